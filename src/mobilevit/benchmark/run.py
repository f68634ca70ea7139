"""How long networks take: several of them side by side in one interleaved run, in whichever runtime.

Processors change their speed from second to second, so times of two separate runs cannot be compared. Here every round
times every side once, and what counts is the ratio of two times of the same round. A side is a file that a runtime
reads: an artifact, or a pickled module for torch. Before its turn everybody sleeps for a moment, so that the threads of
the side before, which wait by spinning, have gone to bed; then it runs once untimed, which wakes its own threads and
fills the caches with its weights.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.benchmark import rivals, timing
from mobilevit.benchmark.cost import profile
from mobilevit.benchmark.timing import WARM_UP_CALLS, matrix_product, measure, processor, ratio, versions
from mobilevit.export import TOLERANCE, find_backend, load_artifact, read_metadata, read_signature
from mobilevit.export.artifact import ArtifactSpec, as_arrays
from mobilevit.export.backend import InferenceFn, Signature
from mobilevit.export.rewrite import optimize_for_inference
from mobilevit.export.verify import synthetic_images
from mobilevit.export_options import ARTIFACT_SUFFIXES, PRECISIONS, Precision, backend_of_file
from mobilevit.images import first_line
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabHead
from mobilevit.models.mobilevit import ARCHITECTURES
from mobilevit.weights import TaskName, Weights

TORCH = ("torch", "compiled")  # eager, and torch.compile with frozen weights
RUNTIMES = (*TORCH, *ARTIFACT_SUFFIXES)
CALIBRATION_IMAGES = 16  # the time does not depend on what int8 was calibrated with
_ARTIFACT = re.compile(
    rf"(mobilevit_({'|'.join(ARCHITECTURES)})(?:_(detect|segment))?_\d+x\d+)_({'|'.join(PRECISIONS)})"
    r"(?:_uint8)?(_postprocess|_answers)?"
)


@dataclass(frozen=True)
class Side:
    """Something to time: the file `path`, which `runtime` reads, for an input of `shape`.

    `network` is the same for files that compute the same function, `num_macs` is for one image, and `expected` are
    the outputs that the network has in torch for `example(side)`. `against` is the label of the side that this one is
    compared with.
    """

    name: str
    network: str
    runtime: str
    precision: str
    path: Path
    shape: tuple[int, ...]
    uint8: bool = False
    num_macs: int | None = None
    expected: tuple[np.ndarray, ...] | None = None
    against: str | None = None

    @property
    def label(self) -> str:
        """Unique among sides of the same batch size."""
        parts = (self.name, self.runtime, self.precision, *(("against", self.against) if self.against else ()))
        return " ".join(parts)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.shape[1], self.shape[2]) if self.uint8 else (self.shape[2], self.shape[3])

    @property
    def num_bytes(self) -> int:
        """What lies on the disk; OpenVINO keeps its weights in a second file."""
        files = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [])]
        return sum(file.stat().st_size for file in files if file.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Sides


def sides_of_weights(
    name: str,
    weights: Weights,
    folder: Path,
    *,
    runtimes: Sequence[str] = ("torch",),
    precisions: Sequence[Precision] = ("fp32",),
    batch_sizes: Sequence[int] = (1,),
    size: tuple[int, int] | None = None,
    against: Sequence[str] = (),
    on_start: Callable[[str], None] = lambda what: None,
    on_problem: Callable[[str], None] = lambda what: None,
) -> list[Side]:
    """Write `weights` into `folder` for every runtime, precision and batch size, and what to compare each with.

    `against` are names for `rivals.build`, and "self". A network of another library that a runtime cannot take is left
    out, and `on_problem` is told so.

    Raises:
        ValueError: what is unknown, not installed or not possible.
    """
    if not weights.num_classes:
        raise ValueError(f"{name}: these weights have no classifier, so there are no answers to compare")
    model = weights.build().requires_grad_(False)
    height, width = size or (weights.preprocessing.crop_px,) * 2
    # What stands behind the network in an artifact, boxes and scores of what it says, is no part of it: what another
    # library does there is not compared.
    specs = [ArtifactSpec(p, height, width, b, task=weights.task) for p in precisions for b in batch_sizes]
    targets = [(runtime, spec) for runtime in runtimes for spec in specs]
    for runtime, target in targets:  # all of them first: what is impossible is said before minutes of work
        _check(runtime, target)
    foreign = _Foreign(weights, against)
    cost = profile(model, (height, width))
    sides = []
    for runtime, target in targets:
        on_start(f"{runtime} {target.precision}: writing {name} for batches of {target.batch_size} ...")
        side = write_side(name, model, runtime, target, folder)
        side = replace(side, network=name, num_macs=cost.num_macs + cost.num_attention_macs)
        sides += [side, *foreign.sides(side, target, folder, on_start, on_problem)]
    return sides


def sides_of_artifact(
    path: Path,
    folder: Path,
    *,
    batch_sizes: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    against: Sequence[str] = (),
    on_start: Callable[[str], None] = lambda what: None,
    on_problem: Callable[[str], None] = lambda what: None,
) -> list[Side]:
    """The artifact `path`, and what to compare it with, which is written into `folder`; see `sides_of_weights`.

    Which network it holds, and in which precision, its name tells if it is the one that `mobilevit export` gave it.

    Raises:
        ValueError: no artifact, a batch or image that it was not made for, a name that does not tell enough.
    """
    runtime = backend_of_file(path)
    if runtime is None or not path.exists():
        load_artifact(path)  # says what is wrong
        raise AssertionError("unreachable")
    _check(runtime, None)
    found = read_signature(path)
    named = _ARTIFACT.fullmatch(path.stem)
    if against and not named:
        raise ValueError(
            f"{path}: its name does not tell which network it holds, so it is not known what to compare it with; name "
            "it as mobilevit export does, or give the weights instead"
        )
    weights = _weights_like(path, named, found) if named else None
    foreign = _Foreign(cast(Weights, weights), against)
    sides = []
    for batch_size in batch_sizes or (found.shape[0] or 1,):
        side = Side(
            name=str(path),
            network=named[1] + (named[5] or "") if named else str(path),
            runtime=runtime,
            precision=named[4] if named else "-",
            path=path,
            shape=_shape(path, found, batch_size, size),
            uint8=found.uint8,
        )
        if weights:
            cost = profile(weights.build(), side.size)
            side = replace(side, num_macs=cost.num_macs + cost.num_attention_macs)
        task = weights.task if weights else "classify"
        target = ArtifactSpec(cast(Precision, side.precision), *side.size, batch_size, task=task)
        sides += [side, *foreign.sides(side, target, folder, on_start, on_problem)]
    return sides


def _weights_like(path: Path, named: re.Match[str], found: Signature) -> Weights:
    """Random weights of the network that an artifact holds."""
    if named[3] is None:
        return rivals.random_weights(named[2], num_classes=found.num_classes)
    said = read_metadata(path)
    head: dict[str, Any] = json.loads(said["head"]) if "head" in said else {}
    return rivals.random_weights(
        named[2],
        task=cast(TaskName, named[3]),
        num_classes=int(said["num_classes"]),
        output_stride=int(said["output_stride"]),
        head=DeepLabHead(**{**head, "rates": tuple(head["rates"])}) if head else PAPER_HEAD,
    )


def write_side(name: str, network: nn.Module, runtime: str, target: ArtifactSpec, folder: Path) -> Side:
    """Write `network`, ours or another, in eval mode, for `runtime` into `folder`."""
    stem = re.sub(r"[^\w.-]", "_", f"{name}_{target.height}x{target.width}_b{target.batch_size}_{target.precision}")
    path = folder / f"{stem}_{len(list(folder.iterdir()))}{ARTIFACT_SUFFIXES.get(runtime, '.pt')}"
    shape = (target.batch_size, 3, target.height, target.width)
    side = Side(name, name, runtime, target.precision, path, shape)
    images = torch.from_numpy(example(side))
    with torch.inference_mode():
        expected = as_arrays(network(images))
    if runtime in TORCH:
        torch.save(_faster_layout(optimize_for_inference(network), images), path)
    else:
        drawn = synthetic_images(CALIBRATION_IMAGES if target.precision == "int8" else 0, side.size)
        calibration = [torch.from_numpy(p).permute(2, 0, 1)[None].contiguous() / 255 for p in drawn]
        find_backend(runtime, target).write(network, target, path, {}, calibration)
    return replace(side, expected=expected)


def example(side: Side) -> np.ndarray:
    """An input for `side`, always the same."""
    random = np.random.default_rng(0)
    if side.uint8:
        return random.integers(0, 256, side.shape, dtype=np.uint8)
    return random.random(side.shape, dtype=np.float32)


class _Foreign:
    """What to compare with, built before anything is written, so that a wrong name is told at once."""

    def __init__(self, weights: Weights, names: Sequence[str]):
        self.names = list(dict.fromkeys(names))
        self.weights = weights
        self.built: dict[tuple[str, bool], nn.Module] = {}
        for name in self.names:
            self.build(name, exportable=False)

    def build(self, name: str, exportable: bool) -> nn.Module | None:
        if name == "self":
            return None
        if (name, exportable) not in self.built:
            self.built[name, exportable] = rivals.build(name, self.weights, exportable=exportable)
        return self.built[name, exportable]

    def sides(
        self,
        ours: Side,
        target: ArtifactSpec,
        folder: Path,
        on_start: Callable[[str], None],
        on_problem: Callable[[str], None],
    ) -> list[Side]:
        sides = []
        for name in self.names:
            network = self.build(name, exportable=ours.runtime not in TORCH)
            if network is None:
                sides.append(replace(ours, name="self", against=ours.label))
                continue
            _check(ours.runtime, target)
            on_start(f"{ours.runtime} {target.precision}: writing {name} for batches of {target.batch_size} ...")
            try:
                side = write_side(name, network, ours.runtime, target, folder)
            except Exception as error:  # whatever a converter says of a network that is not ours
                on_problem(
                    f"{ours.runtime} {target.precision}: left out {name}, which cannot be converted "
                    f"({first_line(error)})"
                )
                continue
            assert side.expected is not None
            if name in rivals.SAME:
                side = replace(side, network=ours.network, num_macs=ours.num_macs)
                if ours.expected is not None:
                    side = replace(side, expected=ours.expected)
            else:
                for output in side.expected:
                    rivals.check_scale(name, torch.from_numpy(output))
            sides.append(replace(side, against=ours.label))
        return sides


def _check(runtime: str, target: ArtifactSpec | None) -> None:
    """Refuse what a runtime cannot do, or what is not installed."""
    if runtime not in RUNTIMES:
        raise ValueError(f"there is no runtime {runtime!r}; there are {', '.join(RUNTIMES)}")
    if runtime not in TORCH:
        find_backend(runtime, target or ArtifactSpec("fp32", 256, 256))
    elif target and target.precision != "fp32":
        raise ValueError(f"{runtime} is timed in fp32 alone; leave out {target.precision} or {runtime}")


def _faster_layout(network: nn.Module, images: Tensor, num_rounds: int = 3) -> nn.Module:
    """`network` with its weights in the memory layout that is the faster one here: every side gets its best."""
    layouts = [network, optimize_for_inference(network).to(memory_format=torch.channels_last)]
    with torch.inference_mode():
        times = measure([lambda x=x: x(images) for x in layouts], num_rounds)
    return layouts[int(times.min(axis=1).argmin())]


def _shape(path: Path, found: Signature, batch_size: int, size: tuple[int, int] | None) -> tuple[int, ...]:
    if found.shape[0] not in (None, batch_size):
        raise ValueError(
            f"{path}: made for batches of {found.shape[0]}, not {batch_size}; give --batch-size {found.shape[0]}, or "
            f"export it with --batch-size {batch_size}"
        )
    fixed = found.shape[1:3] if found.uint8 else found.shape[2:4]
    height, width = size or [side or 256 for side in fixed]
    if any(side not in (None, wanted) for side, wanted in zip(fixed, (height, width), strict=True)):
        raise ValueError(f"{path}: made for {fixed[0]} x {fixed[1]} px, not {height} x {width}; leave out --size")
    return (batch_size, height, width, 3) if found.uint8 else (batch_size, 3, height, width)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def load(side: Side, num_threads: int) -> InferenceFn:
    """`side` in its runtime, from inputs to outputs."""
    if side.runtime not in TORCH:
        return load_artifact(side.path, num_threads)
    torch.set_num_threads(num_threads)
    network = torch.load(side.path, weights_only=False)
    if side.runtime == "compiled":
        network = torch.compile(network, dynamic=False, options={"freezing": True})

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad() if side.runtime == "compiled" else torch.inference_mode():
            return as_arrays(network(torch.from_numpy(images)))

    return run


def benchmark(
    sides: Sequence[Side],
    *,
    num_rounds: int = 40,
    num_threads: int = 2,
    on_start: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time `sides`, those of the same batch size interleaved; everything found as plain JSON values.

    Raises:
        ValueError: an artifact that cannot be run, or whose fp32 outputs are not torch's.
    """
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "num_threads": num_threads,
        "num_rounds": num_rounds,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "peak_gflops": {},
        "rows": [],
        "notes": [],
    }
    for batch_size in dict.fromkeys(side.shape[0] for side in sides):
        together = [side for side in sides if side.shape[0] == batch_size]
        alone = []
        for side in together:
            on_start(f"{side.label}: in a process of its own, batches of {batch_size} ...")
            alone.append(run_alone(side, num_threads))
        who = f"{len(together)} sides in turns" if len(together) > 1 else together[0].label
        on_start(f"{who}, batches of {batch_size}, {num_rounds} rounds ...")
        rows, peak_gflops = _rows(together, alone, num_rounds, num_threads)
        report["rows"] += rows
        report["peak_gflops"][str(batch_size)] = peak_gflops
    report["notes"] = int8_notes(report["rows"])
    return report


def _rows(
    sides: Sequence[Side], alone: Sequence[Mapping[str, Any]], num_rounds: int, num_threads: int
) -> tuple[list[dict[str, Any]], float]:
    """Time sides of one batch size; and the GFLOP/s of a large product in the same rounds."""
    torch.set_num_threads(num_threads)
    runs, errors = [], []
    for side in sides:
        run, images = load(side, num_threads), example(side)
        errors.append(_error(side, run(images)))
        runs.append(lambda run=run, images=images: run(images))
    times_ms = measure([*runs, matrix_product()], num_rounds)
    peak_gflops = 2 * timing.PEAK_SIDE**3 / 1e6 / times_ms[-1]
    times_of = {side.label: times_ms[i] for i, side in enumerate(sides)}
    in_fp32 = {_same_but_precision(side): side for side in sides if side.precision == "fp32"}
    rows = []
    for i, side in enumerate(sides):
        batch_size = side.shape[0]
        p10, p50, p90, p99 = (float(x) for x in np.percentile(times_ms[i], (10, 50, 90, 99)))
        gflops = None if side.num_macs is None else 2 * side.num_macs * batch_size / 1e6 / times_ms[i]
        fp32 = in_fp32.get(_same_but_precision(side)) if side.precision == "int8" else None
        rows.append(
            {
                "name": side.name,
                "network": side.network,
                "runtime": side.runtime,
                "precision": side.precision,
                "batch_size": batch_size,
                "size_px": list(side.size),
                "latency_ms": {"p10": p10, "p50": p50, "p90": p90, "p99": p99},
                "images_per_second": 1e3 * batch_size / p50,
                "load_ms": alone[i]["load_ms"],
                "num_bytes": side.num_bytes,
                "memory_bytes": alone[i]["memory_bytes"],
                "gflops": None if gflops is None else float(np.median(gflops)),
                "peak_share": None if gflops is None else float(np.median(gflops / peak_gflops)),
                "error": errors[i],
                "against": side.against,
                "ratio": ratio(times_ms[i], times_of[side.against]) if side.against else None,
                "ratio_to_fp32": ratio(times_ms[i], times_of[fp32.label]) if fp32 else None,
            }
        )
    return rows, float(np.median(peak_gflops))


def _same_but_precision(side: Side) -> tuple[str | None, ...]:
    # Of ours the name may be that of a file, which is another one in every precision.
    return (side.network, side.runtime, side.name if side.against else None)


def int8_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every int8 that takes as long as fp32 of the same network, or longer."""
    return [
        f"{row['name']}, {row['runtime']}, batch {row['batch_size']}: int8 is not faster than fp32 "
        f"({row['ratio_to_fp32']['median']:.2f} times its time)"
        for row in rows
        if row["ratio_to_fp32"] and row["ratio_to_fp32"]["median"] >= 1
    ]


def _error(side: Side, outputs: Sequence[np.ndarray]) -> float | None:
    """The largest difference of a number from torch's, in standard deviations of torch's in the same output."""
    if side.expected is None:
        return None
    pairs = zip(outputs, side.expected, strict=True)
    error = float(np.max([np.abs(x.astype(np.float32) - expected).max() / expected.std() for x, expected in pairs]))
    allowed = TOLERANCE["fp32"] if side.precision == "fp32" else math.inf  # random weights tell nothing of the others
    if not error <= allowed:
        raise ValueError(
            f"{side.label} answers otherwise than torch: an output differs by {error:.2g} of its standard deviation, "
            f"allowed are {allowed:g}; its times would mean nothing"
        )
    return error


# ---------------------------------------------------------------------------------------------------------------------
# A process of its own


def run_alone(side: Side, num_threads: int) -> dict[str, Any]:
    """Load and run `side` in a fresh process: `load_ms`, and `memory_bytes`, the most that it took on top.

    What is there before counts nothing: Python, torch, the runtime. None where the system does not tell.
    """
    modules: list[str] = []
    if side.runtime in TORCH:  # or the libraries that its classes are from would count
        network = torch.load(side.path, weights_only=False)
        modules = sorted({type(module).__module__ for module in network.modules()})
    else:
        modules = [f"mobilevit.export.{side.runtime}"]
    order = {
        "side": [side.name, side.network, side.runtime, side.precision, str(side.path), side.shape, side.uint8],
        "modules": modules,
        "num_threads": num_threads,
    }
    program = "import mobilevit.benchmark.run as latency; latency._alone()"
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(order), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise ValueError(f"{side.label}: cannot be run ({said})")
    return json.loads(done.stdout.splitlines()[-1])


def _alone() -> None:
    """What the process of `run_alone` does: the order on stdin, the answer as the last line of stdout."""
    order = json.load(sys.stdin)
    for module in order["modules"]:
        importlib.import_module(module)
    name, network, runtime, precision, path, shape, uint8 = order["side"]
    side = Side(name, network, runtime, precision, Path(path), tuple(shape), uint8)
    images = example(side)
    torch.set_num_threads(order["num_threads"])
    torch.ones(64, 64).mm(torch.ones(64, 64))  # torch's own buffers and threads
    with contextlib.suppress(OSError):  # Linux: forget the most that importing took
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    started = time.perf_counter()
    run = load(side, order["num_threads"])
    if runtime == "compiled":  # it compiles when it is first called
        run(images)
    load_ms = 1e3 * (time.perf_counter() - started)
    for _ in range(WARM_UP_CALLS):
        run(images)
    most = _memory("VmHWM")
    memory_bytes = None if before is None or most is None else max(0, most - before)
    print("\n" + json.dumps({"load_ms": load_ms, "memory_bytes": memory_bytes}))


def _memory(field: str) -> int | None:
    """The resident set now (VmRSS) or at its largest (VmHWM), in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    with contextlib.suppress(ImportError):  # macOS knows the largest alone
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What to look at


def table(report: Mapping[str, Any]) -> Any:
    """A report of `benchmark` to print with rich."""
    from rich.box import SIMPLE
    from rich.table import Column, Table

    names = ("batch", "p10 ms", "p50", "p90", "p99", "images/s", "load ms", "MB", "memory MB", "GFLOP/s", "of peak")
    columns = [Column(name, justify="right") for name in (*names, "time / ours (p10 - p90)")]
    peak = " / ".join(f"{value:.0f}" for value in report["peak_gflops"].values())
    threads = f"{report['num_threads']} thread{'s' if report['num_threads'] > 1 else ''}"
    result = Table(
        "network",
        "runtime",
        *columns,
        box=SIMPLE,
        title=f"{report['date']}, {report['processor']}, {threads}, {report['num_rounds']} rounds",
        title_justify="left",
        caption=f"peak: {peak} GFLOP/s, a float32 matrix product in torch in the same rounds",
        caption_justify="left",
    )
    for row in report["rows"]:
        latency, compared = row["latency_ms"], row["ratio"]
        result.add_row(
            f"  {row['name']}" if compared else row["name"],
            f"{row['runtime']} {row['precision']}",
            str(row["batch_size"]),
            *(f"{latency[key]:.2f}" for key in ("p10", "p50", "p90", "p99")),
            f"{row['images_per_second']:.1f}",
            f"{row['load_ms']:.0f}",
            f"{row['num_bytes'] / 1e6:.2f}",
            "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.1f}",
            "-" if row["gflops"] is None else f"{row['gflops']:.0f}",
            "-" if row["peak_share"] is None else f"{100 * row['peak_share']:.0f} %",
            f"{compared['median']:.2f} ({compared['p10']:.2f} - {compared['p90']:.2f})" if compared else "",
        )
    return result


def check_figure(file: Path) -> None:
    """Refuse to begin what could not be drawn in the end.

    Raises:
        ValueError: an ending that is no figure's, or matplotlib is missing.
    """
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{file}: a figure ends in .png, .svg or .pdf")
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ValueError("a figure needs matplotlib, which is not installed: pip install 'mobilevit[docs]'") from None


def figure(report: Mapping[str, Any], file: Path) -> None:
    """Draw the times of a report of `benchmark`, a bar a row."""
    check_figure(file)
    from matplotlib.figure import Figure

    rows = report["rows"]
    labels = [f"{r['name']}, {r['runtime']} {r['precision']}, batch {r['batch_size']}" for r in rows]
    p10, p50, p90 = (
        np.array([row["latency_ms"][key] / row["batch_size"] for row in rows]) for key in ("p10", "p50", "p90")
    )
    canvas = Figure(figsize=(9, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = canvas.add_subplot()
    colours = ["#8a8a8a" if row["against"] else "#1f77b4" for row in rows]
    places = np.arange(len(rows))[::-1]
    axes.barh(places, p50, xerr=(p50 - p10, p90 - p50), color=colours, capsize=2)
    axes.set_yticks(places, labels)
    axes.set_xlabel("ms an image: median, 10th to 90th percentile")
    axes.set_title(f"{report['processor']}, {report['num_threads']} threads, {report['date']}", fontsize="medium")
    canvas.savefig(file)
