"""What is seen becomes the inventory: what each workload talks to, since when, how much, and how we know.

In: events (who, to whom, by what name, which executable) and deltas of the kernel's counters (bytes). Out: an event
of kind `new` for each pair of workload and destination that was not known before; the file, now and then. Not its
job: what stands in the file (book.py), hiding secrets (the events are redacted), what `exclude` hides (it is not told
to anybody, and not here).

A connection is entered a moment after it opened: most show their real name (a server name, a Host) right after, and an
address that turns out to be api.example.com is no second destination. Bytes of a flow without a name go where the last
name seen behind that address went. An attempt that failed is no destination.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

from exporter import events
from exporter.enrich.identity import UNNAMED, Who, who
from exporter.errors import InventoryError
from exporter.events import ADDRESS, DNS_ANSWER, HOST, OK, SERVER, SNI, Counts, Event, Flow, Workload
from exporter.health import losses
from exporter.inventory.book import OTHER, Book, Destinations, Entry, Place, Row, check, read, rows_of, write

log = logging.getLogger(__name__)

PER_WORKLOAD = 1_000
WORKLOADS = 500
TOTAL = 10_000  # some 8 MB
KEEP_SECONDS = 90 * 86_400  # not seen for so long: forgotten
NAME_SECONDS = 2.0  # for a connection to show its name
FLOW_SECONDS = 6.0  # for an event of a flow that only the counters have seen
SAVE_SECONDS, SAVE_NEW_SECONDS = 60.0, 5.0
_PENDING = 8_192
_INDEXED = 16_384
_REST = Place(OTHER, 0, "")
_SHOWN = frozenset((events.TLS, events.HTTP, events.HTTPS))

Key = tuple[int, str, int, str]  # cgroup id, name or address, port, transport


class _Waiting:
    """A flow that only the counters have seen so far."""

    __slots__ = ("counts", "flow", "since")

    def __init__(self, flow: Flow, since: float) -> None:
        self.flow, self.since = flow, since
        self.counts = [0] * len(Counts._fields)


class Inventory:
    """One thread calls it, the pipeline's; files are written by another.

    `lookup`: cgroup id -> the workload as it is known now (a container's name comes late). `wall`: ns since the
    epoch; `clock`: seconds, monotonic. Raises InventoryError where the file cannot be kept there."""

    def __init__(
        self,
        path: Path,
        node: str,
        lookup: Callable[[int], Workload],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path, self._node, self._lookup, self._clock, self._wall = path, node, lookup, clock, wall
        self._book: Book = {}
        self._size = 0
        self._index: dict[Key, Entry] = {}
        self._opening: OrderedDict[int, tuple[float, Event]] = OrderedDict()  # by cookie
        self._unnamed: OrderedDict[int, tuple[float, Event, int]] = OrderedDict()  # of workloads without a name yet
        self._flows: OrderedDict[Key, _Waiting] = OrderedDict()
        self._aliases: dict[Key, str] = {}
        self._new: list[Event] = []
        self._number = 0
        self._changed = False
        self._save_at = clock() + SAVE_SECONDS
        self._saver: threading.Thread | None = None
        self._counted_until = 0  # wall ns: what kernel rows counted before is in the file
        self._open()

    def __len__(self) -> int:
        return self._size

    # --- what is seen ---------------------------------------------------------------------------------------------

    def observe(self, told: Iterable[Event]) -> None:
        """Take events that are told, in their order."""
        for event in told:
            self._observe(event)

    def _observe(self, event: Event) -> None:
        kind = event.kind
        if kind == events.CONNECT:
            if event.status == OK and event.role != SERVER:
                opening = self._opening
                if event.cookie in opening:  # a UDP socket with several peers
                    self._enter(opening.pop(event.cookie)[1], 1)
                opening[event.cookie] = (self._clock(), event)
                if len(opening) > _PENDING:
                    self._enter(opening.popitem(last=False)[1][1], 1)
        elif kind == events.CLOSE:
            if (found := self._opening.pop(event.cookie, None)) is not None:
                self._enter(found[1]._replace(domain=event.domain, name_source=event.name_source, group=event.group), 1)
        elif kind in _SHOWN and event.role != SERVER:
            opened = self._opening.pop(event.cookie, None) if event.cookie else None
            if not event.port:  # a request whose peer is not known: its connection is an event of its own
                return
            if event.dst and event.name_source in (SNI, HOST):
                self._alias(event, event.domain)
            self._enter(event, 1 if opened is not None else 0)

    def hide(self, filtered: Iterable[Event]) -> None:
        """Take events that `exclude` hides: a connection that opened before it showed its name is hidden, too."""
        for event in filtered:
            if self._opening.pop(event.cookie, None) is not None or event.kind in _SHOWN:
                self._alias(event, "")

    def add(self, flow: Flow, delta: Counts, since_ns: int, first_read: bool = False) -> None:
        """Add by how much a kernel row moved. `since_ns`: wall clock, when that row began to count. `first_read`: the
        delta is all that the row holds, which may be in the file already."""
        if flow.role == SERVER or flow.filtered or flow.other or not flow.peer:
            return
        if first_read and since_ns <= self._counted_until:
            return
        key = self._flow_key(flow)
        if not key[1]:  # `exclude` hides the name that it showed
            return
        entry = self._index.get(key)
        if entry is None:
            known = self._book.get(who(flow.workload))
            entry = known.places.get(Place(*key[1:])) if known is not None else None
            if entry is not None:
                self._remember(key, entry)
        if entry is not None:
            self._move(entry, delta)
            return
        waiting = self._flows.get(key)
        if waiting is None:
            if len(self._flows) >= _PENDING:
                losses.add("table", "inventory_flows")
                return
            waiting = self._flows[key] = _Waiting(flow, self._clock())
        waiting.counts = list(map(int.__add__, waiting.counts, delta))

    def due(self) -> list[Event]:
        """Enter what has waited long enough; the events of kind `new` since the last call."""
        now = self._clock()
        while self._opening:
            cookie, (since, event) = next(iter(self._opening.items()))
            if now - since < NAME_SECONDS:
                break
            del self._opening[cookie]
            self._enter(event, 1)
        while self._unnamed:
            number, (since, event, connections) = next(iter(self._unnamed.items()))
            if now - since < 2 * NAME_SECONDS:
                break
            del self._unnamed[number]
            self._enter(event, connections, wait=False)
        while self._flows:
            key, waiting = next(iter(self._flows.items()))
            if now - waiting.since < FLOW_SECONDS:
                break
            del self._flows[key]
            self._enter_flow(waiting)
        found, self._new = self._new, []
        return found

    def _flow_key(self, flow: Flow) -> Key:
        key = (flow.workload.cgroup_id, flow.name or flow.peer, flow.port, flow.transport)
        if flow.name_source in (ADDRESS, DNS_ANSWER):
            name = self._aliases.get((key[0], flow.peer, flow.port, flow.transport))
            if name is not None:
                return (key[0], name, flow.port, flow.transport)
        return key

    def _alias(self, event: Event, name: str) -> None:
        key = (event.workload.cgroup_id, event.dst, event.port, event.transport)
        if self._aliases.get(key) != name:
            if len(self._aliases) >= _INDEXED:
                self._aliases.clear()
            self._aliases[key] = name

    def _enter(self, event: Event, connections: int, wait: bool = True) -> Entry | None:
        entry = self._index.get((event.workload.cgroup_id, event.domain or event.dst, event.port, event.transport))
        if entry is None:
            entry = self._find(event, connections, wait)
            if entry is None:
                return None
        entry.connections += connections
        entry.seen(event.time // 1_000_000_000, event.name_source, event.group, event.comm)
        self._changed = True
        return entry

    def _find(self, event: Event, connections: int, wait: bool) -> Entry | None:
        """The entry of the pair, made if there is none; None if the workload is still to be named."""
        found = self._lookup(event.workload.cgroup_id)
        workload = found if found.kind != "unknown" else event.workload
        identity = who(workload)
        if wait and identity.name == UNNAMED and len(self._unnamed) < _PENDING:
            self._number += 1
            self._unnamed[self._number] = (self._clock(), event, connections)
            return None
        destinations = self._book.get(identity)
        if destinations is None:
            if len(self._book) >= WORKLOADS:
                identity = Who(OTHER, "", OTHER, "")
            destinations = self._book.setdefault(identity, Destinations())
        destinations.image = workload.image or destinations.image
        place = Place(event.domain or event.dst, event.port, event.transport)
        entry = destinations.places.get(place)
        if entry is None and (self._size >= TOTAL or destinations.full(PER_WORKLOAD) or identity.name == OTHER):
            losses.add("table", "inventory_full")
            entry = destinations.places.setdefault(_REST, Entry(event.time // 1_000_000_000))
        elif entry is None:
            entry = Entry(event.time // 1_000_000_000, event.name_source, event.group)
            destinations.places[place] = entry
            self._size += 1
            self._save_at = min(self._save_at, self._clock() + SAVE_NEW_SECONDS)
            self._new.append(event._replace(kind=events.NEW, workload=workload, status="", duration=None, rtt=None))
        self._remember((event.workload.cgroup_id, *place), entry)
        return entry

    def _remember(self, key: Key, entry: Entry) -> None:
        if len(self._index) >= _INDEXED:
            self._index.clear()
        self._index[key] = entry

    def _enter_flow(self, waiting: _Waiting) -> None:
        flow, counts = waiting.flow, Counts._make(waiting.counts)
        key = self._flow_key(flow)  # a name may have come
        if not key[1]:
            return
        if flow.transport == "tcp" and key not in self._index and not (counts.opened or counts.closed):
            failed = counts.refused or counts.timed_out or counts.cancelled or counts.unreachable or counts.denied
            if failed or not counts.rx_bytes:
                return
        event = Event(
            events.CONNECT,
            self._wall(),
            flow.workload,
            0,
            "",
            flow.transport,
            flow.role,
            "",
            0,
            flow.peer,
            flow.port,
            flow.scope,
            key[1],
            flow.name_source if key[1] == flow.name else SNI,
            OK,
            group=flow.group,
        )
        entry = self._enter(event, 0, wait=False)
        if entry is not None:
            self._move(entry, counts)

    def _move(self, entry: Entry, delta: Counts) -> None:
        entry.tx_bytes += delta.tx_bytes
        entry.rx_bytes += delta.rx_bytes
        entry.last = max(entry.last, self._wall() // 1_000_000_000)
        self._changed = True

    # --- the file -------------------------------------------------------------------------------------------------

    def save(self, wait: bool = False) -> None:
        """Write the file if something changed and it is time; `wait`: now, and until it is written."""
        if self._saver is not None and self._saver.is_alive():
            if not wait:
                return
            self._saver.join()
        now = self._clock()
        if not self._changed or (now < self._save_at and not wait):
            return
        self._changed, self._save_at = False, now + SAVE_SECONDS
        self._forget()
        written = self._wall()
        rows = list(rows_of(self._book))  # a copy: the writer is another thread
        if wait:
            self._write(rows, written)
        else:
            self._saver = threading.Thread(target=self._write, args=(rows, written), name="inventory", daemon=True)
            self._saver.start()

    def close(self) -> None:
        """Enter what waits, and write the file."""
        for _, event in self._opening.values():
            self._enter(event, 1, wait=False)
        for _, event, connections in self._unnamed.values():
            self._enter(event, connections, wait=False)
        for waiting in self._flows.values():
            self._enter_flow(waiting)
        self._opening.clear()
        self._unnamed.clear()
        self._flows.clear()
        self.save(wait=True)

    def _write(self, rows: list[Row], written: int) -> None:
        try:
            write(self._path, rows, self._node, written)
        except OSError as error:
            self._changed = True
            losses.add("export", "inventory")
            log.warning("the inventory cannot be written to %s: %s", self._path, error.strerror or error)

    def _forget(self) -> None:
        old = self._wall() // 1_000_000_000 - KEEP_SECONDS
        for identity, destinations in list(self._book.items()):
            for place, entry in list(destinations.places.items()):
                if entry.last < old:
                    del destinations.places[place]
                    self._size -= place != _REST
                    self._index.clear()
            if not destinations.places:
                del self._book[identity]

    def _open(self) -> None:
        check(self._path)
        if not self._path.exists():
            return
        try:
            found = read(self._path)
        except InventoryError as error:
            aside = self._path.with_name(f"{self._path.name}.unreadable")
            with contextlib.suppress(OSError):
                os.replace(self._path, aside)
            log.warning("%s; it is kept as %s, and a new inventory is begun", error, aside)
            return
        self._book = found.book
        self._size = sum(place != _REST for known in found.book.values() for place in known.places)
        self._counted_until = found.written
        log.info("inventory: %d destinations of %d workloads from %s", self._size, len(self._book), self._path)
