"""Whether networks differ by more than chance, where each was trained a few times with different seeds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.05  # what is rarer than this, were there no difference, is taken for one


@dataclass(frozen=True)
class Difference:
    """The mean of one sample minus that of another.

    `low` and `high` are the ends of its 95 % confidence interval and `p` how often chance alone makes a difference as
    large, both of Welch's t test. All three are None where nothing can be said of chance: with fewer than two values on
    a side, or where no value differs from the others of its side.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def check_scipy() -> None:
    """Refuse to begin what could not be tested in the end.

    Raises:
        ValueError: scipy is not installed.
    """
    try:
        importlib.import_module("scipy")
    except ImportError:
        raise ValueError(
            "scipy is not installed, and says what seeds are worth: pip install 'mobilevit[compare]'"
        ) from None


def welch(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The mean of `values` minus that of `others`, two samples whose spreads may differ."""
    mean = float(np.mean(values) - np.mean(others))
    if min(len(values), len(others)) < 2:
        return Difference(mean)
    a, b = (np.var(sample, ddof=1) / len(sample) for sample in (values, others))
    error = float(np.sqrt(a + b))
    # Of equal values the mean is rounded, and what is left of their spread is no spread.
    if error <= 1e-9 * float(np.abs([*values, *others]).max()):
        return Difference(mean)
    from scipy.stats import t

    freedom = float((a + b) ** 2 / (a**2 / (len(values) - 1) + b**2 / (len(others) - 1)))
    half = float(t.ppf(0.975, freedom)) * error
    return Difference(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, freedom)))


def holm(ps: Sequence[float]) -> list[float]:
    """`ps` of several tests, each raised so that some are below `LEVEL` by chance as seldom as one alone would be."""
    raised, so_far = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        so_far = max(so_far, min(1.0, (len(ps) - rank) * ps[i]))
        raised[i] = so_far
    return raised


def sentence(comparison: Mapping[str, Any]) -> str:
    """What a comparison of two networks says, in words."""
    name, against, num_seeds = (comparison[key] for key in ("name", "against", "num_seeds"))
    mean, low, high, p = (comparison[key] for key in ("difference", "low", "high", "p_holm"))
    apart = f"{abs(mean):.2f} points {'above' if mean > 0 else 'below'}" if mean else "level with"
    if num_seeds < 2:
        return f"{name} is {apart} {against}; one seed says nothing about chance"
    if p is None:
        return f"{name} is {apart} {against}, the same with each of {num_seeds} seeds: they say nothing about chance"
    tested = f"95 % interval {low:+.2f} to {high:+.2f}, {_p(p)}"
    if p < LEVEL:
        return f"{name} is {apart} {against} ({tested} over {num_seeds} seeds): unlikely chance"
    return f"{name}: no difference from {against} can be seen with {num_seeds} seeds ({mean:+.2f} points, {tested})"


def _p(p: float) -> str:
    return f"p {p:.2g}" if p >= 0.001 else "p below 0.001"
