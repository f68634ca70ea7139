"""Device and number of CPU threads."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

CALIBRATION_SECONDS = 0.05


def choose_device(name: str) -> str:
    """Check that the device `name` is available. "auto" selects the first available one of cuda, mps and cpu.

    Raises:
        ValueError: an unknown or unavailable device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name).tolist()  # fails on "meta", which has no data
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        reason = "unknown type" if "device type at start" in first_line else first_line.partition(". Please")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); use auto, cpu, cuda:0 or mps") from None
    return name


def use_threads(num_threads: int | None) -> None:
    """Set the number of CPU threads of this process. None: the default of PyTorch.

    Raises:
        ValueError: fewer than one thread.
    """
    if num_threads is None:
        return
    if num_threads < 1:
        raise ValueError(f"num threads is {num_threads}; it must be 1 or more")
    torch.set_num_threads(num_threads)


def thread_advice() -> str:
    """Advice if all threads together are not faster than one, or an empty string.

    OpenMP threads wait for each other in a busy loop. If another process uses one of the cores, each of the many small
    layers waits for the scheduler. Takes about 0.2 s, uses no random numbers, and restores the number of threads.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return ""
    speeds = {1: 0.0, num_threads: 0.0}
    try:
        for count in (1, num_threads, 1, num_threads):  # interleaved, since the load of the machine changes
            speeds[count] += _convolutions_per_second(count) / 2
    finally:
        torch.set_num_threads(num_threads)
    if speeds[num_threads] > speeds[1]:
        return ""
    return (
        f"{num_threads} threads are slower than 1 here ({speeds[num_threads]:,.0f} against {speeds[1]:,.0f} "
        "convolutions per second), because another process uses the cores; use --num-threads 1, or set "
        "OMP_WAIT_POLICY=passive"
    )


@torch.inference_mode()
def _convolutions_per_second(num_threads: int) -> float:
    """Speed of a typical small layer with `num_threads` threads."""
    torch.set_num_threads(num_threads)
    pixels = torch.ones(16, 64, 16, 16).to(memory_format=torch.channels_last)
    kernel = torch.ones(64, 64, 3, 3)
    F.conv2d(pixels, kernel, padding=1)  # the first call sets up the threads
    num_calls, start, seconds = 0, time.perf_counter(), 0.0
    while seconds < CALIBRATION_SECONDS:
        F.conv2d(pixels, kernel, padding=1)
        num_calls, seconds = num_calls + 1, time.perf_counter() - start
    return num_calls / seconds
