"""OTLP encoding of metrics: a snapshot as opentelemetry-proto messages.

Comes in: a metrics snapshot. Goes out: ExportMetricsServiceRequest messages, each below `LIMIT` bytes, with how many
points they hold. Not its job: sending them (otlp_transport.py), deciding what is sent (otlp.py), spans and log
records (otlp_records.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb

from exporter.emit import semconv as c
from exporter.emit.metrics import Gone, Point, Snapshot
from exporter.emit.otlp_records import LIMIT, Payload
from exporter.emit.resource import Resource

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

    def metrics(self, snapshot: Snapshot, gone: Iterable[Gone], since_ns: int | None) -> Iterator[Payload]:
        """One ResourceMetrics for each workload in a request. `since_ns`: None for cumulative totals, else
        the time of the last push, and counters and histograms tell what came since then."""
        delta = since_ns is not None
        batch = _Batch(ExportMetricsServiceRequest, "resource_metrics", "scope_metrics", self)
        for resource, metrics in snapshot.by_resource():
            for metric, points in metrics:
                for point in points:
                    value = _moved(point) if delta and metric.kind in (c.COUNTER, c.HISTOGRAM) else point.value
                    if value is None:
                        continue
                    start = max(point.start_ns, since_ns or 0)
                    data = batch.data(resource, metric, delta)
                    message = _point(data, metric, start, snapshot.time_ns, value)
                    message.attributes.extend(self._attributes(point.attributes)[0])
                    if delta:
                        batch.on_sent(point)
                    yield from batch.added(message)
        for ended in () if delta else gone:
            message = batch.data(ended.resource, ended.metric, delta).data_points.add(
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

    def __init__(self, request: Callable[[], Any], resources: str, scopes: str, encoder: Encoder) -> None:
        self._request, self._resources, self._scopes = request, resources, scopes
        self._encoder = encoder
        self._start()

    def _start(self) -> None:
        self._message = self._request()
        self._by_resource: dict[int, tuple[Resource, Any]] = {}
        self._by_metric: dict[tuple[int, str], Any] = {}
        self._points: list[Point] = []
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
                message.histogram.aggregation_temporality = temporality
                known = message.histogram
            else:
                counter = metric.kind == c.COUNTER
                message.sum.aggregation_temporality = temporality if counter else _CUMULATIVE
                message.sum.is_monotonic = counter
                known = message.sum
            self._by_metric[key] = known
            self._bytes += message.ByteSize() + 8
        return known

    def on_sent(self, point: Point) -> None:
        self._points.append(point)

    def added(self, message: Any) -> Iterator[Payload]:
        self._items += 1
        self._bytes += message.ByteSize() + 8
        if self._bytes >= LIMIT:
            yield from self.rest()

    def rest(self) -> Iterator[Payload]:
        if self._items:
            points = self._points
            payload = Payload(self._message, self._items, lambda: _mark_sent(points))
            self._start()
            yield payload


def _point(data: Any, metric: c.Metric, start: int, now: int, value: Any) -> Any:
    if metric.kind == c.HISTOGRAM:
        *counts, total = value
        return data.data_points.add(
            start_time_unix_nano=start,
            time_unix_nano=now,
            count=sum(counts),
            sum=total,
            bucket_counts=counts,
            explicit_bounds=metric.bounds,
        )
    message = data.data_points.add(time_unix_nano=now)
    if metric.kind != c.GAUGE:
        message.start_time_unix_nano = start
    if isinstance(value, int):
        message.as_int = value
    else:
        message.as_double = value
    return message


def _moved(point: Point) -> Any:
    """By how much a point moved since it was last sent; None where it did not."""
    if point.source is None or point.source.sent is None:
        return point.value
    if point.cell >= 0:
        return (point.value - point.source.sent[point.cell]) or None
    moved = [now - before for now, before in zip(point.value, point.source.sent, strict=True)]
    return moved if any(moved[:-1]) else None


def _mark_sent(points: Iterable[Point]) -> None:
    for point in points:
        if point.source is None:
            continue
        if point.cell < 0:
            point.source.sent = point.value
        else:
            if point.source.sent is None:
                point.source.sent = [0] * len(point.source.cells)
            point.source.sent[point.cell] = point.value
