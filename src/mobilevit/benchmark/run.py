"""Time several models in one interleaved run, in any runtime; see `mobilevit.benchmark.timing.measure`."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Column, Table

from mobilevit.benchmark import timing
from mobilevit.benchmark.models import TORCH, BenchmarkModel
from mobilevit.benchmark.timing import WARM_UP_CALLS, Machine, Spread, machine, matrix_product, measure
from mobilevit.defaults import NUM_ROUNDS, NUM_THREADS
from mobilevit.export import TOLERANCE

logger = logging.getLogger(__name__)

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Startup:
    """Loading a model in a new process. `memory_bytes` is None where the system does not report it."""

    load_ms: float
    memory_bytes: int | None


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the times of a model."""

    p10: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Result:
    """The measurement of one model.

    `error` is the largest difference of an output from torch's, in standard deviations of that output; None where torch
    has no such outputs. `peak_fraction` is the fraction of `Report.peak_gflops` reached. `ratio` divides the time by
    that of `baseline` in the same round, `ratio_to_fp32` by that of the same model in fp32.
    """

    name: str
    network: str
    runtime: str
    precision: str
    batch_size: int
    size_px: tuple[int, int]
    latency_ms: Percentiles
    images_per_second: float
    load_ms: float
    num_bytes: int
    memory_bytes: int | None
    gflops: float | None
    peak_fraction: float | None
    error: float | None
    baseline: str | None
    ratio: Spread | None
    ratio_to_fp32: Spread | None


@dataclass
class Report:
    """The results of a benchmark. `peak_gflops` is that of a large float32 matrix product, by batch size."""

    machine: Machine
    num_rounds: int
    peak_gflops: dict[str, float] = field(default_factory=dict)
    rows: list[Result] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """A line for every int8 model that is not faster than the same model in fp32."""
        return [
            f"{row.name}, {row.runtime}, batch {row.batch_size}: int8 is not faster than fp32 "
            f"({row.ratio_to_fp32.median:.2f} times its time)"
            for row in self.rows
            if row.ratio_to_fp32 and row.ratio_to_fp32.median >= 1
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = asdict(self)
        return {**values.pop("machine"), **values, "notes": self.notes}


def benchmark(
    models: Sequence[BenchmarkModel], *, num_rounds: int = NUM_ROUNDS, num_threads: int = NUM_THREADS
) -> Report:
    """Time `models`, those of the same batch size interleaved.

    Raises:
        ValueError: an artifact that does not run, or whose fp32 outputs differ from torch's.
    """
    report = Report(machine(num_threads), num_rounds)
    for batch_size in dict.fromkeys(model.batch_size for model in models):
        group = [model for model in models if model.batch_size == batch_size]
        startups = []
        for model in group:
            logger.info("%s, batch size %d: load time and memory in a new process ...", model.label, batch_size)
            startups.append(measure_in_subprocess(model, num_threads))
        logger.info("%d models interleaved, batch size %d, %d rounds ...", len(group), batch_size, num_rounds)
        rows, report.peak_gflops[str(batch_size)] = _measure_group(group, startups, num_rounds, num_threads)
        report.rows += rows
    return report


def _measure_group(
    models: Sequence[BenchmarkModel], startups: Sequence[Startup], num_rounds: int, num_threads: int
) -> tuple[list[Result], float]:
    """Time models of one batch size; also returns the GFLOP/s of a large matrix product in the same rounds."""
    torch.set_num_threads(num_threads)
    runs, errors = [], []
    for model in models:
        run, images = model.load(num_threads), model.example_input()
        errors.append(_check_outputs(model, run(images)))
        runs.append(lambda run=run, images=images: run(images))
    times_ms = measure([*runs, matrix_product()], num_rounds)
    peak_gflops = 2 * timing.PEAK_SIZE**3 / 1e6 / times_ms[-1]
    times_of = {model.label: times_ms[i] for i, model in enumerate(models)}
    fp32_times = {_without_precision(model): times_of[model.label] for model in models if model.precision == "fp32"}
    rows = []
    for model, startup, error, times in zip(models, startups, errors, times_ms[:-1], strict=True):
        latency_ms = Percentiles(*np.percentile(times, (10, 50, 90, 99)).tolist())
        gflops = None if model.num_macs is None else 2 * model.num_macs * model.batch_size / 1e6 / times
        fp32 = fp32_times.get(_without_precision(model)) if model.precision == "int8" else None
        rows.append(
            Result(
                name=model.name,
                network=model.network,
                runtime=model.runtime,
                precision=model.precision,
                batch_size=model.batch_size,
                size_px=model.size,
                latency_ms=latency_ms,
                images_per_second=1e3 * model.batch_size / latency_ms.p50,
                load_ms=startup.load_ms,
                num_bytes=model.num_bytes,
                memory_bytes=startup.memory_bytes,
                gflops=None if gflops is None else float(np.median(gflops)),
                peak_fraction=None if gflops is None else float(np.median(gflops / peak_gflops)),
                error=error,
                baseline=model.baseline,
                ratio=Spread.of(times / times_of[model.baseline]) if model.baseline else None,
                ratio_to_fp32=None if fp32 is None else Spread.of(times / fp32),
            )
        )
    return rows, float(np.median(peak_gflops))


def _without_precision(model: BenchmarkModel) -> tuple[str | None, ...]:
    # The name of an artifact is its path, which differs between precisions.
    return (model.network, model.runtime, model.name if model.baseline else None)


def _check_outputs(model: BenchmarkModel, outputs: Sequence[np.ndarray]) -> float | None:
    """Check that the fp32 outputs equal torch's; returns the error, see `Result`."""
    error = model.error(outputs)
    # With random weights, the error of lower precisions is meaningless.
    if error is not None and model.precision == "fp32" and not error <= TOLERANCE["fp32"]:
        raise ValueError(
            f"{model.label}: its outputs differ from torch's by {error:.2g} of their standard deviation, the tolerance "
            f"is {TOLERANCE['fp32']:g}; it is not timed"
        )
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Load time and memory


def measure_in_subprocess(model: BenchmarkModel, num_threads: int) -> Startup:
    """Load and run `model` in a new process: its load time, and its peak memory without Python and the runtime."""
    if model.runtime in TORCH:  # the modules of its classes, whose import would count
        network = torch.load(model.path, weights_only=False)
        modules = sorted({type(module).__module__ for module in network.modules()})
    else:
        modules = [f"mobilevit.export.{model.runtime}"]
    arguments = {
        "model": {"runtime": model.runtime, "path": str(model.path), "shape": model.shape, "uint8": model.uint8},
        "modules": modules,
        "num_threads": num_threads,
    }
    program = "from mobilevit.benchmark import run; run._subprocess_main()"
    process = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    if process.returncode:
        reason = next(iter(process.stderr.strip().splitlines()[-1:]), f"exit code {process.returncode}")
        raise ValueError(f"{model.label}: does not run ({reason})")
    return Startup(**json.loads(process.stdout.splitlines()[-1]))


def _subprocess_main() -> None:
    """The program of `measure_in_subprocess`: arguments on stdin, the result as the last line of stdout."""
    arguments = json.load(sys.stdin)
    for module in arguments["modules"]:
        importlib.import_module(module)
    fields = arguments["model"]
    fields |= {"path": Path(fields["path"]), "shape": tuple(fields["shape"])}
    model = BenchmarkModel(name="", network="", precision="", **fields)
    images = model.example_input()
    torch.set_num_threads(arguments["num_threads"])
    torch.ones(64, 64).mm(torch.ones(64, 64))  # allocates the buffers and threads of torch itself
    with contextlib.suppress(OSError):  # on Linux: reset the peak, which the imports may have set
        Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    run = model.load(arguments["num_threads"])
    if model.runtime == "compiled":  # the first call compiles
        run(images)
    load_ms = 1e3 * (time.perf_counter() - started)
    for _ in range(WARM_UP_CALLS):
        run(images)
    peak = _peak_memory()
    print("\n" + json.dumps({"load_ms": load_ms, "memory_bytes": None if peak is None else max(0, peak - before)}))


def _peak_memory() -> int | None:
    """The largest resident set size of this process in bytes."""
    status = Path("/proc/self/status")  # unlike getrusage, reflects the reset by clear_refs
    if status.exists():
        match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return 1024 * int(match[1]) if match else None
    with contextlib.suppress(ImportError):  # macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Presentation


def table(report: Report) -> Table:
    """The report as a rich table."""
    names = ("batch", "p10 ms", "p50", "p90", "p99", "images/s", "load ms", "MB", "memory MB", "GFLOP/s", "of peak")
    columns = [Column(name, justify="right") for name in (*names, "time / ours (p10 - p90)")]
    peak = " / ".join(f"{value:.0f}" for value in report.peak_gflops.values())
    result = Table(
        "model",
        "runtime",
        *columns,
        box=SIMPLE,
        title=_title(report),
        title_justify="left",
        caption=f"peak: {peak} GFLOP/s, a float32 matrix product in torch in the same rounds",
        caption_justify="left",
    )
    for row in report.rows:
        ratio = row.ratio
        result.add_row(
            f"  {row.name}" if ratio else row.name,
            f"{row.runtime} {row.precision}",
            str(row.batch_size),
            *(f"{percentile:.2f}" for percentile in astuple(row.latency_ms)),
            f"{row.images_per_second:.1f}",
            f"{row.load_ms:.0f}",
            f"{row.num_bytes / 1e6:.2f}",
            "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.1f}",
            "-" if row.gflops is None else f"{row.gflops:.0f}",
            "-" if row.peak_fraction is None else f"{100 * row.peak_fraction:.0f} %",
            f"{ratio.median:.2f} ({ratio.p10:.2f} - {ratio.p90:.2f})" if ratio else "",
        )
    return result


def check_figure_path(path: Path) -> None:
    """Raise ValueError if `path` has no suffix of a figure format."""
    if path.suffix not in FIGURE_SUFFIXES:
        raise ValueError(f"{path}: not a figure format; use one of {', '.join(FIGURE_SUFFIXES)}")


def save_figure(report: Report, path: Path) -> None:
    """Draw the times of a report as a bar chart."""
    check_figure_path(path)
    rows = report.rows
    labels = [f"{row.name}, {row.runtime} {row.precision}, batch {row.batch_size}" for row in rows]
    p10, p50, p90, _ = np.array([astuple(row.latency_ms) for row in rows]).T / [row.batch_size for row in rows]
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colors = ["#8a8a8a" if row.baseline else "#1f77b4" for row in rows]
    positions = np.arange(len(rows))[::-1]
    axes.barh(positions, p50, xerr=(p50 - p10, p90 - p50), color=colors, capsize=2)
    axes.set_yticks(positions, labels)
    axes.set_xlabel("ms per image: median, 10th to 90th percentile")
    axes.set_title(_title(report), fontsize="medium")
    figure.savefig(path)


def _title(report: Report) -> str:
    m = report.machine
    return f"{m.date}, {m.processor}, {m.num_threads} thread{'s'[: m.num_threads > 1]}, {report.num_rounds} rounds"
