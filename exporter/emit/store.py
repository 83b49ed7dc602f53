"""The store of series: whose they are, how many there may be, when they end. The caller holds the lock.

Comes in: workloads, label values. Goes out: the Row, Number or Histogram to count into, made where there is room. Not
its job: what is counted where (metrics.py), what series look like to readers (series.py).

Series belong to an *identity* (what Prometheus sees as labels), not to a cgroup: a container that restarts goes on
with its series, where two states of one identity would collide in the second face. At workload level the pods of one
workload on this node are one identity; at pod level each is its own. Bounds: `limit` series for each (workload,
instrument) and `total` on the node, histograms counted as what they cost in Prometheus; what is beyond goes into one
overflow series and is counted. A series that expires and comes back starts from zero with a new start time, which
every reader takes for the reset that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from exporter.emit import semconv as c
from exporter.emit.histograms import Histogram
from exporter.emit.resource import Resource, Resources
from exporter.emit.series import CELL_IX, IX, Attributes, Gone, Layout, Number, Row, State, Value
from exporter.events import Workload

DNS_LIMIT: Final = 200  # of LIMIT, what dns.question.name may take: each costs 17 series in Prometheus
LIMIT: Final = 2000  # series for each (workload, instrument): the SDKs' default cardinality limit
TOTAL: Final = 50_000  # series on a node, as Prometheus counts them
ENDED_SECONDS: Final = 300.0  # at least two scrapes after a workload's end
IDLE_SECONDS: Final = 900.0
UNSENT_SECONDS: Final = 3600.0  # for what a delta receiver has not taken yet: a receiver may be down for a while
_SCALARS: Final = 1000  # of the agent's own, for each instrument: their labels are constants of the code
_CGROUPS: Final = 16_384
_MEMBERS: Final = 100  # pods of one identity, in WORKLOAD_INFO

WORKLOAD: Final = "workload"
POD: Final = "pod"
TRACE_BASED: Final = "trace_based"
ALWAYS_ON: Final = "always_on"
ALWAYS_OFF: Final = "always_off"

_CONNECT: Final = IX[c.CONNECT_TIME]
_DNS: Final = IX[c.DNS_TIME]
_OPEN: Final = IX[c.OPEN_CONNECTIONS]
_WEIGHTS: Final = tuple(len(m.bounds) + 3 if m.kind == c.HISTOGRAM else 1 for m in c.WORKLOAD_METRICS)
_INFO_KEYS: Final = frozenset(c.WORKLOAD_INFO.attributes)
# What one pod has and its workload has not.
_POD_KEYS: Final = frozenset((c.K8S_POD_NAME, c.K8S_POD_UID, c.CONTAINER_ID))


class Known:
    """What was found out about a cgroup's workload. `fast`: what an event shows -> where its duration goes, so that
    an event of a kind that was seen lately takes one look-up; emptied by expire()."""

    __slots__ = ("fast", "nobody", "state", "workload")

    def __init__(self, workload: Workload, state: State) -> None:
        self.workload, self.state = workload, state
        self.nobody = workload.kind == "unknown"
        self.fast: dict[Any, Any] = {}


class Store:
    """`now`: seconds, as of the last expire(). `floor`: where a row that expired would come back with the start time of
    its kernel row, a reader would see the same series fall without a reset; so none starts earlier. `count`: series, as
    Prometheus counts them. `gone`: None until somebody takes what expired. `exponential`, `exemplars` are what new
    histograms do; `held` says which metrics do not expire before their last value was sent."""

    def __init__(
        self,
        resources: Resources,
        layout: Layout,
        level: str,
        limits: tuple[int, int, int],
        clock: Callable[[], float],
        wall: Callable[[], int],
    ) -> None:
        self._resources, self.layout, self._level = resources, layout, level
        self._limit, self._max, self._dns_limit = limits
        self._clock, self.wall = clock, wall
        self._started = wall()
        self.now = clock()
        self.floor = 0
        self.cgroups: dict[int, Known] = {}
        self.states: dict[tuple[Any, ...], State] = {}
        self.rest = State(resources.other(), layout, self.now, shown=False)
        self.count = 0
        # Of which histograms: they may have half, lest they crowd out the counters that cost so much less.
        self._in_histograms = 0
        self.own: dict[c.Metric, dict[Attributes, Number]] = {metric: {} for metric in c.AGENT_METRICS}
        self.gone: list[Gone] | None = None
        self.exponential, self.exemplars = False, TRACE_BASED
        self.held: Callable[[c.Metric], bool] = lambda metric: False

    def know(self, workload: Workload) -> Known:
        """What is known of the workload; found out where nothing is, or where it has another name by now."""
        known = self.cgroups.get(workload.cgroup_id)
        if known is not None and known.workload == workload:
            known.workload = workload  # an equal one: found at once the next time
            return known
        made = self._resources.of(workload)
        resource = made if self._level == POD else _workload_level(made)
        identity = (resource.identity, resource.workload_id)
        state = self.states.get(identity)
        if state is None:
            if self.count >= self._max:
                # Not kept under the cgroup: once series expire, the workload gets a state of its own.
                return Known(workload, self.rest)
            state = self.states[identity] = State(resource, self.layout, self.now)
        else:
            state.resource = resource
            if state.ended is not None and state.gone != workload.cgroup_id:
                state.ended = None
        self._join(state, workload, made)
        if len(self.cgroups) >= _CGROUPS:
            self.cgroups.clear()
        known = self.cgroups[workload.cgroup_id] = Known(workload, state)
        return known

    def _join(self, state: State, workload: Workload, made: Resource) -> None:
        """A WORKLOAD_INFO for each pod of an identity; at pod level there is one."""
        shown = {key for key, _ in state.resource.identity}
        info = tuple((key, str(value)) for key, value in made.attributes if key in _INFO_KEYS and key not in shown)
        pod = workload.pod_uid if self._level != POD else ""
        if pod not in state.members:
            if len(state.members) >= _MEMBERS:
                self._leave(state, next(iter(state.members)))
            state.series[IX[c.WORKLOAD_INFO]] += 1
            self.count += 1
        state.members[pod] = (workload.cgroup_id, info)

    def _leave(self, state: State, pod: str) -> None:
        _, info = state.members.pop(pod)
        state.series[IX[c.WORKLOAD_INFO]] -= 1
        self.count -= 1
        self._mark(state, c.WORKLOAD_INFO, info, 0)

    def end(self, workload: Workload) -> None:
        """The workload's cgroup is gone: its series stay for ENDED_SECONDS, then expire."""
        known = self.cgroups.pop(workload.cgroup_id, None)
        if known is None:
            return
        state = known.state
        if not any(other.state is state for other in self.cgroups.values()):
            state.ended, state.gone = self._clock(), workload.cgroup_id
        else:
            for pod, (cgroup_id, _) in list(state.members.items()):
                if cgroup_id == workload.cgroup_id and len(state.members) > 1:
                    self._leave(state, pod)

    def expire(self, now: float | None = None) -> None:
        """Drop what ended or went idle."""
        self.now = now = self._clock() if now is None else now
        dropped = self.count
        for known in self.cgroups.values():
            known.fast.clear()
        for identity, state in list(self.states.items()):
            ended = state.ended is not None and now - max(state.ended, state.last) >= ENDED_SECONDS
            self._drop(state, now if ended else now - IDLE_SECONDS, ended)
            if state.empty and (ended or state.last <= now - IDLE_SECONDS):
                for pod in list(state.members):
                    self._leave(state, pod)
                del self.states[identity]
        states = {id(state) for state in self.states.values()}
        self.cgroups = {k: v for k, v in self.cgroups.items() if id(v.state) in states}
        self._drop(self.rest, now - IDLE_SECONDS, False)
        if dropped != self.count:
            self.number(c.SERIES_EXPIRED, ()).cells[0] += dropped - self.count
            self.floor = self.wall()

    def first(self, state: State, row: Row, cell: int, moved: int) -> None:
        """A cell leaves zero: a new series, if there is room for one."""
        index = CELL_IX[cell]
        if moved < 0:
            self.number(c.CLAMPED, (("ebfw.metric", c.CELLS[cell][0].name),)).cells[0] += 1
        elif state is not self.rest and (
            # The few rows that are bounded by themselves must not drown in a port scan's peers.
            str(row.key[0]).startswith("~") or self._room(state, index, 1, self._limit)
        ):
            state.series[index] += 1
            self.count += 1
            row.cells[cell] += moved
        else:
            self._overflowed(index)[0] += 1
            home = state if state.overflow is not None or self.count < self._max else self.rest
            if home.overflow is None:
                home.overflow = Row((), max(self.floor, self.wall()), self.now)
            if not home.overflow.cells[cell]:
                home.series[index] += 1
                self.count += 1
            home.overflow.cells[cell] += moved
            home.overflow.last = home.last = self.now

    def series(self, state: State, index: int, values: tuple[Value, ...], fold: tuple[Value, ...] = ()) -> Any:
        """The Number or Histogram of these values; made where there is room for it, else the one of `fold`, which is
        the conventions' overflow series where nothing better is known. (A lookup's error survives: rcodes are few.)"""
        found = state.table(index).get(values)
        if found is not None:
            found.last = state.last = self.now
            return found
        weight, metric = _WEIGHTS[index], c.WORKLOAD_METRICS[index]
        histogram = metric.kind == c.HISTOGRAM
        limit = self._dns_limit if index == _DNS else self._limit
        overflow: list[Any] | None = None
        # What is bounded by itself is not crowded out by what is not.
        bounded = index == _OPEN or (index in (_CONNECT, _DNS) and values[0] == c.EXCLUDED)
        room = bounded or (
            self._room(state, index, weight, limit)
            and not (histogram and self._in_histograms + weight > self._max // 2)
        )
        if state is self.rest or not room:
            overflow = self._overflowed(index)
            if self.count >= self._max:
                state = self.rest
            values = fold + ("",) * (len(self.layout.names[index]) - len(fold)) if fold else ()
            found = state.table(index).get(values)
        if found is None:
            if histogram:
                found = Histogram(values, metric.bounds, self.wall(), self.now, self.exponential)
                found.overflow = overflow
                found.extra = self.exponential or overflow is not None or self.exemplars == ALWAYS_ON
                self._in_histograms += weight
            else:
                found = Number(values, self.wall(), self.now)
            state.table(index)[values] = found
            state.series[index] += 1
            self.count += weight
        if overflow is not None and not histogram:
            overflow[0] += 1
        found.last = state.last = self.now
        return found

    def _room(self, state: State, index: int, weight: int, limit: int) -> bool:
        return state.series[index] < limit - 1 and self.count + weight <= self._max

    def _overflowed(self, index: int) -> list[Any]:
        """The cells of the counter of what found no room."""
        return self.number(c.SERIES_OVERFLOW, (("ebfw.metric", c.WORKLOAD_METRICS[index].name),)).cells

    def _drop(self, state: State, idle: float, ended: bool) -> None:
        """Drop what was not moved after `idle`."""
        patience = self.now - UNSENT_SECONDS
        held = [self.held(metric) for metric in c.WORKLOAD_METRICS]
        for row in state.all_rows():
            if row.last > idle or (row.last > patience and held[0] and row.cells != row.sent):
                continue
            for cell, value in enumerate(row.cells):
                if value:
                    state.series[CELL_IX[cell]] -= 1
                    self.count -= 1
                    metric, extra = c.CELLS[cell]
                    if self.gone is not None:
                        self._mark(state, metric, self.layout.row(row.key) + extra, row.start)
            if row is state.overflow:
                state.overflow = None
            else:
                del state.rows[row.key]
        for index, sources in state.all_sources():
            metric = c.WORKLOAD_METRICS[index]
            for source in sources:
                if source.last > idle or (source.last > patience and held[index] and source.cells != source.sent):
                    continue
                if metric.kind in (c.UPDOWN, c.GAUGE) and source.cells[0] and not ended:
                    continue  # it stands as it is
                state.series[index] -= 1
                self.count -= _WEIGHTS[index]
                if metric.kind == c.HISTOGRAM:
                    self._in_histograms -= _WEIGHTS[index]
                self._mark(state, metric, self.layout.of(index, source.key), source.start)
                del state.tables[index][source.key]

    def _mark(self, state: State, metric: c.Metric, attributes: Attributes, start: int) -> None:
        if self.gone is not None and len(self.gone) < self._max:
            self.gone.append(Gone(state.resource, metric, state.own + attributes, start))

    def number(self, metric: c.Metric, key: Attributes) -> Number:
        """One of the agent's own series."""
        series = self.own[metric]
        number = series.get(key)
        if number is None:
            if len(series) >= _SCALARS:
                key = tuple((name, c.OTHER) for name, _ in key)
            number = series.setdefault(key, Number(key, self._started))
        return number

    def set_total(self, metric: c.Metric, key: Attributes, value: float) -> None:
        cells = self.number(metric, key).cells
        if value >= cells[0]:
            cells[0] = value
        else:
            self.number(c.CLAMPED, (("ebfw.metric", metric.name),)).cells[0] += 1


def _workload_level(resource: Resource) -> Resource:
    """Without what only one pod of a workload has. The instance is the workload on this node."""
    found = dict(resource.attributes)
    if c.K8S_POD_NAME not in found:
        return resource
    identity = tuple((key, value) for key, value in resource.identity if key != c.K8S_POD_NAME)
    node = found.get(c.K8S_NODE_NAME) or found.get(c.HOST_NAME, "")
    kept = {key: value for key, value in found.items() if key not in _POD_KEYS}
    instance = (node, *(found.get(key) for key in (c.K8S_NAMESPACE_NAME, c.SERVICE_NAME, c.CONTAINER_NAME)))
    kept[c.SERVICE_INSTANCE_ID] = ".".join(str(part) for part in instance if part)
    return Resource(identity, resource.workload_id, tuple(kept.items()))
