"""The largest micro-batch that fits into memory."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.recipes import Recipe
from mobilevit.training.step import Loss

logger = logging.getLogger(__name__)
# Fraction of the memory that activations may use. The rest is for gradients, weights, the optimizer, fragmentation of
# the allocator, and other programs.
ACTIVATION_FRACTION = 0.4


def max_micro_batch_pixels(
    recipe: Recipe, loss: Loss, model: nn.Module, batch: Batch, device: torch.device, teacher: nn.Module | None = None
) -> int:
    """Number of image pixels (height times width) that one process can compute forward and backward on `device`.

    Measures the bytes that autograd saves for `batch`, and the largest layer of the `teacher`, if there is one. The
    result depends on the installed memory and not on the free memory, so that a resumed run is divided into the
    same micro-batches. Changes the running statistics of `model`.
    """
    if recipe.compute.micro_batch_size:
        return recipe.compute.micro_batch_size * recipe.data.size_px**2
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved_bytes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        value = loss(model, batch)
    num_pixels = batch.pixels.shape[0] * (batch.size_px or batch.pixels.shape[3]) ** 2
    student_bytes = sum(saved_bytes.values()) / num_pixels
    del value
    memory = ACTIVATION_FRACTION * _memory_bytes(device)
    max_pixels = int(memory / student_bytes)
    if teacher is None:
        return max_pixels
    weight_bytes = sum(tensor.nbytes for tensor in teacher.state_dict().values())
    if weight_bytes > memory:
        raise ValueError(
            f"the teacher has {weight_bytes / 1e9:.1f} GB of weights, but the {device} has room for "
            f"{memory / 1e9:.1f} GB; use a smaller teacher"
        )
    if recipe.distill.size_px and recipe.sampler.variant != "standard":  # the teacher's cost per image is constant
        num_pixels = batch.pixels.shape[0] * min(recipe.sampler.sizes_px) ** 2
    teacher_bytes = 2 * _largest_layer_bytes(teacher, batch.pixels) / num_pixels
    smaller = int((memory - weight_bytes) / (student_bytes + teacher_bytes))
    if smaller < recipe.batch_size * recipe.data.size_px**2 <= max_pixels:
        logger.info(
            f"the teacher leaves memory for micro-batches of {smaller // recipe.data.size_px**2:,} images instead of "
            f"{recipe.batch_size:,}"
        )
    return smaller


def _largest_layer_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes of input and output of the layer where they are largest. Nothing is saved for a backward pass."""
    largest = 0

    def record(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        largest = max(largest, sum(x.nbytes for x in (*inputs, output) if isinstance(x, Tensor)))

    hooks = [module.register_forward_hook(record) for module in network.modules() if not list(module.children())]
    network(images)
    for hook in hooks:
        hook.remove()
    return largest


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_local_processes
