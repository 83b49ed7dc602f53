"""HTTP connections: sockets that carried requests, from the first request seen to the close.

Comes in: requests that are over, closes, and from join who waits for a response now. Goes out: how many requests a
connection carried (for hygiene.py), and where EBFW_METRICS_OPT_IN names them `http.client.open_connections` and
`http.client.connection.duration`. Not its job: finding requests (exchanges, http2), connections without any.

A connection whose close was lost would stay for good; so one without a request for half an hour to an hour is
forgotten, and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from exporter.emit import semconv as c
from exporter.emit.metrics import Metrics
from exporter.emit.series import Value
from exporter.events import Event, Workload
from exporter.health import losses

CONNECTIONS = 8_192
IDLE_SECONDS = 1800.0  # to twice that

ACTIVE, IDLE = "active", "idle"


class _Shown(NamedTuple):
    """Who, to whom, and how: what the series of a connection depend on."""

    workload: Workload
    server: tuple[str, Value, str]  # address, port, scope
    version: str


class HttpConnections:
    """For one thread, the pipeline's. `counted`: an event as metrics are to see it, None if they are not to."""

    def __init__(
        self,
        metrics: Metrics,
        counted: Callable[[Event], Event | None] = lambda event: event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._counted, self._clock = metrics, counted, clock
        self._open, self._time = (
            c.HTTP_OPEN_CONNECTIONS.name in metrics.wanted,
            c.HTTP_CONNECTION_TIME.name in metrics.wanted,
        )
        # Requests so far, by the socket's cookie. Two generations: to move each connection to the end of one table with
        # each of its requests costs more than the look-up.
        self._carried: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._turned = clock()
        self.shown: dict[int, _Shown] = {}  # of these, where one of the metrics is wanted

    def __len__(self) -> int:
        return len(self._carried) + len(self._older)

    def carried(self, event: Event) -> None:
        """A request is over."""
        cookie, exchange = event.cookie, event.exchange
        so_far = self._carried.get(cookie)
        if so_far is None:
            so_far = self._older.pop(cookie, 0) or self._meet(event)
        so_far += 1
        self._carried[cookie] = so_far if exchange is None else max(so_far, exchange.sequence)

    def closed(self, event: Event) -> int:
        """A connection is over, and all its requests were told: how many it carried, 0 for one of something else."""
        carried = self._carried.pop(event.cookie, 0) or self._older.pop(event.cookie, 0)
        if carried and self.shown:
            shown = self.shown.pop(event.cookie, None)
            # Of a connection that is older than the kernel's programs nobody knows when it began.
            if shown is not None and event.duration and self._time and not self._tells_its_own(shown.workload):
                address, port, scope = shown.server
                values = (address, port, shown.version, scope)
                self._metrics.record_for(
                    shown.workload, c.HTTP_CONNECTION_TIME, values, event.duration / 1e9, event.time
                )
        return carried

    def publish(self, busy: Callable[[Container[int]], Iterable[tuple[int, Event | None]]]) -> None:
        """Bring the metrics up to date, and forget. `busy`: which connections, by their cookies, wait for a response
        now; with the request unless the argument has the cookie."""
        if self._open:
            self._count(busy(self.shown))
        if self._clock() - self._turned >= IDLE_SECONDS:
            self._turned = self._clock()
            if self._older:
                losses.add("table", "http_connection_without_end", len(self._older))
                for cookie in self._older:
                    self.shown.pop(cookie, None)
            self._older, self._carried = self._carried, {}

    def _meet(self, event: Event) -> int:
        if len(self) >= CONNECTIONS:
            losses.add("table", "http_connections_full")
            table = self._older or self._carried
            oldest = next(iter(table))
            del table[oldest]
            self.shown.pop(oldest, None)
        if self._open or self._time:
            counted = self._counted(event)
            if counted is not None:
                self.shown[event.cookie] = _shown(counted)
        return 0

    def _count(self, busy: Iterable[tuple[int, Event | None]]) -> None:
        counts: dict[tuple[int, str, tuple[str, Value, str]], tuple[Workload, list[int]]] = {}

        def add(shown: _Shown, state: str) -> None:
            key = (shown.workload.cgroup_id, state, shown.server)
            counts.setdefault(key, (shown.workload, [0]))[1][0] += 1

        active = set()
        for cookie, event in busy:
            active.add(cookie)
            if event is not None and (counted := self._counted(event)) is not None:
                add(_shown(counted), ACTIVE)
            elif cookie in self._older:  # a request may take longer than we remember idle ones
                self._carried[cookie] = self._older.pop(cookie)
        for cookie, shown in self.shown.items():
            add(shown, ACTIVE if cookie in active else IDLE)
        self._metrics.gauge_for(
            c.HTTP_OPEN_CONNECTIONS,
            (
                (workload, (state, *server), count[0])
                for (_, state, server), (workload, count) in counts.items()
                if not self._tells_its_own(workload)
            ),
        )

    def _tells_its_own(self, workload: Workload) -> bool:
        instrumented = self._metrics.instrumented
        return instrumented is not None and instrumented(workload)


def _shown(event: Event) -> _Shown:
    """The server is whom the connection leads to: where there is a proxy, that."""
    version = event.exchange.version if event.exchange is not None else ""
    if event.filtered:
        server: tuple[str, Value, str] = (c.EXCLUDED, "", event.scope)
    elif event.proxy:
        server = (event.dst, event.port, "")
    else:
        server = (event.domain or event.dst, event.port, "")
    return _Shown(event.workload, server, version)
