"""The memory allocator, shared by the benchmarks. The docstring of eager.py explains the reason."""

from __future__ import annotations

import ctypes
import platform


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory; False where that is not possible."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    return mallopt is not None and mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, 2**31 - 1) == 1
