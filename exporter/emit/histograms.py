"""Histograms: one measurement into explicit buckets and, where asked for, exponential ones; exemplars beside them.

Comes in: values, trace ids. Goes out: bucket counts that a reader in another thread copies in one step. Not its job:
which histogram a value belongs to (metrics.py), how it looks on a face.

Source of the exponential form: OpenTelemetry metrics data model, "ExponentialHistogram": at scale s the bucket i holds
what is above 2**(i / 2**s) and not above 2**((i + 1) / 2**s). A histogram begins at the finest scale and halves its
resolution whenever its values span more than 160 buckets. Resolution never comes back, with delta temporality either:
the interval's counts are differences of totals.
"""

from __future__ import annotations

from bisect import bisect_left
from math import ceil, frexp, log2
from typing import Any, NamedTuple

BUCKETS = 160
SCALE = 20  # the finest; 160 buckets of it span one part in ten thousand
_HEAD = 3


class Exemplar(NamedTuple):
    """One measurement out of a bucket: in the metric's unit, when it ended, which span it was ("" where none)."""

    value: float
    time_ns: int
    trace_id: bytes = b""
    span_id: bytes = b""


class Histogram:
    """`cells`: a count for each bucket, the last for what is above every bound, then the sum.

    `exponential`: None, or [scale, number of the first bucket, count of zeros, *counts of buckets]. `exemplars`: None,
    or the newest of each explicit bucket. `extra`: something is to be done beside counting into `cells`. `sent` and the
    like are what a delta reader was given; `told` which exemplars.
    """

    __slots__ = (
        "bounds",
        "cells",
        "exemplars",
        "exponential",
        "extra",
        "key",
        "last",
        "overflow",
        "sent",
        "sent_at",
        "sent_exponential",
        "start",
        "told",
    )  # fmt: skip

    def __init__(
        self, key: tuple[Any, ...], bounds: tuple[float, ...], start: int, last: float, exponential: bool = False
    ) -> None:
        self.key, self.bounds, self.start, self.last = key, bounds, start, last
        self.cells: list[Any] = [0] * (len(bounds) + 1) + [0.0]
        self.exponential: list[int] | None = [SCALE, 0, 0] if exponential else None
        self.exemplars: list[Exemplar | None] | None = None
        self.overflow: list[Any] | None = None  # cells of the counter of what was folded into this one
        self.extra = exponential
        self.sent: list[Any] | None = None
        self.sent_at: list[int] | None = None
        self.sent_exponential: list[int] | None = None
        self.told: list[Exemplar | None] | None = None

    def beside(self, value: float) -> None:
        """What `extra` says is to be done for a value that `cells` have counted."""
        if self.exponential is not None:
            self.exponential = added(self.exponential, value)
        if self.overflow is not None:
            self.overflow[0] += 1

    def exemplify(self, exemplar: Exemplar) -> None:
        """Keep it as the newest of its bucket."""
        if self.exemplars is None:
            self.exemplars = [None] * (len(self.bounds) + 1)
        self.exemplars[bisect_left(self.bounds, exemplar.value)] = exemplar


def added(cells: list[int], value: float) -> list[int]:
    """Exponential cells with one value more; the same list where its bucket was there. Not negative."""
    if value <= 0:
        cells[2] += 1
        return cells
    scale, first = cells[0], cells[1]
    index = bucket(value, scale)
    width = len(cells) - _HEAD
    if not width:
        return [scale, index, cells[2], 1]
    if 0 <= index - first < width:
        cells[_HEAD + index - first] += 1
        return cells
    low, high, coarser = min(index, first), max(index, first + width - 1), 0
    while (high >> coarser) - (low >> coarser) >= BUCKETS:
        coarser += 1
    scale, first, zeros, *counts = coarsened(cells, coarser)
    index >>= coarser
    if index < first:
        counts[:0] = [0] * (first - index)
        first = index
    counts += [0] * (index - first + 1 - len(counts))
    counts[index - first] += 1
    return [scale, first, zeros, *counts]


def bucket(value: float, scale: int) -> int:
    """Number of the bucket that holds a positive value."""
    mantissa, exponent = frexp(value)  # value = mantissa * 2**exponent, 0.5 <= mantissa < 1
    exponent -= 1
    # A power of two is the upper bound of its bucket: told apart exactly, which a logarithm would not.
    power = mantissa == 0.5
    if scale <= 0:
        return (exponent - power) >> -scale
    if power:
        return (exponent << scale) - 1
    return (exponent << scale) + max(1, ceil(log2(2 * mantissa) * (1 << scale))) - 1


def coarsened(cells: list[int], by: int) -> list[int]:
    """The same counts at a scale that is `by` lower."""
    scale, first, zeros, *counts = cells
    if not by or not counts:
        return [scale - by, first >> by, zeros, *counts]
    start = first >> by
    merged = [0] * (((first + len(counts) - 1) >> by) - start + 1)
    for index, count in enumerate(counts, first):
        merged[(index >> by) - start] += count
    return [scale - by, start, zeros, *merged]


def since(now: list[int], before: list[int] | None) -> list[int]:
    """What exponential cells counted since they were `before`, at the scale of now."""
    if before is None:
        return now
    scale, first, zeros, *counts = now
    _, then, zeros_then, *counts_then = coarsened(before, before[0] - scale)
    for index, count in enumerate(counts_then, then - first):
        counts[index] -= count
    while counts and not counts[-1]:
        counts.pop()
    empty = next((index for index, count in enumerate(counts) if count), 0)
    return [scale, first + empty, zeros - zeros_then, *counts[empty:]]
