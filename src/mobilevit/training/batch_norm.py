"""Running statistics of batch norm that do not depend on how a step is shared out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilevit.training.distributed import Processes

MOMENTUM = 0.1  # PyTorch's, and that of the released code


class RunningStatistics:
    """Takes over the running mean and variance of every batch norm of `model` that is in training.

    A layer updates its own with every part of a step that it sees, so that in four parts they would move four times as
    far as in one, and in four processes go four ways. Here the layers only note the statistics of a part (momentum 1);
    the mean over all parts of a step, in all processes, then moves the running ones by a tenth, once a step.
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
    def note(self) -> None:
        """To be called after each part of a step."""
        if self._buffers:
            torch._foreach_add_(self._sums, self._buffers)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def update(self, num_parts: int, processes: Processes) -> None:
        """To be called after a step of `num_parts` parts in all processes; the layers then hold what is running."""
        if not self._buffers:
            return
        processes.sum(self._sums)
        torch._foreach_div_(self._sums, num_parts)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(self._running, self._sums, MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(self._buffers, self._running)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_zero_(self._sums)  # pyright: ignore[reportPrivateImportUsage]
