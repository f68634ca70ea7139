"""The comparison as plain JSON values: what was published of the systems, what they cost, what they take here and now.

Times of two separate runs cannot be compared, see `mobilevit.benchmark.run`. So the systems are timed in small
groups, and in every group the three sizes of MobileViT take their turns in every round: what counts is the ratio of two
times of the same round.
"""

from __future__ import annotations

import copy
import datetime
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from mobilevit.benchmark import timing
from mobilevit.benchmark.rivals import keep_silu, randomise
from mobilevit.benchmark.run import example, load, write_side
from mobilevit.compare.claims import check_claims, dense_tables, speeds
from mobilevit.compare.counts import count
from mobilevit.compare.models import SYSTEMS, Network, System
from mobilevit.export import TOLERANCE, find_backend
from mobilevit.export.artifact import ArtifactSpec
from mobilevit.images import first_line
from mobilevit.names import nearest

Runtime = Literal["torch", "onnx"]
Baseline = Literal["nearest", "mobilevit-xxs", "mobilevit-xs", "mobilevit-s"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
OURS = tuple(name for name, system in SYSTEMS.items() if system.family == "mobilevit")
GROUP = 6  # systems beside ours in a round: with more, the two sides of a ratio are seconds apart
LAYOUT_ROUNDS = 3
Say = Callable[[str], None]


def choose(names: Sequence[str]) -> list[System]:
    """The systems called `names`, all if there are none, in the order of the table; always with MobileViT's three.

    Raises:
        ValueError: names that are not in the table.
    """
    check_names(names, SYSTEMS)
    wanted = {*names, *OURS} if names else set(SYSTEMS)
    return [system for name, system in SYSTEMS.items() if name in wanted]


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Refuse names that are not among those known.

    Raises:
        ValueError: which they are, with the most similar names, or all names where none is similar.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = nearest(unknown[0], known) or f"there are {', '.join(known)}"
        raise ValueError(f"there is no system {', '.join(repr(name) for name in unknown)}; {hint.strip()}")


def compare(
    systems: Sequence[System],
    *,
    runtimes: Sequence[Runtime] = RUNTIMES,
    batch_sizes: Sequence[int] = (1,),
    size_px: int | None = None,
    device: str = "cpu",
    baseline: Baseline = "nearest",
    num_rounds: int = 40,
    num_threads: int = 2,
    on_start: Say = lambda what: None,
    on_problem: Say = lambda what: None,
) -> dict[str, Any]:
    """Count and time `systems`, of which MobileViT's three are some; without `runtimes` nothing is timed.

    Args:
        size_px: the side of the images; unless given, that of each system.
        device: where torch computes; ONNX Runtime is timed on the CPU alone.
        baseline: what the others' times are divided by, one size of MobileViT or the nearest in parameters.
        on_problem: told of a system that does not take the size, or that a runtime does not take. It is left out, and
            in the notes.

    Raises:
        ValueError: a library or runtime that is not installed.
    """
    check_runtimes(runtimes, device)
    begun = circumstances(device)
    notes: list[str] = []
    taken = []
    for system in systems:
        try:
            system.check_size(size_px or system.size_px)
            taken.append(system)
        except ValueError as error:
            notes.append(f"left out {system.name}: {error}")
    if size_px and any(system.size_px != size_px for system in taken):
        notes.append(f"top-1, and what the paper claims, are for the sizes of the papers and not for {size_px} px")
    for note in notes:
        on_problem(note)
    rows = [_row(system, size_px, on_start) for system in taken]
    notes += add_times(
        [(system, row["size_px"], row) for system, row in zip(taken, rows, strict=True)],
        runtimes=runtimes,
        batch_sizes=batch_sizes,
        device=device,
        baseline=baseline,
        num_rounds=num_rounds,
        num_threads=num_threads,
        on_start=on_start,
        on_problem=on_problem,
    )
    as_published = [row for row in rows if row["size_px"] == SYSTEMS[row["name"]].size_px]
    return {
        **begun,
        "num_threads": num_threads,
        "num_rounds": num_rounds if runtimes else 0,
        "baseline": baseline,
        "rows": rows,
        "claims": check_claims(as_published),
        "speeds": speeds(as_published),
        "dense": dense_tables(),
        "notes": notes,
    }


def check_runtimes(runtimes: Sequence[Runtime], device: str) -> None:
    """Refuse what cannot be timed in.

    Raises:
        ValueError: ONNX Runtime where it is not installed, or beside a device that is not the CPU.
    """
    if "onnx" in runtimes:
        find_backend("onnx", ArtifactSpec("fp32", 256, 256))  # says so if it is not installed
        if device != "cpu":
            raise ValueError(f"ONNX Runtime is timed on the CPU alone; with --device {device} give --runtime torch")


def add_times(
    systems: Sequence[tuple[Network, int, dict[str, Any]]],
    *,
    runtimes: Sequence[Runtime],
    batch_sizes: Sequence[int],
    device: str,
    baseline: Baseline,
    num_rounds: int,
    num_threads: int,
    num_classes: int = 1000,
    on_start: Say,
    on_problem: Say,
) -> list[str]:
    """Time systems, given with the side of their images and their row, and put the times into the rows.

    Each is compared with the MobileViT among them that is its `baseline`. For the arguments see `compare`. Returns what
    `on_problem` was told.
    """
    notes: list[str] = []

    def problem(what: str) -> None:
        notes.append(what)
        on_problem(what)

    rows = [row for _, _, row in systems]
    for runtime in runtimes:
        for batch_size in batch_sizes:
            with tempfile.TemporaryDirectory() as folder:
                clock = _Clock(
                    runtime,
                    batch_size,
                    num_classes,
                    device,
                    num_rounds,
                    num_threads,
                    Path(folder),
                    on_start,
                    problem,
                )
                timings = clock.time([(system, size_px) for system, size_px, _ in systems])
            for row in rows:
                if network_of(row["name"]) in timings:
                    other = against(row, rows, baseline)
                    timing = timings[network_of(row["name"])]
                    row["timings"].append(timing | {"against": other, "ratio": timing["ratios"].get(other)})
    return notes


def circumstances(device: str) -> dict[str, Any]:
    """When, on what and with what something is measured in torch."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": timing.processor(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": timing.versions(),
    }


def _row(system: System, size_px: int | None, on_start: Say) -> dict[str, Any]:
    size_px = size_px or system.size_px
    on_start(f"{system.name}: counting ...")
    counts = count(lambda: system.build(size_px=size_px), size_px)
    return {
        "name": system.name,
        "family": system.family,
        "paper": system.paper,
        "library": system.library,
        "size_px": size_px,
        "num_parameters": counts.num_parameters,
        "published_parameters": system.published_parameters,
        "num_macs": counts.num_macs + counts.num_attention_macs,
        "num_macs_without_attention": counts.num_macs,
        "activation_bytes": counts.inference_bytes,
        "published_top1": system.published_top1,
        "augmentation": system.augmentation,
        "source": system.source,
        "library_weights": [asdict(weights) for weights in system.library_weights],
        "timings": [],
    }


def network_of(name: str) -> str:
    """The same for systems that differ only in how they were trained."""
    return name.removesuffix("-basic")


def against(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], baseline: Baseline) -> str | None:
    """The MobileViT among `rows` that a row is compared with; None if it is not there, or is the row itself."""
    sizes = {other["name"]: other["num_parameters"] for other in rows if other["name"] in OURS}
    if baseline != "nearest":
        sizes = {name: size for name, size in sizes.items() if name == baseline}
    name = min(sizes, key=lambda name: abs(np.log(sizes[name] / row["num_parameters"])), default=None)
    return None if name == row["name"] else name


@dataclass(frozen=True)
class _Clock:
    """Times systems in one runtime, in batches of one size."""

    runtime: Runtime
    batch_size: int
    num_classes: int
    device: str
    num_rounds: int
    num_threads: int
    folder: Path
    on_start: Say
    on_problem: Say

    def time(self, systems: Sequence[tuple[Network, int]]) -> dict[str, dict[str, Any]]:
        """By network, for systems and the side of their images: times, and ratios to the MobileViTs among them."""
        torch.set_num_threads(self.num_threads)
        sides = {network_of(system.name): (system, size_px) for system, size_px in systems}
        ours = self._prepare({name: sides.pop(name) for name in OURS if name in sides})
        names = list(sides)
        groups = [names[i : i + GROUP] for i in range(0, len(names), GROUP)] or [[]]
        times_ms: dict[str, list[np.ndarray]] = {name: [] for name in (*ours, *names)}
        ratios: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in times_ms}
        about: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(groups, start=1):
            runs = ours | self._prepare({name: sides[name] for name in group})
            about |= {name: found for name, (_, found) in runs.items()}
            self.on_start(
                f"{self.runtime}, batches of {self.batch_size}: {len(runs)} systems in turns, {self.num_rounds} "
                f"rounds, group {number} of {len(groups)} ..."
            )
            measured = timing.measure([run for run, _ in runs.values()], self.num_rounds)
            of = dict(zip(runs, measured, strict=True))
            for name, times in of.items():
                times_ms[name].append(times)
                for base in ours:
                    ratios[name].setdefault(base, []).append(times / of[base])
        return {
            name: {
                "runtime": self.runtime,
                "batch_size": self.batch_size,
                **about[name],
                "latency_ms": timing.spread(np.concatenate(times)),
                "images_per_second": 1e3 * self.batch_size / float(np.median(np.concatenate(times))),
                "ratios": {
                    base: timing.spread(np.concatenate(found)) for base, found in ratios[name].items() if base != name
                },
            }
            for name, times in times_ms.items()
            if times
        }

    def _prepare(
        self, systems: Mapping[str, tuple[Network, int]]
    ) -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
        """What runs each network once, and what there is to say of it; without those that cannot be run."""
        prepared = {}
        for name, (system, size_px) in systems.items():
            self.on_start(f"{self.runtime}, batches of {self.batch_size}: preparing {name} ...")
            # Not the initialisation it has: see `randomise`.
            network = randomise(system.build(self.num_classes, size_px), seed=0).requires_grad_(False)
            try:
                prepared[name] = (self._in_torch if self.runtime == "torch" else self._in_onnx)(name, network, size_px)
            except Exception as error:  # whatever a converter says of a network
                self.on_problem(f"{self.runtime}: left out {name}, which cannot be run ({first_line(error)})")
        return prepared

    def _in_torch(self, name: str, network: nn.Module, size_px: int) -> tuple[Callable[[], Any], dict[str, Any]]:
        """As it is defined, nothing rewritten, in the memory layout of weights that is the faster one here."""
        images = torch.rand(self.batch_size, 3, size_px, size_px).to(self.device)

        def runner(network: nn.Module) -> Callable[[], Any]:
            def run() -> None:
                with torch.inference_mode():
                    network(images)
                if self.device != "cpu":
                    torch.accelerator.synchronize(self.device)

            return run

        network = network.to(self.device)
        runs = {
            "channels first": runner(network),
            "channels last": runner(copy.deepcopy(network).to(memory_format=torch.channels_last)),
        }
        times_ms = timing.measure(list(runs.values()), LAYOUT_ROUNDS)
        layout = list(runs)[int(times_ms.min(axis=1).argmin())]
        return runs[layout], {"layout": layout, "error": None}

    def _in_onnx(self, name: str, network: nn.Module, size_px: int) -> tuple[Callable[[], Any], dict[str, Any]]:
        """Exported as `mobilevit export` does it."""
        if name not in OURS:
            keep_silu(network)
        target = ArtifactSpec("fp32", size_px, size_px, self.batch_size)
        side = write_side(name, network, "onnx", target, self.folder)
        run, images = load(side, self.num_threads), example(side)
        assert side.expected is not None
        (expected,), (found,) = side.expected, run(images)
        error = float(np.abs(found - expected).max() / expected.std())
        if not error <= TOLERANCE["fp32"]:
            self.on_problem(
                f"onnx: {name} differs from torch by {error:.1g} of the standard deviation of its logits, allowed are "
                f"{TOLERANCE['fp32']:g}; with random weights some networks amplify rounding"
            )
        return lambda: run(images), {"layout": None, "error": error}
