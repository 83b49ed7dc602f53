"""The process's heap, kept small. Nothing goes in, nothing comes out but memory, back to the kernel."""

from __future__ import annotations

import contextlib
import ctypes


def keep_small() -> None:
    """glibc raises its mmap threshold with every large block that is freed, and gives each thread a heap: buffers that
    live for a moment then stay in the process for ever. Fixed limits give them back (mallopt(3)); elsewhere a no-op."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    for option, value in ((-8, 1), (-3, 1 << 16), (-1, 1 << 17)):  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, value)


def give_back() -> None:
    """What is free inside the heap goes back, too (malloc_trim(3)); about a millisecond."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
