"""`mobilevit explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import (
    Device,
    Download,
    SomeWeights,
    choose_device,
    expand,
    limit_megapixels,
    read_weights,
    warn_of_assumptions,
)


@dataclass(frozen=True)
class Explain:
    """Show attention, receptive fields and class evidence (Grad-CAM) for an image."""

    weights: SomeWeights
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file."""
    at: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="X Y")] = None
    """Query point of attention and receptive fields, in pixels of the upright image. Default: the center."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class to show the evidence for (classifiers only). Default: the most likely class."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Side of the network's input in pixels. Default: the size that the weights were trained for. A larger input gives
    finer maps, but its activations differ from those in training."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("explanation.html")
    """Output file: an interactive page (.html) or a figure (.png). An existing file is overwritten."""
    device: Device = "auto"
    download: Download = False

    def run(self) -> int:
        from rich.box import SIMPLE
        from rich.table import Column, Table

        from mobilevit.explain import explain_image

        weights = read_weights(self.weights, self.download)
        warn_of_assumptions(self.weights, weights)
        out = expand(self.out)
        limit_megapixels()
        explanation = explain_image(
            weights,
            expand(self.image),
            at=self.at,
            class_name=self.class_name,
            size_px=self.size,
            out=out,
            device=choose_device(self.device),
        )
        if explanation.class_evidence:
            table = Table("class", Column("probability", justify="right"), box=SIMPLE)
            for evidence in explanation.class_evidence:
                table.add_row(evidence.class_name, f"{100 * evidence.probability:.1f} %")
            stdout().print(table)
        for field in explanation.receptive_fields:
            print(f"{field.title}: the receptive field is {100 * field.fraction:.1f} % of the pixels")
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        return 0
