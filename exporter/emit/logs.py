"""Log records: what is worth a line, and what the line says.

Comes in: events.Event, redacted. Goes out: Record values: an EventName without dynamic parts, the kernel's
time, a severity by impact, flat attributes, a short text for people. Not its job: queues and encoding
(otlp.py).

By default only what is notable (D13): failures (but not cancelled connections), denials, and destinations
that a workload had not talked to before. A request fails by 5xx, by a gRPC status that is the server's fault, or by
having no answer. The same failure within a minute is one record at once and one with
a count when the minute ends. `all` tells everything, without folding. Headers are never in a record (D8).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from exporter.emit import semconv as c
from exporter.emit.spans import (
    Attributes,
    Pairs,
    dns,
    error_type,
    grave,
    measures,
    outcome,
    tls,
    told,
    where,
)
from exporter.emit.trace_context import Context
from exporter.events import CLOSE, CONNECT, DNS, HTTP, HTTPS, NEW, TLS, Event
from exporter.health import printable

INFO: Final = 9  # SeverityNumber
WARN: Final = 13
SEVERITY: Final = {INFO: "INFO", WARN: "WARN"}

WINDOW_SECONDS: Final = 60.0
_WINDOWS: Final = 4096
_SEEN: Final = 32_768
_LATELY: Final = 2_048

_DESTINATIONS: Final = frozenset((CONNECT, TLS, HTTP, HTTPS))
_DURATIONS: Final = {
    CONNECT: c.CONNECT_DURATION,
    DNS: c.DNS_DURATION,
    TLS: c.TLS_DURATION,
    HTTP: c.HTTP_DURATION,
    HTTPS: c.HTTP_DURATION,
}
_NAMES: Final = {
    CONNECT: c.EVENT_CONNECTION,
    CLOSE: c.EVENT_CONNECTION,
    DNS: c.EVENT_DNS,
    TLS: c.EVENT_TLS,
    HTTP: c.EVENT_HTTP,
    HTTPS: c.EVENT_HTTP,
    NEW: c.EVENT_DESTINATION_NEW,
}


class Note(NamedTuple):
    """An event that deserves a record. `repeats`: how often it happened again in the window that has just
    ended. `context`: the trace that it belongs to."""

    event: Event
    first_seen: bool = False
    repeats: int = 0
    context: Context | None = None


class Record(NamedTuple):
    """`name`: an event name, without dynamic parts. `time_ns`: when it happened, wall clock."""

    name: str
    time_ns: int
    severity: int
    body: str
    attributes: Attributes


class Notable:
    """Decides. One thread calls it. `volume`: "notable" or "all". At most 32,768 destinations and 4,096
    failures are remembered; a destination that was forgotten is told again. `inventory`: there is one, whose events
    tell new destinations, also over restarts."""

    def __init__(
        self, volume: str = "notable", clock: Callable[[], float] = time.monotonic, inventory: bool = False
    ) -> None:
        self._all, self._inventory = volume == "all", inventory
        self._clock = clock
        # Two generations of hashes are an LRU that costs 6 MB when full; an OrderedDict would cost 20.
        self._young: set[int] = set()
        self._lately: set[tuple[int, str, int]] = set()  # (cgroup, name, port), to save the work
        self._old: set[int] = set()
        # failure -> (when its window ends, how often again, the last event, its trace); in the order of their ends
        self._windows: dict[tuple[object, ...], tuple[float, int, Event, Context | None]] = {}

    def of(self, event: Event, context: Context | None = None) -> Note | None:
        """The note for this event, or None where it needs none. `context`: the trace that the event is in."""
        if not told(event):
            return None
        kind = event.kind
        first = kind == NEW or (not self._inventory and kind in _DESTINATIONS and self._first_seen(event))
        if self._all:
            return Note(event, first, context=context)
        if not grave(event):
            return Note(event, True, context=context) if first else None
        key = (event.workload.cgroup_id, event.kind, error_type(event), event.domain or event.dst, event.port)
        window = self._windows.get(key)
        if window is not None:
            self._windows[key] = (window[0], window[1] + 1, event, context)
            return None
        self._windows[key] = (self._clock() + WINDOW_SECONDS, 0, event, context)
        return Note(event, first, context=context)

    def plain(self, request: Event) -> bool:
        """Whether `of` has nothing to say of this request, as of most. Any thread may ask."""
        if self._all or grave(request):
            return False
        who = request.workload.cgroup_id
        return self._inventory or (who, request.domain or request.dst, request.port) in self._lately

    def due(self, everything: bool = False) -> list[Note]:
        """Notes for windows that ended with repeats. Call it about every second; `everything` at the end."""
        notes = []
        now = self._clock()
        while self._windows:
            key = next(iter(self._windows))
            end, repeats, event, context = self._windows[key]
            if end > now and not everything and len(self._windows) <= _WINDOWS:
                break
            del self._windows[key]
            if repeats:
                notes.append(Note(event, repeats=repeats, context=context))
        return notes

    def _first_seen(self, event: Event) -> bool:
        w = event.workload
        lately = w.cgroup_id, event.domain or event.dst, event.port
        if lately in self._lately:
            return False
        if len(self._lately) >= _LATELY:
            self._lately.clear()
        self._lately.add(lately)
        # By name where there is one: a container that restarts knows its destinations already.
        who = (w.namespace, w.pod_name, w.container_name, w.name) if w.name or w.pod_name else w.cgroup_id
        key = hash((who, event.domain or event.dst, event.port))
        if key in self._young:
            return False
        known = key in self._old
        if len(self._young) >= _SEEN // 2:
            self._old, self._young = self._young, set()
            self._lately.clear()
        self._young.add(key)
        return not known


def record(note: Note) -> Record:
    """What the record says."""
    event = note.event
    error = error_type(event)
    severity = WARN if grave(event) and error != "host_not_found" else INFO
    found = where(event)
    if event.kind == DNS:
        found += dns(event)
    elif event.kind in (HTTP, HTTPS):
        found += _request(event)
    elif event.kind == TLS:
        found += tls(event)
    elif event.kind == CLOSE:
        found += _close(event)
    elif event.kind == CONNECT and not error and event.transport == "tcp":
        found.append((c.CONNECTION_STATE, "opened"))
    if event.duration is not None and event.kind in _DURATIONS:
        found.append((_DURATIONS[event.kind], event.duration / 1e9))
    if error and event.exchange is None:
        found.append((c.ERROR_TYPE, error))
    if event.cookie:
        # Text: a cookie uses all 64 bits, an attribute's integer is signed.
        found.append((c.CONNECTION_ID, f"{event.cookie:x}"))
    if note.first_seen and event.kind != NEW:
        found.append((c.FIRST_SEEN, True))
    if note.repeats:
        found.append((c.REPEATS, note.repeats))
    return Record(_NAMES[event.kind], event.time, severity, _body(note, error), tuple(found))


def _request(event: Event) -> Pairs:
    path, _, query = event.path.partition("?")
    scheme = event.exchange.scheme if event.exchange is not None else event.kind
    pairs: Pairs = [(c.URL_SCHEME, scheme), (c.URL_PATH, path), (c.URL_QUERY, query)]
    pairs = outcome(event, "") + [pair for pair in pairs if pair[1]]
    if event.credentials:
        pairs.append((c.CLEARTEXT_CREDENTIALS, True))
    if event.exchange is not None:
        pairs += [(c.PROTOCOL_VERSION, event.exchange.version), *measures(event.exchange)]
    return pairs


def _close(event: Event) -> Pairs:
    found: Pairs = [(c.CONNECTION_STATE, "closed")]
    if event.duration is not None:
        found.append((c.CONNECTION_DURATION, event.duration / 1e9))
    found.append((c.CONNECTION_SENT, event.tx_bytes))
    found.append((c.CONNECTION_RECEIVED, event.rx_bytes))
    found.append((c.CONNECTION_RETRANSMITS, event.retransmits))
    if event.rtt is not None:
        found.append((c.CONNECTION_RTT, event.rtt / 1e9))
    return found


def _body(note: Note, error: str) -> str:
    event = note.event
    who = printable(event.comm or event.workload.name or "?", space=True)
    host = printable(event.domain or event.dst, space=True)
    if event.kind == DNS:
        text = f"{who} asked for {host} ({event.dns_type})"
    elif event.kind in (HTTP, HTTPS):
        text = f"{who} sent {printable(event.method)} {event.kind}://{host}{printable(event.path.partition('?')[0])}"
        if event.exchange is not None and event.exchange.status and not error:
            text += f": {event.exchange.status}"
    else:
        verb = "closed" if event.kind == CLOSE else "for the first time to" if event.kind == NEW else "to"
        peer = f"[{host}]:{event.port}" if ":" in host else f"{host}:{event.port}"
        text = f"{who} {verb} {peer}"
    if error:
        text += f": {error}"
    if note.repeats:
        text += f", {note.repeats} more times within {WINDOW_SECONDS:.0f} s"
    return text
