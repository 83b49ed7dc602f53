"""Series: what folds into what, what is bounded, what never falls. No kernel, no exporter.

Excluded: how series look in text (test_prometheus.py) and in protobuf (test_otlp.py).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import health
from exporter.emit import semconv as c
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.events import Counts, Event, Exchange, Flow, Workload

SSHD = Workload(7, "/system.slice/ssh.service", "unit", "ssh.service", unit="ssh.service")


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def wall(self) -> int:
        return int(self.seconds * 1e9)


def make(**options: Any) -> tuple[Metrics, Clock]:
    """At pod level where a test does not say otherwise: what one identity has must not depend on the level."""
    clock = Clock()
    options = {"level": "pod"} | options
    options = {"losses": health.Losses(), "features": health.Features()} | options
    return Metrics(Resources("node1"), clock=clock, wall=clock.wall, **options), clock


def flow(name: str = "example.com", workload: Workload = SSHD, **changes: Any) -> Flow:
    return Flow(workload, "client", "tcp", "192.0.2.1", 443, "internet", name, "sni")._replace(**changes)


def event(kind: str = "connect", **changes: Any) -> Event:
    made = Event(
        kind, 1_000_000_000, SSHD, 42, "curl", "tcp", "client", "192.0.2.9", 40000, "192.0.2.1", 443,
        "internet", "example.com", "sni", "ok", 20_000_000,
    )  # fmt: skip
    return made._replace(**changes)


def read(metrics: Metrics, metric: c.Metric, *keys: str) -> dict[tuple[Any, ...], Any]:
    """{values of `keys`: value}, summed over everything else."""
    found: dict[tuple[Any, ...], Any] = defaultdict(int)
    for known, points in metrics.snapshot().by_metric():
        if known is metric:
            for resource, point in points:
                labels = dict(resource.identity) | dict(point.attributes)
                found[tuple(labels.get(key, "") for key in keys)] += point.value
    return dict(found)


def test_a_delta_feeds_every_series_of_its_flow() -> None:
    metrics, _ = make()
    delta = Counts(*range(1, 13))
    metrics.add(flow(), delta, 5)
    metrics.add(flow(), delta, 5)
    assert read(metrics, c.NETWORK_IO, c.IO_DIRECTION) == {
        ("transmit",): 2 * delta.tx_bytes,
        ("receive",): 2 * delta.rx_bytes,
    }
    assert read(metrics, c.NETWORK_PACKETS, c.IO_DIRECTION) == {
        ("transmit",): 2 * delta.tx_packets,
        ("receive",): 2 * delta.rx_packets,
    }
    assert read(metrics, c.TCP_CONNECTIONS, c.CONNECTION_STATE) == {
        ("opened",): 2 * delta.opened,
        ("closed",): 2 * delta.closed,
    }
    assert read(metrics, c.TCP_FAILURES, c.ERROR_TYPE) == {
        ("connection_refused",): 2 * delta.refused,
        ("timed_out",): 2 * delta.timed_out,
        ("cancelled",): 2 * delta.cancelled,
        ("host_unreachable",): 2 * delta.unreachable,
        ("access_denied",): 2 * delta.denied,
    }
    assert read(metrics, c.TCP_RETRANSMITS) == {(): 2 * delta.retransmits}


def test_labels_of_a_flow_have_no_address_and_no_port() -> None:
    metrics, _ = make()
    metrics.add(flow(), Counts(tx_bytes=1), 5)
    metrics.add(flow(peer="192.0.2.2", port=8443), Counts(tx_bytes=1), 5)
    keys = (
        c.SERVICE_NAME,
        c.SERVER_ADDRESS,
        c.TRANSPORT,
        c.PEER_SCOPE,
        c.PEER_NAME_SOURCE,
        c.ROLE,
        c.PEER_ADDRESS,
    )
    assert read(metrics, c.NETWORK_IO, *keys) == {
        ("ssh.service", "example.com", "tcp", "internet", "sni", "client", ""): 2
    }


def test_special_rows_d2_d5() -> None:
    """5,000 clients of one server are one row; so is what `exclude` hides; so is what found no room."""
    metrics, _ = make()
    for port in range(5000):
        metrics.add(flow("", role="server", peer="", port=port % 3, name_source=""), Counts(rx_bytes=1), 5)
        metrics.add(flow(str(port), filtered=True, scope="private"), Counts(tx_bytes=1), 5)
        metrics.add(flow(str(port), other=True), Counts(tx_bytes=1), 5)
    assert read(metrics, c.NETWORK_IO, c.SERVER_ADDRESS, c.PEER_SCOPE, c.IO_DIRECTION) == {
        ("~inbound", "internet", "receive"): 5000,
        ("~excluded", "private", "transmit"): 5000,
        ("~other", "internet", "transmit"): 5000,
    }


def test_d1_what_goes_to_a_sidecar_can_be_left_out_of_totals() -> None:
    metrics, _ = make()
    for redirected, size in ((True, 100), (False, 103)):
        metrics.add(flow(redirected=redirected), Counts(tx_bytes=size), 5)
        metrics.observe(event(redirected=redirected, duration=1))
    assert {key: n for key, n in read(metrics, c.NETWORK_IO, c.PROXIED).items() if n} == {(True,): 100, ("",): 103}
    assert [dict(labels).get(c.PROXIED) for labels in histogram(metrics, c.CONNECT_TIME)] == [True, None]


def test_without_a_name_the_address_is_the_server() -> None:
    metrics, _ = make()
    metrics.add(flow("", name_source="address"), Counts(tx_bytes=1), 5)
    assert read(metrics, c.NETWORK_IO, c.SERVER_ADDRESS) == {("192.0.2.1",): 1}


def test_limit_for_each_workload_and_instrument_d14() -> None:
    metrics, _ = make(limit=20)
    other = SSHD._replace(cgroup_id=8, name="cron.service", unit="cron.service")
    for n in range(100):
        metrics.add(flow(f"h{n}"), Counts(tx_bytes=10, opened=1), 5)
    metrics.add(flow("", role="server", peer=""), Counts(tx_bytes=7), 5)
    metrics.add(flow("h1", other), Counts(tx_bytes=10), 5)
    io = read(metrics, c.NETWORK_IO, c.SERVICE_NAME, c.SERVER_ADDRESS, c.OVERFLOW)
    assert sum(value for (service, *_), value in io.items() if service == "ssh.service") == 1007
    assert io["ssh.service", "~other", True] == (100 - 19) * 10
    assert io["ssh.service", "~inbound", ""] == 7
    assert io["cron.service", "h1", ""] == 10
    # 19 peers, the overflow, and the inbound row, which is bounded by itself
    assert len([key for key in io if key[0] == "ssh.service"]) == 21
    assert len(read(metrics, c.TCP_CONNECTIONS, c.SERVER_ADDRESS)) == 20
    assert read(metrics, c.SERIES_OVERFLOW, "ebfw.metric") == {
        (c.NETWORK_IO.name,): 81,
        (c.TCP_CONNECTIONS.name,): 81,
    }
    assert read(metrics, c.SERIES, "ebfw.metric")[c.NETWORK_IO.name,] == 22


def test_total_for_the_node() -> None:
    metrics, _ = make(total=500)
    for w in range(50):
        workload = SSHD._replace(cgroup_id=100 + w, name=f"w{w}.service", unit=f"w{w}.service")
        for n in range(100):
            metrics.add(flow(f"h{n}", workload), Counts(tx_bytes=1, rx_bytes=1), 5)
            metrics.observe(event(workload=workload, domain=f"h{n}"))
    assert sum(read(metrics, c.NETWORK_IO).values()) == 50 * 100 * 2
    points = [len(list(points)) for metric, points in metrics.snapshot().by_metric() if metric in c.WORKLOAD_METRICS]
    assert sum(points) < 600
    assert sum(read(metrics, c.SERIES, "ebfw.metric").values()) < 600
    connects = [p for m, points in metrics.snapshot().by_metric() if m is c.CONNECT_TIME for _, p in points]
    assert sum(sum(p.value[:-1]) for p in connects) == 50 * 100


def test_one_identity_is_one_series_over_restarts_of_a_container() -> None:
    metrics, _ = make()
    pod = Workload(
        1,
        "/kubepods/a",
        "pod",
        "web",
        "uid1",
        "c" * 64,
        pod_name="web-0",
        namespace="shop",
        container_name="nginx",
    )
    metrics.add(flow(workload=pod), Counts(tx_bytes=1), 5)
    metrics.add(flow(workload=pod._replace(cgroup_id=2, container_id="d" * 64)), Counts(tx_bytes=2), 5)
    assert read(metrics, c.NETWORK_IO, *c.IDENTITY) == {("web-0", "shop", "shop", "web-0", "nginx"): 3}
    assert read(metrics, c.WORKLOAD_INFO, c.CONTAINER_ID) == {("d" * 64,): 1}


def test_nameless_workloads_stay_apart_and_have_no_id_in_their_name_d17() -> None:
    metrics, _ = make()
    for n, digit in enumerate("ab"):
        pod = Workload(n, f"/kubepods/{n}", "pod", digit * 32, digit * 32, digit * 64)
        metrics.add(flow(workload=pod), Counts(tx_bytes=n + 1), 5)
    assert read(metrics, c.NETWORK_IO, c.SERVICE_NAME, c.WORKLOAD_ID) == {
        ("unknown_service", "a" * 64): 1,
        ("unknown_service", "b" * 64): 2,
    }


def test_a_name_that_is_learned_opens_a_new_series() -> None:
    metrics, _ = make()
    nameless = Workload(3, "/kubepods/x", "pod", "", "uid", "e" * 64)
    metrics.add(flow(workload=nameless), Counts(tx_bytes=1), 5)
    metrics.add(flow(workload=nameless._replace(pod_name="web-0", container_name="n")), Counts(tx_bytes=1), 5)
    assert read(metrics, c.NETWORK_IO, c.SERVICE_NAME) == {("unknown_service",): 1, ("web-0",): 1}


def test_start_time_is_the_kernel_rows_whatever_the_order() -> None:
    """D4: after a restart of the agent, rows that share a series arrive in any order."""
    for order in ((5, 9), (9, 5)):
        metrics, _ = make()
        for start in order:
            metrics.add(flow(port=start), Counts(tx_bytes=1), start)
        starts = [p.start_ns for m, points in metrics.snapshot().by_metric() if m is c.NETWORK_IO for _, p in points]
        assert starts == [5]


def test_idle_peers_expire_and_come_back_as_a_reset() -> None:
    metrics, clock = make()
    metrics.take_gone()
    metrics.add(flow("gone"), Counts(tx_bytes=100), 5)
    metrics.add(flow("kept"), Counts(tx_bytes=1), 5)
    for _ in range(16):
        clock.seconds += 60
        metrics.expire()
        metrics.add(flow("kept"), Counts(tx_bytes=1), 5)
    assert read(metrics, c.NETWORK_IO, c.SERVER_ADDRESS) == {("kept",): 17}
    (gone,) = metrics.take_gone()
    assert (gone.metric, dict(gone.attributes)[c.SERVER_ADDRESS]) == (c.NETWORK_IO, "gone")
    assert metrics.take_gone() == []
    metrics.add(flow("gone"), Counts(tx_bytes=3), 5)
    starts = {
        dict(p.attributes)[c.SERVER_ADDRESS]: p.start_ns
        for m, points in metrics.snapshot().by_metric()
        if m is c.NETWORK_IO
        for _, p in points
    }
    assert starts["gone"] > 1000 * 10**9
    assert starts["kept"] == 5


def test_a_workload_that_ended_stays_five_minutes_d16() -> None:
    metrics, clock = make()
    metrics.add(flow(), Counts(tx_bytes=1), 5)
    metrics.observe(event())
    metrics.end(SSHD)
    metrics.add(flow(), Counts(tx_bytes=1), 5)  # the last read of its counters comes after its end
    clock.seconds += 299
    metrics.expire()
    assert read(metrics, c.NETWORK_IO) == {(): 2}
    clock.seconds += 2
    metrics.expire()
    assert read(metrics, c.NETWORK_IO) == {}
    assert read(metrics, c.WORKLOAD_INFO) == {}
    assert read(metrics, c.SERIES, "ebfw.metric")[c.CONNECT_TIME.name,] == 0
    assert read(metrics, c.SERIES_EXPIRED) == {(): 19}  # the info, one counter, a histogram of 17


def test_a_unit_that_starts_again_is_not_ended() -> None:
    metrics, clock = make()
    metrics.add(flow(), Counts(tx_bytes=1), 5)
    metrics.end(SSHD)
    metrics.add(flow(workload=SSHD._replace(cgroup_id=99)), Counts(tx_bytes=1), 5)
    clock.seconds += 400
    metrics.expire()
    assert read(metrics, c.NETWORK_IO) == {(): 2}


def test_everything_is_given_back_after_expiry() -> None:
    metrics, clock = make(limit=50, total=2000)
    for n in range(300):
        metrics.add(flow(f"h{n}"), Counts(*([1] * 12)), 5)
        metrics.observe(event(domain=f"h{n}"))
        metrics.observe(event("dns", domain=f"h{n}", status="NXDOMAIN"))
    clock.seconds += 1000
    metrics.expire()
    assert set(read(metrics, c.SERIES, "ebfw.metric").values()) == {0}
    assert metrics._store.count == 0


def test_events_and_attribution() -> None:
    metrics, _ = make()
    for n in range(23):
        metrics.observe(event(filtered=n % 2 == 0))
    metrics.observe(event("tls", workload=SSHD._replace(kind="unknown")))
    assert read(metrics, c.EVENTS, "kind") == {("connect",): 11, ("tls",): 1}
    assert read(metrics, c.FILTERED, "kind") == {("connect",): 12}
    assert read(metrics, c.ATTRIBUTION, "result") == {("hit",): 23, ("miss",): 1}


def histogram(metrics: Metrics, metric: c.Metric) -> dict[tuple[tuple[str, Any], ...], list[Any]]:
    return {p.attributes: p.value for m, points in metrics.snapshot().by_metric() if m is metric for _, p in points}


def test_connect_duration_holds_success_and_failure() -> None:
    metrics, _ = make()
    for milliseconds in (1, 5, 6, 20_000):
        metrics.observe(event(duration=milliseconds * 1_000_000))
    metrics.observe(event(status="refused", duration=1))
    metrics.observe(event(status="refused", duration=None))
    metrics.observe(event(transport="udp"))
    metrics.observe(event(role="server"))
    metrics.observe(event(filtered=True, scope="private"))
    found = {
        (dict(key)[c.SERVER_ADDRESS], dict(key).get(c.ERROR_TYPE)): value
        for key, value in histogram(metrics, c.CONNECT_TIME).items()
    }
    assert set(found) == {("example.com", None), ("example.com", "connection_refused"), ("~excluded", None)}
    counts = found["example.com", None]
    # 5 ms belongs to the bucket whose bound is 5 ms
    assert (counts[0], counts[1], counts[len(c.CONNECT_TIME.bounds)]) == (2, 1, 1)
    assert counts[-1] == pytest.approx(20.012)


def test_rtt_is_for_each_workload_and_scope_only() -> None:
    metrics, _ = make()
    for n in range(23):
        metrics.observe(event("close", domain=f"h{n}", rtt=300_000))
    ((key, value),) = histogram(metrics, c.RTT).items()
    assert key == ((c.PEER_SCOPE, "internet"),)
    assert value[c.RTT.bounds.index(0.0005)] == 23


def test_dns_names_are_capped_and_errors_survive_the_fold() -> None:
    metrics, _ = make(dns_limit=10)
    for n in range(100):
        metrics.observe(event("dns", domain=f"h{n}", status="NXDOMAIN" if n >= 50 else "NOERROR"))
    found = {
        (dict(key)[c.DNS_QUESTION_NAME], dict(key).get(c.ERROR_TYPE)): sum(value[:-1])
        for key, value in histogram(metrics, c.DNS_TIME).items()
    }
    assert found["~other", None] == 41
    assert found["~other", "host_not_found"] == 50
    assert len(found) == 11


def test_strange_errors_of_lookups_are_one_beyond_the_cap() -> None:
    """Extended codes go up to 4,095, and whoever answers chooses them."""
    metrics, _ = make(dns_limit=10)
    for n in range(1000):
        metrics.observe(event("dns", domain="h", status=f"RCODE{n}"))
    counts = {key: sum(value[:-1]) for key, value in histogram(metrics, c.DNS_TIME).items()}
    assert len(counts) == 10
    assert counts[(c.DNS_QUESTION_NAME, "~other"), (c.ERROR_TYPE, "_OTHER")] == 991


def test_what_is_remembered_of_labels_is_bounded() -> None:
    metrics, _ = make(limit=10)
    exchange = Exchange("2", "https", 200, grpc_status=0)
    for n in range(10_000):
        metrics.observe_all(
            (event("https", domain=f"h{n}", path=f"/a.B/c{n}", exchange=exchange), event(domain=f"h{n}"))
        )
    assert all(len(known.fast) <= 1024 for known in metrics._store.cgroups.values())
    metrics.expire()
    assert not any(known.fast for known in metrics._store.cgroups.values())


def test_the_agents_totals_never_go_down() -> None:
    metrics, _ = make()
    for value in (5, 9, 3, 10):
        metrics.set_total(c.EXPORTED.name, value, signal="traces")
    assert read(metrics, c.EXPORTED, "ebfw.signal") == {("traces",): 10}
    assert read(metrics, c.CLAMPED, "ebfw.metric") == {(c.EXPORTED.name,): 1}


def test_losses_and_features_come_from_health() -> None:
    losses, features = health.Losses(), health.Features()
    losses.add("ring", "full", 3)
    features.set("uprobes", True)
    features.set("sock_release", False, "failures by reason")
    metrics, _ = make(losses=losses, features=features)
    assert read(metrics, c.RECORDS_LOST, "ebfw.stage", "ebfw.cause") == {("ring", "full"): 3}
    assert read(metrics, c.FEATURE, "ebfw.feature") == {("uprobes",): 1, ("sock_release",): 0}


def test_a_wrong_label_is_an_error_that_names_the_right_ones() -> None:
    metrics, _ = make()
    metrics.gauge(c.TABLE_USED.name, 5, table="flows")
    with pytest.raises(KeyError, match="it has table"):
        metrics.gauge(c.TABLE_USED.name, 5, tabel="flows")


def test_a_negative_delta_changes_nothing_and_is_counted() -> None:
    metrics, _ = make()
    metrics.add(flow(), Counts(tx_bytes=5), 5)
    metrics.add(flow(), Counts(tx_bytes=-3), 5)
    assert read(metrics, c.NETWORK_IO) == {(): 5}
    assert read(metrics, c.CLAMPED, "ebfw.metric") == {(c.NETWORK_IO.name,): 1}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(0, 30),
            st.sampled_from(("client", "server", "unknown")),
            st.booleans(),
            st.integers(0, 3),
            st.integers(0, 1000),
            st.integers(0, 400),
        ),
        max_size=200,
    )
)
def test_nothing_is_lost_or_counted_twice(steps: list[tuple[int, int, str, bool, int, int, int]]) -> None:
    """Whatever the limits fold: the sum over all series is the sum of all deltas, and no series falls."""
    metrics, clock = make(limit=8, total=60)
    sent = 0
    before: dict[tuple[Any, ...], Any] = {}
    for w, name, role, filtered, field, amount, wait in steps:
        workload = SSHD._replace(cgroup_id=w, name=f"w{w}", unit=f"w{w}")
        values = [0] * 12
        values[field] = amount
        metrics.add(flow(f"h{name}", workload, role=role, filtered=filtered), Counts(*values), 5)
        sent += amount
        clock.seconds += wait / 100
        metrics.expire()
        keys = (*c.IDENTITY, c.SERVER_ADDRESS, c.ROLE, c.TRANSPORT, c.IO_DIRECTION, c.OVERFLOW)
        now = read(metrics, c.NETWORK_IO, *keys)
        now |= {("packets", *key): value for key, value in read(metrics, c.NETWORK_PACKETS, *keys).items()}
        assert all(now.get(key, 0) >= value for key, value in before.items())
        before = now
    assert sum(before.values()) == sent


def test_readers_and_the_writer_at_once() -> None:
    metrics, _ = make()
    done = threading.Event()
    failures: list[BaseException] = []

    def reader() -> None:
        try:
            while not done.is_set():
                for _, points in metrics.snapshot().by_metric():
                    for _ in points:
                        pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(20_000):
        metrics.add(flow(f"h{n % 700}"), Counts(tx_bytes=1, opened=1), 5)
        metrics.observe(event(domain=f"h{n % 300}"))
        if n % 1000 == 0:
            metrics.expire()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(read(metrics, c.NETWORK_IO).values()) == 20_000


# --- who ----------------------------------------------------------------------------------------------------


def test_resource_attributes_of_the_environment_d17() -> None:
    given = (
        "service.name=x,k8s.pod.name=agent-1,k8s.cluster.name=c%201,deployment.environment.name=prod,"
        "process.pid=1,container.id=abc,k8s.namespace.name=ebfw,broken"
    )
    resources = Resources("h", "n1", "1.0", {"OTEL_RESOURCE_ATTRIBUTES": given, "OTEL_SERVICE_NAME": "mine"})
    agent, workload = dict(resources.agent.attributes), dict(resources.of(SSHD).attributes)
    assert agent["service.name"] == "mine"
    assert agent["k8s.pod.name"] == "agent-1"
    assert workload == {
        "host.name": "h",
        "k8s.node.name": "n1",
        "telemetry.distro.name": "ebfw",
        "telemetry.distro.version": "1.0",
        "k8s.cluster.name": "c 1",
        "deployment.environment.name": "prod",
        "service.name": "ssh.service",
        "service.instance.id": "n1.ssh.service",
        "ebfw.systemd.unit": "ssh.service",
        "ebfw.workload.kind": "unit",
    }


@pytest.mark.parametrize(
    ("workload", "name"),
    [
        (Workload(1, "/s", "container", "f" * 64, container_id="f" * 64), "unknown_service"),
        (Workload(1, "/s", "container", "db", container_id="f" * 64, container_name="db"), "db"),
        (Workload(1, "/s", "unit", "run-r0123456789abcdef.service"), "unknown_service"),
        (Workload(1, "/s", "session", "session-3.scope"), "unknown_service"),
        (Workload(1, "/s", "session", "alice"), "alice"),
        (Workload(1, "/s", "unit", "user@1000.service"), "user@1000.service"),
        (Workload(1, "/s", "pod", "x", pod_uid="8f1e2d3c-0000-4000-8000-123456789abc"), "unknown_service"),
        (Workload(1, "/s", "unknown", ""), "unknown_service"),
    ],
)
def test_service_name_never_contains_an_id(workload: Workload, name: str) -> None:
    made = Resources("h").of(workload)
    assert dict(made.identity)["service.name"] == name
    assert bool(made.workload_id) == (name == "unknown_service")


def test_names_are_the_conventions() -> None:
    """semconv.py spells names out; where the installed conventions have them, they agree."""
    pytest.importorskip("opentelemetry.semconv._incubating.attributes.dns_attributes")
    from opentelemetry.semconv._incubating.attributes import (
        container_attributes as container,
    )
    from opentelemetry.semconv._incubating.attributes import (
        dns_attributes as dns,
    )
    from opentelemetry.semconv._incubating.attributes import (
        http_attributes as http,
    )
    from opentelemetry.semconv._incubating.attributes import (
        k8s_attributes as k8s,
    )
    from opentelemetry.semconv._incubating.attributes import (
        network_attributes as network,
    )
    from opentelemetry.semconv._incubating.attributes import (
        process_attributes as process,
    )
    from opentelemetry.semconv._incubating.attributes import (
        rpc_attributes as rpc,
    )
    from opentelemetry.semconv._incubating.attributes import (
        service_attributes as service,
    )
    from opentelemetry.semconv._incubating.attributes import (
        telemetry_attributes as telemetry,
    )
    from opentelemetry.semconv._incubating.attributes import (
        tls_attributes as tls,
    )
    from opentelemetry.semconv._incubating.attributes import (
        url_attributes as url,
    )
    from opentelemetry.semconv._incubating.attributes import (
        user_agent_attributes as user_agent,
    )
    from opentelemetry.semconv._incubating.attributes import (
        user_attributes as user,
    )
    from opentelemetry.semconv.attributes import (
        error_attributes,
        http_attributes,
        server_attributes,
    )

    known = {
        value
        for module in (
            container, dns, http, k8s, network, process, rpc, service, telemetry, tls, url, user, user_agent,
            error_attributes, http_attributes, server_attributes,
        )
        for value in vars(module).values()
        if isinstance(value, str)
    }  # fmt: skip
    ours = {
        value
        for name, value in vars(c).items()
        if name.isupper() and isinstance(value, str) and "." in value and not value.startswith(("ebfw.", "otel."))
    } - {c.HOST_NAME, c.SCHEMA_URL, c.HTTP_REQUEST_HEADER, c.RPC_REQUEST_METADATA}
    assert ours <= known


def test_every_attribute_is_declared() -> None:
    """What the docs' table is made of: no name is missing, none is there twice."""
    declared = [attribute.name for attribute in c.ATTRIBUTES]
    assert len(set(declared)) == len(declared)
    assert {name for metric in c.METRICS for name in (*metric.attributes, *metric.more)} <= set(declared)
    named = {
        value
        for name, value in vars(c).items()
        if name.isupper() and isinstance(value, str) and "." in value and not name.startswith("EVENT_")
    } - {c.SCHEMA_URL, c.HTTP_REQUEST_HEADER}
    assert named <= set(declared)
    assert {a.type for a in c.ATTRIBUTES} <= {"string", "int", "boolean", "double", "string[]"}
    stability = {entry.stability for entry in (*c.ATTRIBUTES, *c.METRICS)}
    assert stability == {c.STABLE, c.CANDIDATE, c.DEVELOPMENT}
