"""The optimizer, its learning rate, and what of a network is trained."""

from __future__ import annotations

import math

import torch
from torch import nn

from mobilevit.recipes import Freeze, Optimizer


def freeze(model: nn.Module, up_to: Freeze) -> None:
    """Keep the backbone of `model` as it is from its stem to `up_to`: no gradients, batch norms not in training."""
    if up_to == "nothing":
        return
    backbone = model.get_submodule("backbone")
    for name, stage in backbone.named_children():
        stage.requires_grad_(False).eval()
        if name == up_to:
            return


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """AdamW over what is to be trained; `set_learning_rate` sets its rates at every step."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = recipe.decay_all or parameter.ndim > 1  # norms and biases are vectors
            scale = recipe.backbone_lr_scale if name.startswith("backbone.") else 1.0
            groups.setdefault((scale, recipe.weight_decay if decays else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=recipe.lr,
        betas=(0.9, 0.999),
        fused=True,  # one kernel for all parameters, half the time of a step on a small network
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of parameters its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def learning_rate(recipe: Optimizer, step: int, num_steps: int, *, epoch: int, num_epochs: int) -> float:
    """Rate of step `step` of 0 to num_steps - 1, in epoch `epoch` of 0 to num_epochs - 1.

    A line from start_lr to lr, then half a cosine to end_lr: over the steps that are left, or, as v0.1 has it, over the
    epochs, as if the warm-up had been part of it. Epochs beyond num_epochs stay at end_lr.
    """
    if epoch >= num_epochs:
        return recipe.end_lr
    warmup_steps = min(recipe.warmup_steps, num_steps // 10)
    if step < warmup_steps:
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * step / warmup_steps
    if recipe.cosine == "epoch":
        progress = epoch / num_epochs
    else:
        progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return recipe.end_lr + (recipe.lr - recipe.end_lr) * (1 + math.cos(math.pi * progress)) / 2
