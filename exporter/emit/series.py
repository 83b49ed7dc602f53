"""Series: what one identity has, and how readers walk over everybody's. Storage and its shapes, no rules.

Comes in: rows, numbers and histograms that metrics.py makes and counts into. Goes out: Points, by metric (the scrape
face wants families) or by Resource (the push face wants those). Not its job: what is counted where, limits, expiry.

Readers take no lock: list() of a dict's values and a copy of a list are one step each for other threads. A series
is read whole, different series at slightly different times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from exporter.emit import semconv as c
from exporter.emit.histograms import Histogram
from exporter.emit.resource import Resource
from exporter.events import Counts

Value = str | bool | int
Attributes = tuple[tuple[str, Value], ...]

IX = {metric: index for index, metric in enumerate(c.WORKLOAD_METRICS)}
CELL_IX = tuple(IX[metric] for metric, _ in c.CELLS)
_CELLS_OF = tuple(
    tuple((cell, extra) for cell, (owner, extra) in enumerate(c.CELLS) if owner is metric)
    for metric in c.WORKLOAD_METRICS
)
ZEROS = [0] * len(Counts._fields)
OVERFLOW: Attributes = ((c.OVERFLOW, True),)


class Row:
    """Counters of one flow label set: a cell for each field of Counts. `sent`, `sent_at`: what a delta reader was
    given of each, and when it was last up to date."""

    __slots__ = ("cells", "key", "last", "sent", "sent_at", "start")

    def __init__(self, key: tuple[Value, ...], start: int, last: float) -> None:
        self.key, self.start, self.last = key, start, last
        self.cells: list[int] = ZEROS[:]
        self.sent: list[int] | None = None
        self.sent_at: list[int] | None = None


class Number:
    """One counter or gauge. `key`: the values of its metric's attributes, of one of the agent's own the pairs."""

    __slots__ = ("cells", "key", "last", "sent", "sent_at", "start")

    def __init__(self, key: tuple[Any, ...], start: int, last: float = 0.0) -> None:
        self.key, self.start, self.last = key, start, last
        self.cells: list[Any] = [0]
        self.sent: list[Any] | None = None
        self.sent_at: list[int] | None = None


Source = Row | Number | Histogram


class Point(NamedTuple):
    """One series now. `value`: a number, or for a histogram its bucket counts followed by the sum. `source`
    and `cell` are for a delta reader, which keeps what it has sent in `source.sent`; `cell` is -1 for all
    cells."""

    attributes: Attributes
    start_ns: int
    value: Any
    source: Source | None
    cell: int


class Gone(NamedTuple):
    """A series that expired; OTLP ends it with one point without a value."""

    resource: Resource
    metric: c.Metric
    attributes: Attributes
    start_ns: int


class Layout:
    """Which attributes the series of each instrument have: the metric's own, and of its `more` those of `chosen`."""

    def __init__(self, chosen: frozenset[str] = frozenset()) -> None:
        self.names = tuple(
            metric.attributes + tuple(name for name in metric.more if name in chosen) for metric in c.WORKLOAD_METRICS
        )
        # A row's cells go to several metrics, whose attributes differ only in what a cell adds.
        extra = {name for _, pairs in c.CELLS for name, _ in pairs}
        self.flow = tuple(name for name in self.names[IX[c.NETWORK_IO]] if name not in extra)

    def row(self, key: tuple[Value, ...]) -> Attributes:
        """The attributes of a Row; an empty key is the overflow."""
        if not key:
            return ((c.SERVER_ADDRESS, c.OTHER), *OVERFLOW)
        return tuple((name, value) for name, value in zip(self.flow, key, strict=True) if value != "")

    def of(self, index: int, key: tuple[Value, ...]) -> Attributes:
        """The attributes of a Number or Histogram of the `index`th instrument. Absent ones are empty strings."""
        names = self.names[index]
        if not key and names:
            return OVERFLOW
        return tuple((name, value) for name, value in zip(names, key, strict=True) if value != "")


class State:
    """What one identity has: rows, numbers, histograms, how many series in each instrument."""

    __slots__ = (
        "ended", "gone", "last", "layout", "members", "overflow", "resource", "rows", "series", "shown", "tables",
    )  # fmt: skip

    def __init__(self, resource: Resource, layout: Layout, last: float, shown: bool = True) -> None:
        self.resource, self.layout, self.last, self.shown = resource, layout, last, shown
        self.rows: dict[tuple[Value, ...], Row] = {}
        self.overflow: Row | None = None
        # By instrument; made when the first series comes.
        self.tables: dict[int, dict[tuple[Value, ...], Any]] = {}
        self.series = [0] * len(c.WORKLOAD_METRICS)
        # By pod, or "": the cgroup and what tells it apart. A pod that restarts has one entry.
        self.members: dict[str, tuple[int, Attributes]] = {}
        self.ended: float | None = None
        self.gone = 0  # the cgroup that ended

    @property
    def own(self) -> Attributes:
        """What every point of this identity has."""
        return ((c.WORKLOAD_ID, self.resource.workload_id),) if self.resource.workload_id else ()

    @property
    def empty(self) -> bool:
        """Whether no series is left, WORKLOAD_INFO aside."""
        return not self.rows and self.overflow is None and not any(self.tables.values())

    def table(self, index: int) -> dict[tuple[Value, ...], Any]:
        found = self.tables.get(index)
        if found is None:
            found = self.tables[index] = {}
        return found

    def all_rows(self) -> list[Row]:
        rows = list(self.rows.values())
        if self.overflow is not None:
            rows.append(self.overflow)
        return rows

    def all_sources(self) -> Iterator[tuple[int, list[Number | Histogram]]]:
        """Everything but rows, by instrument."""
        for index, table in list(self.tables.items()):
            yield index, list(table.values())

    def points(self, index: int) -> Iterator[Point]:
        """The series of the `index`th instrument."""
        own, layout = self.own, self.layout
        if c.WORKLOAD_METRICS[index] is c.WORKLOAD_INFO:
            if self.shown:
                for _, info in list(self.members.values()):
                    yield Point(own + info, 0, 1, None, 0)
        elif cells := _CELLS_OF[index]:
            for row in self.all_rows():
                attributes: Attributes | None = None
                for cell, extra in cells:
                    if value := row.cells[cell]:
                        if attributes is None:
                            attributes = own + layout.row(row.key)
                        yield Point(attributes + extra, row.start, value, row, cell)
        elif table := self.tables.get(index):
            for source in list(table.values()):
                attributes = own + layout.of(index, source.key)
                if isinstance(source, Histogram):
                    yield Point(attributes, source.start, source.cells[:], source, -1)
                else:
                    yield Point(attributes, source.start, source.cells[0], source, 0)


AgentSeries = Mapping[c.Metric, dict[Attributes, Number]]


class Snapshot:
    """All series at about one time. Values are read while iterating, each series whole; iterate as often as needed.
    `exponential`: histograms have exponential cells too."""

    def __init__(
        self, time_ns: int, agent: Resource, states: list[State], agent_series: AgentSeries, exponential: bool = False
    ) -> None:
        self.time_ns, self.agent, self.exponential = time_ns, agent, exponential
        self._states, self._agent_series = states, agent_series

    def by_metric(self) -> Iterator[tuple[c.Metric, Iterator[tuple[Resource, Point]]]]:
        """Every metric with its points over all workloads, in semconv's order. Metrics without points included."""
        for index, metric in enumerate(c.WORKLOAD_METRICS):
            yield metric, self._everybodys(index)
        for metric in c.AGENT_METRICS:
            yield metric, ((self.agent, point) for point in self._agent_points(metric))

    def by_resource(self) -> Iterator[tuple[Resource, Iterator[tuple[c.Metric, Iterator[Point]]]]]:
        """The agent's own metrics first, then every workload's. A metric may have no points."""
        yield self.agent, ((metric, self._agent_points(metric)) for metric in c.AGENT_METRICS)
        for state in self._states:
            yield state.resource, self._of(state)

    def _everybodys(self, index: int) -> Iterator[tuple[Resource, Point]]:
        for state in self._states:
            for point in state.points(index):
                yield state.resource, point

    @staticmethod
    def _of(state: State) -> Iterator[tuple[c.Metric, Iterator[Point]]]:
        return ((metric, state.points(index)) for index, metric in enumerate(c.WORKLOAD_METRICS))

    def _agent_points(self, metric: c.Metric) -> Iterator[Point]:
        for number in list(self._agent_series.get(metric, {}).values()):
            yield Point(number.key, number.start, number.cells[0], number, 0)
