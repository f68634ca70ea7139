"""`mobilevit benchmark`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import (
    FLAT,
    WEIGHTS,
    WeightsOptions,
    choices,
    expand,
    height_width,
    require_positive,
)
from mobilevit.defaults import NUM_ROUNDS, NUM_THREADS
from mobilevit.export_options import Precision

if TYPE_CHECKING:
    from mobilevit.weights import Weights

Runtime = Literal["torch", "compiled", "onnx", "executorch", "openvino", "litert"]


@dataclass(frozen=True)
class Benchmark:
    """Measure latency, throughput, memory and load time on this machine.

    All models are timed interleaved; --against adds models of other libraries. The last line of the output is JSON.
    """

    targets: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="TARGET...",
            help="Artifacts (.onnx, .pte, .xml, .tflite), untrained networks (xxs, xs, s, xxs:detect, xxs:segment ...) "
            f"or weights: {WEIGHTS}.",
        ),
    ]
    runtime: Annotated[tuple[Runtime, ...], tyro.conf.arg(metavar=f"{choices(Runtime)}...")] = ()
    """Runtimes for networks and weights. Default: torch. An artifact has its own."""
    precision: Annotated[tuple[Precision, ...], tyro.conf.arg(metavar=f"{choices(Precision)}...")] = ()
    """Precisions for networks and weights. Default: fp32. An artifact has its own."""
    against: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Models to compare with: timm or transformers (the same network in that library); torchvision:NAME, timm:NAME or
    NAME (another model); self (the same model again, as a control)."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """Batch sizes. Default: 1, or that of the artifact."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Input size in pixels, or height and width. Default: that of the weights."""
    rounds: int = NUM_ROUNDS
    """Number of rounds. Each round times every model once."""
    num_threads: int = NUM_THREADS
    """Number of CPU threads of each runtime."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", name="out")] = None
    """Also write the JSON to this file."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a bar chart of the latencies to this file: .png, .svg or .pdf."""
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        import tempfile

        from mobilevit.benchmark import models, run
        from mobilevit.export_options import backend_of_file

        self._check()
        artifacts = {name for name in self.targets if backend_of_file(Path(name))}
        if artifacts.issuperset(self.targets) and (self.runtime or self.precision):
            raise ValueError("an artifact has its own runtime and precision; leave out --runtime and --precision")
        # Read all weights first, so that a wrong name fails before minutes of exports.
        weights = {name: self._weights(name) for name in dict.fromkeys(self.targets) if name not in artifacts}
        size = height_width(self.size)
        timed = []
        with tempfile.TemporaryDirectory() as folder:
            for name in dict.fromkeys(self.targets):
                if name in artifacts:
                    path = expand(Path(name))
                    timed += models.models_from_artifact(
                        path, Path(folder), batch_sizes=self.batch_size, size=size, against=self.against
                    )
                else:
                    timed += models.models_from_weights(
                        name,
                        weights[name],
                        Path(folder),
                        runtimes=tuple(dict.fromkeys(self.runtime)) or ("torch",),
                        precisions=tuple(dict.fromkeys(self.precision)) or ("fp32",),
                        batch_sizes=tuple(dict.fromkeys(self.batch_size)) or (1,),
                        size=size,
                        against=self.against,
                    )
            report = run.benchmark(timed, num_rounds=self.rounds, num_threads=self.num_threads)
        stdout().print(run.table(report))
        for note in report.notes:
            print(note)
        line = json.dumps(report.to_dict(), ensure_ascii=False)
        if self.json:
            expand(self.json).write_text(line + "\n", encoding="utf-8")
        if self.figure:
            run.save_figure(report, expand(self.figure))
        print(line)
        return 0

    def _check(self) -> None:
        from mobilevit.benchmark.run import check_figure_path

        if not self.targets:
            raise ValueError("no target is given; give artifacts, weights, or xxs, xs, s")
        require_positive("--rounds", self.rounds)
        require_positive("--num-threads", self.num_threads)
        require_positive("--batch-size", *self.batch_size)
        if self.figure:
            check_figure_path(self.figure)
        for file in (self.json, self.figure):
            if file and not expand(file).parent.is_dir():
                raise ValueError(f"{file}: the folder does not exist")

    def _weights(self, name: str) -> Weights:
        from mobilevit.benchmark.rivals import random_weights
        from mobilevit.models.mobilevit import ARCHITECTURES
        from mobilevit.weights import NETWORKS

        architecture, _, suffix = name.lower().partition(":")
        task: Any = suffix or "classify"
        if architecture in ARCHITECTURES and task in NETWORKS:
            weights = random_weights(architecture, task=task)
        else:
            weights = self.weights_options.read(name)
        # The network for several labels per image is that of a classifier.
        return replace(weights, task="classify", thresholds=()) if weights.task == "multilabel" else weights
