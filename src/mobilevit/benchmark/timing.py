"""The one interleaved timer, and what a report says of the machine.

Processors change their speed from second to second, so times of separate runs cannot be compared. Every round times
every callable once, and results are ratios of two times of the same round.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARM_UP_CALLS = 5
PAUSE_SECONDS = 0.01
PEAK_SIDE = 1536  # of the square matrices whose product stands for the peak of the machine
LIBRARIES = (
    *("mobilevit", "torch", "torchvision", "timm", "transformers", "onnxruntime", "executorch", "openvino"),
    *("ai-edge-litert", "numpy"),
)


def measure(runs: Sequence[Callable[[], Any]], num_rounds: int, pause_seconds: float = PAUSE_SECONDS) -> np.ndarray:
    """Milliseconds (runs, rounds) of every run in every round, after a warm-up.

    The first place goes round, and every second round is in reverse, so that no run always follows the same other one.
    """
    times_ms = np.empty((len(runs), num_rounds))
    for call in runs:
        for _ in range(WARM_UP_CALLS):
            call()
    for i in range(num_rounds):
        order = [(k + i // 2) % len(runs) for k in range(len(runs))]
        for k in order if i % 2 == 0 else reversed(order):
            time.sleep(pause_seconds)
            runs[k]()
            started = time.perf_counter()
            runs[k]()
            times_ms[k, i] = 1e3 * (time.perf_counter() - started)
    return times_ms


def ratio(times_ms: np.ndarray, ours_ms: np.ndarray) -> dict[str, float]:
    """How many times as long as ours, round by round: median, tenth and ninetieth percentile."""
    return spread(times_ms / ours_ms)


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def matrix_product() -> Callable[[], Tensor]:
    """A float32 product large enough to run at what the machine can do at most."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed and have to do with speed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
