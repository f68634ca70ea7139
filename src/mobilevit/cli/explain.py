"""`mobilevit explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    pass
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
    """Show attention, receptive fields and class evidence for an image."""

    weights: SomeWeights
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file."""
    at: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="X Y")] = None
    """The place to ask about, in pixels of the upright image from its upper left corner; unless given, the middle."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Of classifiers: the class to show the evidence for; unless given, the likeliest."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Side of what the network is given, in pixels; unless given, what the weights were made for. A larger one has
    finer maps, and is answered by other activations than the network was trained with."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("explanation.html")
    """A page in which the place is moved with the mouse (.html), or one image (.png); a file of that name is
    replaced."""
    device: Device = "auto"
    download: Download = False

    def run(self) -> int:
        """Compute, write, say what was found."""
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
        if explanation.evidence:
            table = Table("class", Column("probability", justify="right"), box=SIMPLE)
            for one in explanation.evidence:
                table.add_row(one.class_name, f"{100 * one.probability:.1f} %")
            stdout().print(table)
        for layer in explanation.fields:
            print(f"{layer.name}: depends on {100 * layer.share:.1f} % of the pixels")
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        return 0
