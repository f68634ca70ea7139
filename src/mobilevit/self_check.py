"""Comparison of a device with the CPU, before a command relies on it.

PyTorch's MPS backend has been silently wrong for tensors that are not contiguous, in operators and in the update of an
optimizer, and the weights of our networks are channels-last. A test suite that runs on a CPU cannot find such a fault.
So the device is tested when it is used: it computes a batch of synthetic images at the input size of the command.

How far rounding changes the results depends on the weights and on the size, so the limit is measured. The CPU repeats
the computation with weights and images that are changed at random by up to the unit roundoff of the precision. With
float16 and bfloat16, which also round the activations, the CPU differs by 0.4 to 2 times as much from its own float32.
The limit is 10 times as much, and at most 0.5. A tensor of zeros has a relative difference of 1, an unrelated one
of 1.4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.recipes import Precision

NUM_IMAGES = 4
SAFETY_FACTOR, MAX_LIMIT = 10, 0.5
# TF32 has the mantissa of float16. It counts as float32, because cuDNN convolves in TF32 by default.
UNIT_ROUNDOFF = {"float32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}
UPDATE_LIMIT = 1e-3  # the first update of the weights, always in float32 and from equal gradients
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


class DeviceError(ValueError):
    """A device computes other results than the CPU."""


@dataclass(frozen=True)
class Difference:
    """The relative difference (norm of the difference divided by the norm) of a result, and its limit."""

    name: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2g} (limit {self.limit:.2g})"


def check_device(
    model: nn.Module, size_px: int, precision: Precision = "float32", build_optimizer: Optimizer | None = None
) -> None:
    """Compare `model` on its device with the same model on the CPU. Does nothing for a model on the CPU.

    Neither the model nor the random state changes. The arguments are those of `compare_with_cpu`.

    Raises:
        DeviceError: the results differ. The message contains the relative differences and their limits.
    """
    device = next(model.parameters()).device
    if _is_reference(device):
        return
    differences = compare_with_cpu(model, size_px, precision, build_optimizer)
    if all(difference.value <= difference.limit for difference in differences):  # False for NaN
        return
    raise DeviceError(
        f"device {str(device)!r} computes other results than the CPU: relative difference of "
        f"{', '.join(map(str, differences))}; {precision}, {NUM_IMAGES} images of {size_px} px; use --device cpu or "
        "another version of PyTorch, or skip this check with --no-self-check (in Python self_check=False)"
    )


def compare_with_cpu(
    model: nn.Module, size_px: int, precision: Precision = "float32", build_optimizer: Optimizer | None = None
) -> list[Difference]:
    """Differences between copies of `model` on its device and on the CPU, in evaluation mode.

    The outputs are compared. With `build_optimizer`, the gradients of all weights are compared as well, and the update
    of the weights by the optimizer from equal gradients. Empty if the results of the CPU are not finite.

    Args:
        model: takes images (B, 3, H, W) and returns a tensor or a tuple of tensors.
        size_px: height and width of the images.
        precision: of the device; below float32 it is autocast. The CPU always computes in float32.
        build_optimizer: returns the optimizer of a model.
    """
    generator = torch.Generator().manual_seed(0)
    # Smooth images: the averages of noise would look alike, and rounding errors would grow.
    coarse = torch.rand(NUM_IMAGES, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, (size_px, size_px), mode="bicubic").clamp(0, 1)
    is_training = build_optimizer is not None
    on_cpu = copy.deepcopy(model).cpu()
    expected = _compute(on_cpu, images, "float32", is_training)
    if not all(value.isfinite().all() for value in expected.values()):
        return []
    on_device, rounded = _copy_to(next(model.parameters()).device, on_cpu), copy.deepcopy(on_cpu)
    for tensor in (*rounded.parameters(), rounded_images := images.clone()):
        noise = 2 * torch.rand(tensor.shape, generator=generator) - 1
        tensor.data.mul_(1 + UNIT_ROUNDOFF[precision] * noise)
    found = _compute(on_device, images, precision, is_training)
    near = _compute(rounded, rounded_images, "float32", is_training)
    differences = []
    for name, value in expected.items():
        limit = min(SAFETY_FACTOR * _relative_difference(near[name], value), MAX_LIMIT)
        differences.append(Difference(name, _relative_difference(found[name], value), limit))
    if build_optimizer:
        updates = [_update(each, expected["gradients"], build_optimizer) for each in (on_device, on_cpu)]
        differences.append(Difference("weight update", _relative_difference(*updates), UPDATE_LIMIT))
    return differences


def _is_reference(device: torch.device) -> bool:
    return device.type == "cpu"


def _copy_to(device: torch.device, model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(device)


def _compute(model: nn.Module, images: Tensor, precision: Precision, is_training: bool) -> dict[str, Tensor]:
    """Outputs, and for training the gradients of all parameters as one vector, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    autocast = torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
    with torch.set_grad_enabled(is_training), autocast:
        outputs = model(images.to(device))
    outputs = [output.float() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    results = {f"output {i + 1}" if len(outputs) > 1 else "outputs": output for i, output in enumerate(outputs)}
    if is_training:
        # Divided by the root, so that gradients are neither too small nor too large for float16.
        loss = torch.stack([output.square().sum() / output.numel() ** 0.5 for output in outputs]).sum()
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
        results["gradients"] = torch.cat([gradient.flatten() for gradient in gradients])
    return {name: value.detach().cpu() for name, value in results.items()}


def _update(model: nn.Module, gradients: Tensor, build_optimizer: Optimizer) -> Tensor:
    """The change of all weights by one step of the optimizer, a vector on the CPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter, gradient in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape))  # with its memory layout
    before = [p.detach().clone() for p in parameters]
    build_optimizer(model).step()
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)]).cpu()


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
