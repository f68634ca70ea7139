"""The optimizer, the learning rate schedule, the EMA of the weights, and the running statistics of batch norm."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilevit.recipes import Freeze, Optimizer
from mobilevit.training.distillation import Student
from mobilevit.training.distributed import Processes

BATCH_NORM_MOMENTUM = 0.1  # PyTorch's default, and that of the released code


def freeze(model: nn.Module, up_to: Freeze) -> None:
    """Freeze the backbone from its stem to the stage `up_to`: no gradients, batch norm in eval mode."""
    if up_to == "nothing":
        return
    backbone = model.get_submodule(_backbone_name(model))
    for name, stage in backbone.named_children():
        stage.requires_grad_(False).eval()
        if name == up_to:
            return


def _backbone_name(model: nn.Module) -> str:
    return "network.backbone" if isinstance(model, Student) else "backbone"


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """AdamW for the parameters that require gradients. `set_learning_rate` sets the learning rates at every step."""
    backbone = _backbone_name(model) + "."
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            has_decay = recipe.decay_all or parameter.ndim > 1  # norms and biases are vectors
            scale = recipe.backbone_lr_scale if name.startswith(backbone) else 1.0
            groups.setdefault((scale, recipe.weight_decay if has_decay else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=recipe.lr,
        betas=(0.9, 0.999),
        fused=True,  # one kernel for all parameters: halves the time of a step of a small network
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group to `learning_rate` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def learning_rate_at(
    recipe: Optimizer, step: int, num_steps: int, *, epoch: int, num_epochs: int, cooldown: range = range(0)
) -> float:
    """Learning rate of a step. `step` counts from 0 to num_steps - 1, `epoch` from 0 to num_epochs - 1.

    Linear warm-up from start_lr to lr, then a cosine to end_lr. The cosine runs over the steps after the warm-up, or,
    as in v0.1, over all epochs, including those of the warm-up. Later epochs are computed at end_lr.

    With the schedule wsd, the learning rate is lr until the steps `cooldown`. In these, it decreases to end_lr as one
    minus a square root, the best form in the comparison of Haegele et al. (2024, arXiv 2405.18392).
    """
    if epoch >= num_epochs:
        return recipe.end_lr
    if step in cooldown:
        progress = (step - cooldown.start + 1) / len(cooldown)
        return recipe.end_lr + (recipe.lr - recipe.end_lr) * (1 - math.sqrt(progress))
    warmup_steps = min(recipe.warmup_steps, num_steps // 10)
    if step < warmup_steps:
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * step / warmup_steps
    if recipe.schedule == "wsd":
        return recipe.lr
    if recipe.cosine == "epoch":
        progress = epoch / num_epochs
    else:
        progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return recipe.end_lr + (recipe.lr - recipe.end_lr) * (1 + math.cos(math.pi * progress)) / 2


class EMA:
    """Exponential moving average of the weights (paper, section 4.1): ema = decay * ema + (1 - decay) * weights.

    The running statistics of batch norm are averaged, too, as in the released code. The published decay averages over
    2,000 steps, 1/200 of the published run. In a short run the average would still contain the initial weights at the
    end, so the decay is limited such that the average spans at most 1/100 of the run.
    """

    def __init__(self, model: nn.Module, decay: float, num_steps: int):
        self.decay = min(decay, max(0.0, 1 - 100 / num_steps))
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged, latest = map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
        torch._foreach_lerp_(averaged, latest, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, value in pairs:
            if not average.is_floating_point():  # num_batches_tracked of batch norm
                average.copy_(value)


class BatchNormStatistics:
    """Running statistics of the batch norm layers in training mode, independent of how a step is divided.

    By default a layer updates its running statistics once per micro-batch: four micro-batches would move them four
    times as far as one, and four processes would diverge. Here a layer only records the statistics of the current
    micro-batch (momentum 1). Once per step the mean over all micro-batches of all processes updates the running
    statistics.
    """

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
        for norm in norms:
            norm.momentum = 1.0
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._buffers: list[Tensor] = [buffer for buffer in buffers if buffer is not None]
        self._running = [buffer.clone() for buffer in self._buffers]
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]

    @torch.no_grad()
    def add_micro_batch(self) -> None:
        """Add the statistics of the micro-batch that the model has just computed."""
        if self._buffers:
            torch._foreach_add_(self._sums, self._buffers)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def update(self, num_micro_batches: int, processes: Processes) -> None:
        """Update the running statistics after a step of `num_micro_batches` in all processes together."""
        if not self._buffers:
            return
        processes.sum(self._sums)
        torch._foreach_div_(self._sums, num_micro_batches)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(self._running, self._sums, BATCH_NORM_MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(self._buffers, self._running)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_zero_(self._sums)  # pyright: ignore[reportPrivateImportUsage]
