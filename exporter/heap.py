"""The process's heap, kept small, and its garbage collector, kept out of the way. Nothing goes in, nothing comes out
but memory, back to the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from itertools import count

_FULLY = 12  # every so many times `give_back` walks over everything that lives

_times = count(1)


def take_charge() -> None:
    """glibc raises its mmap threshold with every large block that is freed, and gives each thread a heap: buffers that
    live for a moment then stay in the process for ever. Fixed limits give them back (mallopt(3)); elsewhere a no-op.

    Python's collector would begin in the middle of a batch, and walk over what is under way: an eighth of the agent's
    CPU, for nothing, because reference counts free all of it a moment later. It comes when it is called."""
    gc.disable()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    for option, value in ((-8, 1), (-3, 1 << 16), (-1, 1 << 17)):  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, value)


def collect() -> None:
    """Free the cycles among what is new since the last time. Call it when nothing is under way."""
    gc.collect(0)


def give_back() -> None:
    """Free cycles that outlived `collect`, and what is free inside the heap goes back, too (malloc_trim(3)); a
    millisecond, and some tens of them each twelfth time."""
    gc.collect(1 if next(_times) % _FULLY else 2)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
