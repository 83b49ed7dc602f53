"""Metrics: one aggregation with two faces. Deltas and events in, series out.

Comes in: deltas of the kernel's counters (`add`), events (`observe_all`), counts of what is open (`active_requests`,
`count_for`, `gauge_for`), and the agent's own numbers (`count`, `set_total`, `gauge`; losses and features are read from
health). Goes out: `snapshot()`, which prometheus.py and otlp.py both read, so that they cannot disagree. Not its job:
names and units (semconv.py), how series are kept and walked (series.py), who a workload is (resource.py), encoding.

Many kernel rows share one series: addresses and ports are no labels, so a name behind fifty addresses is one row here.
Whose series they are, how many and for how long says store.py.
"""

from __future__ import annotations

import os
import re
import resource as rusage
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from exporter import health
from exporter.emit import semconv as c
from exporter.emit.histograms import Exemplar, Histogram
from exporter.emit.redact import Options, target
from exporter.emit.resource import Resources
from exporter.emit.routes import Routes
from exporter.emit.series import IX, ZEROS, Attributes, Gone, Layout, Number, Point, Row, Snapshot, Value
from exporter.emit.spans import server_port
from exporter.emit.store import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DNS_LIMIT,
    LIMIT,
    TOTAL,
    WORKLOAD,
    Known,
    Store,
)  # fmt: skip
from exporter.errors import SettingsError
from exporter.events import CLOSE, CONNECT, DNS, HTTP, HTTPS, OK, SERVER, TLS, Counts, Event, Exchange, Flow, Workload

__all__ = ["Gone", "Metrics", "Point", "Snapshot", "is_delta"]

_EXEMPLARS: Final = 1000  # the default budget of spans twice over, at expire()'s five seconds
_LABEL_SETS: Final = 1024  # remembered for each workload between two calls of expire()

_CONNECT: Final = IX[c.CONNECT_TIME]
_RTT: Final = IX[c.RTT]
_DNS: Final = IX[c.DNS_TIME]
_TLS: Final = IX[c.TLS_TIME]
_HANDSHAKES: Final = IX[c.TLS_HANDSHAKES]
_HTTP: Final = IX[c.HTTP_TIME]
_RPC: Final = IX[c.RPC_TIME]
_OPEN: Final = IX[c.OPEN_CONNECTIONS]
_HTTP_MORE: Final = (IX[c.HTTP_FIRST_BYTE], IX[c.HTTP_REQUEST_SIZE], IX[c.HTTP_RESPONSE_SIZE])
_OPENED: Final = Counts._fields.index("opened")
_CLOSED: Final = Counts._fields.index("closed")
_CALL: Final = re.compile(r"/[A-Za-z0-9_.]{1,128}/[A-Za-z0-9_]{1,128}")

# What getaddrinfo tells apart: error.type of most lookups, and of all that found no room.
_LOOKUP_ERRORS: Final = frozenset(("", "host_not_found", "try_again", "no_recovery", "timeout"))

_UNIMPLEMENTED: Final = c.GRPC_CODES.index("UNIMPLEMENTED")  # the server knows no such method: any word may stand there

Trace = tuple[bytes, bytes]  # trace id, span id
_Series = TypeVar("_Series", Number, Histogram)


class Metrics:
    """Aggregates. Any thread may call anything; the pipeline's calls never wait for a reader.

    `limit`, `total`, `dns_limit` as the constants in store.py. `level`: WORKLOAD or POD. `attributes`: names of
    optional attributes, `opt_in` of optional metrics (semconv's `more` and `opt_in`); SettingsError for others.
    `routes` makes `url.template`, None for none. `clock` gives seconds for expiry, `wall` nanoseconds since the epoch.
    `losses` and `features` default to the process's.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        limit: int = LIMIT,
        total: int = TOTAL,
        dns_limit: int = DNS_LIMIT,
        level: str = WORKLOAD,
        attributes: Iterable[str] = (),
        opt_in: Iterable[str] = (),
        routes: Routes | None = None,
        losses: health.Losses | None = None,
        features: health.Features | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        chosen = _chosen("EBFW_METRICS_ATTRIBUTES", attributes, {name for m in c.WORKLOAD_METRICS for name in m.more})
        self.wanted = _chosen("EBFW_METRICS_OPT_IN", opt_in, {m.name for m in c.WORKLOAD_METRICS if m.opt_in})
        self._store = Store(resources, Layout(chosen), level, (limit, total, dns_limit), clock, wall)
        self._agent, self._wall = resources.agent, wall
        self.refresh: Callable[[], None] = lambda: None  # before a snapshot: have the newest counters added
        self._losses, self._features = losses or health.losses, features or health.features
        self._port, self._type = c.PEER_PORT in chosen, c.DNS_QUESTION_TYPE in chosen
        self._scheme, self._ja4 = c.URL_SCHEME in chosen, c.TLS_JA4 in chosen
        self._template = c.URL_TEMPLATE in chosen
        self.instrumented: Callable[[Workload], bool] | None = None  # whose requests are none of ours
        self.routes = routes  # of whoever else wants templates: one book for all
        self._routes = routes if self._template else None
        self._more = tuple(index for index in _HTTP_MORE if c.WORKLOAD_METRICS[index].name in self.wanted)
        self._tick, self._exemplified = 0.0, 0
        self._lock = threading.Lock()
        self._told: defaultdict[str, int] = defaultdict(int)
        self._hidden: defaultdict[str, int] = defaultdict(int)
        self._hit = self._store.number(c.ATTRIBUTION, (("result", "hit"),))
        self._miss = self._store.number(c.ATTRIBUTION, (("result", "miss"),))
        self.gauge(c.START_TIME.name, wall() / 1e9)

    def configure(self, *, exponential: bool, exemplars: str, delta: bool = False, lowmemory: bool = False) -> None:
        """What the push face was told (OTEL_*), before the first event. `exponential`: histograms have exponential
        buckets, too. `exemplars`: one of TRACE_BASED, ALWAYS_ON, ALWAYS_OFF. `delta`: a series does not expire before
        its last value was sent; `lowmemory`: the same where totals are not kept elsewhere."""
        self._store.exponential, self._store.exemplars = exponential, exemplars
        if delta:
            self._store.held = lambda metric: is_delta(metric, lowmemory)

    # --- what workloads do ----------------------------------------------------------------------------------

    def add(self, flow: Flow, delta: Counts, start_ns: int) -> None:
        """Fold in by how much a kernel row moved. `start_ns`: wall clock, when that row began to count."""
        key: tuple[Value, ...]
        if flow.other:
            key = (c.OTHER, flow.transport, flow.scope, "", flow.role, "", "")
        elif flow.filtered:
            key = (c.EXCLUDED, flow.transport, flow.scope, "", flow.role, "", "")
        elif flow.role == SERVER:
            key = (c.INBOUND, flow.transport, flow.scope, "", SERVER, "", "")
        else:
            key = (
                flow.name or flow.peer, flow.transport, flow.scope, flow.name_source, flow.role, flow.group,
                flow.redirected or "",
            )  # fmt: skip
        if self._port:
            key += ("" if flow.other or flow.filtered or flow.role == SERVER else flow.port,)
        with self._lock:
            known = self._store.cgroups.get(flow.workload.cgroup_id)
            if known is None or known.workload is not flow.workload:
                known = self._store.know(flow.workload)
            state = known.state
            row = state.rows.get(key)
            fresh = row is None
            if row is None:
                row = Row(key, max(start_ns, self._store.floor), self._store.now)
            elif start_ns < row.start:
                # After a restart of the agent, kernel rows that share a series come in any order.
                row.start = min(row.start, max(start_ns, self._store.floor))
            cells = row.cells
            cell = 0
            for moved in delta:
                if moved:
                    if moved > 0 and cells[cell]:
                        cells[cell] += moved
                    else:
                        self._store.first(state, row, cell, moved)
                cell += 1  # noqa: SIM113 - enumerate() costs a tuple for each of twelve cells, 65,536 times
            row.last = state.last = self._store.now
            if fresh and cells != ZEROS:
                state.rows[key] = row
            if opened := delta[_OPENED] - delta[_CLOSED]:
                # Opened in one row and closed in another where a socket learned its name: only the sum is right.
                self._store.series(state, _OPEN, ()).cells[0] += opened

    def observe(self, event: Event, trace: Trace | None = None) -> None:
        """observe_all() for one. `trace`: (trace id, span id) of the span that was made of it."""
        self.observe_all((event,))
        if trace is not None:
            self.exemplify(event, trace)

    def observe_all(self, events: Sequence[Event]) -> None:
        """Count events, and put their durations, sizes and round-trip times into the histograms. Some hundred at a
        time: 0.7 us an event, where a call for each takes 1.9 us."""
        misses = 0
        with self._lock:
            store = self._store
            now, cgroups = store.now, store.cgroups
            told, hidden = self._told, self._hidden
            for event in events:
                workload = event.workload
                known = cgroups.get(workload.cgroup_id)
                if known is None or known.workload is not workload:
                    known = store.know(workload)
                kind, filtered = event.kind, event.filtered
                if filtered:
                    hidden[kind] += 1
                else:
                    told[kind] += 1
                if known.nobody:
                    misses += 1
                if event.role == SERVER:
                    continue
                # Each branch ends with a value and its histogram. The keys hold what the series depends on, and no
                # more; _find() says how.
                key: tuple[Any, ...]
                made: tuple[Any, ...]
                value = event.duration
                if kind == DNS:
                    if value is None:
                        continue
                    key = (event.domain, event.status, filtered, event.search_expansion)
                    if self._type:
                        key += (event.dns_type,)
                elif kind == CONNECT:
                    if value is None or event.transport != "tcp":
                        continue
                    key = (
                        event.domain or event.dst,
                        event.scope,
                        event.name_source,
                        event.role,
                        event.status,
                        filtered,
                        event.group,
                        event.redirected,
                    )
                    if self._port:
                        key += (event.port,)
                elif kind == CLOSE:
                    value = event.rtt
                    if not value:
                        continue
                    key = (event.scope,)
                elif kind in (HTTPS, HTTP):
                    exchange = event.exchange
                    if exchange is None or value is None:
                        continue
                    if self.instrumented is not None and self.instrumented(workload):
                        continue  # it tells its own (D12)
                    key = (
                        event.domain or event.dst,
                        event.port
                        if event.port and not event.proxy
                        else (exchange.server_port, exchange.scheme, event.port),
                        event.method, exchange.status, exchange.error,
                        exchange.version, filtered, event.scope, event.redirected,
                    )  # fmt: skip
                    if self._scheme:
                        key += (exchange.scheme,)
                    if self._routes is not None:
                        key += (self._routes.of(event),)
                    if self._more or exchange.grpc_status is not None:
                        self._beside_request(known, event, exchange, key)
                elif kind == TLS:
                    tls = event.tls
                    if tls is None:
                        continue
                    status, alert = event.status, tls.alert
                    made = (event.transport, tls.quic, tls.version, tls.group, tls.post_quantum, alert, status)
                    if self._ja4:
                        made += (tls.ja4,)
                    number = known.fast.get(made)
                    if number is None:
                        number = self._handshakes(known, event, made)
                    number.cells[0] += 1
                    number.last = known.state.last = now
                    if value is None:
                        continue
                    key = (event.domain or event.dst, tls.version, alert, status, event.scope, filtered, TLS)
                else:
                    continue
                histogram = known.fast.get(key)
                if histogram is None:
                    histogram = self._find(known, event, key)
                seconds = value / 1e9
                cells = histogram.cells
                cells[bisect_left(histogram.bounds, seconds)] += 1
                cells[-1] += seconds
                histogram.last = known.state.last = now
                if histogram.extra:
                    self._beside(histogram, event, seconds)
            for kind, count in told.items():
                self._store.number(c.EVENTS, (("kind", kind),)).cells[0] += count
            for kind, count in hidden.items():
                self._store.number(c.FILTERED, (("kind", kind),)).cells[0] += count
            told.clear()
            hidden.clear()
            self._miss.cells[0] += misses
            self._hit.cells[0] += len(events) - misses

    def exemplify(self, event: Event, trace: Trace) -> None:
        """A span was made of an event that was observed: it is the newest exemplar of its bucket. Any time later. Of
        more than _EXEMPLARS between two calls of expire() one in 32 is kept: finding its bucket takes 4 us."""
        value = event.rtt if event.kind == CLOSE else event.duration
        if self._store.exemplars == ALWAYS_OFF or value is None or event.role == SERVER:
            return
        if self._tick != self._store.now:
            self._tick, self._exemplified = self._store.now, 0
        self._exemplified += 1
        if self._exemplified > _EXEMPLARS and self._exemplified % 32:
            return
        with self._lock:
            known = self._store.cgroups.get(event.workload.cgroup_id)
            if known is None or known.workload != event.workload:
                return
            exemplar = Exemplar(value / 1e9, _over(event), *trace)
            for index, values in self._shown(event):
                histogram = known.state.table(index).get(values)
                if histogram is not None:
                    histogram.exemplify(exemplar)

    def active_requests(self, counts: Iterable[tuple[Event, int]]) -> None:
        """HTTP requests without an answer yet: one of each kind, and how many. What is not in it is 0 from now on."""
        rows: list[tuple[Workload, tuple[Value, ...], float]] = []
        for event, count in counts:
            if self.instrumented is None or not self.instrumented(event.workload):
                method = event.method if event.method in c.HTTP_METHODS else "_OTHER"
                scheme = event.exchange.scheme if event.exchange is not None else event.kind
                rows.append((event.workload, (method, *_server(event), scheme), count))
        self.gauge_for(c.HTTP_ACTIVE, rows)

    def count_for(self, workload: Workload, metric: c.Metric, values: tuple[Value, ...], amount: float = 1) -> None:
        """Add to a counter of a workload's. `values`: of the metric's attributes, in their order, "" where absent."""
        with self._lock:
            state = self._store.know(workload).state
            self._store.series(state, IX[metric], values).cells[0] += amount

    def record_for(
        self, workload: Workload, metric: c.Metric, values: tuple[Value, ...], value: float, time_ns: int
    ) -> None:
        """Put a value, which came about at `time_ns`, into a histogram of a workload's. `values` as in count_for."""
        with self._lock:
            state = self._store.know(workload).state
            histogram: Histogram = self._store.series(state, IX[metric], values)
            histogram.cells[bisect_left(histogram.bounds, value)] += 1
            histogram.cells[-1] += value
            if histogram.extra:
                histogram.beside(value)
                if self._store.exemplars == ALWAYS_ON:
                    histogram.exemplify(Exemplar(value, time_ns))

    def gauge_for(self, metric: c.Metric, rows: Iterable[tuple[Workload, tuple[Value, ...], float]]) -> None:
        """Set a gauge of all workloads: (workload, values as in count_for, value); rows with the same series add up.
        Series that are not named are 0 from now on, and expire."""
        index = IX[metric]
        rows = list(rows)  # whatever it takes to make them: not with the lock
        with self._lock:
            sums: dict[int, tuple[Number, float]] = {}
            for workload, values, value in rows:
                number = self._store.series(self._store.know(workload).state, index, values)
                sums[id(number)] = (number, value + sums.get(id(number), (number, 0))[1])
            for state in (*self._store.states.values(), self._store.rest):
                for number in state.tables.get(index, {}).values():
                    number.cells[0] = sums.get(id(number), (number, 0))[1]

    def end(self, workload: Workload) -> None:
        """The workload's cgroup is gone: its series stay for ENDED_SECONDS, then expire. Late deltas still
        count."""
        with self._lock:
            self._store.end(workload)

    def expire(self, now: float | None = None) -> None:
        """Drop what ended or went idle. Call it every few seconds: it is also the coarse clock of `add`."""
        if self.routes is not None:
            self.routes.expire()
        with self._lock:
            self._store.expire(now)

    # --- what the agent does --------------------------------------------------------------------------------

    def count(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter of the agent's. A label is named by the last word of its attribute:
        stage="ring"."""
        metric = c.BY_NAME[name]
        with self._lock:
            self._store.number(metric, _labels(metric, labels)).cells[0] += value

    def set_total(self, name: str, value: float, **labels: str) -> None:
        """Take over a total that is kept elsewhere. One that would go down is held, and that is counted."""
        metric = c.BY_NAME[name]
        with self._lock:
            self._store.set_total(metric, _labels(metric, labels), value)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of the agent's."""
        metric = c.BY_NAME[name]
        with self._lock:
            self._store.number(metric, _labels(metric, labels)).cells[0] = value

    # --- reading --------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All series now: see Snapshot. Also brings the agent's own numbers up to date."""
        self.refresh()
        usage = rusage.getrusage(rusage.RUSAGE_SELF)
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with self._lock:
            for (stage, cause), lost in self._losses.snapshot().items():
                self._store.set_total(c.RECORDS_LOST, (("ebfw.stage", stage), ("ebfw.cause", cause)), lost)
            for name, feature in self._features.snapshot().items():
                self._store.number(c.FEATURE, (("ebfw.feature", name),)).cells[0] = int(feature.active)
            self._store.set_total(c.CPU_TIME, (("cpu.mode", "user"),), usage.ru_utime)
            self._store.set_total(c.CPU_TIME, (("cpu.mode", "system"),), usage.ru_stime)
            self._store.number(c.MEMORY, ()).cells[0] = resident
            states = [*self._store.states.values(), self._store.rest]
            for metric, index in IX.items():
                series = sum(state.series[index] for state in states)
                self._store.number(c.SERIES, (("ebfw.metric", metric.name),)).cells[0] = series
            return Snapshot(self._wall(), self._agent, states, self._store.own, self._store.exponential)

    def take_gone(self) -> list[Gone]:
        """What expired since the last call; the first call starts the keeping. At most TOTAL are kept."""
        with self._lock:
            gone, self._store.gone = self._store.gone or [], []
            return gone

    # --- inside; the lock is held ---------------------------------------------------------------------------

    def _find(self, known: Known, event: Event, key: tuple[Any, ...]) -> Histogram:
        """The histogram of the event's duration (or RTT); from now on `key` leads there."""
        index, values = self._shown(event)[0]
        fold: tuple[Value, ...] = ()
        if index == _DNS:
            error, expansion = values[1:3]
            fold = (c.OTHER, error if error in _LOOKUP_ERRORS else "_OTHER", expansion)
        found: Histogram = self._store.series(known.state, index, values, fold)
        return self._remember(known, key, found)

    def _remember(self, known: Known, key: tuple[Any, ...], found: _Series) -> _Series:
        if len(known.fast) >= _LABEL_SETS:
            known.fast.clear()
        known.fast[key] = found
        return found

    def _shown(self, event: Event) -> list[tuple[int, tuple[Value, ...]]]:
        """Where the event's duration (or RTT) goes: instrument and values of its attributes. The first always."""
        name: str = c.EXCLUDED if event.filtered else event.domain or event.dst
        kind, exchange, tls = event.kind, event.exchange, event.tls
        values: tuple[Value, ...]
        if kind == DNS:
            name = c.EXCLUDED if event.filtered else event.domain
            expansion = event.search_expansion
            values = (name, "" if expansion else c.dns_error(event.status), expansion or "")
            return [(_DNS, (*values, event.dns_type) if self._type else values)]
        if kind == CONNECT:
            error = "" if event.status == OK else c.CONNECT_ERRORS.get(event.status, event.status)
            source = "" if event.filtered else event.name_source
            group = "" if event.filtered else event.group
            proxied = "" if event.filtered else event.redirected or ""
            values = (name, "tcp", event.scope, source, event.role, group, proxied, error)
            return [(_CONNECT, (*values, "" if event.filtered else event.port) if self._port else values)]
        if kind == TLS and tls is not None:
            return [(_TLS, (name, tls.version, handshake_error(event), event.scope if event.filtered else ""))]
        if exchange is None:
            return [(_RTT, (event.scope,))]
        name, port, scope = _server(event)
        error = exchange.error or (str(exchange.status) if exchange.status >= 400 else "")
        method = event.method if event.method in c.HTTP_METHODS else "_OTHER"
        values = (method, name, port, exchange.status or "", error, exchange.version, scope, event.redirected or "")
        if self._scheme:
            values += (exchange.scheme,)
        if self._template:
            values += (self._routes.of(event) if self._routes is not None else "",)
        if exchange.grpc_status is None:
            return [(_HTTP, values)]
        code = exchange.grpc_status
        word = c.GRPC_CODES[code] if 0 <= code < len(c.GRPC_CODES) else str(code)
        called = (
            event.path[1:]
            if code != _UNIMPLEMENTED and _CALL.fullmatch(event.path) and target(event.path, Options()) == event.path
            else "_OTHER"
        )
        return [
            (_HTTP, values),
            (_RPC, ("grpc", called, word, name, port, word if code else "", scope, event.redirected or "")),
        ]

    def _beside_request(self, known: Known, event: Event, exchange: Exchange, key: tuple[Any, ...]) -> None:
        """What a request has beside its duration: the gRPC call, time to first byte, sizes."""
        state = known.state
        if exchange.grpc_status is not None and event.duration is not None:
            call = ("rpc", event.path, exchange.grpc_status, *key)
            histogram = known.fast.get(call)
            if histogram is None:
                index, values = self._shown(event)[1]
                histogram = self._remember(known, call, self._store.series(state, index, values))
            self._record(histogram, event, event.duration / 1e9)
        for index in self._more:
            value: float | None
            if index == IX[c.HTTP_FIRST_BYTE]:
                value = None if exchange.first_byte is None else exchange.first_byte / 1e9
            else:
                value = exchange.request_size if index == IX[c.HTTP_REQUEST_SIZE] else exchange.response_size
            if value is not None:
                histogram = known.fast.get((index, *key))
                if histogram is None:
                    values = self._shown(event)[0][1]
                    histogram = self._remember(known, (index, *key), self._store.series(state, index, values))
                self._record(histogram, event, value)

    def _handshakes(self, known: Known, event: Event, key: tuple[Any, ...]) -> Number:
        tls = event.tls
        assert tls is not None
        values: tuple[Value, ...] = (
            "quic" if tls.quic else event.transport, tls.version, tls.group, tls.post_quantum, handshake_error(event),
        )  # fmt: skip
        number: Number = self._store.series(known.state, _HANDSHAKES, (*values, tls.ja4) if self._ja4 else values)
        # Each of those in the overflow is to be counted as such.
        return self._remember(known, key, number) if number.key else number

    def _record(self, histogram: Histogram, event: Event, value: float) -> None:
        """What the end of observe_all() does, in the metric's unit."""
        histogram.cells[bisect_left(histogram.bounds, value)] += 1
        histogram.cells[-1] += value
        histogram.last = self._store.now
        if histogram.extra:
            self._beside(histogram, event, value)

    def _beside(self, histogram: Histogram, event: Event, value: float) -> None:
        histogram.beside(value)
        if self._store.exemplars == ALWAYS_ON:
            histogram.exemplify(Exemplar(value, _over(event)))


def _server(event: Event) -> tuple[str, Value, str]:
    """Whom a request is for: server.address, server.port and, of what is excluded, the scope instead."""
    if event.filtered:
        return c.EXCLUDED, "", event.scope
    return event.domain or event.dst, server_port(event), ""


def _over(event: Event) -> int:
    """When what it tells was over, in ns since the epoch. A close is told at its own time, and its duration is that of
    the connection before it."""
    return event.time if event.kind == CLOSE else event.time + (event.duration or 0)


def handshake_error(event: Event) -> str:
    """error.type of a TLS handshake: its alert, else "closed" or "timeout"; "" where nothing went wrong."""
    alert = event.tls.alert if event.tls is not None else ""
    return alert or ("" if event.status in ("", OK) else event.status)


def _chosen(variable: str, names: Iterable[str], known: set[str]) -> frozenset[str]:
    found = frozenset(names)
    for name in sorted(found - known):
        raise SettingsError(f"{variable}: {name} is not one of {', '.join(sorted(known))}")
    return found


def _labels(metric: c.Metric, labels: dict[str, str]) -> Attributes:
    """Labels by the last word of their attribute, in the metric's order. KeyError names one that does not
    exist."""
    words = {attribute.rpartition(".")[2]: attribute for attribute in metric.attributes}
    for word in labels:
        if word not in words:
            raise KeyError(f"{metric.name} has no attribute {word!r}; it has {', '.join(words)}")
    return tuple((attribute, labels[word]) for word, attribute in words.items() if word in labels)


def is_delta(metric: c.Metric, lowmemory: bool) -> bool:
    """Whether the metric is told in deltas under the temporality preference `delta`, or `lowmemory`. Source: OTLP
    metrics exporter, "Additional environment variable configuration"."""
    return metric.kind == c.HISTOGRAM or (metric.kind == c.COUNTER and not (lowmemory and metric.observed))
