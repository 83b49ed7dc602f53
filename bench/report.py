"""Rows: what was measured, next to what, whether that is within its bound; as a table and as JSON lines.

In: values and samples. Out: text. Not its job: measuring.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, TextIO


class Row(NamedTuple):
    """One line. `reference`: what `value` is compared with. `bound`: the largest (`at_least`: smallest) that
    `judged` may be; None where the issue sets none. `low`, `high`: the quartiles of what stands in `spread_of`."""

    name: str
    value: float
    unit: str
    reference: str = ""
    reference_value: float | None = None
    ratio: float | None = None
    bound: float | None = None
    bound_of: str = "ratio"  # or "value"
    at_least: bool = False
    low: float | None = None
    high: float | None = None
    spread_of: str = ""  # "value" or "ratio"
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None where there is no bound."""
        judged = self.ratio if self.bound_of == "ratio" else self.value
        if self.bound is None or judged is None:
            return None
        return judged >= self.bound if self.at_least else judged <= self.bound

    def as_json(self) -> str:
        row = self._asdict()
        row["pass"] = self.passed
        return json.dumps(row)


class Samples(NamedTuple):
    """The median and the quartiles of some measurements."""

    median: float
    low: float
    high: float
    runs: int


def summary(values: Sequence[float]) -> Samples:
    if len(values) < 2:
        return Samples(values[0], values[0], values[0], len(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Samples(statistics.median(values), low, high, len(values))


def compared(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    reference: str,
    bound: float | None = None,
    note: str = "",
) -> Row:
    """Two things measured by turns: medians, and the median of the ratios of neighbours."""
    ratio = summary([a / b for a, b in zip(ours, theirs, strict=True) if b])
    return Row(
        name,
        summary(ours).median,
        unit,
        reference,
        summary(theirs).median,
        ratio.median,
        bound,
        low=ratio.low,
        high=ratio.high,
        spread_of="ratio",
        note=note,
    )


def single(name: str, values: Sequence[float], unit: str, bound: float | None = None, note: str = "") -> Row:
    """A thing that is compared with nothing."""
    all_ = summary(values)
    return Row(
        name,
        all_.median,
        unit,
        bound=bound,
        bound_of="value",
        low=all_.low if all_.runs > 1 else None,
        high=all_.high if all_.runs > 1 else None,
        spread_of="value",
        note=note,
    )


def number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; numbers to the right."""
    head = ("", "value", "unit", "compared with", "", "ratio", "quartiles", "bound", "", "note")
    lines = [head]
    for row in rows:
        sign = ">=" if row.at_least else "<="
        lines.append(
            (
                row.name,
                number(row.value),
                row.unit,
                row.reference,
                number(row.reference_value),
                number(row.ratio),
                f"{number(row.low)}..{number(row.high)}" if row.low is not None else "",
                f"{sign} {number(row.bound)}" if row.bound is not None else "",
                {None: "", True: "pass", False: "FAIL"}[row.passed],
                row.note,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = {1, 4, 5, 6, 7}
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Progress:
    """One line a second on standard error about what is being done; on a terminal it overwrites itself."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream, self._last, self._open = stream, 0.0, False
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """A stage begins."""
        self._end()
        print(f"bench: [{time.monotonic() - self._began:4.0f} s] {text}", file=self._stream, flush=True)
        self._last = time.monotonic()

    def step(self, text: str) -> None:
        """Somewhere in the stage; shown every two seconds."""
        now = time.monotonic()
        if now - self._last < 2:
            return
        self._last = now
        if self._stream.isatty():
            print(f"\r\x1b[Kbench:          {text}", end="", file=self._stream, flush=True)
            self._open = True
        else:
            print(f"bench:          {text}", file=self._stream, flush=True)

    def _end(self) -> None:
        if self._open:
            print("\r\x1b[K", end="", file=self._stream)
            self._open = False


progress = Progress()
