"""When a run ends: after its epochs, or early, without an improvement of the metric for some epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mobilevit.recipes import Recipe


@dataclass(frozen=True)
class Ending:
    """The number of epochs of a run, and the epoch in which the cooldown of the learning rate starts, counted from 0.

    Only the schedule wsd has a cooldown; `cooldown_start` is `num_epochs` otherwise. `stopped_after` is the number of
    epochs after which early stopping was decided, or 0.
    """

    num_epochs: int
    cooldown_start: int
    stopped_after: int = 0


def find_ending(recipe: Recipe, schedule_epochs: int, history: Sequence[Mapping[str, float]], metric: str) -> Ending:
    """The ending of a run with these epochs so far; `history` holds lines of metrics.jsonl, `metric` is a key of them.

    A pure function of the metrics, so a resumed run decides as an uninterrupted one. `schedule_epochs` is less than the
    epochs of the recipe in an extended run. With the schedule wsd, the decision starts the cooldown, which takes the
    same fraction of the run as in a full run, rounded up to whole epochs. The cooldown is not interrupted.
    """
    fraction = recipe.optimizer.cooldown_fraction if recipe.optimizer.schedule == "wsd" else 0.0
    tolerance = 1e-9  # of rounding errors
    cooldown_start = schedule_epochs - math.ceil(fraction * schedule_epochs - tolerance) if fraction else recipe.epochs
    stopped_after = 0
    if recipe.patience:
        stopped_after = _stagnation([record[metric] for record in history[:cooldown_start]], recipe.patience)
    if not stopped_after:
        return Ending(recipe.epochs, cooldown_start)
    num_epochs = (
        min(schedule_epochs, math.ceil(stopped_after / (1 - fraction) - tolerance)) if fraction else stopped_after
    )
    return Ending(num_epochs, stopped_after, stopped_after)


def _stagnation(values: Sequence[float], patience: int) -> int:
    """The number of values up to the first `patience` ones in a row without a new maximum; 0 if there are none."""
    best, num_since_best = -math.inf, 0
    for number, value in enumerate(values, 1):
        num_since_best = 0 if value > best else num_since_best + 1
        best = max(best, value)
        if num_since_best == patience:
            return number
    return 0
