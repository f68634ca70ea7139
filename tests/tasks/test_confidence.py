"""Calibration and rejection against scipy, brute force and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torch import nn

from mobilevit.data.loader import Batch
from mobilevit.tasks.calibration import fit_calibration
from mobilevit.tasks.classification import Classification, ClassificationResults
from mobilevit.tasks.confidence import TEMPERATURES, CalibrationError, coverage_curve, reliability


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

    optimum = minimize_scalar(loss, bounds=(0.2, 10), method="bounded").x
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
