"""How far the predictions of a classifier can be trusted: calibration, rejection, images of another source.

Temperature scaling and the reliability diagram are those of Guo et al. 2017 (arXiv 1706.04599). The rejection threshold
is chosen as by Geifman and El-Yaniv 2017 (arXiv 1705.08500), the out-of-distribution score is the energy of Liu et al.
2020 (arXiv 2010.03759). docs/calibration.md explains the figures.

`probabilities` are those of the most probable class of N images, (N,) from 0 to 1; `is_correct` (N,) tells whether that
class is the label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mobilevit.files import require

NUM_BINS = 15
TEMPERATURES = 1.025 ** np.arange(-64, 97)
"""Candidates for the temperature: 0.21 to 10.7, 2.5 % apart. They include 1."""

CONFIDENCE = 0.95
"""Confidence level of the lower bound on the precision."""


class CalibrationError(ValueError):
    """The images do not determine a temperature or a threshold."""


def fit_temperature(losses: np.ndarray) -> float:
    """The temperature with the lowest mean loss; `losses` (N, T) at each of `TEMPERATURES`.

    The loss is convex in the inverse of the temperature, so the best candidate is next to the global optimum.

    Raises:
        CalibrationError: the best candidate is the first or the last.
    """
    best = int(losses.mean(0).argmin()) if len(losses) else 0
    if not 0 < best < len(TEMPERATURES) - 1:
        problem = (
            "their predictions are almost all correct" if best == 0 else "the probabilities say nothing about the class"
        )
        raise CalibrationError(
            f"{len(losses):,} images do not determine the temperature, because {problem}: the fit is outside "
            f"{TEMPERATURES[0]:.2f} to {TEMPERATURES[-1]:.1f}; use other or more images"
        )
    return float(TEMPERATURES[best])


@dataclass(frozen=True)
class LogitSummary:
    """What the loss and the highest probability of N images at any of `TEMPERATURES` depend on.

    Its size does not depend on the number of classes.
    """

    top: np.ndarray  # (N,) logit of the most probable class
    label: np.ndarray  # (N,) logit of the label
    log_partitions: np.ndarray  # (N, T) logsumexp(logits / t) for each t of TEMPERATURES

    def losses(self) -> np.ndarray:
        """The cross-entropy at each of `TEMPERATURES`, (N, T)."""
        return self.log_partitions - self.label[:, None] / TEMPERATURES

    def energies(self) -> np.ndarray:
        """The energy of each image, (N,): -logsumexp(logits). Images unlike the training images tend to have more."""
        return -self.log_partitions[:, TEMPERATURES.tolist().index(1)]

    def probabilities_at(self, temperature: float) -> np.ndarray:
        """The probability of the most probable class, (N,).

        Between two of `TEMPERATURES`, logsumexp is interpolated linearly in 1 / temperature.
        """
        inverse, inverses = 1 / temperature, 1 / TEMPERATURES[::-1]
        i = int(np.clip(np.searchsorted(inverses, inverse), 1, len(inverses) - 1))
        weight = (inverse - inverses[i - 1]) / (inverses[i] - inverses[i - 1])
        ascending = self.log_partitions[:, ::-1].astype(np.float64)
        log_partition = (1 - weight) * ascending[:, i - 1] + weight * ascending[:, i]
        return np.exp(self.top * inverse - log_partition)


@dataclass(frozen=True)
class Reliability:
    """Images by probability, in `NUM_BINS` bins of equal width that include their upper limit."""

    counts: np.ndarray  # (NUM_BINS,) number of images
    accuracy: np.ndarray  # (NUM_BINS,) in percent; NaN without images
    error: float  # the expected calibration error (ECE) in percent
    error_if_calibrated: float  # the mean ECE of a perfectly calibrated classifier with these probabilities


def reliability(probabilities: np.ndarray, is_correct: np.ndarray) -> Reliability:
    """The reliability diagram, and the ECE: the mean distance of accuracy and mean probability over images.

    With few images, the accuracy of a bin deviates by chance, which the ECE counts as an error. `error_if_calibrated`
    is the size of this bias (the normal approximation of each bin).
    """
    p, N = probabilities.astype(np.float64), len(probabilities)
    bins = np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, p)
    counts, correct, expected, variance = (
        np.bincount(bins, weights, minlength=NUM_BINS) for weights in (np.ones(N), is_correct, p, p * (1 - p))
    )
    accuracy = np.full(NUM_BINS, np.nan)
    np.divide(100 * correct, counts, out=accuracy, where=counts > 0)
    error = 100 * float(np.abs(correct - expected).sum()) / N
    error_if_calibrated = 100 * float(np.sqrt(2 / math.pi * variance).sum()) / N
    return Reliability(counts.astype(np.int64), accuracy, error, error_if_calibrated)


def coverage_curve(
    probabilities: np.ndarray, is_correct: np.ndarray, coverages: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The accuracy (0 to 1) of the most confident images, at each fraction of the images in `coverages` (above 0).

    Also the lowest probability among these images. A fraction is rounded up to whole images.
    """
    order = np.argsort(-probabilities, kind="stable")
    counts = np.maximum(1, np.ceil(coverages * len(order) - 1e-9).astype(int))
    accuracy = np.cumsum(is_correct[order]) / np.arange(1, len(order) + 1)
    return accuracy[counts - 1], probabilities[order][counts - 1]


@dataclass(frozen=True)
class Rejection:
    """A threshold, the fraction of images that it accepts, their precision, and a lower bound on that; all 0 to 1."""

    min_probability: float
    coverage: float
    precision: float
    lower_bound: float


def choose_threshold(probabilities: np.ndarray, is_correct: np.ndarray, min_precision: float) -> Rejection:
    """The lowest threshold whose accepted images have a precision of `min_precision` (0 to 1) or more.

    The precision of new images of the same distribution is at least that with a probability of `CONFIDENCE`. A binary
    search tests a few thresholds. Each test uses the bound of Clopper and Pearson on the number of correct predictions,
    at a confidence level that is corrected for the number of tests (Bonferroni), because the search selects among them.

    Raises:
        CalibrationError: no tested threshold reaches the precision.
        MissingExtraError: scipy is not installed.
    """
    beta = require("scipy.stats", "calibration", "a rejection threshold").beta
    values = np.unique(probabilities)
    num_tests = max(1, math.ceil(math.log2(len(values) + 1)))
    best, highest_bound, low, high = None, 0.0, 0, len(values)
    while low < high:
        middle = (low + high) // 2
        accepted = probabilities >= values[middle]
        num, num_correct = int(accepted.sum()), int(is_correct[accepted].sum())
        bound = (
            float(beta.ppf((1 - CONFIDENCE) / num_tests, num_correct, num - num_correct + 1)) if num_correct else 0.0
        )
        highest_bound = max(highest_bound, bound)
        if bound < min_precision:
            low = middle + 1
            continue
        # Between two probabilities, so that rounding errors of another device do not change what is accepted.
        threshold = float(values[middle - 1] + values[middle]) / 2 if middle else 0.0
        best = Rejection(threshold, num / len(probabilities), num_correct / num, bound)
        high = middle
    if best is None:
        raise CalibrationError(
            f"no threshold has a precision of {min_precision:g} with {100 * CONFIDENCE:.0f} % confidence on "
            f"{len(probabilities):,} images; the highest lower bound is {highest_bound:.3f}: request less, or use more "
            "images"
        )
    return best


def auroc(scores: np.ndarray, others: np.ndarray) -> float:
    """The probability that one of `others` is higher than one of `scores`; ties count half.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    test = require("scipy.stats", "calibration", "the AUROC").mannwhitneyu
    return float(test(others, scores, method="asymptotic").statistic) / (len(scores) * len(others))
