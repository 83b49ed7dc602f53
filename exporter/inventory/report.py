"""`ebfw inventory`: an inventory as a table for people, as lines for programs, as JSON; and what two of them differ in.

In: files, read. Out: text; where there is nothing to show, a line on standard error. On a terminal columns are aligned,
numbers short and times local; in a pipe values are exact, separated by tabs, with names of columns in the first line.
Not its job: reading files (book.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

from exporter.enrich.identity import Who
from exporter.health import printable
from exporter.inventory.book import Book, Place, Row, as_document, read, rows_of, stamp

_COLUMNS = (
    "WORKLOAD", "IMAGE", "DESTINATION", "PORT", "TRANSPORT", "EVIDENCE", "GROUP", "FIRST SEEN", "LAST SEEN",
    "CONNECTIONS", "SENT", "RECEIVED", "EXECUTABLES",
)  # fmt: skip
_RIGHT = frozenset(("PORT", "CONNECTIONS", "SENT", "RECEIVED"))
_BOLD, _DIM, _GREEN, _RED, _YELLOW, _OFF = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[0m"


class Style(NamedTuple):
    """`terminal`: people read it. `colour`: and like colours."""

    terminal: bool
    colour: bool

    @classmethod
    def of(cls, out: IO[str], colour: bool | None) -> Style:
        terminal = out.isatty()
        return cls(terminal, terminal and colour is not False)


class Change(NamedTuple):
    """One pair that two inventories tell differently of. `what`: "added", "gone", "changed"; `fields`: name ->
    (before, after), only where it changed."""

    what: str
    row: Row
    fields: dict[str, tuple[str, str]]


def show(path: Path, workload: str, as_json: bool, colour: bool | None, out: IO[str]) -> int:
    """Print the inventory in this file: all of it, or the workloads whose name matches. 0. Raises InventoryError."""
    found = read(path)
    rows = [row for row in rows_of(found.book) if matches(row.who, workload)]
    if workload and not rows:
        _remark(f"no workload of {path} matches {printable(workload)}")
    if as_json:
        _json(as_document(rows, found.node, found.written), out)
        return 0
    rows.sort(key=lambda row: (str(row.who), row.who.kind, row.place.name == "~other", row.place))
    style = Style.of(out, colour)
    if style.terminal and workload and not rows:
        return 0
    _table([_cells(row, style) for row in rows], style, out)
    if style.terminal:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.written // 1_000_000_000))
        workloads = len({row.who for row in rows})
        print(f"\n{len(rows)} destinations of {workloads} workloads on {found.node}, as of {written}", file=out)
    return 0


def show_diff(before: Path, after: Path, workload: str, as_json: bool, colour: bool | None, out: IO[str]) -> int:
    """Print what is in one and not in the other; how many differences there are. Raises InventoryError."""
    changes = [c for c in diff(read(before).book, read(after).book) if matches(c.row.who, workload)]
    if not changes:
        of = f" of workloads that match {printable(workload)}" if workload else ""
        _remark(f"no differences{of} between {before} and {after}")
    if as_json:
        _json({what: [_as_json(c) for c in changes if c.what == what] for what in ("added", "gone", "changed")}, out)
        return len(changes)
    style = Style.of(out, colour)
    signs = {"added": ("+", _GREEN), "gone": ("-", _RED), "changed": ("~", _YELLOW)}
    for change in changes:
        sign, tint = signs[change.what]
        row = change.row
        words = [sign, printable(str(row.who)), _place(row.place)]
        if change.what == "changed":
            words += [
                f"{name}: {printable(a) or '-'} -> {printable(b) or '-'}" for name, (a, b) in change.fields.items()
            ]
        else:
            words.append(" ".join(filter(None, (_times(row), f"via={row.evidence}", *map(printable, row.executables)))))
        text = ("  " if style.terminal else "\t").join(words)
        print(f"{tint}{text}{_OFF}" if style.colour else text, file=out)
    if style.terminal and changes:
        counts = [f"{sum(c.what == what for c in changes)} {what}" for what in ("added", "gone", "changed")]
        print(f"\n{', '.join(counts)}", file=out)
    return len(changes)


def _remark(text: str) -> None:
    """Why there is nothing, where a pipe does not get it."""
    print(f"ebfw: {text}", file=sys.stderr)


def matches(who: Who, wanted: str) -> bool:
    """Whether the workload is meant: by its name, `namespace/name`, the whole `namespace/name:container`, or its
    container; `*` and `?` stand for anything. "" means all."""
    if not wanted:
        return True
    names = {str(who), who.name, who.container, f"{who.namespace}/{who.name}" if who.namespace else who.name}
    return any(fnmatchcase(name, wanted) for name in names if name)


def diff(before: Book, after: Book) -> list[Change]:
    """Added, gone and changed pairs, in the order of workload and destination. Bytes, connections and times of one
    that is in both are no change: they always differ."""
    old = {(row.who, row.place): row for row in rows_of(before)}
    new = {(row.who, row.place): row for row in rows_of(after)}
    found = []
    for key in sorted(old.keys() | new.keys(), key=lambda key: (str(key[0]), *key)):
        a, b = old.get(key), new.get(key)
        if a is None or b is None:
            row = a or b
            assert row is not None
            found.append(Change("gone" if b is None else "added", row, {}))
        elif fields := _changed(a, b):
            found.append(Change("changed", b, fields))
    return found


def _changed(a: Row, b: Row) -> dict[str, tuple[str, str]]:
    pairs = {
        "image": (a.image, b.image),
        "evidence": (a.evidence, b.evidence),
        "group": (a.group, b.group),
        "executables": (",".join(sorted(a.executables)), ",".join(sorted(b.executables))),
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _as_json(change: Change) -> dict[str, Any]:
    row = change.row
    (workload,) = as_document([row], "", 0)["workloads"]
    (destination,) = workload.pop("destinations")
    found = {"workload": workload, "destination": destination}
    if change.fields:
        found["changed"] = {name: {"before": a, "after": b} for name, (a, b) in change.fields.items()}
    return found


def _json(value: Any, out: IO[str]) -> None:
    json.dump(value, out, indent=2)
    out.write("\n")


def _place(place: Place) -> str:
    if not place.transport:
        return printable(place.name)
    host = f"[{place.name}]" if ":" in place.name else place.name
    return f"{printable(host)}:{place.port}/{place.transport}"


def _times(row: Row) -> str:
    return f"first={stamp(row.first)} last={stamp(row.last)}"


def _cells(row: Row, style: Style) -> tuple[str, ...]:
    if style.terminal:
        first, last, sent, received = _local(row.first), _local(row.last), _size(row.tx_bytes), _size(row.rx_bytes)
    else:
        first, last, sent, received = stamp(row.first), stamp(row.last), str(row.tx_bytes), str(row.rx_bytes)
    texts = (str(row.who), row.image, row.place.name)
    place = (str(row.place.port) if row.place.port else "", row.place.transport, row.evidence, row.group)
    programs = ",".join(map(printable, row.executables))
    return (*map(printable, texts), *place, first, last, str(row.connections), sent, received, programs)


def _table(rows: Sequence[tuple[str, ...]], style: Style, out: IO[str]) -> None:
    if not style.terminal:
        for row in (_COLUMNS, *rows):
            print("\t".join(row), file=out)
        return
    # A column that says nothing takes no room.
    shown = [at for at in range(len(_COLUMNS)) if any(row[at] for row in rows) or _COLUMNS[at] == "WORKLOAD"]
    widths = {at: max(len(_COLUMNS[at]), *(len(row[at]) for row in rows), 0) for at in shown}
    print(_line(_COLUMNS, shown, widths, (_BOLD if style.colour else ""), ()), file=out)
    before = ""
    for row in rows:
        # The workload stands once; what belongs to it, below.
        first, before = row[0] != before, row[0]
        cells = row if first else ("", "", *row[2:])
        print(_line(cells, shown, widths, "", (5, 7, 8) if style.colour else ()), file=out)


def _line(cells: Sequence[str], shown: Iterable[int], widths: dict[int, int], tint: str, dim: tuple[int, ...]) -> str:
    parts = []
    for at in shown:
        text = cells[at].rjust(widths[at]) if _COLUMNS[at] in _RIGHT else cells[at].ljust(widths[at])
        parts.append(f"{_DIM}{text}{_OFF}" if at in dim else text)
    line = "  ".join(parts).rstrip()
    return f"{tint}{line}{_OFF}" if tint else line


def _local(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _size(count: int) -> str:
    value, units = float(count), ["TiB", "GiB", "MiB", "KiB"]
    if count < 1024:
        return f"{count} B"
    value /= 1024
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.1f} {units[-1]}"
