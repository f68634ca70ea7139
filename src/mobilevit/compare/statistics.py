"""Significance of differences between models that were trained with several seeds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilevit.files import require

SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """The mean score of a model minus that of `baseline`, in percentage points, over `num_seeds` seeds each.

    `low` and `high` are the limits of the 95 % confidence interval, `p` is the p-value of Welch's t-test; None without
    a test, see `welch`. `p_holm` is corrected for all `num_tests` tests of the report.
    """

    name: str
    baseline: str
    num_seeds: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = None
    num_tests: int = 0

    def describe(self) -> str:
        """The comparison as a sentence."""
        sign = "above" if self.difference > 0 else "below"
        result = f"{abs(self.difference):.2f} points {sign}" if self.difference else "equal to"
        subject = f"{self.name} is {result} {self.baseline}"
        if self.num_seeds < 2:
            return f"{subject}; a single seed permits no significance test"
        if self.p_holm is None:
            return f"{subject} with each of {self.num_seeds} seeds; without variance there is no significance test"
        p = f"p = {self.p_holm:.2g}" if self.p_holm >= 0.001 else "p < 0.001"
        significant = "significant" if self.p_holm < SIGNIFICANCE_LEVEL else "not significant"
        correction = f", Holm-corrected for {self.num_tests} comparisons" if self.num_tests > 1 else ""
        return (
            f"{subject} (95 % confidence interval {self.low:+.2f} to {self.high:+.2f}, {self.num_seeds} seeds). The "
            f"difference is {significant} ({p}; Welch's t-test{correction})."
        )


def require_scipy() -> Any:
    """Import scipy.stats."""
    return require("scipy.stats", "compare", "a significance test over several seeds")


def welch(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float] | None:
    """Welch's t-test of the mean of `values` minus that of `others`; the variances may differ.

    Returns the limits of the 95 % confidence interval and the p-value. None if a sample has fewer than two values, or
    if both are constant.
    """
    if min(len(values), len(others)) < 2 or np.ptp(values) == np.ptp(others) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one of the samples may be constant
        result = require_scipy().ttest_ind(values, others, equal_var=False)
    interval = result.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(result.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of the p-values of several tests."""
    order = np.argsort(ps, kind="stable")
    scaled = np.arange(len(ps), 0, -1) * np.array(ps)[order]
    corrected = np.empty(len(ps))
    corrected[order] = np.maximum.accumulate(scaled).clip(max=1)
    return corrected.tolist()
