"""`mobilevit info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import FLAT, RUN_FOLDER, WEIGHTS, WeightsOptions, format_resize, height_width
from mobilevit.messages import join_names, nearest

if TYPE_CHECKING:
    from mobilevit.weights import Weights


@dataclass(frozen=True)
class Info:
    """Print parameters, multiply-accumulates (MACs) and activation memory of each stage."""

    network: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="NETWORK", help=f"xxs, xs, s, or weights: {WEIGHTS}; {RUN_FOLDER}."),
    ]
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Input size in pixels, or height and width. Default: that of the weights; 256 for xxs, xs and s."""
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        from mobilevit.benchmark.cost import profile, table
        from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT

        size = height_width(self.size)
        console = stdout()
        if self.network.lower() in ARCHITECTURES:
            model, size_px = MobileViT(self.network.lower()), 256
        else:
            try:
                weights = self.weights_options.read_for_inference(self.network)
            except ValueError as error:
                hint = nearest(self.network, ARCHITECTURES)
                message = str(error)
                message += " " if message.endswith("?") else "; "
                raise ValueError(f"{message}{hint}the architectures are {', '.join(ARCHITECTURES)}") from None
            model, size_px = weights.build(), weights.preprocessing.crop_px
            console.print(_description(self.network, weights))
        console.print(table(profile(model, size or (size_px, size_px))))
        return 0


def _description(source: str, weights: Weights) -> str:
    p = weights.preprocessing
    c = weights.calibration
    calibrated = "" if c.temperature == 1 else f"\ncalibration: temperature {c.temperature:.3g}"
    rejected = f", predictions below {100 * c.min_probability:.1f} % are rejected" if c.min_probability else ""
    names = f" ({join_names(weights.class_names)})" if weights.class_names else ", names unknown"
    return (
        f"{weights.name} from {source}, output stride {weights.output_stride}\n"
        f"input: RGB, {format_resize(p)}, / 255, mean {p.mean}, std {p.std}\n"
        f"classes: {weights.num_classes}{names}{calibrated}{rejected}"
    )
