"""From the kernel's clock to wall time (D7)."""

from __future__ import annotations

import time

import pytest

from exporter import agent
from exporter import clock as module
from exporter.clock import Clock


def test_d7_the_offset_is_that_of_the_quickest_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the readings of the two clocks a thread may lose the CPU: of a few readings the quickest counts."""
    truth = time.time_ns() - time.monotonic_ns()
    real, waits = time.time_ns, iter([0.05, 0.0, 0.05])

    def late() -> int:
        now = real()
        time.sleep(next(waits))
        return now

    monkeypatch.setattr(module.time, "time_ns", late)
    clock = Clock()
    assert abs(clock.wall(0) - truth) < 20_000_000  # without the choice it would be 25 ms off


def test_d7_a_clock_that_is_set_is_followed_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    before = clock.wall(1000)
    real = time.time_ns
    monkeypatch.setattr(module.time, "time_ns", lambda: real() + 3_600_000_000_000)
    clock.set()
    assert abs(clock.wall(1000) - before - 3_600_000_000_000) < 1_000_000_000
    assert agent.CLOCK_SECONDS <= 1.0
