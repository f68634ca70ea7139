"""The moving average of the weights (paper, section 4.1): what is evaluated, saved and used."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """A copy of a network whose tensors follow it: copy = decay * copy + (1 - decay) * network.

    Batch norm's running statistics are averaged as well, as in the released code. The published decay averages over
    2,000 steps, half a hundredth of the published run; in a short run it would still hold the initial weights at the
    end, so the average spans at most a hundredth of the run.
    """

    def __init__(self, model: nn.Module, decay: float, num_steps: int):
        self.decay = min(decay, max(0.0, 1 - 100 / num_steps))
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards `model`."""
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        averaged, latest = map(list, zip(*floats, strict=True))
        torch._foreach_lerp_(averaged, latest, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        for ours, theirs in pairs:
            if not ours.is_floating_point():  # the counters of batch norm
                ours.copy_(theirs)
