"""`mobilevit benchmark`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    pass
from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import WEIGHTS, Download, expand, read_weights


@dataclass(frozen=True)
class Benchmark:
    """Measure latency, throughput, memory and load time on this machine.

    Models are timed interleaved, in any runtime and beside models of other libraries. The last line is JSON.
    """

    targets: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="TARGET...",
            help=f"Artifacts (.onnx, .pte, .xml, .tflite), xxs, xs, s, xxs:detect, xxs:segment ..., or {WEIGHTS}.",
        ),
    ]
    runtime: tuple[Literal["torch", "compiled", "onnx", "executorch", "openvino", "litert"], ...] = ()
    """What to export weights for first; torch unless given. An artifact has its own."""
    precision: tuple[Literal["fp32", "fp16", "bf16", "int8"], ...] = ()
    """Numbers to compute with; fp32 unless given. An artifact has its own."""
    against: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """What to compare with, in turns: timm or transformers (the same network by that library), torchvision:NAME,
    timm:NAME or a name alone (another network), or self, whose ratio of about 1 shows what the others are worth."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """Images in an input, one number or several; 1 unless given, or what an artifact was made for."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX [PX]")] = ()
    """Side of the images, or their height and width, in pixels; unless given, what the weights were made for."""
    rounds: int = 40
    """Every side is timed once a round."""
    num_threads: int = 2
    """Of every runtime."""
    json: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FILE")] = None
    """Write the JSON object to this file as well."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the times here, as .png, .svg or .pdf."""
    download: Download = False

    def run(self) -> int:
        """Write what is to be timed, time it, print."""
        import tempfile

        from mobilevit.benchmark import rivals, run
        from mobilevit.export_options import backend_of_file
        from mobilevit.models.mobilevit import ARCHITECTURES
        from mobilevit.weights import NETWORKS

        if not self.targets:
            raise ValueError("nothing is named; give artifacts, weights, or xxs, xs, s")
        if len(self.size) > 2 or any(side < 32 for side in self.size):
            raise ValueError(f"size is {self.size}; give one side or height and width, from 32 px up")
        counts = [("batch size", size) for size in self.batch_size]
        for name, value in (*counts, ("rounds", self.rounds), ("num threads", self.num_threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        artifacts = {name for name in self.targets if backend_of_file(Path(name))}
        if artifacts.issuperset(self.targets) and (self.runtime or self.precision):
            raise ValueError("an artifact has its runtime and precision; leave out --runtime and --precision")
        if self.figure:
            run.check_figure(self.figure)
        for file in (self.json, self.figure):  # said now, and not when everything has been measured
            if file and not expand(file).parent.is_dir():
                raise ValueError(f"{file}: there is no such folder to write to")
        shared: dict[str, Any] = {
            "size": (self.size[0], self.size[-1]) if self.size else None,
            "against": self.against,
            "on_start": lambda what: print(what, file=sys.stderr, flush=True),
            "on_problem": warn,
        }
        drawn: dict[str, tuple[str, Any]] = {f"{x}:{task}": (x, task) for x in ARCHITECTURES for task in NETWORKS}
        drawn |= {name: drawn[f"{name}:classify"] for name in ARCHITECTURES}
        weights = {}  # all of them first: a name that is wrong is said before minutes of work
        for name in dict.fromkeys(self.targets):
            if name.lower() in drawn:
                architecture, task = drawn[name.lower()]
                weights[name] = rivals.random_weights(architecture, task=task)
            elif name not in artifacts:
                weights[name] = read_weights(name, self.download)
        sides = []
        with tempfile.TemporaryDirectory() as folder:
            for name in dict.fromkeys(self.targets):
                if name in artifacts:
                    path = expand(Path(name))
                    sides += run.sides_of_artifact(path, Path(folder), batch_sizes=self.batch_size, **shared)
                else:
                    sides += run.sides_of_weights(
                        name,
                        weights[name],
                        Path(folder),
                        runtimes=tuple(dict.fromkeys(self.runtime)) or ("torch",),
                        precisions=tuple(dict.fromkeys(self.precision)) or ("fp32",),
                        batch_sizes=tuple(dict.fromkeys(self.batch_size)) or (1,),
                        **shared,
                    )
            report = run.benchmark(
                sides, num_rounds=self.rounds, num_threads=self.num_threads, on_start=shared["on_start"]
            )
        stdout().print(run.table(report))
        for note in report["notes"]:
            print(note)
        line = json.dumps(report, ensure_ascii=False)
        if self.json:
            expand(self.json).write_text(line + "\n", encoding="utf-8")
        if self.figure:
            run.figure(report, expand(self.figure))
        print(line)
        return 0
