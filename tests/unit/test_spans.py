"""What spans say, put together from pieces or not; and how connections came about.

Excluded: what the receiver gets (test_otlp.py), which spans are kept (test_sampling.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from exporter.emit import otlp_records, registry, setup, spans
from exporter.emit import semconv as c
from exporter.emit.logs import Note
from exporter.emit.otlp_records import Records
from exporter.emit.otlp_settings import Limits
from exporter.emit.resource import Resources
from exporter.emit.sampling import Request
from exporter.emit.setup import Setup, Setups
from exporter.events import Event
from tests.pipeline.otlp_receiver import attributes
from tests.unit.samples import (
    EVENT,
    EXCHANGE,
    FOUND,
    HELLO,
    LOOKUP,
    PARENT,
    REQUEST,
    SSHD,
    START,
    WEB,
    outcome,
)

RESOURCES = Resources("host1", "node1", "1.2.3")


def records(limits: Limits | None = None, **options: Any) -> Records:
    return Records(RESOURCES.of, "1.2.3", limits, **options)


def encoded(items: Iterable[Request | Setup], maker: Records | None = None) -> list[Any]:
    """Every span as protobuf reads it; the bytes are those that protobuf would have written."""
    found = []
    for payload in (maker or records()).spans(items):
        message = ExportTraceServiceRequest.FromString(payload.message)
        assert message.SerializeToString(deterministic=True) == payload.message
        batch = [s for r in message.resource_spans for scope in r.scope_spans for s in scope.spans]
        assert len(batch) == payload.items
        found += batch
    return found


def one(event: Event, **options: Any) -> Any:
    (span,) = encoded([Request(event)], records(**options))
    return span


# --- HTTP -------------------------------------------------------------------------------------------------------------


def test_a_request_is_a_client_span_of_the_conventions() -> None:
    span = one(REQUEST)
    assert (span.name, span.kind, span.status.code, span.flags) == ("GET", 3, 0, 0x101)
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (REQUEST.time, REQUEST.time + 9_000_000)
    assert (len(span.trace_id), len(span.span_id), span.parent_span_id, list(span.links)) == (16, 8, b"", [])
    assert attributes(span) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.request.body.size": 0,
        "http.response.body.size": 5123,
        "ebfw.http.first_byte": 0.004,
        "ebfw.http.request.sequence": 1,
        "url.full": "https://example.com/v1/items/42?page=REDACTED",
        "url.scheme": "https",
        "server.address": "example.com",
        "server.port": 443,
        "network.peer.address": "192.0.2.1",
        "network.peer.port": 443,
        "network.local.address": "10.0.0.9",
        "network.local.port": 40000,
        "network.transport": "tcp",
        "network.type": "ipv4",
        "network.protocol.version": "1.1",
        "ebfw.peer.name.source": "host",
        "ebfw.peer.scope": "internet",
        "ebfw.role": "client",
        "process.pid": 42,
        "process.executable.name": "curl",
    }


@pytest.mark.parametrize(
    ("changes", "code", "error"),
    [
        ({"status": 100}, 0, None),
        ({"status": 204}, 0, None),
        ({"status": 304}, 0, None),
        ({"status": 404}, 2, "404"),
        ({"status": 503}, 2, "503"),
        ({"status": 0, "error": "connection_reset"}, 2, "connection_reset"),
        ({"status": 200, "error": "response_truncated"}, 2, "response_truncated"),
        ({"status": 0, "partial": "midway"}, 0, None),
    ],
)
def test_status_is_error_from_400_on_for_a_client(changes: dict[str, Any], code: int, error: str | None) -> None:
    span = one(outcome(**changes))
    assert (span.status.code, span.status.message, attributes(span).get("error.type")) == (code, "", error)
    assert attributes(span).get("http.response.status_code", 0) == changes["status"]


def test_the_name_is_the_template_or_only_the_method() -> None:
    assert one(REQUEST, template=lambda event: "/v1/items/{id}").name == "GET /v1/items/{id}"
    assert attributes(one(REQUEST, template=lambda event: "/v1/items/{id}"))["url.template"] == "/v1/items/{id}"
    odd = one(REQUEST._replace(method="BREW"))
    assert odd.name == "HTTP"
    assert attributes(odd)["http.request.method"] == "_OTHER"
    assert attributes(odd)["http.request.method_original"] == "BREW"


def test_the_url_names_ports_that_are_not_the_schemes_own() -> None:
    def url(event: Event) -> str:
        return str(attributes(one(event))["url.full"])

    assert url(REQUEST._replace(port=8443)) == "https://example.com:8443/v1/items/42?page=REDACTED"
    assert url(REQUEST._replace(domain="2001:db8::1", path="/")) == "https://[2001:db8::1]/"
    assert url(outcome(scheme="http")._replace(port=80, path="/a")) == "http://example.com/a"


def test_d6_behind_a_proxy_the_server_is_the_target() -> None:
    proxied = outcome(scheme="http", server_port=8080)._replace(
        kind="http", proxy="192.0.2.7:3128", dst="192.0.2.7", port=3128, path="/x"
    )
    found = attributes(one(proxied))
    assert (found["server.address"], found["server.port"], found["url.full"]) == (
        "example.com", 8080, "http://example.com:8080/x",
    )  # fmt: skip
    assert (found["network.peer.address"], found["network.peer.port"]) == ("192.0.2.7", 3128)
    assert found["ebfw.proxy.address"] == "192.0.2.7:3128"
    assert attributes(one(proxied._replace(exchange=EXCHANGE)))["server.port"] == 443


def test_headers_are_told_by_allow_list_only_d8() -> None:
    event = REQUEST._replace(
        headers=(("User-Agent", "curl/8"), ("X-Team", "a"), ("x-team", "b"), ("Authorization", "canary"))
    )
    assert not {key for key in attributes(one(event)) if "header" in key or "user_agent" in key}
    allowed = frozenset(("user-agent", "x-team"))
    for limits in (None, Limits(attributes=90)):  # with pieces, and without
        found = attributes(one(event, allowed=allowed, limits=limits))
        assert found["user_agent.original"] == "curl/8"
        assert found["http.request.header.x-team"] == ("a", "b")
        assert "canary" not in repr(found)


# --- gRPC -------------------------------------------------------------------------------------------------------------


def test_a_grpc_call_is_an_rpc_client_span() -> None:
    call = outcome(version="2", grpc_status=0)._replace(method="POST", path="/shop.v1.Cart/Add")
    span = one(call)
    found = attributes(span)
    assert (span.name, span.kind, span.status.code) == ("shop.v1.Cart/Add", 3, 0)
    assert (found["rpc.system.name"], found["rpc.method"], found["rpc.response.status_code"]) == (
        "grpc", "shop.v1.Cart/Add", "OK",
    )  # fmt: skip
    assert "error.type" not in found
    late = one(call._replace(exchange=EXCHANGE._replace(grpc_status=4)))
    assert (late.status.code, attributes(late)["error.type"]) == (2, "DEADLINE_EXCEEDED")
    found = attributes(one(call._replace(exchange=EXCHANGE._replace(grpc_status=99))))
    assert found["rpc.response.status_code"] == "99"


def test_a_method_that_the_server_does_not_know_makes_no_name() -> None:
    span = one(outcome(grpc_status=12)._replace(method="POST", path="/made.up/Name-4711"))
    found = attributes(span)
    assert (span.name, found["rpc.method"], found["rpc.method_original"]) == ("grpc", "_OTHER", "made.up/Name-4711")


# --- traceparent ------------------------------------------------------------------------------------------------------


def test_the_span_is_a_child_of_the_applications_context() -> None:
    span = one(outcome(traceparent=PARENT[:-2] + "03", tracestate="ot=th:8"))
    assert span.trace_id.hex() == PARENT[3:35]
    assert span.parent_span_id.hex() == PARENT[36:52]
    assert span.span_id != span.parent_span_id
    assert span.trace_state == "ot=th:8"
    assert span.flags == 0x303  # sampled and random, as the application said; the parent is remote


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_pieces_say_what_the_plain_values_say() -> None:
    """Whatever a piece depends on must be in its key: each field changed alone, and all events through one encoder,
    by turns."""
    changes: list[dict[str, Any]] = [
        {}, {"domain": "other.example"}, {"domain": ""}, {"name_source": "dns"}, {"dst": "2001:db8::9"}, {"port": 8443},
        {"scope": "private"}, {"role": "unknown"}, {"transport": "udp"}, {"proxy": "p:1"}, {"src": "10.0.0.10"},
        {"pid": 43}, {"pid": 1 << 21}, {"comm": "wget"}, {"comm": "a\udcffb"}, {"method": "PUT"}, {"method": "BREW"},
        {"src_port": 1}, {"src_port": 200}, {"src_port": 65535}, {"path": ""}, {"path": "/" + "x" * 99},
        {"path": "/" + "y" * 9000}, {"path": "/ü\x00"}, {"time": 1}, {"duration": None}, {"kind": "http"},
    ]  # fmt: skip
    exchanges: list[dict[str, Any]] = [
        {}, {"version": "2"}, {"scheme": "http"}, {"status": 0}, {"status": 404}, {"error": "timeout"},
        {"first_byte": None}, {"request_size": None}, {"request_size": 1 << 40}, {"response_size": 127},
        {"response_size": 128}, {"response_size": 16384}, {"grpc_status": 0}, {"grpc_status": 12}, {"grpc_status": 14},
        {"traceparent": PARENT}, {"sequence": 0}, {"sequence": 300}, {"partial": "lost"},
        {"traceparent": PARENT, "tracestate": "a=b"}, {"server_port": 8080},
    ]  # fmt: skip

    def template(event: Event) -> str:
        return "/t" if event.path.startswith("/v1") else ""

    maker, plain = records(template=template), records(Limits(attributes=95), template=template)
    seen = 0
    for event, exchange in product(changes, exchanges):
        made = REQUEST._replace(**event, exchange=EXCHANGE._replace(**exchange))
        (fast,), (slow,) = encoded([Request(made)], maker), encoded([Request(made)], plain)
        for span in (fast, slow):
            span.ClearField("span_id")
            if not exchange.get("traceparent"):
                span.ClearField("trace_id")
        assert fast == slow
        seen += 1
    assert seen == len(changes) * len(exchanges)


def test_kept_pieces_are_bounded() -> None:
    maker = records()
    for n in range(10_000):
        list(maker.spans([Request(REQUEST._replace(domain=f"h{n}", pid=n))]))
        assert len(maker._pieces) <= otlp_records._KEPT + 3
    assert len(maker._urls) <= otlp_records._KEPT


def test_limits_of_values_and_counts() -> None:
    short = one(REQUEST, limits=Limits(value_length=10))
    assert max(len(v) for v in attributes(short).values() if isinstance(v, str)) == 10
    few = one(REQUEST, limits=Limits(attributes=3))
    assert (len(few.attributes), few.dropped_attributes_count) == (3, len(one(REQUEST).attributes) - 3)
    (log,) = [
        log
        for payload in records(Limits(attributes=2)).logs([Note(EVENT)])
        for resource in ExportLogsServiceRequest.FromString(payload.message).resource_logs
        for scope in resource.scope_logs
        for log in scope.log_records
    ]
    assert len(log.attributes) == 2
    assert log.dropped_attributes_count > 10


def test_d19_payloads_stay_below_the_limit_and_lose_nothing() -> None:
    events = [REQUEST._replace(path="/" + "x" * random.Random(n).randrange(8000)) for n in range(3000)]
    payloads = list(records().spans(Request(event) for event in events))
    assert max(len(payload.message) for payload in payloads) < 4 << 20
    assert sum(payload.items for payload in payloads) == 3000
    assert len(payloads) > 20


def test_spans_are_grouped_by_workload() -> None:
    (payload,) = records().spans([Request(REQUEST), Request(REQUEST._replace(workload=SSHD)), Request(REQUEST)])
    message = ExportTraceServiceRequest.FromString(payload.message)
    found = {attributes(r.resource)["service.name"]: len(r.scope_spans[0].spans) for r in message.resource_spans}
    assert found == {"web-0": 2, "ssh.service": 1}
    for resource in message.resource_spans:
        assert resource.schema_url == resource.scope_spans[0].schema_url == c.SCHEMA_URL
        assert (resource.scope_spans[0].scope.name, resource.scope_spans[0].scope.version) == ("ebfw", "1.2.3")


# --- how connections came about ---------------------------------------------------------------------------------------


def told(*events: Event, mode: str = setup.NOTABLE, slow_ns: int = setup.SLOW) -> list[Setup]:
    setups = Setups(mode, slow_ns)
    return [found for event in events for found in setups.add(event)]


def test_d11_a_slow_connection_is_a_trace_of_its_own_with_its_steps() -> None:
    (found,) = told(FOUND, EVENT, HELLO, REQUEST, slow_ns=50_000_000)
    root, lookup, connect, tls = encoded([found])
    assert (root.name, root.kind, root.parent_span_id) == ("connection", 1, b"")
    assert [span.name for span in (lookup, connect, tls)] == [
        "DNS lookup example.com", "socket connect 192.0.2.1:443", "TLS client handshake example.com",
    ]  # fmt: skip
    assert {span.parent_span_id for span in (lookup, connect, tls)} == {root.span_id}
    assert len({span.trace_id for span in (root, lookup, connect, tls)}) == 1
    assert root.start_time_unix_nano == START - 5_000_000
    assert root.end_time_unix_nano == START + 50_000_000
    assert attributes(root)["ebfw.connection.id"] == "8000000000000001"
    shown = attributes(tls)
    assert (shown["tls.protocol.version"], shown["ebfw.tls.alpn.offered"]) == ("1.3", ("h2", "http/1.1"))
    assert shown["ebfw.tls.post_quantum"] is True
    assert attributes(lookup)["dns.answers"] == ("192.0.2.1", "192.0.2.2")


def test_d11_only_when_slow_failed_or_asked_for() -> None:
    assert told(FOUND, EVENT, HELLO) == []
    assert len(told(FOUND, EVENT, HELLO, mode=setup.ALL)) == 1
    assert told(EVENT._replace(status="refused"), mode=setup.NONE) == []
    (refused,) = told(FOUND, EVENT._replace(status="refused"))
    root, _, connect = encoded([refused])
    assert (root.status.code, connect.status.code) == (2, 2)
    assert attributes(root)["error.type"] == attributes(connect)["error.type"] == "connection_refused"
    assert told(EVENT._replace(status="cancelled")) == []
    (nameless,) = told(LOOKUP)
    assert [span.name for span in encoded([nameless])] == ["connection", "DNS lookup db.example.com"]
    assert told(LOOKUP._replace(search_expansion=True)) == []
    assert HELLO.tls is not None
    (alarm,) = told(EVENT, HELLO._replace(tls=HELLO.tls._replace(alert="handshake_failure")))
    assert attributes(encoded([alarm])[0])["error.type"] == "handshake_failure"


def test_d11_each_request_of_the_connection_has_a_link() -> None:
    setups = Setups(slow_ns=1)
    assert setups.add(EVENT) == []
    (found,) = setups.add(HELLO)
    found.kept = True
    assert setups.of(EVENT.cookie) is found
    assert setups.of(99) is None
    spans_ = encoded([Request(REQUEST, setups.of(EVENT.cookie)), Request(REQUEST, found)])
    for span in spans_:
        (link,) = span.links
        assert (link.trace_id, link.span_id) == (found.trace_id, found.span_id)
    found.kept = False  # the budget left it out: a link would lead nowhere
    assert not encoded([Request(REQUEST, found)])[0].links
    setups.add(EVENT._replace(kind="close"))
    assert setups.of(EVENT.cookie) is found  # the last request is told after the end
    setups.expire(EVENT.time + setup.WAIT_NS - 1)
    assert setups.of(EVENT.cookie) is found
    setups.expire(EVENT.time + setup.WAIT_NS)
    assert setups.of(EVENT.cookie) is None


def test_d11_a_plain_connection_is_complete_with_its_first_request() -> None:
    plain = outcome(scheme="http")._replace(kind="http")
    setups = Setups(mode=setup.ALL)
    assert setups.add(EVENT) == []
    (found,) = setups.add(plain)
    assert [event.kind for event in found.events] == ["connect"]
    assert setups.of(EVENT.cookie) is found


def test_a_lookup_long_ago_is_not_part_of_a_connection() -> None:
    (found,) = told(FOUND._replace(time=START - 30_000_000_000), EVENT, HELLO, mode=setup.ALL)
    assert [event.kind for event in found.events] == ["connect", "tls"]
    (found,) = told(FOUND._replace(workload=SSHD), EVENT, HELLO, mode=setup.ALL)
    assert [event.kind for event in found.events] == ["connect", "tls"]


def test_d7_no_child_starts_before_its_parent() -> None:
    """Whatever order the steps' times have: the wall clock may be set between two of them."""
    chance = random.Random(7)
    for _ in range(500):
        shift = [chance.randrange(-2_000_000_000, 2_000_000_000) for _ in range(3)]
        found = told(
            FOUND._replace(time=START + shift[0]), EVENT._replace(time=START + shift[1]),
            HELLO._replace(time=START + shift[2]), mode=setup.ALL,
        )  # fmt: skip
        for item in found:
            root, *children = encoded([item])
            assert children
            for child in children:
                assert child.start_time_unix_nano >= root.start_time_unix_nano - 1_000_000
                assert child.end_time_unix_nano <= root.end_time_unix_nano


def test_what_waits_is_bounded_and_expires() -> None:
    setups = Setups(slow_ns=1)
    for n in range(30_000):
        setups.add(FOUND._replace(answers=(f"192.0.{n >> 8}.{n & 255}",)))
        setups.add(EVENT._replace(cookie=n + 1, dst=f"192.0.{n >> 8}.{n & 255}"))
    assert len(setups) <= 4096 + 8192 + 8192
    ended = setups.expire(START + 60_000_000_000)
    assert len(ended) == 8192
    assert len(setups) <= 8192
    assert setups.expire(START + 120_000_000_000) == []


# --- the tables -------------------------------------------------------------------------------------------------------


def test_spans_have_the_attributes_that_the_table_says() -> None:
    """Both ways: nothing that is not in it, and nothing in it that never comes."""
    more: dict[str, Any] = {"method": "BREW", "proxy": "p:1", "headers": (("user-agent", "x"), ("a", "b"))}
    more |= (beside := {"group": "g", "redirected": True})
    plain = outcome(status=500, partial="lost")._replace(**more)
    call = outcome(status=200, partial="lost", grpc_status=12)._replace(**more, path="/a.B/C")
    maker = records(template=lambda event: "/t", allowed=frozenset(("a", "user-agent")))
    http, rpc = (set(attributes(span)) for span in encoded([Request(plain), Request(call)], maker))
    assert HELLO.tls is not None
    alarm = HELLO.tls._replace(alert="x", quic="1", resumed=False)
    (chain,) = told(
        *(one._replace(**beside) for one in (FOUND, EVENT, HELLO._replace(tls=alarm, proxy="p:1"))), mode=setup.ALL
    )
    root, _, _, tls = (set(attributes(span)) for span in encoded([chain]))
    (nameless,), (refused,) = told(LOOKUP._replace(**beside)), told(EVENT._replace(status="refused", **beside))
    lookup, connect = set(attributes(encoded([nameless])[1])), set(attributes(encoded([refused])[1]))
    found = [http, rpc, root, lookup | {c.DNS_ANSWERS, c.DNS_SEARCH_EXPANSION}, connect, tls]
    for span_type, got in zip(registry.SPANS, found, strict=True):
        named = {key if key in registry.BY_NAME else key[: key.rindex(".") + 1] for key in got}
        assert named == set(span_type.attributes), span_type.name


def test_every_attribute_that_a_span_or_record_has_is_declared() -> None:
    for kind in (*registry.SPANS, *registry.EVENTS):
        for name in kind.attributes:
            assert name in registry.BY_NAME, name


def test_requests_without_an_outcome_are_no_spans() -> None:
    assert spans.request(REQUEST._replace(exchange=None)) is None
    assert WEB.cgroup_id == REQUEST.workload.cgroup_id
