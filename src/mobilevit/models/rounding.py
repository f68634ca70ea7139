"""int8 rounding of weights and activations in PyTorch: simulation of int8, and quantization-aware training.

The inputs of convolutions, linear layers and SiLU are rounded. SiLU has its own rounding, because ONNX Runtime and
ExecuTorch compute it in int8. Weights have one scale per output channel, symmetric with 127 steps on each side. Inputs
have one scale and a zero point, with 255 steps from their smallest to their largest value. PyTorch's `fake_quantize`
operators round, and pass gradients through the rounding unchanged (straight-through estimator).

Batch norm needs no attention: it multiplies each output channel by a factor, which changes the scale of the channel and
not the integers, so it does not matter whether it is folded into the weights before or after rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.models.fuse import Network, frozen_copy, replace_modules
from mobilevit.models.mobilevit import ConvNorm, TransformerLayer

MIN_SCALE = 1e-12  # of weights or inputs that are all 0
Range = tuple[Tensor, Tensor]
"""Smallest and largest input of a layer, float32 scalars."""


def round_weight(weight: Tensor) -> Tensor:
    """`weight` (out, ...), rounded per output channel."""
    values = weight.detach()
    scale = (values.flatten(1).abs().amax(dim=1).float() / 127).clamp(min=MIN_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return _StraightThrough.apply(weight, torch.fake_quantize_per_channel_affine(values, scale, zero, 0, -127, 127))


class _StraightThrough(torch.autograd.Function):
    """Rounded weights with the gradient of the weights.

    The gradient of `fake_quantize` has the same values, since nothing is clipped. It loses the memory layout of 1x1
    weights, and DDP would copy it.
    """

    @staticmethod
    def forward(weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def round_input(x: Tensor, range_: Range) -> Tensor:
    """`x`, clipped to a range and rounded to 256 values."""
    low, high = range_
    scale = ((high - low) / 255).clamp(min=MIN_SCALE)
    return torch.fake_quantize_per_tensor_affine(x, scale, torch.round(-low / scale).int(), 0, 255)


def range_of(x: Tensor) -> Range:
    """The range of `x`. It includes zero: padding contains it, and int8 must represent it exactly."""
    low, high = torch.aminmax(x.detach())
    return low.float().clamp(max=0), high.float().clamp(min=0)


def layers_of(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


class PreActivation(nn.Identity):
    """The input of a SiLU."""


def insert_pre_activations(model: Network) -> Network:
    """Insert a `PreActivation` before every SiLU inside a MobileViT network, in place."""
    for module in list(model.modules()):
        if isinstance(module, ConvNorm) and module.activation:
            module.norm = cast(nn.BatchNorm2d, nn.Sequential(module.norm, PreActivation()))
        elif isinstance(module, TransformerLayer):
            module.ffn_in = cast(nn.Linear, nn.Sequential(module.ffn_in, PreActivation()))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Static ranges, as in an artifact


def calibrate(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Range]:
    """The ranges of the inputs of `layers`, which are inside `model`, over all `batches`."""
    ranges: dict[str, Range] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = range_of(args[0])
            if name in ranges:
                low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
            ranges[name] = low, high

        return hook

    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return ranges


def input_rounder(range_: Range) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward pre-hook that rounds the input of a layer."""
    return lambda _, args: (round_input(args[0], range_),)


def simulate_int8(model: Network, batches: Iterable[Tensor]) -> Network:
    """A copy of `model`, for inference, that computes approximately what an int8 artifact computes.

    `batches` calibrate the ranges. Attention, norms and sums stay float32; some runtimes quantize these, too.
    """
    model = insert_pre_activations(frozen_copy(model))
    layers = layers_of(model)
    activations = {name: module for name, module in model.named_modules() if isinstance(module, PreActivation)}
    for name, range_ in calibrate(model, {**layers, **activations}, batches).items():
        model.get_submodule(name).register_forward_pre_hook(input_rounder(range_))
    for layer in layers.values():
        layer.weight.data = round_weight(layer.weight)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Ranges of the batch, for training


class RoundedConv2d(nn.Conv2d):
    """A convolution with rounded weights and a rounded input; the range of the input is that of the batch."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(round_input(input, range_of(input)), round_weight(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer with rounded weights and a rounded input; the range of the input is that of the batch."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(round_input(input, range_of(input)), round_weight(self.weight), self.bias)


class RoundedPreActivation(nn.Module):
    """Rounds the input of a SiLU; the range is that of the batch."""

    def forward(self, input: Tensor) -> Tensor:
        return round_input(input, range_of(input))


def twin(model: Network) -> Network:
    """A copy of `model` that shares its parameters and buffers; modes and modules are its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def round_layers(model: Network) -> Network:
    """Replace the convolutions and linear layers inside `model` by rounded ones with the same parameters, in place.

    The inputs of SiLU are rounded as well.
    """
    return replace_modules(insert_pre_activations(model), _rounded)


def _rounded(layer: nn.Module) -> nn.Module:
    if type(layer) is nn.Conv2d:
        new = RoundedConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # pyright: ignore[reportArgumentType]
            layer.stride,  # pyright: ignore[reportArgumentType]
            layer.padding,  # pyright: ignore[reportArgumentType]
            layer.dilation,  # pyright: ignore[reportArgumentType]
            layer.groups,
            device="meta",
        )
    elif type(layer) is nn.Linear:
        new = RoundedLinear(layer.in_features, layer.out_features, device="meta")
    else:
        return RoundedPreActivation() if isinstance(layer, PreActivation) else layer
    new.weight, new.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue] - as in `layer`
    return new.train(layer.training)
