"""A real Prometheus 3 gets the same from a scrape, from a push, and from a push by way of a Collector (D15), keeps what
a job of two seconds did (D16), and its own tool has nothing to say against /metrics.

Two agents watch one cgroup: `direct` is scraped and pushes into Prometheus itself, `relay` pushes to the Collector,
which pushes on. Series are told apart by `instance`, the one label that has to differ.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from exporter.emit import semconv
from tests.pipeline import known
from tests.pipeline.collector import EXAMPLES, Collector
from tests.pipeline.conftest import Agent, Host, World, eventually
from tests.pipeline.prometheus_server import PrometheusServer, Series, promtool

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

# What Prometheus itself adds: to a target, and to each resource that was pushed.
ADDED = ("up", "scrape_", "target_info")
Labels = tuple[tuple[str, str], ...]


class Faces(NamedTuple):
    """The same series by three ways: labels without job and instance -> value."""

    scraped: dict[Labels, float]
    pushed: dict[Labels, float]
    relayed: dict[Labels, float]
    page: str  # in Prometheus's text format
    openmetrics: str
    direct: Agent
    relay: Agent


@pytest.fixture(scope="module")
def agents(
    world: World, prometheus: PrometheusServer, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Host, Agent, Agent]]:
    with Host(world, tmp_path_factory.mktemp("faces")) as host:
        direct = host.start(
            EBFW_METRICS_ADDR=prometheus.target,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.http,
            OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{prometheus.otlp}/v1/metrics",
            **known.settings("direct"),
        )
        relay = host.start(
            EBFW_BPF_PIN_PATH=str(host.directory / "pins-too"),
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.grpc,
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
            **known.settings("relay"),
        )
        direct.ready()
        relay.ready()
        yield host, direct, relay


def read(address: str, accept: str) -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def side(prometheus: PrometheusServer, which: str) -> dict[Labels, float]:
    """All that one way brought, without what Prometheus added."""
    instance = prometheus.target if which == "scraped" else f"node-{which}(\\\\..*)?"
    found = {}
    for series in prometheus.query(f'{{instance=~"{instance}"}}'):
        if not series.name.startswith(ADDED):
            labels = tuple(sorted((k, v) for k, v in series.labels.items() if k not in ("job", "instance")))
            assert labels not in found, f"twice by one way: {labels}"
            found[labels] = series.value
    return found


@pytest.fixture(scope="module")
def faces(agents: tuple[Host, Agent, Agent], world: World, prometheus: PrometheusServer, collector: Collector) -> Faces:
    host, direct, relay = agents
    known.traffic(world, host.shop)
    direct.settled()

    def all_there() -> bool:
        # Two rounds of scrapes and pushes, at a second each, after the counters have come to rest.
        rows = [side(prometheus, which) for which in ("scraped", "direct", "relay")]
        return all(done(row) == known.CONNECTIONS for row in rows)

    eventually(all_there, 30)
    time.sleep(3)
    return Faces(
        side(prometheus, "scraped"),
        side(prometheus, "direct"),
        side(prometheus, "relay"),
        read(prometheus.target, "text/plain"),
        read(prometheus.target, "application/openmetrics-text; version=1.0.0"),
        direct,
        relay,
    )


def done(rows: dict[Labels, float]) -> float:
    wanted = {("__name__", "ebfw_tcp_connections_total"), ("ebfw_connection_state", "closed")}
    return sum(value for labels, value in rows.items() if wanted <= set(labels))


def of_workloads(rows: dict[Labels, float]) -> dict[Labels, float]:
    return {labels: value for labels, value in rows.items() if dict(labels).get("service_name") != "ebfw"}


def test_d15_a_scrape_and_a_push_are_the_same_series(faces: Faces) -> None:
    scraped, pushed = of_workloads(faces.scraped), of_workloads(faces.pushed)
    assert scraped.keys() == pushed.keys()
    assert scraped == pushed
    # Every workload metric that the product has and this workload feeds is among them.
    names = {dict(labels)["__name__"] for labels in scraped}
    expected = {
        "ebfw_network_io_bytes_total", "ebfw_network_packets_total", "ebfw_tcp_connections_total",
        "ebfw_tcp_connection_failures_total", "ebfw_tcp_connect_duration_seconds_bucket",
        "ebfw_tcp_connect_duration_seconds_sum", "ebfw_tcp_rtt_seconds_count", "dns_lookup_duration_seconds_bucket",
        "ebfw_workload_info", "http_client_request_duration_seconds_bucket", "ebfw_tcp_open_connections",
    }  # fmt: skip
    assert expected <= names


def test_d15_by_way_of_a_collector_too(faces: Faces) -> None:
    """Another agent, another measurement: names and labels are the same, and every number that is no duration. What is
    open is looked at once a second: a short request is met by one of them, maybe."""
    pushed, relayed = (
        {k: v for k, v in of_workloads(rows).items() if dict(k)["__name__"] != "http_client_active_requests"}
        for rows in (faces.pushed, faces.relayed)
    )
    assert pushed.keys() == relayed.keys()

    def counted(rows: dict[Labels, float]) -> dict[Labels, float]:
        return {
            k: v
            for k, v in rows.items()
            if not dict(k)["__name__"].endswith(("_bucket", "_sum", "_time_seconds_total"))
        }

    assert counted(pushed) == counted(relayed)


def test_d15_the_agents_own_metrics(faces: Faces) -> None:
    """Names and labels; the values are of other moments, but for those that stand still."""
    own = [{k: v for k, v in rows.items() if k not in of_workloads(rows)} for rows in (faces.scraped, faces.pushed)]
    assert own[0].keys() == own[1].keys()
    still = {k for k in own[0] if dict(k)["__name__"] in ("ebfw_build_info", "ebfw_events_total", "ebfw_feature")}
    assert len(still) > 5
    assert all(own[0][k] == own[1][k] for k in still)


def test_d15_labels(faces: Faces) -> None:
    """Scraping renames a label of its own; a label that has nothing to say is not there."""
    for labels in faces.scraped:
        names = {name for name, _ in labels}
        assert not {name for name in names if name.startswith("exported_")}
        assert not {"namespace", "pod", "container", "node"} & names
        assert all(value for _, value in labels)


def test_d15_one_target_info(faces: Faces, prometheus: PrometheusServer) -> None:
    """Of a scrape. (Prometheus makes one of each resource that is pushed.) Both faces say the same of the agent."""
    (scraped,) = prometheus.query(f'target_info{{instance="{prometheus.target}"}}')
    (pushed,) = prometheus.query('target_info{instance="node-direct"}')

    def said(series: Series) -> dict[str, str]:
        return {k: v for k, v in series.labels.items() if k not in ("job", "instance")}

    assert said(scraped) == said(pushed)
    assert said(scraped)["deployment_environment_name"] == "direct"


def test_d15_the_values_are_the_workloads(faces: Faces) -> None:
    def total(name: str, **labels: str) -> float:
        wanted = {("__name__", name), *labels.items()}
        return sum(value for key, value in faces.scraped.items() if wanted <= set(key))

    assert total("ebfw_tcp_connections_total", ebfw_connection_state="opened") == known.CONNECTIONS
    assert total("ebfw_tcp_connection_failures_total", error_type="connection_refused") == known.REFUSED
    assert total("dns_lookup_duration_seconds_count", dns_question_name=known.NAME) == known.LOOKUPS
    sent = {"network_transport": "udp", "network_io_direction": "transmit", "server_address": known.SERVER}
    assert total("ebfw_network_packets_total", **sent) == known.DATAGRAMS


def test_documented_promotion_is_what_a_scrape_shows() -> None:
    """The labels that tell workloads apart are written down in two places: here they meet."""
    import yaml

    config = yaml.safe_load((EXAMPLES / "prometheus.yaml").read_text())
    assert tuple(config["otlp"]["promote_resource_attributes"]) == semconv.IDENTITY


def test_promtool_finds_nothing(faces: Faces) -> None:
    done = promtool("check", "metrics", text=faces.page)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_documented_configuration_is_valid() -> None:
    done = promtool("check", "config", str(EXAMPLES / "prometheus.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_and_units(faces: Faces, prometheus: PrometheusServer) -> None:
    """As OpenMetrics tells them: a counter's family is without `_total`."""
    found = {name: rows[0] for name, rows in prometheus.metadata().items()}
    assert (found["ebfw_network_io_bytes"]["type"], found["ebfw_network_io_bytes"]["unit"]) == ("counter", "bytes")
    histogram = found["dns_lookup_duration_seconds"]
    assert (histogram["type"], histogram["unit"]) == ("histogram", "seconds")
    assert found["ebfw_table_used"]["type"] == "gauge"
    assert all(row["help"] for name, row in found.items() if name.startswith("ebfw_"))


def test_exemplars_are_scraped(
    faces: Faces, agents: tuple[Host, Agent, Agent], world: World, prometheus: PrometheusServer
) -> None:
    """A request of which a span is made is an exemplar of its duration: on the OpenMetrics page, in Prometheus by
    way of a scrape, and of a push."""
    host, _, _ = agents
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    world.curl(host.shop, "-H", f"traceparent: 00-{trace}-00f067aa0ba902b7-01", f"http://{known.SERVER}/traced")
    eventually(lambda: trace in read(prometheus.target, "application/openmetrics-text; version=1.0.0"))
    assert trace not in read(prometheus.target, "text/plain")  # that format has none
    for instance in (prometheus.target, "node-direct.shop"):

        def found(instance: str = instance) -> set[str]:
            rows = prometheus.exemplars(f'{{instance="{instance}"}}')
            return {labels["__name__"] for labels, row in rows if row["labels"].get("trace_id") == trace}

        assert "http_client_request_duration_seconds_bucket" in eventually(found)


JOB = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 80), 10) as s:
    s.sendall(b"GET /job HTTP/1.1\\r\\nHost: inside.lab.example\\r\\nConnection: close\\r\\n\\r\\n")
    while s.recv(4096):
        pass
time.sleep(2)
"""


def test_d16_a_job_of_two_seconds_shows_on_both_faces(
    faces: Faces, agents: tuple[Host, Agent, Agent], world: World, prometheus: PrometheusServer
) -> None:
    """A cgroup that lives for two seconds, with one connection: less than the shortest interval anybody scrapes at.
    Both faces go on showing its last values after its end."""
    host, direct, _ = agents
    job = host.cgroup.child("job.service")
    world.python(job, JOB, known.SERVER)
    job.remove()
    gone = time.time()
    wanted = {("__name__", "ebfw_tcp_connections_total"), ("service_name", "job.service")}

    def there() -> bool:
        rows = [side(prometheus, which) for which in ("scraped", "direct", "relay")]
        found = [{k: v for k, v in row.items() if wanted <= set(k)} for row in rows]
        return all(len(row) == 2 and set(row.values()) == {1} for row in found) and found[0] == found[1] == found[2]

    eventually(there, 15)
    # Housekeeping has seen the end of the cgroup by now, and two scrapes later the values are still new ones.
    time.sleep(max(0.0, gone + 8 - time.time()))
    assert there()
    for which in (prometheus.target, "node-direct.job.service"):
        stamp = f'timestamp(ebfw_tcp_connections_total{{service_name="job.service",instance="{which}"}})'
        assert all(series.value > gone + 5 for series in prometheus.query(stamp))
        assert len(prometheus.query(stamp)) == 2
    assert not direct.ended()
