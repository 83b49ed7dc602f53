"""The push face against a real receiver on loopback, gRPC and HTTP: what arrives, and what is counted when
not.

Excluded: a real Collector and Prometheus (tests/pipeline).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from exporter import health
from exporter.emit import otlp, prometheus
from exporter.emit import semconv as c
from exporter.emit.instrumented import Instrumented
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.emit.setup import ALL, Setups
from exporter.events import Counts, Flow, Workload
from tests.pipeline.otlp_receiver import Receiver, attributes
from tests.unit.samples import EVENT, HELLO, LOOKUP, PARENT, REQUEST, SSHD, UNSAMPLED, WEB, outcome


class Rig:
    """An Otlp pointed at the receiver, with counters of its own."""

    def __init__(self, url: str, protocol: str, environ: dict[str, str] | None = None, **options: Any) -> None:
        self.losses = health.Losses()
        self.resources = Resources("host1", "node1", "1.2.3")
        self.metrics = Metrics(self.resources, losses=self.losses, features=health.Features())
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BLRP_SCHEDULE_DELAY": "50",
            "OTEL_METRIC_EXPORT_INTERVAL": "60000",
        }
        self.otlp = otlp.Otlp(
            env | (environ or {}),
            self.resources,
            self.metrics,
            version="1.2.3",
            losses=self.losses,
            **options,
        )

    def lost(self, cause: str) -> int:
        return self.losses.snapshot().get(("export", cause), 0)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(params=["http/protobuf", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def url(receiver: Receiver, protocol: str) -> str:
    return receiver.grpc if protocol == "grpc" else receiver.http


def test_every_signal_arrives_under_the_resource_of_its_workload(receiver: Receiver, protocol: str) -> None:
    rig = Rig(url(receiver, protocol), protocol)
    rig.otlp.start()
    rig.otlp.emit(EVENT)
    rig.otlp.emit(EVENT._replace(workload=SSHD, status="refused"))
    rig.otlp.emit(LOOKUP)
    rig.otlp.emit(REQUEST)
    rig.metrics.add(
        Flow(WEB, "client", "tcp", "192.0.2.1", 443, "internet", "example.com", "sni"),
        Counts(tx_bytes=100),
        5,
    )
    rig.metrics.observe(EVENT)
    rig.otlp.shutdown()

    spans = {found.name: (resource, found) for resource, found in receiver.spans()}
    assert set(spans) == {"connection", "socket connect 192.0.2.1:443", "DNS lookup db.example.com", "GET"}
    resource, lookup = spans["DNS lookup db.example.com"]
    assert resource == {
        "host.name": "host1",
        "k8s.node.name": "node1",
        "telemetry.distro.name": "ebfw",
        "telemetry.distro.version": "1.2.3",
        "service.name": "web-0",
        "service.namespace": "shop",
        "service.instance.id": "shop.web-0.nginx",
        "k8s.namespace.name": "shop",
        "k8s.pod.name": "web-0",
        "k8s.pod.uid": "uid-1",
        "k8s.container.name": "nginx",
        "container.name": "nginx",
        "container.id": "c" * 64,
        "container.runtime.name": "containerd",
        "ebfw.workload.kind": "pod",
        "ebfw.workload.qos": "burstable",
    }
    assert (lookup.kind, lookup.status.code) == (1, 2)
    assert lookup.end_time_unix_nano - lookup.start_time_unix_nano == 3_000_000
    assert attributes(lookup)["error.type"] == "host_not_found"
    assert (len(lookup.trace_id), len(lookup.span_id)) == (16, 8)
    found = [(resource["service.name"], span.name, span.status.code) for resource, span in receiver.spans()]
    assert sorted(found) == [
        ("ssh.service", "connection", 2),
        ("ssh.service", "socket connect 192.0.2.1:443", 2),
        ("web-0", "DNS lookup db.example.com", 2),
        ("web-0", "GET", 0),
        ("web-0", "connection", 2),
    ]

    logs = {(resource["service.name"], log.event_name): log for resource, log in receiver.logs()}
    assert set(logs) == {
        ("web-0", "ebfw.egress.connection"),
        ("ssh.service", "ebfw.egress.connection"),
        ("web-0", "ebfw.egress.dns"),
    }
    first = logs["web-0", "ebfw.egress.connection"]
    assert (first.time_unix_nano, first.severity_number) == (EVENT.time, 9)
    assert attributes(first) == {
        "server.address": "example.com",
        "server.port": 443,
        "network.peer.address": "192.0.2.1",
        "network.peer.port": 443,
        "network.local.address": "10.0.0.9",
        "network.local.port": 40000,
        "network.transport": "tcp",
        "network.type": "ipv4",
        "ebfw.peer.name.source": "sni",
        "ebfw.peer.scope": "internet",
        "ebfw.role": "client",
        "process.pid": 42,
        "process.executable.name": "curl",
        "ebfw.connection.state": "opened",
        "ebfw.connect.duration": 0.02,
        "ebfw.connection.id": "8000000000000001",
        "ebfw.destination.first_seen": True,
    }
    assert logs["ssh.service", "ebfw.egress.connection"].severity_number == 13

    ((resource, metric, point),) = receiver.points("ebfw.network.io")
    assert (resource["service.name"], point.as_int, point.start_time_unix_nano) == ("web-0", 100, 5)
    assert (metric.unit, metric.sum.is_monotonic, metric.sum.aggregation_temporality) == ("By", True, 2)
    ((_, _, buckets),) = receiver.points("ebfw.tcp.connect.duration")
    assert (buckets.count, list(buckets.explicit_bounds)) == (1, list(c.CONNECT_TIME.bounds))
    assert len(buckets.bucket_counts) == len(c.CONNECT_TIME.bounds) + 1
    agents = {resource["service.name"] for resource, metric, _ in receiver.points("ebfw.events")}
    assert agents == {"ebfw"}
    assert rig.losses.total() == 0


def test_both_faces_say_the_same_d15(receiver: Receiver) -> None:
    """Names, labels and values of a scrape, and of an OTLP push translated by the specification's rules."""
    rig = Rig(receiver.http, "http/protobuf")
    rig.otlp.start()
    for n in range(23):
        rig.metrics.add(
            Flow(WEB, "client", "tcp", "192.0.2.1", n, "internet", f"h{n % 5}", "sni"), Counts(*range(12)), 5
        )
        rig.metrics.observe(LOOKUP)
        rig.metrics.observe(EVENT._replace(workload=Workload(9, "/p", "pod", "", "u", "d" * 64)))
    scraped = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in prometheus.Collect(rig.metrics).collect()
        for sample in family.samples
    }
    rig.otlp.shutdown()
    pushed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for resource, metric, point in receiver.points():
        known = c.BY_NAME[metric.name]
        labels = {c.prometheus_label(key): resource[key] for key in c.IDENTITY if key in resource}
        for key, got in attributes(point).items():
            labels[c.prometheus_label(key)] = str(got).lower() if isinstance(got, bool) else str(got)
        name = c.prometheus_series(known)
        if metric.WhichOneof("data") == "histogram":
            pushed[f"{name}_count", tuple(sorted(labels.items()))] = point.count
            pushed[f"{name}_sum", tuple(sorted(labels.items()))] = point.sum
        else:
            got = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
            pushed[name, tuple(sorted(labels.items()))] = got

    def comparable(series: dict[Any, float]) -> dict[Any, float]:
        volatile = ("process_", "target_info", "ebfw_export_")
        return {k: v for k, v in series.items() if not k[0].startswith(volatile) and "_bucket" not in k[0]}

    assert comparable(scraped) == comparable(pushed)
    assert len(comparable(pushed)) > 50


def test_nothing_happens_without_an_endpoint_d10() -> None:
    rig = Rig("", "http/protobuf")
    assert not rig.otlp.active
    rig.otlp.start()
    for _ in range(5000):
        rig.otlp.emit(EVENT)
    rig.otlp.shutdown()
    assert rig.losses.total() == 0


def test_imports_only_what_was_chosen() -> None:
    """RSS is bounded: no OpenTelemetry without an endpoint, no grpc for HTTP."""
    program = "\n".join(
        (
            "import sys",
            "from exporter.emit import otlp",
            "from exporter.emit.metrics import Metrics",
            "from exporter.emit.resource import Resources",
            "resources = Resources('h')",
            "otlp.Otlp(ENVIRON, resources, Metrics(resources)).start()",
            "names = ('google.protobuf', 'opentelemetry', 'requests', 'grpc', 'charset_normalizer')",
            "print(*(name for name in names if sys.modules.get(name)))",
        )
    )
    for environ, expected in (
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, "google.protobuf opentelemetry requests"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "google.protobuf opentelemetry grpc",
        ),
    ):
        code = program.replace("ENVIRON", repr(environ))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == expected
        assert "DependencyWarning" not in done.stderr


def test_headers_and_compression_reach_the_receiver_and_no_log(
    receiver: Receiver, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    environ = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20canary-1,x-scope=a,no canary-2,b@=canary-3",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    rig = Rig(url(receiver, protocol), protocol, environ)
    rig.otlp.start()
    rig.otlp.emit(EVENT)
    rig.otlp.shutdown()
    assert receiver.requests
    for received in receiver.requests:
        assert received.headers["authorization"] == "Bearer canary-1"
        assert received.headers["x-scope"] == "a"
        if protocol != "grpc":
            assert received.headers["content-encoding"] == "gzip"
    assert "canary" not in caplog.text
    assert "canary" not in repr(rig.otlp.settings)


def test_d19_a_refusal_is_retried_after_what_the_receiver_said(receiver: Receiver, protocol: str) -> None:
    receiver.refuse, receiver.retry_after = 1, 1
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"})
    rig.otlp.start()
    started = time.monotonic()
    rig.otlp.emit(REQUEST)
    receiver.wait(lambda: receiver.requests)
    assert 0.9 < time.monotonic() - started < 6
    rig.otlp.shutdown()
    assert (receiver.refused, len(list(receiver.spans())), rig.losses.total()) == (1, 1, 0)


def test_what_no_receiver_takes_is_counted(receiver: Receiver, protocol: str) -> None:
    receiver.refuse, receiver.status = -1, 400
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    for n in range(23):
        rig.otlp.emit(REQUEST._replace(domain=f"h{n}"))
    rig.otlp.shutdown()
    assert rig.lost("failed") == 23 * 2


def test_d19_partial_success_is_counted(receiver: Receiver, protocol: str) -> None:
    receiver.reject = 3
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"})
    rig.otlp.start()
    for _ in range(10):
        rig.otlp.emit(REQUEST)
    rig.otlp.shutdown()
    assert (rig.lost("rejected"), rig.losses.total()) == (
        3 * len(receiver.requests),
        3 * len(receiver.requests),
    )
    exported = [p.value for m, points in rig.metrics.snapshot().by_metric() if m is c.EXPORTED for _, p in points]
    assert exported == [10 - 3 * len(receiver.requests)]


def test_a_receiver_that_hangs_never_stalls_emit_and_every_record_is_accounted_for(
    receiver: Receiver, protocol: str
) -> None:
    receiver.delay = 60
    off = {"OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}
    rig = Rig(url(receiver, protocol), protocol, off, logs="all")
    rig.otlp.start()
    slowest = 0.0
    for _ in range(10_000):
        before = time.perf_counter()
        rig.otlp.emit(EVENT)
        slowest = max(slowest, time.perf_counter() - before)
    started = time.monotonic()
    rig.otlp.shutdown(timeout=0.5)
    assert time.monotonic() - started < 4
    assert slowest < 0.5  # two shared cores; a stall would be seconds
    assert rig.lost("queue_full") > 5000
    lost = sum(rig.lost(cause) for cause in ("queue_full", "shutdown", "failed"))
    # What the receiver holds at the end is neither sent nor given up: one batch.
    assert 10_000 - 512 <= lost <= 10_000


def test_no_receiver_at_all(protocol: str) -> None:
    rig = Rig("http://127.0.0.1:9", protocol, {"OTEL_EXPORTER_OTLP_TIMEOUT": "0.3"})
    rig.otlp.start()
    rig.otlp.emit(REQUEST)
    rig.otlp.shutdown(timeout=3)
    assert rig.lost("failed") + rig.lost("shutdown") == 2
    assert rig.lost("failed_points") + rig.lost("shutdown_points") > 0


def test_d19_payloads_stay_below_the_limit(receiver: Receiver, protocol: str) -> None:
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_BLRP_MAX_QUEUE_SIZE": "5000",
              "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": "5000"}, logs="all")  # fmt: skip
    for n in range(5000):
        rig.metrics.add(
            Flow(WEB, "client", "tcp", "192.0.2.1", 1, "internet", f"{n}.{'x' * 200}", "sni"),
            Counts(*[1] * 12),
            5,
        )
    rig.otlp.start()
    for n in range(4000):
        rig.otlp.emit(EVENT._replace(domain=f"{n}.{'x' * 200}"))
    rig.otlp.shutdown(timeout=30)
    assert max(received.message.ByteSize() for received in receiver.requests) < 4 << 20
    assert len(receiver.of("metrics")) > 2
    assert len(list(receiver.logs())) == 4000
    names = {attributes(p)["server.address"] for _, _, p in receiver.points("ebfw.network.packets")}
    assert len(names) == 1001  # 2,000 series: 1,000 names in two directions, less one, and the overflow
    assert rig.lost("queue_full") == rig.lost("failed") == 0


def test_delta_tells_each_byte_once_even_when_a_push_fails(receiver: Receiver) -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_METRIC_EXPORT_INTERVAL": "150",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    rig = Rig(receiver.http, "http/protobuf", environ)
    rig.otlp.start()
    flow = Flow(WEB, "client", "tcp", "192.0.2.1", 443, "internet", "example.com", "sni")
    receiver.status = 400
    for n in range(23):
        rig.metrics.add(flow, Counts(tx_bytes=n), 5)
        rig.metrics.observe(EVENT)
        receiver.refuse = int(n == 7)
        time.sleep(0.03)
    rig.otlp.shutdown()
    points = [p for _, _, p in receiver.points("ebfw.network.io")]
    assert sum(p.as_int for p in points) == sum(range(23))
    assert len(points) > 1
    assert sum(p.count for _, _, p in receiver.points("ebfw.tcp.connect.duration")) == 23
    assert all(p.start_time_unix_nano < p.time_unix_nano for p in points)
    memory = [m for _, m, _ in receiver.points("process.memory.usage")]
    assert {m.sum.aggregation_temporality for m in memory} == {2}


def test_an_ended_series_gets_one_point_without_a_value_d16(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", {"OTEL_METRIC_EXPORT_INTERVAL": "100"})
    rig.otlp.start()
    rig.metrics.add(Flow(WEB, "client", "tcp", "", 1, "internet", "x", "sni"), Counts(tx_bytes=1), 5)
    rig.metrics.end(WEB)
    receiver.wait(lambda: list(receiver.points("ebfw.network.io")))
    rig.metrics.expire(time.monotonic() + 1000)
    time.sleep(0.4)
    rig.otlp.shutdown()
    flags = [p.flags for _, _, p in receiver.points("ebfw.network.io")]
    assert flags.count(1) == 1
    assert flags[-1] == 1


# --- which spans ------------------------------------------------------------------------------------------------------

OFF = {"OTEL_LOGS_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}


@pytest.mark.parametrize(
    ("environ", "spans"),
    [
        ({}, 5),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, 0),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, 400),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, 0),
        ({"OTEL_TRACES_EXPORTER": "none"}, 0),
        ({"OTEL_SDK_DISABLED": "true"}, 0),
    ],
)
@pytest.mark.parametrize("asked", [False, True])
def test_d10_a_sampler_that_is_set_is_obeyed(
    receiver: Receiver, environ: dict[str, str], spans: int, asked: bool
) -> None:
    rig = Rig(receiver.http, "http/protobuf", environ | OFF, spans_per_second=5)
    rig.otlp.start()
    while time.time() % 1 > 0.8:
        time.sleep(0.05)  # all 400 in one second
    for _ in range(400):
        if not asked or rig.otlp.wants(REQUEST):
            rig.otlp.emit(REQUEST)
    rig.otlp.shutdown()
    assert len(list(receiver.spans())) == pytest.approx(spans, abs=5 if not environ else 0)
    if not environ:
        assert rig.lost("budget") == 400 - len(list(receiver.spans()))


def test_d10_what_is_wanted_before_it_is_redacted(receiver: Receiver) -> None:
    """All but a plain request of a workload that has used its share."""
    rig = Rig(receiver.http, "http/protobuf", spans_per_second=1)
    every = Rig(receiver.http, "http/protobuf", spans_per_second=1, logs="all")
    while time.time() % 1 > 0.8:
        time.sleep(0.05)  # all in one second
    for one in (rig, every):
        assert one.otlp.wants(REQUEST)
        one.otlp.emit(REQUEST)  # a destination that is new
    assert sum(map(rig.otlp.wants, [REQUEST] * 200)) < 30
    assert all(map(every.otlp.wants, [REQUEST] * 200))
    for wanted in (
        EVENT,
        LOOKUP,
        HELLO,
        outcome(status=500),
        outcome(traceparent=PARENT),
        REQUEST._replace(domain="other.example"),
        REQUEST._replace(domain=f"user@{REQUEST.domain}"),
        REQUEST._replace(workload=SSHD),
    ):
        assert all(map(rig.otlp.wants, [wanted] * 20))


@pytest.mark.parametrize("environ", [{}, {"OTEL_TRACES_SAMPLER": "always_on"}, {"OTEL_TRACES_SAMPLER": "always_off"}])
def test_d10_an_error_that_is_not_sampled_is_a_log_with_the_trace_id(
    receiver: Receiver, environ: dict[str, str]
) -> None:
    rig = Rig(receiver.http, "http/protobuf", environ | {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    rig.otlp.emit(outcome(status=503, traceparent=UNSAMPLED))
    rig.otlp.shutdown()
    assert list(receiver.spans()) == []
    ((_, log),) = receiver.logs()
    assert (log.event_name, log.severity_number) == ("ebfw.egress.http.request", 13)
    assert (log.trace_id.hex(), log.span_id.hex(), log.flags) == (UNSAMPLED[3:35], UNSAMPLED[36:52], 0)
    assert attributes(log)["http.response.status_code"] == 503
    assert rig.losses.total() == 0


def test_a_log_record_names_the_span_of_the_same_failure(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    rig.otlp.emit(outcome(status=503, traceparent=PARENT))
    rig.otlp.emit(outcome(status=502)._replace(domain="other"))
    rig.otlp.emit(EVENT._replace(status="refused"))
    rig.otlp.shutdown()
    spans = {(span.trace_id, span.span_id): span.name for _, span in receiver.spans()}
    assert len(spans) == 4
    named = sorted(spans[log.trace_id, log.span_id] for _, log in receiver.logs())
    assert named == ["GET", "GET", "connection"]


def test_d11_a_request_links_to_the_connection_that_it_used(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", OFF, setups=Setups(ALL))
    rig.otlp.start()
    for event in (EVENT, HELLO, REQUEST, REQUEST, REQUEST._replace(cookie=5)):
        rig.otlp.emit(event)
    rig.otlp.shutdown()
    spans = [span for _, span in receiver.spans()]
    (root,) = [span for span in spans if span.name == "connection"]
    links = [[(link.trace_id, link.span_id) for link in span.links] for span in spans if span.name == "GET"]
    assert sorted(map(len, links)) == [0, 1, 1]
    assert {found for link in links for found in link} == {(root.trace_id, root.span_id)}
    assert len([span for span in spans if span.parent_span_id == root.span_id]) == 2


def test_d11_a_connection_that_waits_for_nothing_more_is_told_at_the_end(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", OFF, setups=Setups(ALL))
    rig.otlp.start()
    rig.otlp.emit(EVENT)
    rig.otlp.shutdown()
    assert sorted(span.name for _, span in receiver.spans()) == ["connection", "socket connect 192.0.2.1:443"]


def test_d12_an_instrumented_workload_has_no_request_spans(receiver: Receiver) -> None:
    seen = Instrumented()
    rig = Rig(receiver.http, "http/protobuf", OFF, instrumented=seen, setups=Setups(ALL))
    rig.otlp.start()
    seen.observe(REQUEST._replace(workload=SSHD, method="POST", path="/v1/traces"))
    rig.otlp.emit(REQUEST._replace(workload=SSHD))
    rig.otlp.emit(EVENT._replace(workload=SSHD, status="refused"))
    rig.otlp.emit(REQUEST)
    rig.otlp.shutdown()
    assert sorted((resource["service.name"], span.name) for resource, span in receiver.spans()) == [
        ("ssh.service", "connection"),
        ("ssh.service", "socket connect 192.0.2.1:443"),
        ("web-0", "GET"),
    ]


def test_d12_an_instrumented_workload_has_no_request_metrics_of_ours() -> None:
    rig, seen = Rig("", "http/protobuf"), Instrumented()
    rig.metrics.instrumented = seen.metrics
    seen.observe(REQUEST._replace(workload=SSHD, method="POST", path="/v1/metrics"))
    for event in (REQUEST, REQUEST._replace(workload=SSHD), EVENT._replace(workload=SSHD)):
        rig.metrics.observe(event)
    found = {
        (metric.name, dict(resource.identity)["service.name"])
        for metric, points in rig.metrics.snapshot().by_metric()
        if metric.kind == c.HISTOGRAM
        for resource, _ in points
    }
    assert found == {("http.client.request.duration", "web-0"), ("ebfw.tcp.connect.duration", "ssh.service")}


def test_a_span_that_is_kept_is_an_exemplar_and_one_that_is_not_is_none(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", {"OTEL_LOGS_EXPORTER": "none", "OTEL_METRIC_EXPORT_INTERVAL": "600"})
    rig.otlp.start()
    for event in (outcome(traceparent=UNSAMPLED), outcome(traceparent=PARENT)):
        rig.metrics.observe(event)
        rig.otlp.emit(event)

    def exemplars() -> list[Any]:
        return [e for _, _, p in receiver.points("http.client.request.duration") for e in p.exemplars]

    receiver.wait(exemplars)
    rig.otlp.shutdown()
    ((_, span),) = receiver.spans()
    assert {(e.trace_id, e.span_id) for e in exemplars()} == {(span.trace_id, span.span_id)}
    assert span.trace_id.hex() == PARENT[3:35]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_name_of_broken_bytes_costs_nothing_else(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    rig.otlp.emit(REQUEST._replace(comm="a\udcffb", domain="x\x1b[2J"))
    rig.otlp.emit(REQUEST)
    rig.otlp.shutdown()
    for found in (receiver.logs(), receiver.spans()):
        assert sorted(attributes(item)["process.executable.name"] for _, item in found) == ["a?b", "curl"]
    assert all("\x1b" not in log.body.string_value for _, log in receiver.logs())
    assert rig.losses.total() == 0


def test_d19_a_mixed_up_port_gets_one_sentence(
    receiver: Receiver, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC to a port that speaks HTTP, and the other way round, on ports that say nothing."""
    other = receiver.http if protocol == "grpc" else receiver.grpc
    rig = Rig(other, protocol, {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none",
              "OTEL_EXPORTER_OTLP_TIMEOUT": "2500"})  # fmt: skip
    rig.otlp.start()
    rig.otlp.emit(REQUEST)
    rig.otlp.shutdown()
    assert rig.lost("failed") == 1
    sentences = [r.message for r in caplog.records if "seems to speak" in r.message]
    assert len(sentences) == 1
    right = "http/protobuf" if protocol == "grpc" else "grpc"
    assert f"OTEL_EXPORTER_OTLP_PROTOCOL={right}" in sentences[0]


def test_d19_pushes_are_counted_by_signal_and_outcome(receiver: Receiver, protocol: str) -> None:
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    rig.otlp.emit(REQUEST)
    receiver.wait(lambda: len(receiver.requests) == 2)
    receiver.refuse, receiver.status = -1, 400
    rig.otlp.emit(REQUEST._replace(domain="other"))
    rig.otlp.shutdown()
    totals = {
        (metric.name, *(value for _, value in point.attributes)): point.value
        for metric, points in rig.metrics.snapshot().by_metric()
        if metric in (c.EXPORT_REQUESTS, c.EXPORT_TIME, c.EXPORTED)
        for _, point in points
    }
    for signal in ("traces", "logs"):
        assert totals["ebfw.export.requests", signal, "success"] == 1
        assert totals["ebfw.export.requests", signal, "failure"] == 1
        assert totals["ebfw.export.items", signal] == 1
        assert 0 < totals["ebfw.export.duration", signal, "success"] < 10
    assert rig.lost("failed") == 2


def test_d18_console_is_json_lines_on_standard_output(capsys: pytest.CaptureFixture[str], receiver: Receiver) -> None:
    consoles = {"OTEL_TRACES_EXPORTER": "console", "OTEL_LOGS_EXPORTER": "otlp,console",
                "OTEL_METRICS_EXPORTER": "none"}  # fmt: skip
    rig = Rig(receiver.http, "http/protobuf", consoles)
    rig.otlp.start()
    rig.otlp.emit(outcome(status=500, traceparent=PARENT))
    rig.otlp.shutdown()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (spans,) = [line["resourceSpans"] for line in lines if "resourceSpans" in line]
    (logs,) = [line["resourceLogs"] for line in lines if "resourceLogs" in line]
    assert spans[0]["scopeSpans"][0]["spans"][0]["traceId"] == PARENT[3:35]
    assert spans[0]["scopeSpans"][0]["spans"][0]["parentSpanId"] == PARENT[36:52]
    assert logs[0]["scopeLogs"][0]["logRecords"][0]["traceId"] == PARENT[3:35]
    assert list(receiver.spans()) == []
    assert len(list(receiver.logs())) == 1
