"""The section about calibration in the report of a run."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from mobilevit.data.loader import Batch
from mobilevit.report.confidence import confidence_html
from mobilevit.tasks.calibration import fit_calibration
from mobilevit.tasks.classification import Classification, ClassificationResults


class Prepared(nn.Module):
    """The prepared logits of the images in a batch, in order."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.logits


def overconfident(N: int, *, correct: bool = False) -> ClassificationResults:
    torch.manual_seed(0)
    logits = 2 * torch.randn(N, 6)
    labels = logits.argmax(1) if correct else torch.multinomial(logits.softmax(1), 1)[:, 0]
    batch = Batch(torch.zeros(N, 3, 1, 1), labels, tuple(range(N)))
    return Classification().evaluate(Prepared(3 * logits), [batch])


def test_before_and_after() -> None:
    results = overconfident(1000)
    html = confidence_html(results)
    fit = fit_calibration(results)
    assert fit.ece_after < fit.ece_before / 3
    assert f"{fit.ece_before:.2f} % before calibration; {fit.ece_after:.2f} % after calibration" in html
    assert f"about {fit.ece_if_calibrated:.2f} %" in html
    assert html.count("<svg") == 2
    assert "Not calibrated" not in html
    counts = [int(x.replace(",", "")) for x in re.findall(r"images ([\d,]+) before calibration", html)]
    probabilities = results.probabilities.astype(np.float64)
    assert counts == np.histogram(probabilities, np.nextafter(np.arange(16) / 15, 2))[0].tolist()
    # The whole set has the accuracy of the network; the most confident images have a higher one.
    values = [float(x) for x in re.findall(r"% of the images, probability [\d.]+ % or more: ([\d.]+)", html)]
    assert len(values) == 20
    assert values[-1] == pytest.approx(results.metrics()["top1"], abs=0.06)
    assert values[0] > values[-1]


@pytest.mark.parametrize("N", [1, 40])
def test_a_temperature_that_cannot_be_determined(N: int) -> None:
    html = confidence_html(overconfident(N, correct=True))
    assert "Not calibrated: " in html
    assert "after calibration, cross-fitted" not in html
    assert html.count("<svg") == 2
