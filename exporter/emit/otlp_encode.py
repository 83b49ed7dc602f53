"""OTLP encoding of metrics: a snapshot as opentelemetry-proto messages.

Comes in: a metrics snapshot. Goes out: ExportMetricsServiceRequest messages, each below `LIMIT` bytes, with how many
points they hold. Not its job: sending them (otlp_transport.py), deciding what is sent (otlp.py), spans and log
records (otlp_records.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb

from exporter.emit import semconv as c
from exporter.emit.histograms import Exemplar, Histogram, since
from exporter.emit.metrics import Gone, Point, Snapshot, is_delta
from exporter.emit.otlp_records import Payload
from exporter.emit.resource import Resource

# Messages of protobuf's take many times the memory of their bytes.
LIMIT = 1 << 17
# Attributes are encoded once and kept: a message of protobuf's is an arena of 1 to 3 KiB of its own, which no Python
# tool shows. So only few are kept, and none whose values are as many as a host has peers.
_KEPT = 256
_MANY = frozenset(
    (
        c.SERVER_ADDRESS,
        "server.port",
        "dns.question.name",
        "network.peer.address",
        "network.peer.port",
        "network.local.address",
        "network.local.port",
        "process.pid",
        "url.path",
        "url.query",
        "url.full",
    )
)

_CUMULATIVE = pb.AGGREGATION_TEMPORALITY_CUMULATIVE
_DELTA = pb.AGGREGATION_TEMPORALITY_DELTA
_NO_VALUE = pb.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK


class Encoder:
    """One for each worker thread: it caches attributes. `value_length` and `attribute_count` are the specification's
    limits."""

    def __init__(self, version: str, value_length: int | None = None, attribute_count: int = 128) -> None:
        self._version = version
        self._length, self._count = value_length, attribute_count
        self._cache: dict[tuple[str, type, Any], KeyValue] = {}

    def metrics(
        self, snapshot: Snapshot, gone: Iterable[Gone], since_ns: int | None, lowmemory: bool = False
    ) -> Iterator[Payload]:
        """One ResourceMetrics for each workload in a request. `since_ns`: None for cumulative totals, else
        the time of the last push, and counters and histograms tell what came since then; of these, with `lowmemory`,
        only what is not kept elsewhere anyway. Ended series get a point without a value, where totals are told."""
        batch = _Batch(ExportMetricsServiceRequest, "resource_metrics", "scope_metrics", self, snapshot)
        for resource, metrics in snapshot.by_resource():
            for metric, points in metrics:
                delta = since_ns is not None and is_delta(metric, lowmemory)
                for point in points:
                    read = _read(point, delta)
                    told = point.source.sent_at if delta and point.source is not None else None
                    if read is None:
                        if told is not None:
                            told[point.cell] = snapshot.time_ns
                        continue
                    start = point.start_ns if told is None else max(point.start_ns, told[point.cell])
                    data = batch.data(resource, metric, delta)
                    message = _point(data, metric, start, snapshot.time_ns, read)
                    message.attributes.extend(self._attributes(point.attributes)[0])
                    if delta or read.exemplars:
                        batch.on_sent(read)
                    yield from batch.added(message)
        for ended in gone:
            if since_ns is not None and is_delta(ended.metric, lowmemory):
                continue
            message = batch.data(ended.resource, ended.metric, False).data_points.add(
                start_time_unix_nano=ended.start_ns, time_unix_nano=snapshot.time_ns, flags=_NO_VALUE
            )
            message.attributes.extend(self._attributes(ended.attributes)[0])
            yield from batch.added(message)
        yield from batch.rest()

    def _attributes(self, pairs: Iterable[tuple[str, Any]]) -> tuple[list[KeyValue], int]:
        found = [self._pair(key, value) for key, value in pairs]
        return found[: self._count], max(0, len(found) - self._count)

    def _pair(self, key: str, value: Any) -> KeyValue:
        if key in _MANY:
            return KeyValue(key=key, value=self._value(value))
        known = self._cache.get((key, type(value), value))
        if known is None:
            if len(self._cache) >= _KEPT:
                self._cache.clear()
            known = self._cache[key, type(value), value] = KeyValue(key=key, value=self._value(value))
        return known

    def _value(self, value: Any) -> AnyValue:
        if isinstance(value, bool):
            return AnyValue(bool_value=value)
        if isinstance(value, int):
            return AnyValue(int_value=value)
        if isinstance(value, float):
            return AnyValue(double_value=value)
        if isinstance(value, str):
            # A lone surrogate (undecodable bytes in a name) would make protobuf refuse the whole batch.
            text = value.encode("utf-8", "replace").decode()
            return AnyValue(string_value=text if self._length is None else text[: self._length])
        made = AnyValue()
        made.array_value.values.extend(self._value(item) for item in value)
        return made


class _Batch:
    """Fills requests of one kind: groups by Resource, starts a new request when one is full."""

    def __init__(
        self,
        request: Callable[[], Any],
        resources: str,
        scopes: str,
        encoder: Encoder,
        snapshot: Snapshot | None = None,
    ) -> None:
        self._request, self._resources, self._scopes = request, resources, scopes
        self._encoder, self._snapshot = encoder, snapshot
        self._start()

    def _start(self) -> None:
        self._message = self._request()
        self._by_resource: dict[int, tuple[Resource, Any]] = {}
        self._by_metric: dict[tuple[int, str], Any] = {}
        self._points: list[_Reading] = []
        self._bytes = self._items = 0

    def scope(self, resource: Resource) -> Any:
        # By identity: a Resource is cached for as long as its workload is known, and hashing one takes longer
        # than encoding a span. Keeping the object keeps its id from being given to another.
        known = self._by_resource.get(id(resource))
        if known is None:
            outer = getattr(self._message, self._resources).add(schema_url=c.SCHEMA_URL)
            outer.resource.attributes.extend(self._encoder._attributes(resource.attributes)[0])
            inner = getattr(outer, self._scopes).add(schema_url=c.SCHEMA_URL)
            inner.scope.name, inner.scope.version = c.SCOPE, self._encoder._version
            known = self._by_resource[id(resource)] = (resource, inner)
            self._bytes += outer.ByteSize()
        return known[1]

    def data(self, resource: Resource, metric: c.Metric, delta: bool) -> Any:
        key = (id(resource), metric.name)
        known = self._by_metric.get(key)
        if known is None:
            message = self.scope(resource).metrics.add(
                name=metric.name, unit=metric.unit, description=metric.description
            )
            temporality = _DELTA if delta else _CUMULATIVE
            if metric.kind == c.GAUGE:
                message.gauge.SetInParent()
                known = message.gauge
            elif metric.kind == c.HISTOGRAM:
                exponential = self._snapshot is not None and self._snapshot.exponential
                known = message.exponential_histogram if exponential else message.histogram
                known.aggregation_temporality = temporality
            else:
                counter = metric.kind == c.COUNTER
                message.sum.aggregation_temporality = temporality if counter else _CUMULATIVE
                message.sum.is_monotonic = counter
                known = message.sum
            self._by_metric[key] = known
            self._bytes += message.ByteSize() + 8
        return known

    def on_sent(self, read: _Reading) -> None:
        self._points.append(read)

    def added(self, message: Any) -> Iterator[Payload]:
        self._items += 1
        self._bytes += message.ByteSize() + 8
        if self._bytes >= LIMIT:
            yield from self.rest()

    def rest(self) -> Iterator[Payload]:
        if self._items:
            points, now = self._points, 0 if self._snapshot is None else self._snapshot.time_ns
            payload = Payload(self._message, self._items, lambda: _mark_sent(points, now))
            self._start()
            yield payload


class _Reading(NamedTuple):
    """What a point says this time. `value`: the number or the explicit cells, `exponential` the cells of that kind
    ([] for none): the total or what moved. `exponential_total`, `newest`: all of them, for the next time."""

    point: Point
    value: Any
    exponential: list[int]
    exponential_total: list[int] | None
    exemplars: list[Exemplar]
    newest: list[Exemplar | None] | None


def _read(point: Point, delta: bool) -> _Reading | None:
    """None for a delta where nothing moved."""
    source, value = point.source, point.value
    cells: list[int] = []
    total: list[int] | None = None
    exemplars: list[Exemplar] = []
    newest: list[Exemplar | None] | None = None
    if isinstance(source, Histogram):
        if source.exponential is not None:
            cells = total = source.exponential[:]
        if source.exemplars is not None:
            newest = source.exemplars[:]
            told = source.told or [None] * len(newest)
            exemplars = [e for e, before in zip(newest, told, strict=True) if e is not None and e is not before]
    if delta and source is not None and source.sent is not None:
        if point.cell >= 0:
            value = (value - source.sent[point.cell]) or None
        else:
            value = [now - before for now, before in zip(value, source.sent, strict=True)]
            if not any(value[:-1]):
                value = None
            elif total is not None and isinstance(source, Histogram):
                cells = since(total, source.sent_exponential)
    return None if value is None else _Reading(point, value, cells, total, exemplars, newest)


def _point(data: Any, metric: c.Metric, start: int, now: int, read: _Reading) -> Any:
    value = read.value
    if metric.kind == c.HISTOGRAM:
        *counts, total = value
        message = data.data_points.add(start_time_unix_nano=start, time_unix_nano=now, sum=total)
        if read.exponential:
            message.scale, message.positive.offset, message.zero_count, *buckets = read.exponential
            message.positive.bucket_counts.extend(buckets)
            # Not of the explicit cells: they may have been read a moment before.
            message.count = message.zero_count + sum(buckets)
        else:
            message.count = sum(counts)
            message.bucket_counts.extend(counts)
            message.explicit_bounds.extend(metric.bounds)
        for exemplar in read.exemplars:
            message.exemplars.add(
                time_unix_nano=exemplar.time_ns,
                as_double=exemplar.value,
                trace_id=exemplar.trace_id,
                span_id=exemplar.span_id,
            )
        return message
    message = data.data_points.add(time_unix_nano=now)
    if metric.kind != c.GAUGE:
        message.start_time_unix_nano = start
    if isinstance(value, int):
        message.as_int = value
    else:
        message.as_double = value
    return message


def _mark_sent(readings: Iterable[_Reading], now: int) -> None:
    for read in readings:
        point, source = read.point, read.point.source
        if source is None:
            continue
        if point.cell < 0 and isinstance(source, Histogram):
            source.sent, source.sent_exponential, source.told = point.value, read.exponential_total, read.newest
            source.sent_at = [now]
            continue
        if source.sent is None or source.sent_at is None:
            source.sent, source.sent_at = [0] * len(source.cells), [source.start] * len(source.cells)
        source.sent[point.cell], source.sent_at[point.cell] = point.value, now
