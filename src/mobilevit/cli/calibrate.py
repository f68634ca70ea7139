"""`mobilevit calibrate`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.cli.console import stdout, warn
from mobilevit.cli.evaluate import split_line
from mobilevit.cli.options import (
    FLAT,
    DeviceOptions,
    Flag,
    ImageOptions,
    WeightsArgument,
    WeightsOptions,
    choices,
    expand,
    expand_data,
    require,
)

if TYPE_CHECKING:
    from mobilevit.tasks.calibration import CalibrationFit
    from mobilevit.tasks.confidence import Rejection

Split = Literal["val", "test", "all"]


@dataclass(frozen=True)
class Calibrate:
    """Calibrate the probabilities of a classifier, and choose a threshold that rejects uncertain predictions.

    The temperature and the threshold are fitted on labeled images that the network was not trained on. They are stored
    with the weights.
    """

    weights: WeightsArgument
    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """Dataset, as for mobilevit train."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Output: a .safetensors file with the same tensors and the calibration."""
    overwrite: Flag = False
    """Replace the output file if it exists."""
    min_precision: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Precision of accepted predictions, between 0 and 1. predict and the demo reject predictions with a probability
    below the lowest threshold that reaches it with 95 percent confidence. Default: no threshold."""
    split: Annotated[Split | None, tyro.conf.arg(metavar=choices(Split))] = None
    """Split to fit on. Default: as for mobilevit evaluate."""
    json: Flag = False
    """Print one JSON object instead of a table."""
    batch_size: int = 32
    """Batch size in images."""
    num_workers: int = 2
    """Number of processes that read images; 0 reads them in the main process."""
    max_unreadable: int = 0
    """Maximum number of unreadable images to skip."""
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        """Evaluate, fit, write the weights and print the figures."""
        require(self.max_unreadable >= 0, "--max-unreadable", self.max_unreadable, "0 or more")
        require(self.num_workers >= 0, "--num-workers", self.num_workers, "0 or more")
        if self.min_precision is not None:
            require(0 < self.min_precision < 1, "--min-precision", self.min_precision, "between 0 and 1, such as 0.95")
        out = expand(self.out)
        if out.suffix != ".safetensors":
            raise ValueError(f"{out}: --out must end in .safetensors")
        if out.exists() and not self.overwrite:
            raise ValueError(f"{out}: already exists; choose another name or add --overwrite")
        device = self.device_options.apply()
        self.image_options.apply()
        weights = self.weights_options.read_for_inference(self.weights)
        if weights.task != "classify":
            raise ValueError(
                f"{self.weights}: weights for the task {weights.task!r}; calibration requires a classifier with one "
                "class per image"
            )
        from mobilevit.tasks.calibration import fit_calibration
        from mobilevit.tasks.classification import ClassificationResults
        from mobilevit.tasks.evaluation import evaluate
        from mobilevit.weights import write

        data = expand_data(self.data)
        result = evaluate(
            weights,
            data,
            split=self.split,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_unreadable=self.max_unreadable,
            device=device,
        )
        assert isinstance(result.results, ClassificationResults)
        fit = fit_calibration(result.results, self.min_precision)
        write(replace(weights, calibration=fit.calibration), out)
        if self.json:
            print(json.dumps({"weights": str(out), "split": result.split, **fit.to_dict()}))
            return 0
        stdout().print(_table(fit))
        print(f"temperature: {fit.calibration.temperature:.3f}, fitted on {fit.num_images:,} images")
        if not fit.is_significant:
            warn(
                "the temperature does not differ from 1 by more than chance (likelihood-ratio test, 5 %): these images "
                "show no need for calibration"
            )
        if fit.rejection:
            print(_describe(fit.rejection, fit.calibration.min_precision))
        print(split_line(weights, result.split, self.split, fit.num_images, data))
        print(f"{out}: the weights with this calibration, for predict, evaluate, export and demo")
        return 0


def _describe(rejection: Rejection, min_precision: float | None) -> str:
    return (
        f"rejection: predictions with a probability below {100 * rejection.min_probability:.1f} %; the other "
        f"{100 * rejection.coverage:.1f} % of these images have a precision of {100 * rejection.precision:.1f} %, and "
        f"new images of {100 * (min_precision or 0):g} % or more with 95 % confidence"
    )


def _table(fit: CalibrationFit) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    table = Table("", *(Column(name, justify="right") for name in ("before", "after, cross-fitted")), box=SIMPLE)
    table.add_row("calibration error (ECE) %", f"{fit.ece_before:.2f}", f"{fit.ece_after:.2f}")
    table.add_row("ECE % of perfect calibration, by chance", "", f"{fit.ece_if_calibrated:.2f}")
    table.add_row("loss", f"{fit.loss_before:.4f}", f"{fit.loss_after:.4f}")
    return table
