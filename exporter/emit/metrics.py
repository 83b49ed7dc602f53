"""Metrics: one aggregation with two faces. Deltas and events in, series out.

Comes in: deltas of the kernel's counters (`add`), events (`observe`), and the agent's own numbers (`count`,
`set_total`, `gauge`; losses and features are read from health). Goes out: `snapshot()`, which prometheus.py
and otlp.py both read, so that they cannot disagree. Not its job: names and units (semconv.py), who a workload
is (resource.py), encoding.

Many kernel rows share one series: addresses and ports are no labels, so a name behind fifty addresses is one
row here. Series belong to an *identity* (what Prometheus sees as labels), not to a cgroup: a container that
restarts goes on with its series, where two states of one identity would collide in the second face. Bounds:
`limit` series for each (workload, instrument) and `total` on the node, histograms counted as what they cost
in Prometheus; what is beyond goes into one overflow series and is counted. A series that expires and comes
back starts from zero with a new start time, which every reader takes for the reset that it is.
"""

from __future__ import annotations

import os
import resource as rusage
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from exporter import health
from exporter.emit import semconv as c
from exporter.emit.resource import Resource, Resources
from exporter.events import CLOSE, CONNECT, DNS, OK, SERVER, Counts, Event, Flow, Workload

Attributes = tuple[tuple[str, str | bool], ...]

LIMIT = 2000  # series for each (workload, instrument): the SDKs' default cardinality limit
TOTAL = 50_000  # series on a node, as Prometheus counts them
DNS_LIMIT = 200  # of LIMIT, what dns.question.name may take: each costs 17 series in Prometheus
ENDED_SECONDS = 300.0  # at least two scrapes after a workload's end
IDLE_SECONDS = 900.0
_SCALARS = 1000  # of the agent's own, for each instrument: their labels are constants of the code
_CGROUPS = 16_384
_FOLDED = 200  # folded label sets remembered for each identity

_IX = {metric: index for index, metric in enumerate(c.WORKLOAD_METRICS)}
_CELL_IX = tuple(_IX[metric] for metric, _ in c.CELLS)
_CELLS_OF = {
    metric: tuple((cell, extra) for cell, (owner, extra) in enumerate(c.CELLS) if owner is metric)
    for metric in c.WORKLOAD_METRICS
}
_FLOW_KEYS = (c.SERVER_ADDRESS, c.TRANSPORT, c.PEER_SCOPE, c.PEER_NAME_SOURCE, c.ROLE, c.PEER_GROUP)
_HISTOGRAM_KEYS = {_IX[m]: m.attributes for m in (c.CONNECT_TIME, c.RTT, c.DNS_TIME)}
_CONNECT_IX, _RTT_IX, _DNS_IX = _IX[c.CONNECT_TIME], _IX[c.RTT], _IX[c.DNS_TIME]
_CONNECT_WEIGHT, _DNS_WEIGHT = len(c.CONNECT_TIME.bounds) + 3, len(c.DNS_TIME.bounds) + 3
_RTT_WEIGHT = len(c.RTT.bounds) + 3
_ZEROS = [0] * len(Counts._fields)
_INFO_KEYS = frozenset(c.WORKLOAD_INFO.attributes)
_OVERFLOW: Attributes = ((c.OVERFLOW, True),)


class _Row:
    """Counters of one flow label set: a cell for each field of Counts. `sent`: what a delta reader was
    given."""

    __slots__ = ("cells", "key", "last", "sent", "sent_ns", "start")

    def __init__(self, key: tuple[str, ...], start: int, last: float) -> None:
        self.key, self.start, self.last = key, start, last
        self.cells: list[int] = _ZEROS[:]
        self.sent: list[int] | None = None
        self.sent_ns = 0


class _Histogram:
    """`cells`: a count for each bucket, the last for what is above every bound, then the sum."""

    __slots__ = ("cells", "key", "last", "sent", "sent_ns", "start")

    def __init__(self, key: tuple[Any, ...], buckets: int, start: int, last: float) -> None:
        self.key, self.start, self.last = key, start, last
        self.cells: list[Any] = [0] * buckets + [0.0]
        self.sent: list[Any] | None = None
        self.sent_ns = 0


class _Scalar:
    """One of the agent's own series."""

    __slots__ = ("cells", "key", "sent", "sent_ns", "start")

    def __init__(self, key: Attributes, start: int) -> None:
        self.key, self.start = key, start
        self.cells: list[Any] = [0]
        self.sent: list[Any] | None = None
        self.sent_ns = 0


Source = _Row | _Histogram | _Scalar


class Point(NamedTuple):
    """One series now. `value`: a number, or for a histogram its bucket counts followed by the sum. `source`
    and `cell` are for a delta reader, which keeps what it has sent in `source.sent`; `cell` is -1 for all
    cells."""

    attributes: Attributes
    start_ns: int
    value: Any
    source: Source | None
    cell: int


class _State:
    """What one identity has: rows, histograms, how many series in each instrument."""

    __slots__ = ("ended", "folded", "gone", "histograms", "last", "overflow", "resource", "rows", "series", "shown")

    def __init__(self, resource: Resource, last: float) -> None:
        self.resource, self.last = resource, last
        self.rows: dict[tuple[str, ...], _Row] = {}
        self.histograms: dict[tuple[Any, ...], _Histogram] = {}
        # Where what found no room went, so that the next of its kind goes there at once; until the next expire().
        self.folded: dict[tuple[Any, ...], _Histogram] = {}
        self.overflow: _Row | None = None
        self.series = [0] * len(c.WORKLOAD_METRICS)
        self.ended: float | None = None
        self.gone = 0  # the cgroup that ended
        self.shown = True

    def all_rows(self) -> list[_Row]:
        # list() of a dict's values is one step for other threads: readers need no lock.
        rows = list(self.rows.values())
        if self.overflow is not None:
            rows.append(self.overflow)
        return rows

    def points(self, metric: c.Metric) -> Iterator[Point]:
        own: Attributes = ((c.WORKLOAD_ID, self.resource.workload_id),) if self.resource.workload_id else ()
        if metric is c.WORKLOAD_INFO:
            if self.shown:
                info = tuple((k, str(v)) for k, v in self.resource.attributes if k in _INFO_KEYS)
                yield Point(own + info, 0, 1, None, 0)
        elif metric.kind == c.HISTOGRAM:
            index = _IX[metric]
            for histogram in list(self.histograms.values()):
                if histogram.key[0] == index:
                    yield Point(
                        own + _histogram_attributes(histogram.key),
                        histogram.start,
                        histogram.cells[:],
                        histogram,
                        -1,
                    )
        else:
            cells = _CELLS_OF[metric]
            for row in self.all_rows():
                attributes: Attributes | None = None
                for cell, extra in cells:
                    if value := row.cells[cell]:
                        if attributes is None:
                            attributes = own + _row_attributes(row.key)
                        yield Point(attributes + extra, row.start, value, row, cell)


def _row_attributes(key: tuple[str, ...]) -> Attributes:
    if not key:
        return ((c.SERVER_ADDRESS, c.OTHER), *_OVERFLOW)
    return tuple((name, value) for name, value in zip(_FLOW_KEYS, key, strict=True) if value)


def _histogram_attributes(key: tuple[Any, ...]) -> Attributes:
    names, values = _HISTOGRAM_KEYS[key[0]], key[1:]
    if not values:
        return _OVERFLOW
    return tuple((name, value) for name, value in zip(names, values, strict=True) if value)


class Gone(NamedTuple):
    """A series that expired; OTLP ends it with one point without a value."""

    resource: Resource
    metric: c.Metric
    attributes: Attributes
    start_ns: int


class Snapshot:
    """All series at about one time. Values are read while iterating, each series whole; iterate as often as
    needed."""

    def __init__(self, time_ns: int, agent: Resource, states: list[_State], scalars: _Scalars) -> None:
        self.time_ns = time_ns
        self._agent, self._states, self._scalars = agent, states, scalars

    def by_metric(self) -> Iterator[tuple[c.Metric, Iterator[tuple[Resource, Point]]]]:
        """Every metric with its points over all workloads, in semconv's order. Metrics without points
        included."""
        for metric in c.WORKLOAD_METRICS:
            yield (
                metric,
                ((state.resource, point) for state in self._states for point in state.points(metric)),
            )
        for metric in c.AGENT_METRICS:
            yield metric, ((self._agent, point) for point in self._agent_points(metric))

    def by_resource(self) -> Iterator[tuple[Resource, Iterator[tuple[c.Metric, Iterator[Point]]]]]:
        """The agent's own metrics first, then every workload's. A metric may have no points."""
        yield self._agent, ((metric, self._agent_points(metric)) for metric in c.AGENT_METRICS)
        for state in self._states:
            yield state.resource, self._of(state)

    @property
    def agent(self) -> Resource:
        return self._agent

    @staticmethod
    def _of(state: _State) -> Iterator[tuple[c.Metric, Iterator[Point]]]:
        return ((metric, state.points(metric)) for metric in c.WORKLOAD_METRICS)

    def _agent_points(self, metric: c.Metric) -> Iterator[Point]:
        for scalar in list(self._scalars.get(metric, {}).values()):
            yield Point(scalar.key, scalar.start, scalar.cells[0], scalar, 0)


_Scalars = dict[c.Metric, dict[Attributes, _Scalar]]


class Metrics:
    """Aggregates. Any thread may call anything; the pipeline's calls never wait for a reader.

    `limit`, `total`, `dns_limit` as the module's constants; `clock` gives seconds for expiry, `wall`
    nanoseconds since the epoch. `losses` and `features` default to the process's.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        limit: int = LIMIT,
        total: int = TOTAL,
        dns_limit: int = DNS_LIMIT,
        losses: health.Losses | None = None,
        features: health.Features | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._resources = resources
        self.refresh: Callable[[], None] = lambda: None  # before a snapshot: have the newest counters added
        self._limit, self._max, self._dns_limit = limit, total, dns_limit
        self._losses, self._features = losses or health.losses, features or health.features
        self._clock, self._wall = clock, wall
        self._lock = threading.Lock()
        self._started = wall()
        self._now = clock()
        # Where a row that expired would come back with the start time of its kernel row, a reader would see
        # the same series fall without a reset.
        self._floor = 0
        self._cgroups: dict[int, tuple[Workload, _State]] = {}
        self._states: dict[tuple[Any, ...], _State] = {}
        self._rest = _State(resources.other(), self._now)
        self._rest.shown = False
        self._count = 0
        # Of which histograms: they may have half, lest they crowd out the counters that cost so much less.
        self._in_histograms = 0
        self._scalars: _Scalars = {metric: {} for metric in c.AGENT_METRICS}
        self._kinds: dict[tuple[str, bool], _Scalar] = {}
        self._hit = self._scalar(c.ATTRIBUTION, (("result", "hit"),))
        self._miss = self._scalar(c.ATTRIBUTION, (("result", "miss"),))
        self._expired = self._scalar(c.SERIES_EXPIRED, ())
        self._gone: list[Gone] | None = None
        self.gauge(c.START_TIME.name, self._started / 1e9)

    # --- what workloads do ----------------------------------------------------------------------------------

    def add(self, flow: Flow, delta: Counts, start_ns: int) -> None:
        """Fold in by how much a kernel row moved. `start_ns`: wall clock, when that row began to count."""
        if flow.other:
            key = (c.OTHER, flow.transport, flow.scope, "", flow.role, "")
        elif flow.filtered:
            key = (c.EXCLUDED, flow.transport, flow.scope, "", flow.role, "")
        elif flow.role == SERVER:
            key = (c.INBOUND, flow.transport, flow.scope, "", SERVER, "")
        else:
            key = (flow.name or flow.peer, flow.transport, flow.scope, flow.name_source, flow.role, flow.group)
        with self._lock:
            known = self._cgroups.get(flow.workload.cgroup_id)
            state = known[1] if known is not None and known[0] is flow.workload else self._state(flow.workload)
            row = state.rows.get(key)
            fresh = row is None
            if row is None:
                row = _Row(key, max(start_ns, self._floor), self._now)
            elif start_ns < row.start:
                # After a restart of the agent, kernel rows that share a series come in any order.
                row.start = min(row.start, max(start_ns, self._floor))
            cells = row.cells
            cell = 0
            for moved in delta:
                if moved:
                    if moved > 0 and cells[cell]:
                        cells[cell] += moved
                    else:
                        self._first(state, row, cell, moved)
                cell += 1  # noqa: SIM113 - enumerate() costs a tuple for each of twelve cells, 65,536 times
            row.last = state.last = self._now
            if fresh and cells != _ZEROS:
                state.rows[key] = row

    def observe(self, event: Event) -> None:
        """Count one event, and put its duration or RTT into the histograms."""
        with self._lock:
            kind = event.kind
            counter = self._kinds.get((kind, event.filtered)) or self._kind(kind, event.filtered)
            counter.cells[0] += 1
            (self._miss if event.workload.kind == "unknown" else self._hit).cells[0] += 1
            if event.role == SERVER:
                return
            key: tuple[Any, ...]
            if kind == DNS:
                if event.duration is None:
                    return
                name = c.EXCLUDED if event.filtered else event.domain
                key = (_DNS_IX, name, c.dns_error(event.status))
                self._record(event.workload, key, c.DNS_TIME, _DNS_WEIGHT, event.duration)
            elif kind == CONNECT:
                if event.duration is None or event.transport != "tcp":
                    return
                error = "" if event.status == OK else c.CONNECT_ERRORS.get(event.status, event.status)
                if event.filtered:
                    key = (_CONNECT_IX, c.EXCLUDED, "tcp", event.scope, "", event.role, "", error)
                else:
                    name = event.domain or event.dst
                    key = (_CONNECT_IX, name, "tcp", event.scope, event.name_source, event.role, event.group, error)
                self._record(event.workload, key, c.CONNECT_TIME, _CONNECT_WEIGHT, event.duration)
            elif kind == CLOSE and event.rtt:
                self._record(event.workload, (_RTT_IX, event.scope), c.RTT, _RTT_WEIGHT, event.rtt)

    def end(self, workload: Workload) -> None:
        """The workload's cgroup is gone: its series stay for ENDED_SECONDS, then expire. Late deltas still
        count."""
        with self._lock:
            known = self._cgroups.pop(workload.cgroup_id, None)
            if known is None:
                return
            state = known[1]
            if not any(other is state for _, other in self._cgroups.values()):
                state.ended, state.gone = self._clock(), workload.cgroup_id

    def expire(self, now: float | None = None) -> None:
        """Drop what ended or went idle. Call it every few seconds: it is also the coarse clock of `add`."""
        with self._lock:
            self._now = now = self._clock() if now is None else now
            dropped = self._count
            for identity, state in list(self._states.items()):
                state.folded.clear()
                ended = state.ended is not None and now - max(state.ended, state.last) >= ENDED_SECONDS
                if ended:
                    self._drop(state, state.all_rows(), list(state.histograms.values()))
                else:
                    idle = now - IDLE_SECONDS
                    self._drop(
                        state,
                        [row for row in state.all_rows() if row.last <= idle],
                        [histogram for histogram in state.histograms.values() if histogram.last <= idle],
                    )
                if ended or (not state.rows and not state.histograms and state.last <= now - IDLE_SECONDS):
                    self._count -= 1
                    del self._states[identity]
            states = {id(state) for state in self._states.values()}
            self._cgroups = {k: v for k, v in self._cgroups.items() if id(v[1]) in states}
            idle = now - IDLE_SECONDS
            self._drop(
                self._rest,
                [row for row in self._rest.all_rows() if row.last <= idle],
                [histogram for histogram in self._rest.histograms.values() if histogram.last <= idle],
            )
            if dropped != self._count:
                self._expired.cells[0] += dropped - self._count
                self._floor = self._wall()

    # --- what the agent does --------------------------------------------------------------------------------

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter of the agent's. A label is named by the last word of its attribute:
        stage="ring"."""
        metric = c.BY_NAME[name]
        with self._lock:
            self._scalar(metric, _labels(metric, labels)).cells[0] += value

    def set_total(self, name: str, value: float, **labels: str) -> None:
        """Take over a total that is kept elsewhere. One that would go down is held, and that is counted."""
        metric = c.BY_NAME[name]
        with self._lock:
            self._set_total(metric, _labels(metric, labels), value)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of the agent's."""
        metric = c.BY_NAME[name]
        with self._lock:
            self._scalar(metric, _labels(metric, labels)).cells[0] = value

    # --- reading --------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All series now: see Snapshot. Also brings the agent's own numbers up to date."""
        self.refresh()
        usage = rusage.getrusage(rusage.RUSAGE_SELF)
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with self._lock:
            for (stage, cause), lost in self._losses.snapshot().items():
                self._set_total(c.RECORDS_LOST, (("ebfw.stage", stage), ("ebfw.cause", cause)), lost)
            for name, feature in self._features.snapshot().items():
                self._scalar(c.FEATURE, (("ebfw.feature", name),)).cells[0] = int(feature.active)
            self._set_total(c.CPU_TIME, (("cpu.mode", "user"),), usage.ru_utime)
            self._set_total(c.CPU_TIME, (("cpu.mode", "system"),), usage.ru_stime)
            self._scalar(c.MEMORY, ()).cells[0] = resident
            states = [*self._states.values(), self._rest]
            for metric, index in _IX.items():
                series = sum(state.series[index] for state in states)
                self._scalar(c.SERIES, (("ebfw.metric", metric.name),)).cells[0] = series
            return Snapshot(self._wall(), self._resources.agent, states, self._scalars)

    def take_gone(self) -> list[Gone]:
        """What expired since the last call; the first call starts the keeping. At most TOTAL are kept."""
        with self._lock:
            gone, self._gone = self._gone or [], []
            return gone

    # --- inside; the lock is held ---------------------------------------------------------------------------

    def _state(self, workload: Workload) -> _State:
        known = self._cgroups.get(workload.cgroup_id)
        if known is not None and known[0] == workload:
            state = known[1]
        else:
            made = self._resources.of(workload)
            identity = (made.identity, made.workload_id)
            found = self._states.get(identity)
            if found is not None:
                state = found
                state.resource = made
                if state.ended is not None and state.gone != workload.cgroup_id:
                    state.ended = None
            elif self._count >= self._max:
                # Not kept under the cgroup: once series expire, the workload gets a state of its own.
                return self._rest
            else:
                state = self._states[identity] = _State(made, self._now)
                self._count += 1  # its WORKLOAD_INFO
            if len(self._cgroups) >= _CGROUPS:
                self._cgroups.clear()
        self._cgroups[workload.cgroup_id] = (workload, state)
        return state

    def _first(self, state: _State, row: _Row, cell: int, moved: int) -> None:
        """A cell leaves zero: a new series, if there is room for one."""
        index = _CELL_IX[cell]
        if moved < 0:
            self._scalar(c.CLAMPED, (("ebfw.metric", c.CELLS[cell][0].name),)).cells[0] += 1
        elif state is not self._rest and (
            # The few rows that are bounded by themselves must not drown in a port scan's peers.
            row.key[0].startswith("~") or self._room(state, index, 1, self._limit)
        ):
            state.series[index] += 1
            self._count += 1
            row.cells[cell] += moved
        else:
            self._overflowed(index)
            home = state if state.overflow is not None or self._count < self._max else self._rest
            if home.overflow is None:
                home.overflow = _Row((), max(self._floor, self._wall()), self._now)
            if not home.overflow.cells[cell]:
                home.series[index] += 1
                self._count += 1
            home.overflow.cells[cell] += moved
            home.overflow.last = home.last = self._now

    def _record(
        self, workload: Workload, key: tuple[Any, ...], metric: c.Metric, weight: int, duration_ns: int
    ) -> None:
        known = self._cgroups.get(workload.cgroup_id)
        state = known[1] if known is not None and known[0] is workload else self._state(workload)
        histogram = state.histograms.get(key)
        if histogram is None and (histogram := state.folded.get(key)) is not None:
            self._overflowed(key[0])
        if histogram is None:
            asked, folding = key, state.folded
            index = key[0]
            limit = self._dns_limit if index == _DNS_IX else self._limit
            if state is self._rest or not (
                str(key[1]).startswith("~")
                or (self._room(state, index, weight, limit) and self._in_histograms + weight <= self._max // 2)
            ):
                self._overflowed(index)
                home = state if self._count < self._max else self._rest
                # A lookup's error survives the fold (rcodes are few); elsewhere the conventions' overflow
                # series.
                key = (index, c.OTHER, key[2]) if index == _DNS_IX else (index,)
                state, histogram = home, home.histograms.get(key)
            if histogram is None:
                buckets = len(metric.bounds) + 1
                histogram = state.histograms[key] = _Histogram(key, buckets, self._wall(), self._now)
                state.series[index] += 1
                self._count += weight
                self._in_histograms += weight
            if key is not asked and len(folding) < _FOLDED:
                folding[asked] = histogram
        seconds = duration_ns / 1e9
        histogram.cells[bisect_left(metric.bounds, seconds)] += 1
        histogram.cells[-1] += seconds
        histogram.last = state.last = self._now

    def _room(self, state: _State, index: int, weight: int, limit: int) -> bool:
        return state.series[index] < limit - 1 and self._count + weight <= self._max

    def _overflowed(self, index: int) -> None:
        name = c.WORKLOAD_METRICS[index].name
        self._scalar(c.SERIES_OVERFLOW, (("ebfw.metric", name),)).cells[0] += 1

    def _drop(self, state: _State, rows: Iterable[_Row], histograms: Iterable[_Histogram]) -> None:
        for row in rows:
            for cell, value in enumerate(row.cells):
                if value:
                    state.series[_CELL_IX[cell]] -= 1
                    self._count -= 1
                    if self._gone is not None:
                        metric, extra = c.CELLS[cell]
                        self._mark(state, metric, _row_attributes(row.key) + extra, row.start)
            if row is state.overflow:
                state.overflow = None
            else:
                del state.rows[row.key]
        for histogram in histograms:
            index = histogram.key[0]
            metric = c.WORKLOAD_METRICS[index]
            state.series[index] -= 1
            self._count -= len(metric.bounds) + 3
            self._in_histograms -= len(metric.bounds) + 3
            self._mark(state, metric, _histogram_attributes(histogram.key), histogram.start)
            del state.histograms[histogram.key]

    def _mark(self, state: _State, metric: c.Metric, attributes: Attributes, start: int) -> None:
        if self._gone is not None and len(self._gone) < self._max:
            own: Attributes = ((c.WORKLOAD_ID, state.resource.workload_id),) if state.resource.workload_id else ()
            self._gone.append(Gone(state.resource, metric, own + attributes, start))

    def _scalar(self, metric: c.Metric, key: Attributes) -> _Scalar:
        series = self._scalars[metric]
        scalar = series.get(key)
        if scalar is None:
            if len(series) >= _SCALARS:
                key = tuple((name, c.OTHER) for name, _ in key)
            scalar = series.setdefault(key, _Scalar(key, self._started))
        return scalar

    def _set_total(self, metric: c.Metric, key: Attributes, value: float) -> None:
        cells = self._scalar(metric, key).cells
        if value >= cells[0]:
            cells[0] = value
        else:
            self._scalar(c.CLAMPED, (("ebfw.metric", metric.name),)).cells[0] += 1

    def _kind(self, kind: str, filtered: bool) -> _Scalar:
        metric = c.FILTERED if filtered else c.EVENTS
        scalar = self._kinds[kind, filtered] = self._scalar(metric, (("kind", kind),))
        return scalar


def _labels(metric: c.Metric, labels: dict[str, str]) -> Attributes:
    """Labels by the last word of their attribute, in the metric's order. KeyError names one that does not
    exist."""
    words = {attribute.rpartition(".")[2]: attribute for attribute in metric.attributes}
    for word in labels:
        if word not in words:
            raise KeyError(f"{metric.name} has no attribute {word!r}; it has {', '.join(words)}")
    return tuple((attribute, labels[word]) for word, attribute in words.items() if word in labels)
