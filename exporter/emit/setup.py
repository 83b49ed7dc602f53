"""How connections came about: lookup, TCP handshake and TLS handshake put together (D11).

Comes in: events, redacted, in the order of the ring. Goes out: a Setup for each connection whose way up was slow,
failed, or is told anyway; it becomes a trace of its own, and the connection's requests have a link to it: with
keep-alive one connection serves many traces. Not its job: sampling, encoding.

What waits is bounded and expires: a connection waits for its TLS handshake, its first request or its end, a lookup
for a connection to one of its answers.
"""

from __future__ import annotations

import random

from exporter.emit import semconv as c
from exporter.emit.spans import INTERNAL, Span, error_type, failed, step, where
from exporter.enrich.names import key
from exporter.events import CANCELLED, CLOSE, CONNECT, DNS, HTTP, HTTPS, OK, TLS, Event

NOTABLE, ALL, NONE = "notable", "all", "none"
SLOW = 500_000_000  # ns

# A lookup belongs to a connection that starts so soon after its answer: later it came out of somebody's cache.
LOOKUP_NS = 1_000_000_000
WAIT_NS = 10_000_000_000
_LOOKUPS = 1024
_WAITING = 8192
_TOLD = 8192


class Setup:
    """One connection's way up. `events` in the order in which they began; `cookie` 0 where there is no socket."""

    __slots__ = ("cookie", "events", "kept", "span_id", "trace_id")

    def __init__(self, events: list[Event], cookie: int = 0) -> None:
        self.events, self.cookie = events, cookie
        self.trace_id, self.span_id = b"", b""  # set once it is told
        self.kept = False  # it is exported: a link to it leads somewhere

    @property
    def main(self) -> Event:
        """The event that says who and where to: the handshake where there is one."""
        return next((event for event in self.events if event.kind == CONNECT), self.events[-1])

    @property
    def failed(self) -> bool:
        return any(failed(event) for event in self.events)

    @property
    def weight(self) -> int:
        """How many spans it is."""
        return 1 + len(self.events)

    def span(self) -> tuple[int, int]:
        """(start, end): no child starts before its parent (D7)."""
        start = min(event.time for event in self.events)
        return start, max(event.time + (event.duration or 0) for event in self.events)

    def root(self) -> Span:
        start, end = self.span()
        main = self.main
        pairs = where(main)
        if self.cookie:
            # Text: a cookie uses all 64 bits, an attribute's integer is signed.
            pairs.append((c.CONNECTION_ID, f"{self.cookie:x}"))
        error = next((error_type(event) for event in self.events if failed(event)), "")
        if error := error or error_type(main):
            pairs.append((c.ERROR_TYPE, error))
        return Span("connection", INTERNAL, start, end, self.failed, tuple(pairs))

    def steps(self) -> list[Span]:
        return [step(event) for event in self.events]


class Setups:
    """`mode`: notable, all or none. `slow_ns`: from the first query to the end of the last handshake. One thread at
    a time."""

    def __init__(self, mode: str = NOTABLE, slow_ns: int = SLOW) -> None:
        self._mode, self._slow = mode, slow_ns
        self._lookups: dict[tuple[int | str, str], Event] = {}
        self._waiting: dict[int, Setup] = {}
        self._told: dict[int, Setup] = {}
        self._over: dict[int, int] = {}  # of these, cookies of connections that have ended, and when

    def __len__(self) -> int:
        return len(self._lookups) + len(self._waiting) + len(self._told)

    def __contains__(self, cookie: int) -> bool:
        """Whether a request of this connection concerns us. Any thread may ask."""
        return cookie in self._waiting or cookie in self._told

    def add(self, event: Event) -> list[Setup]:
        """Take one event; the set-ups that are complete now and worth telling."""
        if self._mode == NONE:
            return []
        kind = event.kind
        if kind in (HTTP, HTTPS):
            waiting = self._waiting.pop(event.cookie, None) if self._waiting else None
            return self._finish(waiting) if waiting is not None else []
        if kind == CONNECT:
            return self._connect(event) if event.transport == "tcp" else []
        if kind == DNS:
            return self._lookup(event)
        if kind == TLS:
            setup = self._waiting.pop(event.cookie, None) or Setup([], event.cookie)
            if event.duration is not None or failed(event):
                setup.events.append(event)
            return self._finish(setup) if setup.events else []
        if kind == CLOSE:
            waiting = self._waiting.pop(event.cookie, None)
            told = self._finish(waiting) if waiting is not None else []
            if event.cookie in self._told:
                # Not forgotten yet: the last request is told when its response is known to be over.
                self._over[event.cookie] = event.time
            return told
        return []

    def of(self, cookie: int) -> Setup | None:
        """What the connection's requests have a link to: None where its set-up is not told."""
        return self._told.get(cookie) if self._told else None

    def expire(self, now_ns: int) -> list[Setup]:
        """Set-ups that waited long enough. `now_ns`: wall clock."""
        told: list[Setup] = []
        while self._waiting:
            cookie, setup = next(iter(self._waiting.items()))
            if 0 <= now_ns - setup.main.time < WAIT_NS:
                break
            del self._waiting[cookie]
            told += self._finish(setup)
        while self._over:
            cookie, ended = next(iter(self._over.items()))
            if 0 <= now_ns - ended < WAIT_NS:
                break
            del self._over[cookie]
            self._told.pop(cookie, None)
        while self._lookups:
            place, event = next(iter(self._lookups.items()))
            if 0 <= now_ns - event.time < WAIT_NS:
                break
            del self._lookups[place]
        return told

    def _lookup(self, event: Event) -> list[Setup]:
        if event.search_expansion:
            return []
        if failed(event):
            return self._finish(Setup([event]))
        owner = key(event.workload)
        for address in event.answers:
            self._lookups.pop((owner, address), None)
            self._lookups[owner, address] = event
        while len(self._lookups) > _LOOKUPS:
            del self._lookups[next(iter(self._lookups))]
        return []

    def _connect(self, event: Event) -> list[Setup]:
        lookup = self._lookups.get((key(event.workload), event.dst)) if self._lookups else None
        if lookup is not None and not 0 <= event.time - lookup.time - (lookup.duration or 0) + 1_000_000 <= LOOKUP_NS:
            lookup = None
        setup = Setup([event] if lookup is None else [lookup, event], event.cookie)
        if event.status == CANCELLED and self._mode != ALL:
            return []
        if event.status != OK or not event.cookie:
            return self._finish(setup)
        told: list[Setup] = []
        if len(self._waiting) >= _WAITING:
            told = self._finish(self._waiting.pop(next(iter(self._waiting))))
        self._waiting[event.cookie] = setup
        return told

    def _finish(self, setup: Setup) -> list[Setup]:
        start, end = setup.span()
        if self._mode != ALL and not setup.failed and end - start < self._slow:
            return []
        setup.trace_id, setup.span_id = random.randbytes(16), random.randbytes(8)
        if setup.cookie and setup.main.status in ("", OK):
            if len(self._told) >= _TOLD:
                oldest = next(iter(self._told))
                del self._told[oldest]
                self._over.pop(oldest, None)
            self._told[setup.cookie] = setup
        return [setup]
