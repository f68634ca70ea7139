"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from mobilevit.recipes import Optimizer


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """AdamW; its rate is set at every step from `learning_rate`."""
    return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.999))


def learning_rate(recipe: Optimizer, step: int, num_steps: int) -> float:
    """Rate of step `step` of 0 to num_steps - 1: a line from start_lr to lr, then half a cosine to end_lr."""
    warmup_steps = min(recipe.warmup_steps, num_steps // 10)
    if step < warmup_steps:
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return recipe.end_lr + (recipe.lr - recipe.end_lr) * (1 + math.cos(math.pi * progress)) / 2
