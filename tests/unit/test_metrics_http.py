"""Requests, calls and handshakes as series: which attributes they have, what is left out, what is opt-in.

Excluded: limits and expiry of series in general (test_metrics.py), how they look on the two faces.
"""

from __future__ import annotations

from typing import Any

import pytest

from exporter.emit import semconv as c
from exporter.emit.routes import Routes
from exporter.errors import SettingsError
from exporter.events import Exchange, Tls
from tests.unit.test_metrics import SSHD, event, histogram, make, read

GET = event(
    "https", status="", method="GET", path="/users/42?token=x", duration=30_000_000,
    exchange=Exchange("1.1", "https", 200, "", 10_000_000, 0, 5000),
)  # fmt: skip
OPEN = GET._replace(duration=None, exchange=Exchange("1.1", "https"))
CALL = GET._replace(
    method="POST", path="/shop.Cart/Add", exchange=Exchange("2", "https", 200, grpc_status=0), duration=7_000_000
)
TLS13 = event("tls", status="", duration=8_000_000, tls=Tls("1.3", "1.3", ("h2",), "X25519MLKEM768", True, ja4="t13d"))


def shown(metrics: Any, metric: c.Metric) -> dict[tuple[tuple[str, Any], ...], int]:
    """{attributes: how many}"""
    return {key: sum(value[:-1]) for key, value in histogram(metrics, metric).items()}


def test_a_request_has_the_conventions_attributes() -> None:
    metrics, _ = make()
    for _ in range(23):
        metrics.observe(GET)
    assert shown(metrics, c.HTTP_TIME) == {
        (
            ("http.request.method", "GET"),
            ("server.address", "example.com"),
            ("server.port", 443),
            ("http.response.status_code", 200),
            ("network.protocol.version", "1.1"),
        ): 23
    }
    ((cells),) = histogram(metrics, c.HTTP_TIME).values()
    assert cells[-1] == pytest.approx(23 * 0.03)
    assert shown(metrics, c.HTTP_REQUEST_SIZE) == shown(metrics, c.HTTP_FIRST_BYTE) == {}


@pytest.mark.parametrize(
    ("status", "error", "type_"),
    [
        (200, "", None),
        (302, "", None),
        (404, "", "404"),
        (503, "", "503"),
        (0, "connection_reset", "connection_reset"),
        (200, "incomplete", "incomplete"),
    ],
)
def test_d3_error_type_of_a_request(status: int, error: str, type_: str | None) -> None:
    """A request whose connection closes without an answer is one with error.type, and none without."""
    metrics, _ = make()
    metrics.observe(GET._replace(exchange=Exchange("1.1", "https", status, error)))
    ((attributes, count),) = shown(metrics, c.HTTP_TIME).items()
    assert count == 1
    assert dict(attributes).get("error.type") == type_
    assert dict(attributes).get("http.response.status_code") == (status or None)


def test_unknown_methods_are_one() -> None:
    metrics, _ = make()
    for n in range(23):
        metrics.observe(GET._replace(method=f"BREW{n}"))
    assert read(metrics, c.SERIES, "ebfw.metric")[c.HTTP_TIME.name,] == 1
    ((attributes, count),) = shown(metrics, c.HTTP_TIME).items()
    assert (dict(attributes)["http.request.method"], count) == ("_OTHER", 23)


def test_what_has_no_end_is_no_duration() -> None:
    metrics, _ = make()
    metrics.observe(GET._replace(exchange=None))
    metrics.observe(GET._replace(duration=None))
    metrics.observe(GET._replace(role="server"))
    assert shown(metrics, c.HTTP_TIME) == {}
    assert read(metrics, c.EVENTS, "kind") == {("https",): 3}


def test_d5_excluded_peers_are_one_for_each_scope() -> None:
    metrics, _ = make()
    for n in range(23):
        metrics.observe(GET._replace(filtered=True, domain=f"h{n}", port=n, scope="private" if n % 2 else "loopback"))
    found = {
        (dict(key)["server.address"], dict(key)["ebfw.peer.scope"], dict(key).get("server.port")): count
        for key, count in shown(metrics, c.HTTP_TIME).items()
    }
    assert found == {("~excluded", "private", None): 11, ("~excluded", "loopback", None): 12}


def test_opt_in_metrics_are_of_the_same_requests() -> None:
    metrics, _ = make(
        opt_in=("http.client.request.body.size", "http.client.response.body.size", c.HTTP_FIRST_BYTE.name)
    )
    for _ in range(23):
        metrics.observe(GET)
    metrics.observe(GET._replace(exchange=Exchange("1.1", "https", 200)))
    attributes = next(iter(shown(metrics, c.HTTP_TIME)))
    for metric, bucket, total in (
        (c.HTTP_REQUEST_SIZE, c.HTTP_REQUEST_SIZE.bounds.index(0), 0),
        (c.HTTP_RESPONSE_SIZE, c.HTTP_RESPONSE_SIZE.bounds.index(16384), 23 * 5000),
        (c.HTTP_FIRST_BYTE, c.HTTP_FIRST_BYTE.bounds.index(0.01), 23 * 0.01),
    ):
        ((key, cells),) = histogram(metrics, metric).items()
        assert key == attributes
        assert cells[bucket] == sum(cells[:-1]) == 23
        assert cells[-1] == pytest.approx(total)


def test_d14_attributes_are_opt_in() -> None:
    metrics, _ = make(attributes=("url.scheme", "url.template", "network.peer.port"), routes=Routes())
    for n in range(23):
        metrics.observe(GET._replace(path=f"/users/{n}?token=x"))
        metrics.observe(event(port=n % 2))
    ((attributes, count),) = shown(metrics, c.HTTP_TIME).items()
    assert (attributes[-2:], count) == ((("url.scheme", "https"), ("url.template", "/users/{id}")), 23)
    ports = {dict(key)["network.peer.port"]: count for key, count in shown(metrics, c.CONNECT_TIME).items()}
    assert ports == {0: 12, 1: 11}
    with pytest.raises(SettingsError, match=r"EBFW_METRICS_ATTRIBUTES: url.path is not one of .*url.template"):
        make(attributes=("url.path",))
    with pytest.raises(SettingsError, match="EBFW_METRICS_OPT_IN: x is not one of"):
        make(opt_in=("x",))


def test_d14_a_workload_that_asks_for_everything_has_its_limit() -> None:
    metrics, _ = make(limit=20)
    for n in range(100):
        metrics.observe(GET._replace(domain=f"h{n}"))
        metrics.observe(CALL._replace(path=f"/shop.Cart/Add{n}"))
        metrics.observe(TLS13._replace(tls=Tls("1.3", group=f"g{n}"), domain=f"h{n}"))
    for metric, extra in ((c.HTTP_TIME, 100), (c.RPC_TIME, 0), (c.TLS_TIME, 0)):
        counts = shown(metrics, metric)
        assert len(counts) == 20
        assert sum(counts.values()) == 100 + extra
        assert counts[(c.OVERFLOW, True),] > 50
        assert read(metrics, c.SERIES_OVERFLOW, "ebfw.metric")[metric.name,] == counts[(c.OVERFLOW, True),]
    groups = read(metrics, c.TLS_HANDSHAKES, "ebfw.tls.group", c.OVERFLOW)
    assert (len(groups), sum(groups.values()), groups["", True]) == (20, 100, 81)
    assert read(metrics, c.SERIES_OVERFLOW, "ebfw.metric")[c.TLS_HANDSHAKES.name,] == 81


def test_a_grpc_call_is_a_request_and_a_call() -> None:
    metrics, _ = make()
    for n in range(23):
        failed = Exchange("2", "https", 200, grpc_status=4)
        metrics.observe(CALL if n % 2 else CALL._replace(exchange=failed))
    assert sum(shown(metrics, c.HTTP_TIME).values()) == 23
    common = (("rpc.system.name", "grpc"), ("rpc.method", "shop.Cart/Add"))
    where = (("server.address", "example.com"), ("server.port", 443))
    assert shown(metrics, c.RPC_TIME) == {
        (*common, ("rpc.response.status_code", "OK"), *where): 11,
        (*common, ("rpc.response.status_code", "DEADLINE_EXCEEDED"), *where, ("error.type", "DEADLINE_EXCEEDED")): 12,
    }


@pytest.mark.parametrize(
    "path", ["/", "/a/b/c", "/shop.Cart/Add?x=1", "/hooks/Xy7Kd9Qw2Lm4", "/a/sk_live_0123456789abcdef"]
)
def test_d8_a_path_that_names_no_method_is_other(path: str) -> None:
    metrics, _ = make()
    metrics.observe(CALL._replace(path=path, exchange=Exchange("2", "https", 200, grpc_status=99)))
    ((attributes, _),) = shown(metrics, c.RPC_TIME).items()
    assert dict(attributes)["rpc.method"] == "_OTHER"
    assert dict(attributes)["error.type"] == "99"


def test_a_method_that_the_server_does_not_know_is_other() -> None:
    metrics, _ = make()
    for n in range(23):
        metrics.observe(CALL._replace(path=f"/shop.Cart/x{n}", exchange=Exchange("2", "https", 200, grpc_status=12)))
    ((attributes, count),) = shown(metrics, c.RPC_TIME).items()
    assert (dict(attributes)["rpc.method"], dict(attributes)["error.type"], count) == ("_OTHER", "UNIMPLEMENTED", 23)


def test_d6_behind_a_proxy_the_port_is_the_servers() -> None:
    metrics, _ = make()
    proxied = GET._replace(port=3128, proxy="192.0.2.3:3128")
    metrics.observe(proxied)
    metrics.observe(proxied._replace(exchange=Exchange("1.1", "https", 200, server_port=8443)))
    metrics.observe(GET)
    assert {dict(key)["server.port"]: count for key, count in shown(metrics, c.HTTP_TIME).items()} == {443: 2, 8443: 1}


def test_where_only_a_tls_library_was_seen_the_request_says_the_port() -> None:
    metrics, _ = make()
    metrics.observe(GET._replace(port=0))
    metrics.observe(GET._replace(port=0, exchange=Exchange("1.1", "https", 200, server_port=8443)))
    metrics.observe(GET._replace(port=9443, exchange=Exchange("1.1", "https", 200, server_port=8443)))
    ports = {dict(key)["server.port"]: count for key, count in shown(metrics, c.HTTP_TIME).items()}
    assert ports == {443: 1, 8443: 1, 9443: 1}


def test_handshakes() -> None:
    metrics, _ = make()
    old = Tls("1.2", "1.3", (), "", False, alert="handshake_failure")
    for n in range(23):
        metrics.observe(TLS13 if n % 3 else TLS13._replace(tls=old, duration=None))
    metrics.observe(TLS13._replace(tls=Tls("1.3", quic="1"), transport="udp", duration=None))
    metrics.observe(TLS13._replace(tls=None))
    assert shown(metrics, c.TLS_TIME) == {(("server.address", "example.com"), ("tls.protocol.version", "1.3")): 15}
    keys = ("network.transport", "tls.protocol.version", "ebfw.tls.group", "ebfw.tls.post_quantum", "error.type")
    assert read(metrics, c.TLS_HANDSHAKES, *keys) == {
        ("tcp", "1.3", "X25519MLKEM768", True, ""): 15,
        ("tcp", "1.2", "", False, "handshake_failure"): 8,
        ("quic", "1.3", "", False, ""): 1,
    }


def test_handshakes_without_an_answer() -> None:
    """A close and a timeout have no alert, and are errors all the same."""
    metrics, _ = make()
    for status in ("closed", "closed", "timeout", "ok"):
        metrics.observe(TLS13._replace(tls=Tls(), status=status, duration=None if status == "timeout" else 5))
    assert read(metrics, c.TLS_HANDSHAKES, "error.type") == {("closed",): 2, ("timeout",): 1, ("",): 1}
    assert {dict(key).get("error.type"): n for key, n in shown(metrics, c.TLS_TIME).items()} == {"closed": 2, None: 1}
    metrics, _ = make(attributes=("ebfw.tls.ja4",))
    metrics.observe(TLS13)
    metrics.observe(TLS13._replace(tls=TLS13.tls and TLS13.tls._replace(ja4="t12d")))
    assert read(metrics, c.TLS_HANDSHAKES, "ebfw.tls.ja4") == {("t13d",): 1, ("t12d",): 1}


def test_d3_search_expansion_is_no_error() -> None:
    """It is counted, marked, and has no error.type: whatever divides errors by lookups leaves it out by the mark."""
    metrics, _ = make(attributes=("ebfw.dns.question.type",))
    for n in range(23):
        found = event("dns", domain="db.shop.svc.example", status="NXDOMAIN", dns_type="A", search_expansion=n % 2 == 0)
        metrics.observe(found)
    keys = ("error.type", "ebfw.dns.search_expansion", "ebfw.dns.question.type")
    found = {tuple(dict(key).get(k) for k in keys): count for key, count in shown(metrics, c.DNS_TIME).items()}
    assert found == {(None, True, "A"): 12, ("host_not_found", None, "A"): 11}


def test_active_requests_are_what_was_said_last() -> None:
    metrics, clock = make()
    cron = SSHD._replace(cgroup_id=8, name="cron.service", unit="cron.service")
    plain = OPEN._replace(kind="http", port=80, exchange=Exchange("1.1", "http"))
    metrics.active_requests(
        [
            (plain, 3),
            (plain._replace(domain="", dst="192.0.2.7"), 1),
            (plain._replace(filtered=True, scope="private"), 1),
            (plain._replace(filtered=True, scope="private", domain="other"), 1),
            (plain._replace(port=3128, proxy="192.0.2.3:3128"), 1),
            (OPEN._replace(method="BREW"), 1),
            (OPEN._replace(method="FROB"), 1),
            (OPEN._replace(port=0, exchange=Exchange("2", "https", server_port=8443)), 1),
            (plain._replace(workload=cron), 2),
        ]
    )
    keys = (
        "service.name", "http.request.method", "url.scheme", "server.address", "server.port", "ebfw.peer.scope",
    )  # fmt: skip
    assert read(metrics, c.HTTP_ACTIVE, *keys) == {
        ("ssh.service", "GET", "http", "example.com", 80, ""): 4,
        ("ssh.service", "GET", "http", "192.0.2.7", 80, ""): 1,
        ("ssh.service", "GET", "http", "~excluded", "", "private"): 2,
        ("ssh.service", "_OTHER", "https", "example.com", 443, ""): 2,
        ("ssh.service", "GET", "https", "example.com", 8443, ""): 1,
        ("cron.service", "GET", "http", "example.com", 80, ""): 2,
    }
    metrics.active_requests([(plain, 1)])
    assert sum(read(metrics, c.HTTP_ACTIVE).values()) == 1
    assert len(read(metrics, c.HTTP_ACTIVE, *keys)) == 6
    clock.seconds += 1000
    metrics.expire()
    # One that stands still is not idle, one at zero is.
    assert read(metrics, c.HTTP_ACTIVE, *keys) == {("ssh.service", "GET", "http", "example.com", 80, ""): 1}


def test_d12_requests_of_who_tells_its_own_are_not_active() -> None:
    metrics, _ = make()
    metrics.instrumented = lambda workload: workload is SSHD
    metrics.active_requests([(OPEN, 23), (OPEN._replace(workload=SSHD._replace(cgroup_id=8)), 1)])
    assert sum(read(metrics, c.HTTP_ACTIVE).values()) == 1


def test_d14_active_requests_have_a_limit_and_leave_nothing_behind() -> None:
    metrics, clock = make(limit=20)
    for _ in range(2):
        metrics.active_requests([(OPEN._replace(domain=f"h{n}"), 1) for n in range(100)])
    counts = read(metrics, c.HTTP_ACTIVE, "server.address", c.OVERFLOW)
    assert (len(counts), sum(counts.values()), counts["", True]) == (20, 100, 81)
    assert read(metrics, c.SERIES_OVERFLOW, "ebfw.metric")[c.HTTP_ACTIVE.name,] == 2 * 81
    metrics.active_requests([])
    assert set(read(metrics, c.HTTP_ACTIVE, "server.address", c.OVERFLOW).values()) == {0}
    clock.seconds += 1000
    metrics.expire()
    assert read(metrics, c.HTTP_ACTIVE) == {}
    assert metrics._store.count == 0


def test_open_connections_are_right_although_a_socket_learns_its_name() -> None:
    from exporter.events import Counts
    from tests.unit.test_metrics import flow

    metrics, clock = make()
    for n in range(23):
        metrics.add(flow("", name_source="address"), Counts(opened=1), 5)
        if n % 2:
            metrics.add(flow("example.com"), Counts(closed=1), 5)
    assert read(metrics, c.OPEN_CONNECTIONS) == {(): 12}
    clock.seconds += 5000
    metrics.expire()
    assert read(metrics, c.OPEN_CONNECTIONS) == {(): 12}
    metrics.add(flow("example.com"), Counts(closed=12), 5)
    clock.seconds += 5000
    metrics.expire()
    assert read(metrics, c.OPEN_CONNECTIONS) == {}
    assert metrics._store.count == 0
