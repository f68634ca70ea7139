"""Calibration and rejection against scipy, brute force and simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from torch import nn

from mobilevit.data.loader import Batch
from mobilevit.predict import Classifier
from mobilevit.tasks.calibration import fit_calibration
from mobilevit.tasks.classification import Classification, ClassificationResults
from mobilevit.tasks.confidence import (
    TEMPERATURES,
    CalibrationError,
    auroc,
    choose_threshold,
    coverage_curve,
    reliability,
)
from mobilevit.weights import Calibration


class Prepared(nn.Module):
    """The prepared logits of the images in a batch, in order."""

    def __init__(self, logits: np.ndarray):
        super().__init__()
        self.logits = torch.from_numpy(logits).float()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.logits


def results_of(logits: np.ndarray, labels: np.ndarray) -> ClassificationResults:
    N = len(labels)
    batch = Batch(torch.zeros(N, 3, 1, 1), torch.from_numpy(labels), tuple(range(N)))
    return Classification().evaluate(Prepared(logits), [batch])


def sample(N: int, C: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    random = np.random.default_rng(seed)
    logits = 4 * random.standard_normal((N, C))
    cumulative = softmax(logits / temperature, axis=1).cumsum(1)
    labels = (random.random((N, 1)) > cumulative[:, :-1]).sum(1)
    return logits, labels


def brute_force_ece(probabilities: np.ndarray, is_correct: np.ndarray) -> float:
    """The definition of Guo et al. 2017, section 2, equation 3, over 15 bins ((m - 1) / 15, m / 15]."""
    total = 0.0
    for m in range(1, 16):
        inside = [i for i, p in enumerate(probabilities) if (m - 1) / 15 < p <= m / 15]
        if inside:
            accuracy = sum(bool(is_correct[i]) for i in inside) / len(inside)
            confidence = sum(float(probabilities[i]) for i in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    return 100 * total


@pytest.mark.parametrize(("N", "C", "temperature"), [(2000, 10, 2.0), (501, 3, 0.6), (1000, 101, 1.0)])
def test_the_fit_against_scipy(N: int, C: int, temperature: float) -> None:
    logits, labels = sample(N, C, temperature)

    def loss(t: float) -> float:
        return -float(log_softmax(logits / t, axis=1)[np.arange(N), labels].mean())

    optimum = minimize_scalar(loss, bounds=(0.2, 10), method="bounded").x  # pyright: ignore[reportAttributeAccessIssue]
    fit = fit_calibration(results_of(logits, labels))
    assert fit.calibration.temperature == pytest.approx(optimum, rel=0.0126)  # half a step of the candidates
    assert fit.calibration.temperature == pytest.approx(temperature, rel=0.1)
    assert fit.loss_before == pytest.approx(loss(1), rel=1e-5)
    halves = [results_of(logits[i::2], labels[i::2]) for i in (0, 1)]
    temperatures = [fit_calibration(half).calibration.temperature for half in halves]
    expected = [
        log_softmax(half / t, axis=1)[np.arange(len(half)), classes]
        for half, classes, t in zip(
            (logits[0::2], logits[1::2]), (labels[0::2], labels[1::2]), temperatures[::-1], strict=True
        )
    ]
    assert fit.loss_after == pytest.approx(-np.concatenate(expected).mean(), rel=1e-5)
    if temperature != 1:
        assert fit.ece_after < fit.ece_before / 2
        assert fit.loss_after < fit.loss_before


@pytest.mark.parametrize("temperature", [float(TEMPERATURES[3]), 1.0, 1.3, 2.0, 7.77])
def test_probabilities_at_a_temperature(temperature: float) -> None:
    logits, labels = sample(300, 7, 1)
    results = results_of(logits, labels)
    expected = softmax(logits / temperature, axis=1).max(1)
    np.testing.assert_allclose(results.probabilities_at(temperature), expected, rtol=5e-4)
    if temperature in TEMPERATURES:
        np.testing.assert_allclose(results.probabilities_at(temperature), expected, rtol=1e-5)


@pytest.mark.parametrize(("N", "C"), [(1, 2), (400, 2), (777, 10)])
def test_ece_against_brute_force(N: int, C: int) -> None:
    logits, labels = sample(N, C, 3)
    probabilities, is_correct = softmax(logits, axis=1).max(1), logits.argmax(1) == labels
    probabilities[: N // 10] = np.resize(np.arange(1, 16) / 15, N // 10)  # at the limits of the bins
    assert reliability(probabilities, is_correct).error == pytest.approx(brute_force_ece(probabilities, is_correct))
    results = results_of(logits, labels)
    expected = brute_force_ece(results.probabilities, is_correct)
    assert results.metrics()["ece"] == pytest.approx(expected, rel=1e-4)


def test_reliability_diagram() -> None:
    diagram = reliability(np.array([0.5, 0.51, 1.0, 0.99, 0.98]), np.array([True, False, True, True, False]))
    assert diagram.counts.tolist() == [0] * 7 + [2] + [0] * 6 + [3]
    assert diagram.accuracy[[7, 14]] == pytest.approx([50, 200 / 3])
    assert np.isnan(diagram.accuracy[[0, 8]]).all()


@pytest.mark.parametrize("N", [300, 5000])
def test_ece_of_perfect_calibration(N: int) -> None:
    """The bias of the ECE: its mean over labels that are drawn from the probabilities."""
    random = np.random.default_rng(0)
    probabilities = random.beta(4, 1, N)
    errors = [reliability(probabilities, random.random(N) < probabilities).error for _ in range(300)]
    expected = reliability(probabilities, random.random(N) < probabilities).error_if_calibrated
    assert expected == pytest.approx(float(np.mean(errors)), rel=0.06)


def test_the_cross_fit_uses_the_other_half() -> None:
    """The two halves need different temperatures: each gets the wrong one."""
    (sharp, sharp_labels), (flat, flat_labels) = sample(2000, 5, 0.5), sample(2000, 5, 3, seed=1)
    logits, labels = (
        np.stack(x, axis=1).reshape(4000, *x[0].shape[1:]) for x in ((sharp, flat), (sharp_labels, flat_labels))
    )
    probabilities, _ = results_of(logits, labels).cross_fitted()
    for half, temperature in ((0, 3), (1, 0.5)):
        expected = softmax(logits[half::2] / temperature, axis=1).max(1)
        np.testing.assert_allclose(probabilities[half::2], expected, atol=0.03)


@pytest.mark.parametrize("correct", [True, False])
def test_images_that_do_not_determine_a_temperature(correct: bool) -> None:
    logits, _ = sample(50, 4, 1)
    labels = logits.argmax(1) if correct else logits.argmin(1)
    with pytest.raises(CalibrationError, match=r"50 images .* use other or more images"):
        fit_calibration(results_of(logits, labels))


def test_coverage_curve_against_brute_force() -> None:
    logits, labels = sample(333, 5, 2)
    probabilities, is_correct = softmax(logits, axis=1).max(1), logits.argmax(1) == labels
    coverages = np.array([0.001, 0.1, 0.5, 1.0])
    accuracy, thresholds = coverage_curve(probabilities, is_correct, coverages)
    for num, one, threshold in zip((1, 34, 167, 333), accuracy, thresholds, strict=True):
        accepted = probabilities >= threshold
        assert accepted.sum() == num
        assert one == pytest.approx(is_correct[accepted].mean())


@pytest.mark.parametrize(("N", "min_precision"), [(5000, 0.9), (701, 0.8)])
def test_the_threshold(N: int, min_precision: float) -> None:
    """Its bound holds on these images, at the corrected confidence level, and the next lower one fails."""
    logits, labels = sample(N, 5, 2)
    probabilities, is_correct = softmax(logits / 2, axis=1).max(1), logits.argmax(1) == labels
    rejection = choose_threshold(probabilities, is_correct, min_precision)
    num_tests = int(np.ceil(np.log2(N + 1)))

    def bound(threshold: float) -> float:
        accepted = probabilities >= threshold
        test = binomtest(int(is_correct[accepted].sum()), int(accepted.sum()), alternative="greater")
        return test.proportion_ci(1 - 0.05 / num_tests).low

    accepted = probabilities >= rejection.min_probability
    assert rejection.coverage == pytest.approx(accepted.mean())
    assert rejection.precision == pytest.approx(is_correct[accepted].mean())
    assert rejection.lower_bound == pytest.approx(bound(rejection.min_probability))
    assert rejection.precision > rejection.lower_bound >= min_precision
    # The search stops where the next lower probability fails.
    assert bound(np.sort(probabilities[~accepted])[-1]) < min_precision
    assert not (probabilities == rejection.min_probability).any()


def test_the_precision_holds_on_new_images() -> None:
    """In at least 95 of 100 repetitions; the true precision is the mean probability, since these are calibrated."""
    random = np.random.default_rng(0)
    population = random.beta(3, 1, 100_000)
    num_failures, coverages = 0, []
    for _ in range(100):
        probabilities = random.choice(population, 3000)
        rejection = choose_threshold(probabilities, random.random(3000) < probabilities, 0.9)
        accepted = population[population >= rejection.min_probability]
        num_failures += accepted.mean() < 0.9
        coverages.append(len(accepted) / len(population))
    assert num_failures <= 5
    ordered = np.sort(population)[::-1]
    best = (ordered.cumsum() / np.arange(1, len(ordered) + 1) >= 0.9).mean()  # with the true precisions
    assert 0.6 * best < np.mean(coverages) < best


def test_thresholds_at_the_limits() -> None:
    probabilities = np.linspace(0.3, 0.9, 500)
    everything = choose_threshold(probabilities, np.ones(500, bool), 0.9)
    assert (everything.min_probability, everything.coverage, everything.precision) == (0, 1, 1)
    with pytest.raises(CalibrationError, match=r"precision of 0.99 .* 500 images; the highest lower bound is 0\.\d+"):
        choose_threshold(probabilities, np.arange(500) % 2 == 0, 0.99)
    with pytest.raises(CalibrationError, match=r"is 0\.000"):
        choose_threshold(probabilities, np.zeros(500, bool), 0.5)
    tied = choose_threshold(np.repeat([0.5, 0.8], 200), np.repeat([False, True], 200), 0.9)
    assert (tied.min_probability, tied.coverage) == (pytest.approx(0.65), 0.5)
    logits, labels = sample(500, 5, 1)
    with pytest.raises(ValueError, match="min_precision is 95; it must be between 0 and 1"):
        fit_calibration(results_of(logits, labels), 95)


def test_rejection_in_metrics() -> None:
    """Metrics of another sample, with the temperature and the threshold of the first."""
    fit = fit_calibration(results_of(*sample(3000, 5, 2)), 0.9)
    assert fit.rejection
    logits, labels = sample(2000, 5, 2, seed=1)
    results = replace(results_of(logits, labels), calibration=fit.calibration)
    metrics = results.metrics()
    probabilities = softmax(logits / fit.calibration.temperature, axis=1).max(1)
    is_correct, accepted = logits.argmax(1) == labels, probabilities >= fit.calibration.min_probability
    assert metrics["coverage"] == pytest.approx(100 * accepted.mean())
    assert metrics["accepted_top1"] == pytest.approx(100 * is_correct[accepted].mean())
    assert metrics["ece"] == pytest.approx(brute_force_ece(probabilities, is_correct), abs=0.01)
    assert metrics["ece_uncalibrated"] == pytest.approx(brute_force_ece(results.probabilities, is_correct), rel=1e-4)
    nothing = replace(results, calibration=Calibration(min_probability=1.0)).metrics()
    assert nothing["coverage"] == 0
    assert "accepted_top1" not in nothing


def test_significance_of_the_temperature() -> None:
    """At most a few of 100 samples of calibrated logits have a significant temperature; most uncalibrated ones do."""
    for temperature, low, high in ((1.0, 0, 12), (1.5, 95, 100)):
        significant = [
            fit_calibration(results_of(*sample(300, 5, temperature, seed))).is_significant for seed in range(100)
        ]
        assert low <= sum(significant) <= high


@pytest.mark.parametrize(("N", "M"), [(1, 1), (300, 200), (17, 1000)])
def test_auroc_against_sklearn(N: int, M: int) -> None:
    random = np.random.default_rng(0)
    scores, others = random.normal(0, 1, N).round(1), random.normal(1, 2, M).round(1)  # with ties
    expected = roc_auc_score(np.repeat([0, 1], [N, M]), np.concatenate([scores, others]))
    assert auroc(scores, others) == pytest.approx(expected)


def test_results_without_logits() -> None:
    results = replace(results_of(*sample(50, 6, 1)), logits=None)
    assert results.metrics()["ece"] > 0
    with pytest.raises(ValueError, match="no logits"):
        fit_calibration(results)


def test_energy() -> None:
    logits, labels = sample(50, 6, 1)
    energies = results_of(logits, labels).require_logits().energies()
    np.testing.assert_allclose(energies, -np.log(np.exp(logits).sum(1)), rtol=1e-5)
    np.testing.assert_allclose(Classifier.energy(torch.from_numpy(logits)).numpy(), energies, rtol=1e-5)
