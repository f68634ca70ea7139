"""`mobilevit info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    pass
from mobilevit.cli.console import stdout
from mobilevit.cli.options import OR_RUN, WEIGHTS, Download, _resized, read_weights, warn_of_assumptions


@dataclass(frozen=True)
class Info:
    """Print parameters, multiply-accumulates and memory, stage by stage."""

    network: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="NETWORK", help=f"xxs, xs, s, or weights: {WEIGHTS}; {OR_RUN}."),
    ]
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the image, or its height and width, in pixels; unless given, what the weights were made for."""
    download: Download = False

    def run(self) -> int:
        """Count and print."""
        from mobilevit.benchmark.cost import profile, table
        from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT

        if len(self.size) > 2 or any(side < 32 for side in self.size):
            raise ValueError(f"size is {self.size}; give one side or height and width, from 32 px up")
        console = stdout()
        if self.network.lower() in ARCHITECTURES:
            model, size_px = MobileViT(self.network.lower()), 256
        else:
            weights = read_weights(self.network, self.download)
            warn_of_assumptions(self.network, weights)
            model, size_px = weights.build(), weights.preprocessing.crop_px
            p, names = weights.preprocessing, weights.class_names
            console.print(
                f"{weights.name} from {self.network}, output stride "
                f"{weights.output_stride}\n"
                f"input: RGB, {_resized(p)}, / 255, mean {p.mean}, std {p.std}\n"
                f"classes: {weights.num_classes}"
                + (f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ", not named")
            )
        size = self.size or (size_px,)
        console.print(table(profile(model, (size[0], size[-1]))))
        return 0
