"""Hygiene: what is worth a look although it works. Events and deltas of counters in, totals by workload out.

Comes in: events, and deltas of the kernel's counters. Goes out: metrics under `ebfw.hygiene.`. Not its job: names and
units (semconv.py), series (metrics.py), seeing that a request carries credentials (http1).

    cleartext_credentials  a plaintext request carried Authorization, Cookie or user info
    obsolete_tls           a handshake agreed on less than TLS 1.2 (RFC 8996)
    no_post_quantum        a key exchange that does not hold against a quantum computer
    dns_search             a lookup that only the resolver's search list asked for
    requests, connections  how often a connection is used again
    time                   in dns, connect and tls, beside the requests themselves
    ports                  of the ephemeral range, how many are held towards one destination
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from exporter.emit import semconv as c
from exporter.emit.connections import HttpConnections
from exporter.emit.metrics import Metrics
from exporter.events import CLOSE, CONNECT, DNS, HTTP, HTTPS, OK, SERVER, TLS, Counts, Event, Flow, Workload

log = logging.getLogger(__name__)

PORTS_SHOWN: Final = 100
PORTS_TOLD: Final = 0.8  # of the range, in use towards one destination: a warning in the agent's log
_OPEN = 65_536
_NO_SOCKET: Final = 1 << 63  # cookies from here on are those of TLS libraries

_OBSOLETE: Final = frozenset(("1.1", "1.0", "ssl3"))
_POST_QUANTUM: Final = ("MLKEM", "KYBER")

# What is counted, by number: a tuple of names would be hashed for each event.
_COUNTERS: Final = (
    *((metric, (finding,)) for finding in ("cleartext_credentials", "obsolete_tls", "no_post_quantum", "dns_search")
      for metric in (c.CHECKED, c.FINDINGS)),
    *((c.HYGIENE_TIME, (phase,)) for phase in ("dns", "connect", "tls", "request")),
    (c.HYGIENE_CONNECTIONS, ()),
    (c.HYGIENE_REQUESTS, ()),
)  # fmt: skip
_CLEARTEXT: Final = 0  # the finding itself is one further
_OBSOLETE_TLS: Final = 2
_NO_POST_QUANTUM: Final = 4
_SEARCH: Final = 6
_DNS_TIME: Final = 8
_CONNECT_TIME: Final = 9
_TLS_TIME: Final = 10
_REQUEST_TIME: Final = 11
_CONNECTIONS_CLOSED: Final = 12
_REQUESTS: Final = 13


class Hygiene:
    """For one thread, the pipeline's. `port_range`: the file with the ephemeral ports' bounds."""

    def __init__(
        self,
        metrics: Metrics,
        connections: HttpConnections,
        port_range: Path = Path("/proc/sys/net/ipv4/ip_local_port_range"),
    ) -> None:
        self._metrics, self._connections = metrics, connections
        self._available = _ports(port_range)
        if self._available:
            metrics.gauge(c.PORTS_AVAILABLE.name, self._available)
        # Since the last publish(): by workload, and by number in _COUNTERS. Times are nanoseconds.
        self._counts: dict[int, tuple[Workload, list[int]]] = {}
        self._closed: list[Event] = []
        self._open: dict[tuple[int, str, int], list[Any]] = {}  # (cgroup, peer, port) -> workload, connections
        self._told: set[tuple[int, str, int]] = set()

    # --- events ---------------------------------------------------------------------------------------------------

    def observe(self, events: Iterable[Event]) -> None:
        """Count."""
        for event in events:
            if event.role == SERVER:
                continue
            kind, workload = event.kind, event.workload
            if kind == CLOSE:
                self._closed.append(event)
                continue
            known = self._counts.get(workload.cgroup_id)
            if known is None:
                known = self._counts[workload.cgroup_id] = (workload, [0] * len(_COUNTERS))
            counts = known[1]
            if kind == DNS:
                counts[_SEARCH] += 1
                counts[_SEARCH + 1] += event.search_expansion
                counts[_DNS_TIME] += event.duration or 0
            elif kind == CONNECT:
                if event.status == OK:
                    counts[_CONNECT_TIME] += event.duration or 0
            elif kind == TLS:
                counts[_TLS_TIME] += event.duration or 0
                if event.tls is not None:
                    for index in _found(event.tls.version, event.tls.group):
                        counts[index] += 1
            elif kind in (HTTP, HTTPS):
                counts[_REQUEST_TIME] += event.duration or 0
                if 0 < event.cookie < _NO_SOCKET and event.port:  # else the end of its connection is not known
                    self._connections.carried(event)
                if kind == HTTP:
                    counts[_CLEARTEXT] += 1
                    counts[_CLEARTEXT + 1] += event.credentials

    def settle(self) -> None:
        """Count what closed: call it when all events of a reading of the ring are in. A request is told once it is
        over, which may be after its connection's end."""
        closed, self._closed = self._closed, []
        for event in closed:
            if carried := self._connections.closed(event):
                workload = event.workload
                counts = self._counts.setdefault(workload.cgroup_id, (workload, [0] * len(_COUNTERS)))[1]
                counts[_CONNECTIONS_CLOSED] += 1
                counts[_REQUESTS] += carried

    # --- counters -------------------------------------------------------------------------------------------------

    def add(self, flow: Flow, delta: Counts) -> None:
        """Follow how many connections are open towards a destination."""
        moved = delta.opened - delta.closed
        if not moved or flow.role == SERVER or not flow.peer:
            return
        key = (flow.workload.cgroup_id, flow.peer, flow.port)
        # A connection opens in the row of an address and closes in that of a name: both are of one destination.
        found = self._open.get(key)
        if found is None:
            if len(self._open) < _OPEN:
                self._open[key] = [flow.workload, moved]
        else:
            found[1] += moved
            if not found[1]:
                del self._open[key]

    def publish(self) -> None:
        """Bring the metrics up to date."""
        taken, self._counts = self._counts, {}
        for workload, counts in taken.values():
            for (metric, values), count in zip(_COUNTERS, counts, strict=True):
                if count:
                    amount = count / 1e9 if metric is c.HYGIENE_TIME else count
                    self._metrics.count_for(workload, metric, values, amount)
        busy = [(key, *found) for key, found in self._open.items() if found[1] >= PORTS_SHOWN]
        self._metrics.gauge_for(
            c.PORTS_USED, ((workload, (peer, str(port)), used) for (_, peer, port), workload, used in busy)
        )
        full = {one for one in busy if self._available and one[2] >= PORTS_TOLD * self._available}
        for key, workload, used in full:
            if key not in self._told:
                log.warning(
                    "%s has %d of %d ephemeral ports in use towards %s:%d; beyond the last one connect() fails",
                    workload.name, used, self._available, key[1], key[2],
                )  # fmt: skip
        self._told = {key for key, _, _ in full}


@lru_cache(256)
def _found(version: str, group: str) -> tuple[int, ...]:
    """Which counters a handshake moves that ended so."""
    found = []
    if version:
        found.append(_OBSOLETE_TLS)
        if version in _OBSOLETE:
            found.append(_OBSOLETE_TLS + 1)
    # TLS 1.2 and older have no such key exchange; of 1.3 the server's answer says which was taken.
    if group or version not in ("", "1.3"):
        found.append(_NO_POST_QUANTUM)
        if not any(word in group.upper() for word in _POST_QUANTUM):
            found.append(_NO_POST_QUANTUM + 1)
    return tuple(found)


def _ports(path: Path) -> int:
    try:
        low, high = map(int, path.read_text().split())
    except (OSError, ValueError):
        return 0
    return max(high - low + 1, 0)
