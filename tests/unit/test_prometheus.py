"""The scrape face: names after translation, both formats, protection, and what a taken port says."""

from __future__ import annotations

import base64
import gzip
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter import health
from exporter.emit import prometheus
from exporter.emit import semconv as c
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.errors import SettingsError
from exporter.events import Counts, Event, Flow, Workload

W = Workload(1, "/a", "unit", "a.service", unit="a.service")


@pytest.fixture
def metrics() -> Metrics:
    losses = health.Losses()
    losses.add("ring", "full", 3)
    made = Metrics(Resources("h"), losses=losses, features=health.Features())
    made.add(
        Flow(W, "client", "tcp", "192.0.2.1", 443, "internet", 'a"b\\c\nd', "sni"),
        Counts(100, 2, 200, 3, 1, 1, 1, retransmits=4),
        1,
    )
    made.observe(
        Event(
            "connect",
            1,
            W,
            1,
            "c",
            "tcp",
            "client",
            "::1",
            1,
            "::2",
            443,
            "internet",
            "x",
            "sni",
            "ok",
            3_000_000,
        )
    )
    made.observe(
        Event(
            "dns",
            1,
            W,
            1,
            "c",
            "udp",
            "client",
            "::1",
            1,
            "::2",
            53,
            "internet",
            "x",
            "dns",
            "NXDOMAIN",
            3_000_000,
        )
    )
    made.observe(
        Event(
            "close",
            1,
            W,
            1,
            "c",
            "tcp",
            "client",
            "::1",
            1,
            "::2",
            443,
            "internet",
            "x",
            "sni",
            "ok",
            9,
            rtt=5000,
        )
    )
    made.gauge(c.UPROBE_ATTACHED.name, 2)
    made.gauge(c.TABLE_USED.name, 5, table="flows")
    return made


@pytest.fixture
def server(metrics: Metrics) -> Iterator[prometheus.Server]:
    running = prometheus.serve("127.0.0.1", 0, metrics)
    yield running
    running.close()


def get(server: prometheus.Server, path: str = "/metrics", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://{server.host}:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize(
    ("metric", "series"),
    [
        (c.NETWORK_IO, "ebfw_network_io_bytes_total"),
        (c.NETWORK_PACKETS, "ebfw_network_packets_total"),
        (c.TCP_FAILURES, "ebfw_tcp_connection_failures_total"),
        (c.CONNECT_TIME, "ebfw_tcp_connect_duration_seconds"),
        (c.DNS_TIME, "dns_lookup_duration_seconds"),
        (c.START_TIME, "ebfw_start_time_seconds"),
        (c.CPU_TIME, "process_cpu_time_seconds_total"),
        (c.MEMORY, "process_memory_usage_bytes"),
        (c.WORKLOAD_INFO, "ebfw_workload_info"),
        # of ebfw's first version
        (c.EVENTS, "ebfw_events_total"),
        (c.FILTERED, "ebfw_filtered_total"),
        (c.ATTRIBUTION, "ebfw_attribution_total"),
        (c.UPROBE_ATTACHED, "ebfw_uprobe_attached"),
    ],
)
def test_translated_names(metric: c.Metric, series: str) -> None:
    assert c.prometheus_series(metric) == series


def test_no_label_that_scraping_would_rename_d15() -> None:
    labels = {c.prometheus_label(a) for metric in c.METRICS for a in metric.attributes}
    labels |= {c.prometheus_label(a) for a in c.IDENTITY}
    assert not labels & {"namespace", "pod", "container", "job", "instance", "node", "le", "quantile"}
    assert len({c.prometheus_series(metric) for metric in c.METRICS}) == len(c.METRICS)


def test_text_and_openmetrics_say_the_same(server: prometheus.Server) -> None:
    _, headers, text = get(server)
    assert headers["Content-Type"].startswith("text/plain")
    _, headers, openmetrics = get(server, Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert openmetrics.endswith(b"# EOF\n")

    def samples(families: object) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for family in families  # type: ignore[attr-defined]
            for s in family.samples
            if not s.name.startswith("process_")
        }

    first, second = samples(parse_text(text.decode())), samples(parse_openmetrics(openmetrics.decode()))
    assert first == second
    assert not [name for name, _ in first if name.endswith("_created")]
    assert first["ebfw_events_total", (("kind", "dns"), ("service_name", "ebfw"))] == 1
    assert first["ebfw_uprobe_attached", (("service_name", "ebfw"),)] == 2
    assert len([name for name, _ in first if name == "target_info"]) == 1
    transmit = {
        "ebfw_peer_name_source": "sni",
        "ebfw_peer_scope": "internet",
        "ebfw_role": "client",
        "network_io_direction": "transmit",
        "network_transport": "tcp",
        "server_address": 'a"b\\c\nd',
        "service_name": "a.service",
    }
    assert first["ebfw_network_io_bytes_total", tuple(sorted(transmit.items()))] == 100
    buckets = [v for (name, labels), v in first.items() if name == "dns_lookup_duration_seconds_bucket"]
    assert buckets == [1] * 15


def test_d14_the_count_of_series_by_metric_can_be_asked_for(metrics: Metrics, server: prometheus.Server) -> None:
    found = prometheus.series_of(server.host, server.port)
    assert found is not None
    assert {name: count for name, count in found.items() if count} == {
        "ebfw.network.io": 2, "ebfw.network.packets": 2, "ebfw.tcp.connections": 2, "ebfw.tcp.connection.failures": 1,
        "ebfw.tcp.retransmits": 1, "ebfw.tcp.connect.duration": 1, "ebfw.tcp.rtt": 1, "dns.lookup.duration": 1,
        "ebfw.workload.info": 1,
    }  # fmt: skip
    server.close()
    assert prometheus.series_of(server.host, server.port, 0.2) is None


def test_gzip(server: prometheus.Server) -> None:
    _, headers, body = get(server, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert b"ebfw_network_io_bytes_total" in gzip.decompress(body)


def test_health_and_readiness(metrics: Metrics) -> None:
    waits = ["the kernel side is not attached yet"]
    server = prometheus.serve("127.0.0.1", 0, metrics, ready=lambda: waits[0])
    try:
        assert get(server, "/healthz")[::2] == (200, b"ok\n")
        assert get(server, "/readyz")[::2] == (503, b"the kernel side is not attached yet\n")
        waits[0] = ""
        assert get(server, "/readyz")[0] == 200
        assert get(server, "/nothing")[0] == 404
    finally:
        server.close()


def test_a_taken_port_is_an_error_with_a_suggestion(metrics: Metrics) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"EBFW_METRICS_ADDR=127.0.0.1:{port}: .*taken.*127.0.0.1:\d+"):
            prometheus.serve("127.0.0.1", port, metrics)
    with pytest.raises(SettingsError, match="cannot listen there"):
        prometheus.serve("192.0.2.77", 0, metrics)


def test_every_interface_is_both_families(metrics: Metrics) -> None:
    server = prometheus.serve("", 0, metrics)
    try:
        families = [("127.0.0.1", socket.AF_INET)] + ([("::1", socket.AF_INET6)] if socket.has_ipv6 else [])
        for host, family in families:
            with socket.socket(family) as client:
                client.settimeout(5)
                client.connect((host, server.port))
                client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert b"200 OK" in client.recv(4096)
    finally:
        server.close()


def test_basic_auth_leaves_probes_open(metrics: Metrics, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("# scrapers\nprom:pass:word\n")
    server = prometheus.serve("127.0.0.1", 0, metrics, security=prometheus.Security(users=users))

    def login(text: str) -> str:
        return "Basic " + base64.b64encode(text.encode()).decode()

    try:
        assert get(server)[0] == 401
        assert get(server, "/healthz")[0] == 200
        assert get(server, Authorization=login("prom:pass:word"))[0] == 200
        for wrong in ("prom:pass", "prom:", "nobody:", "nobody:pass:word"):
            assert get(server, Authorization=login(wrong))[0] == 401
        assert get(server, Authorization="Basic %%%")[0] == 401
    finally:
        server.close()
    users.write_text("nothing\n")
    with pytest.raises(SettingsError, match="no line of the form"):
        prometheus.serve("127.0.0.1", 0, metrics, security=prometheus.Security(users=users))


def test_tls_and_a_client_that_never_finishes_its_handshake(metrics: Metrics, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    command += f" -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    server = prometheus.serve("127.0.0.1", 0, metrics, security=prometheus.Security(cert, key))
    try:
        with socket.create_connection(("127.0.0.1", server.port)):
            context = ssl.create_default_context(cafile=str(cert))
            url = f"https://127.0.0.1:{server.port}/metrics"
            with urllib.request.urlopen(url, timeout=5, context=context) as answer:
                assert b"ebfw_network_io_bytes_total" in answer.read()
    finally:
        server.close()


def test_files_that_cannot_be_used_are_named_with_their_variable(metrics: Metrics, tmp_path: Path) -> None:
    certificate, key, none = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "none"
    certificate.write_text("-----BEGIN CERTIFICATE-----\n")
    key.write_text("-----BEGIN PRIVATE KEY-----\n")
    latin = tmp_path / "latin"
    latin.write_bytes(b"prom:\xe9\n")
    missing = f"{none}: cannot be read: No such file or directory"
    for security, says in (
        (prometheus.Security(none), f"EBFW_METRICS_TLS_CERT={missing}"),
        (prometheus.Security(certificate, none), f"EBFW_METRICS_TLS_KEY={missing}"),
        (prometheus.Security(certificate), f"EBFW_METRICS_TLS_CERT={certificate} has no key; set EBFW_METRICS_TLS_KEY"),
        (prometheus.Security(users=none), f"EBFW_METRICS_USERS={missing}"),
        (prometheus.Security(users=latin), f"EBFW_METRICS_USERS={latin}: cannot be read: it is not UTF-8"),
    ):
        with pytest.raises(SettingsError) as caught:
            prometheus.serve("127.0.0.1", 0, metrics, security=security)
        assert str(caught.value) == says
    with pytest.raises(SettingsError, match=f"EBFW_METRICS_TLS_CERT={certificate}: cannot be used"):
        prometheus.serve("127.0.0.1", 0, metrics, security=prometheus.Security(certificate, key))


def test_a_large_page_is_streamed_in_parts_that_make_one(metrics: Metrics, server: prometheus.Server) -> None:
    for n in range(1500):
        metrics.add(Flow(W, "client", "tcp", "", 1, "internet", f"h{n}", "sni"), Counts(tx_bytes=1), 1)
        metrics.observe(
            Event("connect", 1, W, 1, "c", "tcp", "client", "", 1, "", 1, "internet", f"h{n}", "sni", "ok", 1)
        )
    _, headers, text = get(server)
    assert headers["Transfer-Encoding"] == "chunked"
    families = list(parse_text(text.decode()))
    assert len({family.name for family in families}) == len(families)
    buckets = sum(s.name.endswith("connect_duration_seconds_bucket") for f in families for s in f.samples)
    assert buckets == 15 * 1469  # histograms may take half of 50,000 series; this includes the overflow
    sent = sum(s.name == "ebfw_network_io_bytes_total" for f in families for s in f.samples)
    assert sent == 1502
    _, _, openmetrics = get(server, Accept="application/openmetrics-text; version=1.0.0")
    assert openmetrics.count(b"# EOF") == 1
    assert sum(1 for _ in parse_openmetrics(openmetrics.decode())) == len(families)
    with socket.create_connection((server.host, server.port)) as old:
        old.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with old.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert body.count(b"connect_duration_seconds_bucket") == buckets
