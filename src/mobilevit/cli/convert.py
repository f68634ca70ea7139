"""`mobilevit convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    pass
from mobilevit.cli.options import Download, SomeWeights, expand, read_weights, warn_of_transparency


@dataclass(frozen=True)
class Convert:
    """Convert weights to another format."""

    source: SomeWeights
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """A .safetensors file (ours, timm's), a .pt file (Apple's) or a folder (transformers')."""
    to: Literal["mobilevit", "apple", "timm", "transformers"] = "mobilevit"
    """Format to write."""
    overwrite: bool = False
    """Replace TARGET if it exists."""
    download: Download = False

    def run(self) -> int:
        """Read, write, say what was done."""
        from mobilevit.weights import write

        target = expand(self.target)
        if target.exists() and not self.overwrite:
            raise ValueError(f"{target}: exists already; choose another name or say --overwrite")
        weights = read_weights(self.source, self.download)
        write(weights, target, self.to)
        print(f"{target}: {weights.name}, {weights.num_classes} classes, {self.to} format")
        warn_of_transparency(weights)
        if self.to == "apple":
            print("Apple's format has no place for class names and preprocessing; whoever reads it assumes the paper's")
        return 0
