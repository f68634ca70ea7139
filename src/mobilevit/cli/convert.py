"""`mobilevit convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mobilevit.cli.options import Download, SomeWeights, expand, read_weights, warn_of_transparency


@dataclass(frozen=True)
class Convert:
    """Convert weights to another format."""

    source: SomeWeights
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """A .safetensors file (mobilevit, timm), a .pt file (apple) or a folder (transformers)."""
    to: Literal["mobilevit", "apple", "timm", "transformers"] = "mobilevit"
    """Format to write."""
    overwrite: bool = False
    """Replace TARGET if it exists."""
    download: Download = False

    def run(self) -> int:
        from mobilevit.weights import write

        target = expand(self.target)
        if target.exists() and not self.overwrite:
            raise ValueError(f"{target}: already exists; choose another name or add --overwrite")
        weights = read_weights(self.source, self.download)
        write(weights, target, self.to)
        print(f"{target}: {weights.name}, {weights.num_classes} classes, {self.to} format")
        warn_of_transparency(weights)
        if self.to == "apple":
            print("Apple's format does not contain class names and preprocessing; readers assume the paper's")
        return 0
