"""The interleaved timer, and the description of the machine in every report.

The clock speed of a processor changes from second to second, so times of separate runs cannot be compared. Here every
round times every callable once, and results are ratios of two times of the same round.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cpuinfo
import numpy as np
import psutil
import torch
from torch import Tensor

WARM_UP_CALLS = 5
PAUSE_SECONDS = 0.01
PEAK_SIZE = 1536  # rows and columns of the square matrices whose product measures the peak of the machine
LIBRARIES = (
    *("mobilevit", "torch", "torchvision", "timm", "transformers", "onnxruntime", "executorch", "openvino"),
    *("ai-edge-litert", "numpy"),
)


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a sample."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


@dataclass(frozen=True)
class Machine:
    """When and where a measurement ran. `load_average` is that of the last minute before it."""

    date: str
    processor: str
    num_cores: int | None
    num_threads: int
    load_average: float
    versions: dict[str, str]

    def describe(self) -> str:
        """Date, processor, versions and load in one line."""
        versions = ", ".join(f"{library} {version}" for library, version in self.versions.items())
        return f"{self.date}, {self.processor}, {versions}; load average at the start {self.load_average:.2f}"


def measure(
    runs: Sequence[Callable[[], Any]],
    num_rounds: int,
    pause_seconds: float = PAUSE_SECONDS,
    clock: Callable[[], float] | None = None,
) -> np.ndarray:
    """Milliseconds (runs, rounds) of every callable in every round, after a warm-up.

    The order rotates, and every second round is reversed, so that no callable always follows the same other one. Before
    each measurement the process sleeps, because the idle threads of the previous runtime keep spinning for a while;
    then one untimed call wakes the threads and loads the caches. `clock` returns seconds; default: wall time.
    """
    clock = clock or time.perf_counter
    times_ms = np.empty((len(runs), num_rounds))
    for run in runs:
        for _ in range(WARM_UP_CALLS):
            run()
    for i in range(num_rounds):
        order = [(k + i // 2) % len(runs) for k in range(len(runs))]
        for k in order if i % 2 == 0 else reversed(order):
            time.sleep(pause_seconds)
            runs[k]()
            started = clock()
            runs[k]()
            times_ms[k, i] = 1e3 * (clock() - started)
    return times_ms


def matrix_product() -> Callable[[], Tensor]:
    """A float32 matrix product large enough to reach the peak of the machine."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


@cache
def processor() -> str:
    """The name of the CPU. The first call takes a second."""
    info = cpuinfo.get_cpu_info()
    return info.get("brand_raw") or platform.processor() or platform.machine()


def machine(num_threads: int) -> Machine:
    """Describe this machine and the installed libraries that affect speed."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return Machine(
        date=datetime.date.today().isoformat(),
        processor=processor(),
        num_cores=psutil.cpu_count(logical=False),
        num_threads=num_threads,
        load_average=round(psutil.getloadavg()[0], 2),
        versions=versions,
    )
