"""Both faces of one aggregation: temporality, exponential histograms, exemplars, levels, ends. Messages, not the wire.

Excluded: sending (test_otlp.py), a real Collector and Prometheus (tests/tools).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from exporter.emit import otlp_settings, prometheus
from exporter.emit import semconv as c
from exporter.emit.histograms import BUCKETS, bucket
from exporter.emit.metrics import Metrics
from exporter.emit.otlp_encode import Encoder
from exporter.events import Counts, Workload
from tests.unit.test_metrics import SSHD, Clock, event, flow, histogram, make, read
from tests.unit.test_metrics_http import CALL, GET

CUMULATIVE, DELTA = pb.AGGREGATION_TEMPORALITY_CUMULATIVE, pb.AGGREGATION_TEMPORALITY_DELTA
TRACE = (bytes(range(16)), bytes(range(8)))
PODS = [
    Workload(
        n, f"/kubepods/{n}", "pod", f"web-{n}", f"uid-{n}", f"{n}" * 64,
        pod_name=f"web-{n}", namespace="shop", container_name="nginx",
    )
    for n in range(3)
]  # fmt: skip


class Push:
    """A reader in the middle of things: takes, says it arrived or not."""

    def __init__(
        self, metrics: Metrics, clock: Clock, preference: str = "cumulative", exponential: bool = False
    ) -> None:
        self.metrics, self.clock = metrics, clock
        self.delta, self.lowmemory = preference != "cumulative", preference == "lowmemory"
        metrics.configure(exponential=exponential, exemplars="trace_based", delta=self.delta, lowmemory=self.lowmemory)
        metrics.take_gone()
        self.encoder = Encoder("1")
        self.last = 0

    def take(self, arrives: bool = True) -> dict[str, list[Any]]:
        """{metric: points}; and every metric's temporality under `metric/`."""
        self.clock.seconds += 10
        snapshot = self.metrics.snapshot()
        found: dict[str, list[Any]] = {}
        payloads = self.encoder.metrics(
            snapshot, self.metrics.take_gone(), self.last if self.delta else None, self.lowmemory
        )
        for payload in payloads:
            for metric in _metrics(payload.message):
                data = getattr(metric, metric.WhichOneof("data"))
                found.setdefault(metric.name, []).extend(data.data_points)
                if metric.WhichOneof("data") != "gauge":
                    found[f"{metric.name}/"] = [data.aggregation_temporality]
            if arrives:
                payload.sent()
        self.last = snapshot.time_ns
        return found


def _metrics(message: Any) -> Iterator[Any]:
    for resource in message.resource_metrics:
        for scope in resource.scope_metrics:
            yield from scope.metrics


# --- temporality ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "kernel", "events", "durations"),
    [
        ("cumulative", CUMULATIVE, CUMULATIVE, CUMULATIVE),
        ("delta", DELTA, DELTA, DELTA),
        ("lowmemory", CUMULATIVE, DELTA, DELTA),
    ],
)  # fmt: skip
@pytest.mark.parametrize("exponential", [False, True])
def test_d4_temporality_preference(
    preference: str, kernel: int, events: int, durations: int, exponential: bool
) -> None:
    """Totals that are kept elsewhere stay cumulative under lowmemory; what stands still is cumulative always."""
    metrics, clock = make()
    push = Push(metrics, clock, preference, exponential)
    metrics.add(flow(), Counts(tx_bytes=7, opened=1), 5)
    metrics.observe(event())
    found = push.take()
    for metric, temporality in (
        (c.NETWORK_IO, kernel), (c.EVENTS, events), (c.CONNECT_TIME, durations),
        (c.OPEN_CONNECTIONS, CUMULATIVE), (c.MEMORY, CUMULATIVE),
    ):  # fmt: skip
        assert found[f"{metric.name}/"] == [temporality], metric.name
    metrics.add(flow(), Counts(tx_bytes=7), 5)
    metrics.observe(event())
    found = push.take()
    assert [p.as_int for p in found[c.NETWORK_IO.name]] == [14 if kernel == CUMULATIVE else 7]
    assert [p.count for p in found[c.CONNECT_TIME.name]] == [2 if durations == CUMULATIVE else 1]


@pytest.mark.parametrize("exponential", [False, True])
def test_d4_intervals_of_deltas_meet_and_tell_all_once(exponential: bool) -> None:
    """Whatever does not arrive is in the next, whose interval begins where the last that arrived ended, or later
    where nothing moved for a while."""
    metrics, clock = make()
    push = Push(metrics, clock, "delta", exponential)
    ends: dict[str, list[tuple[int, int]]] = {"io": [], "connect": []}
    told = {"io": 0, "connect": 0}
    began = clock.wall()
    for n in range(24):  # the last one arrives
        if n % 5 != 4:
            metrics.add(flow(), Counts(tx_bytes=n), began)
            metrics.observe(event(duration=1000 * 7**n))
        arrives = n % 3 != 1
        found = push.take(arrives)
        if arrives:
            for name, metric in (("io", c.NETWORK_IO), ("connect", c.CONNECT_TIME)):
                ends[name] += [(p.start_time_unix_nano, p.time_unix_nano) for p in found.get(metric.name, ())]
            told["io"] += sum(p.as_int for p in found.get(c.NETWORK_IO.name, ()))
            told["connect"] += sum(p.count for p in found.get(c.CONNECT_TIME.name, ()))
    moved = [n for n in range(24) if n % 5 != 4]
    assert told == {"io": sum(moved), "connect": len(moved)}
    for intervals in ends.values():
        assert len(intervals) > 8
        assert all(start < end for start, end in intervals)
        assert all(later[0] >= earlier[1] for earlier, later in pairwise(intervals))


def test_d4_no_total_falls_and_starts_stay() -> None:
    metrics, clock = make()
    push = Push(metrics, clock, exponential=True)
    before: dict[Any, tuple[int, int]] = {}
    for n in range(23):
        metrics.add(flow(f"h{n % 3}"), Counts(tx_bytes=n), 5 + n)
        metrics.observe(event(domain=f"h{n % 3}", duration=1000 * 3**n))
        metrics.expire()
        for name, points in push.take().items():
            if name not in (c.NETWORK_IO.name, c.CONNECT_TIME.name):
                continue
            for point in points:
                key = (name, *(kv.value.string_value for kv in point.attributes))
                value = point.as_int if name == c.NETWORK_IO.name else point.count
                assert value >= before.get(key, (0, 0))[0]
                assert point.start_time_unix_nano <= before.get(key, (0, 1 << 62))[1]
                before[key] = (value, point.start_time_unix_nano)
    assert len(before) == 6


# --- histograms -------------------------------------------------------------------------------------------------


def test_d15_exponential_and_explicit_histograms_count_the_same() -> None:
    metrics, clock = make(opt_in=(c.HTTP_REQUEST_SIZE.name,))
    push = Push(metrics, clock, exponential=True)
    durations = [17 * 3**n for n in range(20)] + [5_000_000] * 3
    for duration in durations:
        metrics.observe(GET._replace(duration=duration))
    found = push.take()
    (point,) = found[c.HTTP_TIME.name]
    assert isinstance(point, pb.ExponentialHistogramDataPoint)
    assert point.count == 23 == point.zero_count + sum(point.positive.bucket_counts)
    assert point.sum == pytest.approx(sum(durations) / 1e9)
    assert len(point.positive.bucket_counts) <= BUCKETS
    expected: dict[int, int] = {}
    for duration in durations:
        index = bucket(duration / 1e9, point.scale)
        expected[index] = expected.get(index, 0) + 1
    filled = {point.positive.offset + at: count for at, count in enumerate(point.positive.bucket_counts) if count}
    assert filled == expected
    (sizes,) = found[c.HTTP_REQUEST_SIZE.name]
    assert (sizes.zero_count, sizes.count) == (23, 23)
    # The scrape has the same, in explicit buckets.
    ((cells),) = histogram(metrics, c.HTTP_TIME).values()
    assert sum(cells[:-1]) == 23
    assert cells[-1] == point.sum


@pytest.mark.parametrize("preference", ["cumulative", "delta"])
def test_d16_the_end_of_an_exponential_histogram(preference: str) -> None:
    metrics, clock = make()
    push = Push(metrics, clock, preference, exponential=True)
    metrics.observe(event())
    metrics.end(SSHD)
    push.take()
    clock.seconds += 400
    metrics.expire()
    points = push.take().get(c.CONNECT_TIME.name, [])
    assert [p.flags for p in points] == ([1] if preference == "cumulative" else [])
    assert all(isinstance(p, pb.ExponentialHistogramDataPoint) for p in points)


# --- ends -------------------------------------------------------------------------------------------------------


def test_d16_a_job_of_two_seconds_shows_on_both_faces() -> None:
    metrics, clock = make()
    push = Push(metrics, clock)
    metrics.add(flow(), Counts(tx_bytes=7), 5)
    metrics.observe(event())
    clock.seconds += 2
    metrics.end(SSHD)
    scrapes = pushes = 0
    for _ in range(40):
        metrics.expire()
        families = {family.name: family for family in prometheus.Collect(metrics).collect()}
        scrapes += "ebfw_network_io_bytes" in families
        points = push.take().get(c.NETWORK_IO.name, [])
        pushes += any(not p.flags for p in points)
        if any(p.flags for p in points):
            break
    assert scrapes >= 2
    assert pushes >= 2
    assert [p.flags for p in points] == [1]
    after = push.take()
    assert c.NETWORK_IO.name not in after
    assert c.CONNECT_TIME.name not in after


def test_d16_every_stream_of_a_workload_ends_once() -> None:
    metrics, clock = make()
    push = Push(metrics, clock)
    metrics.add(flow(), Counts(*[1] * 12), 5)
    for kind in ("connect", "close", "dns"):
        metrics.observe(event(kind, rtt=5, status="ok"))
    metrics.observe(GET)
    metrics.observe(CALL)
    before = {name: len(points) for name, points in push.take().items() if not name.endswith("/")}
    metrics.end(SSHD)
    clock.seconds += 1000
    metrics.expire()
    ended = {name: sum(p.flags for p in points) for name, points in push.take().items() if not name.endswith("/")}
    names = {metric.name for metric in c.WORKLOAD_METRICS} & before.keys()
    assert len(names) > 9
    assert {name: ended[name] for name in names} == {name: before[name] for name in names}


def test_d16_delta_loses_nothing_when_a_workload_ends_while_the_receiver_is_down() -> None:
    metrics, clock = make()
    push = Push(metrics, clock, "delta")
    metrics.add(flow(), Counts(tx_bytes=7), 5)
    metrics.observe(event())
    metrics.end(SSHD)
    for _ in range(10):
        push.take(arrives=False)
        clock.seconds += 100
        metrics.expire()
    found = push.take()
    assert [p.as_int for p in found[c.NETWORK_IO.name]] == [7]
    assert [p.count for p in found[c.CONNECT_TIME.name]] == [1]
    metrics.expire()
    assert read(metrics, c.NETWORK_IO) == {}
    # But not for ever.
    metrics.add(flow(), Counts(tx_bytes=7), 5)
    clock.seconds += 3700
    metrics.expire()
    assert read(metrics, c.NETWORK_IO) == {}


# --- exemplars --------------------------------------------------------------------------------------------------


def exemplars(metrics: Metrics) -> list[tuple[str, str, dict[str, str], float]]:
    """(metric, le, labels, value) as an OpenMetrics scrape shows them."""
    text = generate_latest(prometheus.Collect(metrics)).decode()
    return [
        (family.name, sample.labels["le"], sample.exemplar.labels, sample.exemplar.value)
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.exemplar
    ]


def test_exemplars_are_on_both_faces() -> None:
    metrics, clock = make()
    push = Push(metrics, clock)
    for n in range(23):
        metrics.observe(GET._replace(duration=30_000_000 + n), trace=(bytes([n]) * 16, bytes([n]) * 8))
    metrics.observe(GET._replace(duration=2_000_000_000))
    late = CALL._replace(time=77)
    metrics.observe(late)
    metrics.exemplify(late, TRACE)  # its second was over before the budget chose it
    ids = {"trace_id": TRACE[0].hex(), "span_id": TRACE[1].hex()}
    newest = {"trace_id": "16" * 16, "span_id": "16" * 8}
    assert exemplars(metrics) == [
        ("http_client_request_duration_seconds", "0.05", newest, pytest.approx(0.030000022)),
        ("http_client_request_duration_seconds", "0.01", ids, 0.007),
        ("rpc_client_call_duration_seconds", "0.01", ids, 0.007),
    ]
    found = push.take()
    (exemplar,) = found[c.RPC_TIME.name][0].exemplars
    assert (exemplar.trace_id, exemplar.span_id, exemplar.as_double) == (*TRACE, 0.007)
    assert exemplar.time_unix_nano == 77 + 7_000_000
    # Each is pushed once; a scrape shows it until a newer comes.
    assert not push.take()[c.RPC_TIME.name][0].exemplars
    assert len(exemplars(metrics)) == 3
    metrics.exemplify(late, TRACE)
    assert len(push.take(arrives=False)[c.RPC_TIME.name][0].exemplars) == 1
    assert len(push.take()[c.RPC_TIME.name][0].exemplars) == 1


@pytest.mark.parametrize(("choice", "count"), [("trace_based", 1), ("always_on", 2), ("always_off", 0)])
def test_exemplar_filter(choice: str, count: int) -> None:
    metrics, _ = make()
    metrics.configure(exponential=False, exemplars=choice)
    metrics.observe(event(duration=1))
    metrics.observe(event(duration=20_000_000), trace=TRACE)
    found = exemplars(metrics)
    assert len(found) == count
    assert sum("trace_id" in labels for _, _, labels, _ in found) == min(count, 1)


def test_of_many_spans_some_become_exemplars() -> None:
    metrics, clock = make()
    made = event()
    for n in range(1, 2001):
        metrics.observe(made)
        metrics.exemplify(made, (n.to_bytes(16, "big"), n.to_bytes(8, "big")))
    assert int(exemplars(metrics)[0][2]["trace_id"], 16) == 2000 // 32 * 32
    clock.seconds += 5
    metrics.expire()
    metrics.exemplify(made, TRACE)
    assert exemplars(metrics)[0][2]["trace_id"] == TRACE[0].hex()


def test_exemplars_are_bounded() -> None:
    metrics, _ = make()
    for n in range(1000):
        metrics.observe(event(duration=n * n * 20_000), trace=(n.to_bytes(16, "big"), n.to_bytes(8, "big")))
    assert len(exemplars(metrics)) <= len(c.CONNECT_TIME.bounds) + 1
    # What was never observed has no histogram, and makes none.
    metrics.exemplify(event(domain="unknown"), TRACE)
    metrics.exemplify(event(workload=SSHD._replace(cgroup_id=99)), TRACE)
    assert read(metrics, c.SERIES, "ebfw.metric")[c.CONNECT_TIME.name,] == 1


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected", "warns"),
    [
        ("OTEL_METRICS_EXEMPLAR_FILTER", "always_on", "exemplars", "always_on", False),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "sometimes", "exemplars", "trace_based", True),
        (
            "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "base2_exponential_bucket_histogram",
            "exponential", True, False,
        ),
        ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "round_buckets", "exponential", False, True),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "LowMemory", "lowmemory", True, False),
    ],
)  # fmt: skip
def test_d18_variables_of_metrics(
    variable: str, value: str, field: str, expected: object, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert getattr(otlp_settings.load({variable: value}), field) == expected
    assert (variable in caplog.text) == warns


# --- levels -----------------------------------------------------------------------------------------------------


def test_d14_workload_level_adds_the_pods_up() -> None:
    metrics, _ = make(level="workload")
    pods = [pod._replace(name="web", pod_name="web") if n else pod for n, pod in enumerate(PODS)]
    for pod in pods:
        metrics.add(flow(workload=pod), Counts(tx_bytes=1), 5)
        metrics.observe(GET._replace(workload=pod))
    labels = (*c.IDENTITY, c.WORKLOAD_ID)
    assert read(metrics, c.NETWORK_IO, *labels) == {
        ("web-0", "shop", "shop", "", "nginx", ""): 1,
        ("web", "shop", "shop", "", "nginx", ""): 2,
    }
    # Who is behind it is still said, one row for each pod.
    assert read(metrics, c.WORKLOAD_INFO, "service.name", "k8s.pod.name", "k8s.pod.uid") == {
        ("web-0", "web-0", "uid-0"): 1,
        ("web", "web", "uid-1"): 1,
        ("web", "web", "uid-2"): 1,
    }
    metrics.end(pods[2])
    assert set(read(metrics, c.WORKLOAD_INFO, "k8s.pod.uid")) == {("uid-0",), ("uid-1",)}
    assert read(metrics, c.SERIES, "ebfw.metric")[c.WORKLOAD_INFO.name,] == 2


def test_d14_pod_level_is_opt_in() -> None:
    metrics, _ = make(level="pod")
    for pod in PODS:
        metrics.add(flow(workload=pod), Counts(tx_bytes=1), 5)
    assert read(metrics, c.NETWORK_IO, "k8s.pod.name") == {("web-0",): 1, ("web-1",): 1, ("web-2",): 1}


@pytest.mark.parametrize("level", ["workload", "pod"])
def test_d15_no_resource_has_two_series_of_one_name(level: str) -> None:
    """Prometheus makes `job` and `instance` of service.namespace, .name and .instance.id, and labels of what is
    promoted: two Resources that agree in all of these would write into one series."""
    metrics, _ = make(level=level)
    for pod in PODS:
        metrics.add(flow(workload=pod), Counts(tx_bytes=1), 5)
    metrics.add(flow(workload=SSHD._replace(cgroup_id=50)), Counts(tx_bytes=1), 5)
    keys = ("service.namespace", "service.name", "service.instance.id", *c.IDENTITY)
    seen = [tuple(dict(resource.attributes).get(k) for k in keys) for resource, _ in metrics.snapshot().by_resource()]
    assert len(seen) == len(set(seen))
    pods = [dict(resource.attributes) for resource, _ in metrics.snapshot().by_resource()][1:4]
    for attributes in pods:
        assert ("k8s.pod.uid" in attributes) == (level == "pod")
        assert attributes["service.instance.id"].startswith("shop.web-" if level == "pod" else "node1.shop.web-")
