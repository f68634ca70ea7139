"""Calibrate a classifier: fit its temperature on images that it was not trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mobilevit.tasks.classification import ClassificationResults
from mobilevit.tasks.confidence import fit_temperature
from mobilevit.weights import Calibration


@dataclass(frozen=True)
class CalibrationFit:
    """A calibration, and how well it works.

    `calibration` is fitted on all images. The figures "after" are cross-fitted: those of each half of the images, with
    the temperature of the other half. ECE is in percent; `ece_if_calibrated` is its mean for a perfectly calibrated
    classifier and this number of images.
    """

    calibration: Calibration
    num_images: int
    ece_before: float
    ece_after: float
    ece_if_calibrated: float
    loss_before: float
    loss_after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in one level."""
        values = asdict(self)
        return {**values.pop("calibration"), **values}


def fit_calibration(results: ClassificationResults) -> CalibrationFit:
    """Fit the temperature on the predictions of an evaluation.

    Examples:
        >>> weights = mobilevit.weights.read("runs/pets/model.safetensors")
        >>> fit = fit_calibration(mobilevit.evaluate(weights, "pets/").results)
        >>> mobilevit.weights.write(dataclasses.replace(weights, calibration=fit.calibration), "pets.safetensors")

    Raises:
        CalibrationError: the images do not determine the temperature.
    """
    losses = results.losses_at_temperatures()
    temperature = fit_temperature(losses)
    probabilities, losses_after = results.cross_fitted()
    after = results.reliability_of(probabilities)
    return CalibrationFit(
        Calibration(temperature),
        num_images=len(losses),
        ece_before=results.reliability_of(results.probabilities).error,
        ece_after=after.error,
        ece_if_calibrated=after.error_if_calibrated,
        loss_before=float(results.losses.mean()),
        loss_after=float(losses_after.mean()),
    )
