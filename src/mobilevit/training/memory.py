"""The largest micro-batch that fits into memory."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.recipes import Recipe
from mobilevit.training.step import Loss

# Fraction of the memory that activations may use. The rest is for gradients, weights, the optimizer, fragmentation of
# the allocator, and other programs.
ACTIVATION_FRACTION = 0.4


def max_micro_batch_pixels(recipe: Recipe, loss: Loss, model: nn.Module, batch: Batch, device: torch.device) -> int:
    """Number of image pixels (height times width) that one process can compute forward and backward on `device`.

    Measures the bytes that autograd saves for `batch`. The result depends on the installed memory and not on the free
    memory, so that a resumed run is divided into the same micro-batches. Changes the running statistics of `model`.
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
    num_pixels = batch.pixels.shape[0] * batch.pixels.shape[2] * batch.pixels.shape[3]
    bytes_per_pixel = sum(saved_bytes.values()) / num_pixels
    del value
    return int(ACTIVATION_FRACTION * _memory_bytes(device) / bytes_per_pixel)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_local_processes
