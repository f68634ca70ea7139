"""`mobilevit explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import FLAT, DeviceOptions, ImageOptions, WeightsArgument, WeightsOptions, expand


@dataclass(frozen=True)
class Explain:
    """Show attention, receptive fields and class evidence (Grad-CAM) for an image."""

    weights: WeightsArgument
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""
    at: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="X Y")] = None
    """Query point of attention and receptive fields, in pixels of the upright image. Default: the center."""
    class_name: Annotated[str | None, tyro.conf.arg(metavar="NAME", name="class")] = None
    """Class to show the evidence for (classifiers only). Default: the most likely class."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Input height and width in pixels. Default: the input size in training. Larger inputs give finer maps, but their
    activations differ from those in training."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("explanation.html")
    """Output file: an interactive page (.html) or a figure (.png). An existing file is overwritten."""
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        from rich.box import SIMPLE
        from rich.table import Column, Table

        from mobilevit.explain import explain_image

        weights = self.weights_options.read_for_inference(self.weights)
        out = expand(self.out)
        self.image_options.apply()
        explanation = explain_image(
            weights,
            expand(self.image),
            at=self.at,
            class_name=self.class_name,
            size_px=self.size,
            out=out,
            device=self.device_options.apply(),
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
