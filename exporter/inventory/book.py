"""What an inventory holds, and its file: pairs of a workload and a destination, written whole and moved into place.

In and out: `Book`, a path. Not its job: what gets into it (watch.py), showing it (report.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from exporter.enrich.identity import Who
from exporter.errors import InventoryError
from exporter.events import ADDRESS, DNS_ANSWER, HOST, SNI

VERSION = 1
FORMAT = "ebfw-inventory"
DEFAULT = Path("/var/lib/ebfw/inventory.json")  # where `ebfw inventory` looks when nothing says otherwise
MAX_BYTES = 64 << 20
EXECUTABLES = 4

OTHER = "~other"
_RANK = {HOST: 3, SNI: 2, DNS_ANSWER: 1, ADDRESS: 0}


class Place(NamedTuple):
    """A destination. `name` is the address where no name is known."""

    name: str
    port: int
    transport: str


class Entry:
    """What is known of a pair. Times are whole seconds since the epoch."""

    __slots__ = ("connections", "evidence", "executables", "first", "group", "last", "rx_bytes", "tx_bytes")

    def __init__(self, first: int, evidence: str = "", group: str = "") -> None:
        self.first = self.last = first
        self.tx_bytes = self.rx_bytes = self.connections = 0
        self.executables: tuple[str, ...] = ()
        self.evidence, self.group = evidence, group

    def seen(self, when: int, evidence: str, group: str, comm: str) -> None:
        if when > self.last:
            self.last = when
        if evidence != self.evidence and _RANK.get(evidence, -1) > _RANK.get(self.evidence, -1):
            self.evidence = evidence
        self.group = group
        if comm and comm not in self.executables and len(self.executables) < EXECUTABLES:
            self.executables = (*self.executables, comm)


class Destinations:
    """Of one workload. The place called OTHER is all that found no room."""

    __slots__ = ("image", "places")

    def __init__(self, image: str = "") -> None:
        self.image = image
        self.places: dict[Place, Entry] = {}

    def full(self, limit: int) -> bool:
        return len(self.places) - (Place(OTHER, 0, "") in self.places) >= limit


Book = dict[Who, Destinations]


class Row(NamedTuple):
    """One pair, as it stands in the file."""

    who: Who
    image: str
    place: Place
    first: int
    last: int
    tx_bytes: int
    rx_bytes: int
    connections: int
    executables: tuple[str, ...]
    evidence: str
    group: str


class File(NamedTuple):
    """A file, read. `written`: ns since the epoch."""

    book: Book
    node: str
    written: int


def rows_of(book: Book) -> Iterator[Row]:
    """Every pair, workload by workload."""
    for identity, destinations in book.items():
        for place, e in destinations.places.items():
            yield Row(
                identity, destinations.image, place, e.first, e.last, e.tx_bytes, e.rx_bytes, e.connections,
                e.executables, e.evidence, e.group,
            )  # fmt: skip


def stamp(seconds: int) -> str:
    """RFC 3339 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def as_document(rows: Iterable[Row], node: str, written: int) -> dict[str, Any]:
    """The file's content: workloads with their destinations; empty values are left out."""
    workloads: dict[Who, dict[str, Any]] = {}
    for row in rows:
        workload = workloads.get(row.who)
        if workload is None:
            known = {**row.who._asdict(), "image": row.image}
            workload = workloads[row.who] = {key: value for key, value in known.items() if value} | {"destinations": []}
        found = {
            "name": row.place.name,
            "port": row.place.port,
            "transport": row.place.transport,
            "first_seen": stamp(row.first),
            "last_seen": stamp(row.last),
            "tx_bytes": row.tx_bytes,
            "rx_bytes": row.rx_bytes,
            "connections": row.connections,
            "executables": list(row.executables),
            "evidence": row.evidence,
            "group": row.group,
        }
        workload["destinations"].append({key: value for key, value in found.items() if value or value == 0})
    return {
        "format": FORMAT,
        "version": VERSION,
        "node": node,
        "written": datetime.fromtimestamp(written / 1e9, UTC).isoformat(),
        "workloads": list(workloads.values()),
    }


def write(path: Path, rows: Iterable[Row], node: str, written: int) -> None:
    """Write the file beside its place and move it there: a reader sees the old one or the new one, and so does
    whoever comes after a crash. Only its owner may read it: it says who talks to whom. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(as_document(rows, node, written), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check(path: Path) -> None:
    """Raises InventoryError where the file cannot be kept at that place: the folder is missing or cannot be written,
    or what is there did not begin as an inventory, and is somebody else's."""
    named = f"EBFW_INVENTORY={path}"
    if not path.parent.is_dir():
        # Not made: a spelling mistake would become a folder somewhere, which nobody removes.
        raise InventoryError(f"{named}: the folder {path.parent} does not exist; make it, or name another path")
    try:
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, os.strerror(13))
        if not path.exists():
            return
        ours = path.is_file() and _begins_as_ours(path)
    except OSError as error:
        raise InventoryError(
            f"{named}: cannot write there: {error.strerror}; name another path, or leave it empty to keep no inventory"
        ) from None
    if not ours:
        raise InventoryError(f"{named}: what is there is no inventory of ebfw, and stays as it is; name another path")


_BEGINNING = json.dumps({"format": FORMAT}, separators=(",", ":"))[:-1].encode()


def _begins_as_ours(path: Path) -> bool:
    """As `write` begins a file, however it goes on, or where it was cut off: an empty one is nobody's."""
    with open(path, "rb") as file:
        head = b"".join(file.read(1024).split())
    return head.startswith(_BEGINNING) or _BEGINNING.startswith(head)


def read(path: Path) -> File:
    """Read a file. Raises InventoryError, which says why not."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except PermissionError:
        raise InventoryError(f"{path}: only its owner may read it; try: sudo ebfw inventory") from None
    except FileNotFoundError:
        raise InventoryError(
            f"{path}: there is no inventory; start the agent with EBFW_INVENTORY={path.absolute()}, or name its file"
        ) from None
    except OSError as error:
        raise InventoryError(f"{path}: cannot read the inventory: {error.strerror}") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError
        found = json.loads(data)
        if found["format"] != FORMAT:
            raise ValueError
        version = int(found["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InventoryError(f"{path}: this is no inventory of ebfw, or it is damaged") from None
    if version > VERSION:
        raise InventoryError(f"{path}: written by a later version of ebfw (format {version}, this one reads {VERSION})")
    try:
        book: Book = {}
        for workload in found["workloads"]:
            identity = Who(*(_text(workload.get(key, "")) for key in Who._fields))
            destinations = book.setdefault(identity, Destinations(_text(workload.get("image", ""))))
            for given in workload["destinations"]:
                place = Place(_text(given["name"]), _number(given["port"]), _text(given.get("transport", "")))
                entry = Entry(_seconds(given["first_seen"]), _text(given.get("evidence", "")))
                entry.last = _seconds(given["last_seen"])
                entry.tx_bytes, entry.rx_bytes = _number(given["tx_bytes"]), _number(given["rx_bytes"])
                entry.connections = _number(given["connections"])
                entry.executables = tuple(map(_text, given.get("executables", [])))[:EXECUTABLES]
                entry.group = _text(given.get("group", ""))
                destinations.places[place] = entry
        written = int(datetime.fromisoformat(_text(found["written"])).timestamp() * 1e9)
        return File(book, _text(found["node"]), written)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise InventoryError(f"{path}: this inventory of ebfw is damaged") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _seconds(value: object) -> int:
    return int(datetime.fromisoformat(_text(value)).timestamp())
