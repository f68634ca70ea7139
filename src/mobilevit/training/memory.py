"""How many images fit into memory at once."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.recipes import Recipe
from mobilevit.tasks import Task

# Of the memory that there is, what activations may take: the rest is for gradients on their way, weights, the
# optimizer, what the allocator cannot use, and whatever else runs.
SHARE = 0.4


def pixels_at_once(recipe: Recipe, task: Task, model: nn.Module, batch: Batch, device: torch.device) -> int:
    """Pixels of images, height times width, that one process can compute forward and backward on `device`.

    What autograd keeps for `batch` is measured. The same machine gives the same answer, whatever else runs on it, so
    that a run that starts again is cut into the same parts. Changes the running statistics of `model`.
    """
    if recipe.compute.micro_batch_size:
        return recipe.compute.micro_batch_size * recipe.data.size_px**2
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task.loss(recipe, model, batch)
    num_pixels = batch.pixels.shape[0] * batch.pixels.shape[2] * batch.pixels.shape[3]
    bytes_a_pixel = sum(kept.values()) / num_pixels
    del loss
    return int(SHARE * _memory(device) / bytes_a_pixel)


def _memory(device: torch.device) -> int:
    """Bytes that this process may count on."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes_here
