"""Calibrate a classifier: fit its temperature on images that it was not trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mobilevit.tasks.classification import ClassificationResults
from mobilevit.tasks.confidence import Rejection, choose_threshold, fit_temperature
from mobilevit.weights import Calibration

CHI_SQUARED_95 = 3.841  # quantile of the distribution with one degree of freedom


@dataclass(frozen=True)
class CalibrationFit:
    """A calibration, and how well it works.

    `calibration` is fitted on all images, and so is `rejection`, which is None without a requested precision. The
    figures "after" are cross-fitted: those of each half of the images, with the temperature of the other half. ECE is
    in percent; `ece_if_calibrated` is its mean for a perfectly calibrated classifier and this number of images.
    """

    calibration: Calibration
    num_images: int
    ece_before: float
    ece_after: float
    ece_if_calibrated: float
    loss_before: float
    loss_after: float
    loss_fitted: float  # on the images of the fit, with the temperature of all of them
    rejection: Rejection | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the temperature differs from 1 by more than chance: likelihood-ratio test at the level of 5 %."""
        return 2 * self.num_images * (self.loss_before - self.loss_fitted) > CHI_SQUARED_95

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in one level."""
        values = asdict(self)
        rejection = values.pop("rejection") or {}
        return {**values.pop("calibration"), **values, "is_significant": self.is_significant, **rejection}


def fit_calibration(results: ClassificationResults, min_precision: float | None = None) -> CalibrationFit:
    """Fit the temperature on the predictions of an evaluation, and choose a rejection threshold for `min_precision`.

    Examples:
        >>> weights = mobilevit.weights.read("runs/pets/model.safetensors")
        >>> fit = fit_calibration(mobilevit.evaluate(weights, "pets/").results)
        >>> mobilevit.weights.write(dataclasses.replace(weights, calibration=fit.calibration), "pets.safetensors")

    Raises:
        CalibrationError: the images do not determine the temperature, or no threshold has the precision.
        ValueError: `min_precision` is not between 0 and 1; results without logits, such as those of `evaluate_knn`.
    """
    if min_precision is not None and not 0 < min_precision < 1:
        raise ValueError(f"min_precision is {min_precision}; it must be between 0 and 1, such as 0.95")
    losses = results.require_logits().losses()
    temperature = fit_temperature(losses)
    probabilities, losses_after = results.cross_fitted()
    after = results.reliability_of(probabilities)
    rejection = None
    if min_precision is not None:
        rejection = choose_threshold(results.probabilities_at(temperature), results.is_correct, min_precision)
    return CalibrationFit(
        Calibration(temperature, rejection.min_probability if rejection else 0.0, min_precision),
        num_images=len(losses),
        ece_before=results.reliability_of(results.probabilities).error,
        ece_after=after.error,
        ece_if_calibrated=after.error_if_calibrated,
        loss_before=float(results.losses.mean()),
        loss_after=float(losses_after.mean()),
        loss_fitted=float(losses.mean(0).min()),
        rejection=rejection,
    )
