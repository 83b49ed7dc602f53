"""The push face against a real receiver on loopback, gRPC and HTTP: what arrives, and what is counted when
not.

Excluded: a real Collector and Prometheus (tests/pipeline).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from exporter import health
from exporter.emit import otlp, otlp_settings, prometheus
from exporter.emit import semconv as c
from exporter.emit.logs import Notable, record
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.emit.spans import span
from exporter.events import Counts, Event, Flow, Workload
from tests.pipeline.otlp_receiver import Receiver, attributes

WEB = Workload(
    1, "/kubepods/x", "pod", "web-0", "uid-1", "c" * 64, "containerd", "burstable",
    pod_name="web-0", namespace="shop", container_name="nginx",
)  # fmt: skip
SSHD = Workload(2, "/system.slice/ssh.service", "unit", "ssh.service", unit="ssh.service")
EVENT = Event(
    "connect", 1_700_000_000_000_000_000, WEB, 42, "curl", "tcp", "client", "10.0.0.9", 40000, "192.0.2.1",
    443, "internet", "example.com", "sni", "ok", 20_000_000, cookie=(1 << 63) + 1,
)  # fmt: skip
LOOKUP = EVENT._replace(
    kind="dns", domain="db.example.com", dst="10.0.0.53", port=53, transport="udp", status="NXDOMAIN",
    dns_type="A", duration=3_000_000,
)  # fmt: skip


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
    rig.metrics.add(
        Flow(WEB, "client", "tcp", "192.0.2.1", 443, "internet", "example.com", "sni"),
        Counts(tx_bytes=100),
        5,
    )
    rig.metrics.observe(EVENT)
    rig.otlp.shutdown()

    spans = {found.name: (resource, found) for resource, found in receiver.spans()}
    assert set(spans) == {"socket connect 192.0.2.1:443", "DNS lookup db.example.com"}
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
    found = [(resource["service.name"], span.status.code) for resource, span in receiver.spans()]
    assert sorted(found) == [("ssh.service", 2), ("web-0", 0), ("web-0", 2)]

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
        "ebfw.destination.first_seen": "true",
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
            "names = ('google.protobuf', 'opentelemetry', 'requests', 'grpc')",
            "print(*(name for name in names if name in sys.modules))",
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


def test_a_refusal_is_retried_after_what_the_receiver_said(receiver: Receiver, protocol: str) -> None:
    receiver.refuse, receiver.retry_after = 1, 1
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"})
    rig.otlp.start()
    started = time.monotonic()
    rig.otlp.emit(EVENT)
    receiver.wait(lambda: receiver.requests)
    assert 0.9 < time.monotonic() - started < 6
    rig.otlp.shutdown()
    assert (receiver.refused, len(list(receiver.spans())), rig.losses.total()) == (1, 1, 0)


def test_what_no_receiver_takes_is_counted(receiver: Receiver, protocol: str) -> None:
    receiver.refuse, receiver.status = -1, 400
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    for n in range(23):
        rig.otlp.emit(EVENT._replace(domain=f"h{n}"))
    rig.otlp.shutdown()
    assert rig.lost("failed") == 23 * 2


def test_partial_success_is_counted(receiver: Receiver, protocol: str) -> None:
    receiver.reject = 3
    rig = Rig(url(receiver, protocol), protocol, {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"})
    rig.otlp.start()
    for _ in range(10):
        rig.otlp.emit(EVENT)
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
    rig.otlp.emit(EVENT)
    rig.otlp.shutdown(timeout=3)
    assert rig.lost("failed") + rig.lost("shutdown") == 2
    assert rig.lost("failed_points") + rig.lost("shutdown_points") > 0


def test_a_mixed_up_port_gets_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    made = otlp_settings.load({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"})
    assert made.traces is not None
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in made.traces.mix_up
    made = otlp_settings.load({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert made.traces is not None
    assert "http/protobuf" in made.traces.mix_up


def test_payloads_stay_below_the_limit(receiver: Receiver, protocol: str) -> None:
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


# --- the budget ---------------------------------------------------------------------------------------------


def test_budget_is_fair_and_keeps_failures_first() -> None:
    now = [10.0]
    losses = health.Losses()
    budget = otlp.Budget(100, losses, clock=lambda: now[0])
    quiet, noisy = SSHD, WEB
    for n in range(5000):
        assert budget.offer(EVENT._replace(workload=noisy)) == []
        if n < 10:
            budget.offer(EVENT._replace(workload=quiet))
            budget.offer(EVENT._replace(workload=noisy, status="refused"))
    now[0] = 11.0
    chosen = budget.offer(EVENT)
    assert len(chosen) == 100
    assert [e.status for e in chosen].count("refused") == 10
    assert [e.workload for e in chosen].count(quiet) == 10
    assert losses.snapshot() == {("export", "budget"): 5000 + 20 - 100}
    assert budget.take() == []
    assert len(budget.take(everything=True)) == 1


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
def test_a_sampler_that_is_set_is_obeyed(receiver: Receiver, environ: dict[str, str], spans: int) -> None:
    off = {"OTEL_LOGS_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}
    rig = Rig(receiver.http, "http/protobuf", environ | off, spans_per_second=5)
    rig.otlp.start()
    while time.time() % 1 > 0.8:
        time.sleep(0.05)  # all 400 in one second
    for _ in range(400):
        rig.otlp.emit(EVENT)
    rig.otlp.shutdown()
    assert len(list(receiver.spans())) == pytest.approx(spans, abs=5 if not environ else 0)


# --- variables ----------------------------------------------------------------------------------------------


def test_variables_of_one_signal_win() -> None:
    made = otlp_settings.load(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/base/",
            "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "https://b/own/path",
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2500",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_HEADERS": "a=1",
            "OTEL_EXPORTER_OTLP_LOGS_HEADERS": "b=2",
        }
    )
    assert made.traces is not None
    assert made.metrics is not None
    assert made.logs is not None
    assert (made.traces.url, made.traces.timeout, made.traces.compression) == (
        "http://a:4318/base/v1/traces",
        2.5,
        "gzip",
    )
    assert (made.metrics.url, made.metrics.protocol, made.metrics.timeout) == (
        "http://a:4318/base/",
        "grpc",
        3,
    )
    assert (made.logs.url, made.logs.headers, made.traces.headers) == (
        "https://b/own/path",
        {"b": "2"},
        {"a": "1"},
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf is used"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "10 is used"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "none is used"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-5", "60000 is used"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "2048 is used"),
        ("OTEL_TRACES_SAMPLER", "xray", "EBFW_SPANS_PER_SECOND"),
        ("OTEL_TRACES_SAMPLER_ARG", "2", "1 is used"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "both", "cumulative, delta"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem", "cannot be read"),
    ],
)
def test_a_mistake_warns_and_falls_back_d18(key: str, value: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"OTEL_TRACES_SAMPLER": "traceidratio"} if key.endswith("_ARG") else {}
    made = otlp_settings.load({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", key: value} | extra)
    assert made.logs is not None
    assert told in caplog.text


# --- what is said -------------------------------------------------------------------------------------------


def test_spans_are_only_what_a_workload_started_and_exclude_left() -> None:
    assert span(EVENT) is not None
    for changes in (
        {"role": "server"},
        {"filtered": True},
        {"transport": "udp"},
        {"kind": "tls"},
        {"kind": "close"},
    ):
        assert span(EVENT._replace(**changes)) is None
    cancelled = span(EVENT._replace(status="cancelled"))
    assert cancelled is not None
    assert not cancelled.failed
    assert dict(cancelled.attributes)["error.type"] == "cancelled"
    v6 = span(EVENT._replace(dst="2001:db8::1", domain="", name_source=""))
    assert v6 is not None
    assert v6.name == "socket connect [2001:db8::1]:443"
    assert dict(v6.attributes)["server.address"] == "2001:db8::1"


def test_notable_is_first_seen_and_failures() -> None:
    now = [0.0]
    notable = Notable(clock=lambda: now[0])
    assert notable.of(EVENT) is not None
    assert notable.of(EVENT) is None
    assert notable.of(EVENT._replace(workload=WEB._replace(cgroup_id=77, container_id="d" * 64))) is None
    assert notable.of(EVENT._replace(port=444)) is not None
    assert notable.of(EVENT._replace(kind="close")) is None
    assert notable.of(EVENT._replace(status="cancelled")) is None
    assert notable.of(EVENT._replace(domain="new", filtered=True)) is None
    assert notable.of(EVENT._replace(domain="new", role="server")) is None
    assert notable.of(LOOKUP._replace(status="NOERROR")) is None
    for _ in range(23):
        notes = [notable.of(EVENT._replace(status="refused"))]
    assert notes == [None]
    now[0] = 59
    assert notable.due() == []
    now[0] = 61
    (repeated,) = notable.due()
    assert repeated.repeats == 22
    assert record(repeated).body == "curl to example.com:443: connection_refused, 22 more times within 60 s"
    assert notable.due() == []
    assert notable.of(EVENT._replace(status="refused")) is not None
    assert notable.due(everything=True) == []


def test_memory_of_destinations_and_failures_is_bounded() -> None:
    notable = Notable()
    for n in range(100_000):
        notable.of(EVENT._replace(domain=f"h{n}", status="refused"))
        if n % 1000 == 0:
            notable.due()
    notable.due()
    assert len(notable._young) + len(notable._old) <= 65_536
    assert len(notable._windows) <= 4096


def test_a_request_is_a_record_without_headers() -> None:
    note = Notable("all").of(
        EVENT._replace(
            kind="https",
            method="BREW",
            path="/a/b?key=REDACTED",
            headers=(("authorization", "canary"),),
            proxy="p:3128",
        )
    )
    assert note is not None
    made = record(note)
    found = dict(made.attributes)
    assert made.name == "ebfw.egress.http.request"
    assert (found["http.request.method"], found["http.request.method_original"]) == ("_OTHER", "BREW")
    assert (found["url.path"], found["url.query"], found["url.scheme"]) == ("/a/b", "key=REDACTED", "https")
    assert found["ebfw.proxy.address"] == "p:3128"
    assert "canary" not in repr(made)
    assert made.body == "curl sent BREW https://example.com/a/b"


def test_a_name_of_broken_bytes_costs_nothing_else(receiver: Receiver) -> None:
    rig = Rig(receiver.http, "http/protobuf", {"OTEL_METRICS_EXPORTER": "none"})
    rig.otlp.start()
    rig.otlp.emit(EVENT._replace(comm="a\udcffb", domain="x\x1b[2J"))
    rig.otlp.emit(EVENT)
    rig.otlp.shutdown()
    assert sorted(attributes(log)["process.executable.name"] for _, log in receiver.logs()) == ["a?b", "curl"]
    assert all("\x1b" not in log.body.string_value for _, log in receiver.logs())
    assert rig.losses.total() == 0
