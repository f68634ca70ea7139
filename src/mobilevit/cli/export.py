"""`mobilevit export`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from mobilevit.export import Artifact
from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import (
    Download,
    SomeWeights,
    artifact_name,
    expand,
    read_weights,
    some_images,
    warn_of_assumptions,
    warn_of_transparency,
)


@dataclass(frozen=True)
class Export:
    """Export weights for phones, boards, servers and browsers.

    Each artifact is run on its own runtime and compared with torch before it is written.
    """

    weights: SomeWeights
    to: tuple[Literal["onnx", "executorch", "openvino", "litert", "coreml", "all"], ...] = ("onnx",)
    """Runtimes; "all" is all of those that are installed."""
    out: Path = Path("exports")
    """Folder to write to. Files are named after the run folder or the weights file, where that has a name of its own
    (not model.safetensors, say), or else after the architecture."""
    overwrite: bool = False
    """Replace files that exist."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Numbers to compute with; int8 is calibrated on --images."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(name="images", metavar="IMAGE...")] = ()
    """Real images to compare on, and to calibrate int8 with: files, folders, patterns, or data as for train. Unless
    given, synthetic ones are compared."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the images, or their height and width, in pixels; unless given, what the weights were made for."""
    batch_size: int = 1
    """Images in an input."""
    dynamic_batch: bool = False
    """Leave the batch open, where the runtime can."""
    dynamic_size: bool = False
    """Leave height and width open, where the runtime can."""
    uint8: bool = False
    """Take pixels as they are, 0 to 255 and (batch, height, width, 3), and scale them inside."""
    answers: bool = False
    """Of a detector the boxes that it finds, with their scores and labels, after NMS; of a segmentation network the
    class of every pixel. Refused where there is no such thing: for classifiers, and NMS outside onnx and openvino."""
    num_threads: int = 2
    """Of the runtimes while they are timed."""
    sensitivity: bool = False
    """Instead of writing anything, show what int8 would cost each part of the network, on --images."""
    json: bool = False
    """One JSON object a line instead of a table."""
    download: Download = False

    def run(self) -> int:
        """Export and print."""
        from mobilevit.export import BACKENDS, export, installed, sensitivity

        if len(self.size) > 2:
            raise ValueError(f"size is {self.size}; give one side or height and width")
        if self.num_threads < 1:
            raise ValueError(f"num threads is {self.num_threads}; it must be 1 or more")
        weights = read_weights(self.weights, self.download)
        warn_of_assumptions(self.weights, weights)
        if self.sensitivity:
            images = some_images(self.images)
            print("every part of the network alone in int8, in torch ...", file=sys.stderr, flush=True)
            costs = sensitivity(weights, images)
            if self.json:
                for cost in costs:
                    print(json.dumps(asdict(cost)), flush=True)
            else:
                stdout().print(_sensitivity_table(costs))
            return 0
        names = list(self.to)
        if "all" in names:
            names = [name for name in BACKENDS if installed(name)]
            missing = [name for name in BACKENDS if name not in names]
            if missing:
                warn("not installed, left out: " + ", ".join(f"{x} (mobilevit[{x}])" for x in missing))
            if not names:
                raise ValueError("no runtime is installed to export for; pip install 'mobilevit[onnx]', say")
        if expand(self.out).exists() and not expand(self.out).is_dir():
            raise ValueError(f"{self.out}: is a file; name a folder to write to")
        # What takes minutes says so; what is written is told at once, lest an interruption takes it along.
        more = ", calibrating, and timing it against fp32" if self.precision == "int8" else ""

        def tell(a: Artifact) -> None:
            if self.json:
                print(json.dumps(a.to_dict(), ensure_ascii=False), flush=True)
            else:
                print(f"{a.backend}: wrote {a.path}", file=sys.stderr, flush=True)

        artifacts = export(
            weights,
            names,
            expand(self.out),
            precision=self.precision,
            size=(self.size[0], self.size[-1]) if self.size else None,
            batch_size=self.batch_size,
            dynamic_batch=self.dynamic_batch,
            dynamic_size=self.dynamic_size,
            uint8=self.uint8,
            answers=self.answers,
            images=some_images(self.images),
            source=self.weights,
            prefix=artifact_name(self.weights),
            overwrite=self.overwrite,
            num_threads=self.num_threads,
            on_start=lambda name: print(f"{name}: converting{more} ...", file=sys.stderr, flush=True),
            on_written=tell,
        )
        warn_of_transparency(weights)
        if not self.json:
            stdout().print(_artifact_table(artifacts))
            real = "of yours" if self.images else "drawn by program; give --images to compare on real ones"
            num_images = max((a.agreement.num_images for a in artifacts if a.agreement), default=0)
            print(f"compared with torch on {num_images} images {real}" if num_images else "nothing could be run")
            for a in artifacts:
                if a.speed_ratio is not None:
                    verdict = "faster than" if a.speed_ratio > 1.02 else "NOT faster than"
                    print(f"{a.backend}: int8 is {verdict} fp32 here, {a.speed_ratio:.2f} times its speed")
        return 0


def _artifact_table(artifacts: Any) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    names = ("MB", "largest error", "same answer", "median ms", "operators", "outside the fast part")
    table = Table("file", *(Column(name, justify="right") for name in names), box=SIMPLE)
    for a in artifacts:
        found = a.agreement
        measured = (
            (f"{found.error:.1e}", f"{100 * found.same:.1f} % of {found.kind}", f"{found.latency_ms:.2f}")
            if found
            else ("converted, not run", "-", "-")
        )
        outside = ", ".join(sorted(set(a.operators.outside))) or "none"
        table.add_row(str(a.path), f"{a.num_bytes / 1e6:.2f}", *measured, str(a.operators.num_operators), outside)
    return table


def _sensitivity_table(costs: Any) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    names = ("layers", "weights", "error", "same answer")
    table = Table("in int8, alone", *(Column(name, justify="right") for name in names), box=SIMPLE)
    for c in costs:
        table.add_row(c.part, str(c.num_layers), f"{c.num_weights:,}", f"{c.error:.4f}", f"{100 * c.same:.1f} %")
    return table
