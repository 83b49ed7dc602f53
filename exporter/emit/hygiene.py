"""Hygiene: what is worth a look although it works. Events and deltas of counters in, totals by workload out.

Comes in: events before redaction, since credentials are seen here (never kept: all that leaves is that there were
some), and deltas of the kernel's counters. Goes out: metrics under `ebfw.hygiene.`, and one mark on an event. Not its
job: names and units (semconv.py), series (metrics.py).

    cleartext_credentials  a plaintext request carried Authorization, Cookie or user info
    obsolete_tls           a handshake agreed on less than TLS 1.2 (RFC 8996)
    no_post_quantum        a key exchange that does not hold against a quantum computer
    dns_search             a lookup that only the resolver's search list asked for
    requests, connections  how often a connection is used again
    time                   in dns, connect and tls, beside the requests themselves
    ports                  of the ephemeral range, how many are held towards one destination

Workloads are told apart by what stays the same over restarts. Beyond WORKLOADS of them all are `~other`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from pathlib import Path

from exporter.emit import semconv as c
from exporter.emit.metrics import Metrics
from exporter.enrich.identity import who
from exporter.events import CLOSE, CONNECT, DNS, HTTP, HTTPS, OK, SERVER, TLS, Counts, Event, Flow, Workload

log = logging.getLogger(__name__)

WORKLOADS = 200
DESTINATIONS = 200  # that ever had PORTS_SHOWN ports in use
PORTS_SHOWN = 100
PORTS_TOLD = 0.8  # of the range, in use towards one destination: a warning in the agent's log
_OPEN = 65_536
_CONNECTIONS = 8_192
_CACHED = 4_096

_CREDENTIALS = frozenset(("authorization", "proxy-authorization", "cookie"))
_OBSOLETE = frozenset(("1.1", "1.0", "ssl 3.0", "ssl 2.0", "3.0", "2.0"))
_POST_QUANTUM = ("MLKEM", "KYBER")
_AT = Event._fields.index("credentials")
_new = tuple.__new__

CLEARTEXT, OBSOLETE, NO_POST_QUANTUM, SEARCH = (
    "cleartext_credentials",
    "obsolete_tls",
    "no_post_quantum",
    "dns_search",
)


class Hygiene:
    """For one thread, the pipeline's. `port_range`: the file with the ephemeral ports' bounds."""

    def __init__(self, metrics: Metrics, port_range: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> None:
        self._metrics = metrics
        self._available = _ports(port_range)
        if self._available:
            metrics.gauge(c.PORTS_AVAILABLE.name, self._available)
        self._names: dict[int, tuple[Workload, str]] = {}
        self._known: set[str] = set()
        self._findings: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._checked: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._time: defaultdict[tuple[str, str], int] = defaultdict(int)  # ns
        self._connections: defaultdict[str, int] = defaultdict(int)
        self._requests: defaultdict[str, int] = defaultdict(int)
        self._carried: OrderedDict[int, int] = OrderedDict()  # requests so far, by the socket's cookie
        self._closed: list[tuple[int, Workload]] = []
        self._open: dict[tuple[str, str, int], int] = {}
        self._shown: set[tuple[str, str, int]] = set()
        self._told: set[tuple[str, str, int]] = set()

    # --- events ---------------------------------------------------------------------------------------------------

    def observe(self, events: Iterable[Event]) -> list[Event]:
        """Count; the same events, those with credentials in the clear marked."""
        return [self._one(event) for event in events]

    def _one(self, event: Event) -> Event:
        if event.role == SERVER:
            return event
        kind = event.kind
        if kind == CONNECT:
            if event.status == OK and event.duration is not None:
                self._time[self._name(event.workload), "connect"] += event.duration
        elif kind == DNS:
            name = self._name(event.workload)
            self._checked[name, SEARCH] += 1
            if event.search_expansion:
                self._findings[name, SEARCH] += 1
            if event.duration is not None:
                self._time[name, "dns"] += event.duration
        elif kind == CLOSE:
            self._closed.append((event.cookie, event.workload))
        elif kind == TLS:
            self._handshake(event)
        elif kind in (HTTP, HTTPS):
            return self._request(event)
        return event

    def _handshake(self, event: Event) -> None:
        name, tls = self._name(event.workload), event.tls
        if event.duration is not None:
            self._time[name, "tls"] += event.duration
        if tls is None:
            return
        if tls.version:
            self._checked[name, OBSOLETE] += 1
            if tls.version.lower() in _OBSOLETE:
                self._findings[name, OBSOLETE] += 1
        # TLS 1.2 and older have no such key exchange; of 1.3 the server's answer says which was taken.
        if tls.group or (tls.version and tls.version.lower() not in ("1.3", "")):
            self._checked[name, NO_POST_QUANTUM] += 1
            if not any(word in tls.group.upper() for word in _POST_QUANTUM):
                self._findings[name, NO_POST_QUANTUM] += 1

    def _request(self, event: Event) -> Event:
        name, cookie, exchange = self._name(event.workload), event.cookie, event.exchange
        if cookie and event.port:  # else it is known by its TLS library alone, and its end is not
            carried = self._carried.get(cookie, 0) + 1
            self._carried[cookie] = max(carried, exchange.sequence) if exchange is not None else carried
            if len(self._carried) > _CONNECTIONS:
                self._carried.popitem(last=False)
        if event.duration is not None:
            self._time[name, "request"] += event.duration
        if event.kind == HTTPS:
            return event
        self._checked[name, CLEARTEXT] += 1
        if not _credentials(event):
            return event
        self._findings[name, CLEARTEXT] += 1
        return _new(Event, (*event[:_AT], True, *event[_AT + 1 :]))

    def settle(self) -> None:
        """Count what closed: call it when all events of a reading of the ring are in. A request is told once it is
        over, which may be after its connection's end."""
        closed, self._closed = self._closed, []
        for cookie, workload in closed:
            if carried := self._carried.pop(cookie, 0):
                name = self._name(workload)
                self._connections[name] += 1
                self._requests[name] += carried

    # --- counters -------------------------------------------------------------------------------------------------

    def add(self, flow: Flow, delta: Counts) -> None:
        """Follow how many connections are open towards a destination."""
        moved = delta.opened - delta.closed
        if not moved or flow.role == SERVER or not flow.peer:
            return
        key = (self._name(flow.workload), flow.peer, flow.port)
        # A connection opens in the row of an address and closes in that of a name: both are of one destination.
        now = self._open.get(key, 0) + moved
        if now:
            if len(self._open) < _OPEN or key in self._open:
                self._open[key] = now
        else:
            del self._open[key]

    def publish(self) -> None:
        """Bring the metrics up to date."""
        total = self._metrics.set_total
        for totals, metric in ((self._findings, c.FINDINGS), (self._checked, c.CHECKED)):
            for (name, finding), count in totals.items():
                total(metric.name, count, workload=name, finding=finding)
        for (name, phase), nanoseconds in self._time.items():
            total(c.HYGIENE_TIME.name, nanoseconds / 1e9, workload=name, phase=phase)
        for name, count in self._connections.items():
            total(c.HYGIENE_CONNECTIONS.name, count, workload=name)
            total(c.HYGIENE_REQUESTS.name, self._requests[name], workload=name)
        self._publish_ports()

    def _publish_ports(self) -> None:
        busy = {key for key, count in self._open.items() if count >= PORTS_SHOWN}
        for key in sorted(busy - self._shown):
            if len(self._shown) < DESTINATIONS:
                self._shown.add(key)
        for name, peer, port in self._shown:
            used = max(self._open.get((name, peer, port), 0), 0)
            self._metrics.gauge(c.PORTS_USED.name, used, workload=name, address=peer, port=str(port))
        full = {key for key in busy if self._available and self._open[key] >= PORTS_TOLD * self._available}
        for name, peer, port in full - self._told:
            log.warning(
                "%s has %d of %d ephemeral ports in use towards %s:%d; beyond the last one connect() fails",
                name, self._open[name, peer, port], self._available, peer, port,
            )  # fmt: skip
        self._told = full

    def _name(self, workload: Workload) -> str:
        known = self._names.get(workload.cgroup_id)
        if known is not None and known[0] is workload:
            return known[1]
        name = str(who(workload))
        if name not in self._known:
            if len(self._known) < WORKLOADS:
                self._known.add(name)
            else:
                name = c.OTHER
        if len(self._names) >= _CACHED:
            self._names.clear()
        self._names[workload.cgroup_id] = (workload, name)
        return name


def _credentials(event: Event) -> bool:
    """Authorization, Cookie or user info. The latter stands before the first slash of a target or behind `//`."""
    for name, _ in event.headers:
        if name.lower() in _CREDENTIALS:
            return True
    if "@" in event.domain:
        return True
    authority = event.path.partition("://")[2] or ("" if event.path.startswith("/") else event.path)
    return "@" in authority.partition("/")[0].partition("?")[0]


def _ports(path: Path) -> int:
    try:
        low, high = map(int, path.read_text().split())
    except (OSError, ValueError):
        return 0
    return max(high - low + 1, 0)
