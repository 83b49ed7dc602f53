"""The kernel's clock and the wall's.

In: CLOCK_MONOTONIC nanoseconds. Out: nanoseconds since the epoch. Not its job: when to look at the clocks (agent).
"""

from __future__ import annotations

import time


class Clock:
    """From the kernel's clock (CLOCK_MONOTONIC) to wall time. The offset moves when the wall clock is set."""

    def __init__(self) -> None:
        self.started = time.monotonic_ns()
        self.set()

    def set(self) -> None:
        """Read the offset again. Of a few readings the one that took least: between the two clocks we may have had to
        wait for the CPU."""
        readings = []
        for _ in range(3):
            before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
            readings.append((after - before, wall - (before + after) // 2))
        self._offset = min(readings)[1]

    def wall(self, monotonic: int) -> int:
        """Nanoseconds since the epoch."""
        return monotonic + self._offset
