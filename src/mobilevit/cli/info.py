"""`mobilevit info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import OR_RUN, WEIGHTS, Download, _resized, read_weights, warn_of_assumptions
from mobilevit.defaults import MIN_SIZE_PX
from mobilevit.messages import nearest


@dataclass(frozen=True)
class Info:
    """Print parameters, multiply-accumulates and memory per stage."""

    network: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="NETWORK", help=f"xxs, xs, s, or weights: {WEIGHTS}; {OR_RUN}."),
    ]
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the input, or its height and width, in pixels; default: that of the weights, 256 without weights."""
    download: Download = False

    def run(self) -> int:
        from mobilevit.benchmark.cost import profile, table
        from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT

        if len(self.size) > 2 or any(side < MIN_SIZE_PX for side in self.size):
            raise ValueError(f"size is {self.size}; give one side or height and width, at least {MIN_SIZE_PX} px")
        console = stdout()
        if self.network.lower() in ARCHITECTURES:
            model, size_px = MobileViT(self.network.lower()), 256
        else:
            try:
                weights = read_weights(self.network, self.download)
            except ValueError as error:
                hint = nearest(self.network, ARCHITECTURES)
                raise ValueError(f"{error}; {hint}the architectures are {', '.join(ARCHITECTURES)}") from None
            warn_of_assumptions(self.network, weights)
            model, size_px = weights.build(), weights.preprocessing.crop_px
            p, names = weights.preprocessing, weights.class_names
            some_names = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ", names unknown"
            console.print(
                f"{weights.name} from {self.network}, output stride {weights.output_stride}\n"
                f"input: RGB, {_resized(p)}, / 255, mean {p.mean}, std {p.std}\n"
                f"classes: {weights.num_classes}{some_names}"
            )
        size = self.size or (size_px,)
        console.print(table(profile(model, (size[0], size[-1]))))
        return 0
