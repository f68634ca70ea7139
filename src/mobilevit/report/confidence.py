"""Reliability diagram, calibration error, and accuracy against coverage, as HTML."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from mobilevit.report import render
from mobilevit.report.charts import Chart, Line, line_chart
from mobilevit.tasks.classification import ClassificationResults
from mobilevit.tasks.confidence import NUM_BINS, CalibrationError, Reliability, coverage_curve

COVERAGES = np.arange(1, 21) / 20


def confidence_html(results: ClassificationResults) -> Markup:
    """Charts of the probabilities before calibration and, cross-fitted, after it; see docs/calibration.md.

    A line says why if the images do not determine the temperature.
    """
    probabilities, note = results.probabilities, ""
    diagrams = {"before calibration": results.reliability_of(probabilities)}
    try:
        probabilities, _ = results.cross_fitted()
    except CalibrationError as error:
        note = f"Not calibrated: {error}."
    else:
        diagrams["after calibration, cross-fitted"] = results.reliability_of(probabilities)
    last = list(diagrams.values())[-1]
    figures = "; ".join(f"{one.error:.2f} % {name}" for name, one in diagrams.items())
    text = (
        f"Expected calibration error (ECE), {NUM_BINS} bins: {figures}. Perfectly calibrated probabilities would have "
        f"about {last.error_if_calibrated:.2f} % with this number of images. The probabilities after calibration are "
        "those of mobilevit calibrate; the temperature of each half of the images is fitted on the other half."
    )
    charts = [_reliability_chart(diagrams), _coverage_chart(results, probabilities)]
    return Markup("<p>{}</p>\n{}{}").format(
        text,
        Markup("<p>{}</p>\n").format(note) if note else "",
        Markup(render("figures.html", charts=[chart for chart in charts if chart])),
    )


def _reliability_chart(diagrams: dict[str, Reliability]) -> Chart | None:
    edges = 100 * np.arange(NUM_BINS + 1) / NUM_BINS
    centers = ((edges[:-1] + edges[1:]) / 2).tolist()
    styles = ("second", "main") if len(diagrams) == 2 else ("main",)
    lines = [
        Line(name, centers, one.accuracy.tolist(), style)
        for (name, one), style in zip(diagrams.items(), styles, strict=True)
    ]
    labels = [
        f"probability {edges[i]:.0f} to {edges[i + 1]:.0f} %, images "
        + ", ".join(f"{one.counts[i]:,} {name}" for name, one in diagrams.items())
        for i in range(NUM_BINS)
    ]
    return line_chart(
        "Reliability: accuracy by probability, %",
        [*lines, Line("perfect calibration", centers, centers, "third")],
        x_name="probability of the predicted class, %",
        unit="%",
        x_labels=labels,
        from_zero=True,
    )


def _coverage_chart(results: ClassificationResults, probabilities: np.ndarray) -> Chart | None:
    accuracy, thresholds = coverage_curve(probabilities, results.is_correct, COVERAGES)
    return line_chart(
        "Accuracy against coverage, %",
        [Line("accuracy", (100 * COVERAGES).tolist(), (100 * accuracy).tolist())],
        x_name="images with the highest probabilities, %",
        unit="%",
        x_labels=[
            f"{100 * c:.0f} % of the images, probability {100 * t:.1f} % or more"
            for c, t in zip(COVERAGES, thresholds, strict=True)
        ],
    )
