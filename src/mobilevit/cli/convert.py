"""`mobilevit convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mobilevit.cli.console import warn
from mobilevit.cli.options import FLAT, Flag, WeightsArgument, WeightsOptions, expand, warn_of_transparency


@dataclass(frozen=True)
class Convert:
    """Convert weights to the format of another library."""

    source: WeightsArgument
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Output: a .safetensors file (mobilevit, timm), a .pt file (apple) or a folder (transformers)."""
    to: Literal["mobilevit", "apple", "timm", "transformers"] = "mobilevit"
    """Output format."""
    overwrite: Flag = False
    """Replace TARGET if it exists."""
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        from mobilevit.weights import UNCALIBRATED, write

        target = expand(self.target)
        if target.exists() and not self.overwrite:
            raise ValueError(f"{target}: already exists; choose another name or add --overwrite")
        weights = self.weights_options.read(self.source)
        write(weights, target, self.to)
        print(f"{target}: {weights.name}, {weights.num_classes} classes, {self.to} format")
        warn_of_transparency(weights)
        if self.to == "apple":
            print("Apple's format does not contain class names and preprocessing; readers assume those of the paper")
            if weights.calibration != UNCALIBRATED:
                warn(f"{target}: without the calibration of {self.source}, which Apple's format cannot contain")
        return 0
