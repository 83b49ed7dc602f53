"""Requests without an answer, as the gauge of active requests has them: from HTTP/1 and from streams of HTTP/2."""

from __future__ import annotations

import struct

from exporter import decode
from exporter.decode import Sighting
from exporter.emit import semconv as c
from exporter.events import Workload
from exporter.http2 import STREAM_SECONDS
from exporter.join import Join
from tests.unit.test_metrics import make, read

HEAD = b"GET /a HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
WORKLOADS = {n: Workload(n, f"/{n}", "unit", f"{n}.service", unit=f"{n}.service") for n in range(3)}
KEYS = ("service.name", "http.request.method", "url.scheme", "server.address", "server.port")


def sighting(cookie: int, cgroup: int, payload: bytes = HEAD, role: str = "client", port: int = 80) -> Sighting:
    return Sighting(
        decode.HEAD, 1_000, cgroup, cookie, 0, 42, "curl", "tcp", role, "internet", "192.0.2.9", 40000, "192.0.2.1",
        port, "", decode.HEAD_END, 0, 0, 0, 0, 0, 0, 1, payload,
    )  # fmt: skip


def frames(cookie: int, *frames: bytes, out: bool = True, told: int = 0) -> Sighting:
    kind = decode.FRAMES_OUT if out else decode.FRAMES_IN
    found = sighting(cookie, 1, b"".join(frames), port=8080)
    return found._replace(kind=kind, flags=0, offset=told, sequence=0)


def headers(stream: int, block: bytes, flags: int = 5) -> bytes:
    """A HEADERS frame that ends its headers and, as it stands, its stream."""
    return struct.pack(">I", len(block))[1:] + bytes((1, flags)) + struct.pack(">I", stream) + block


# RFC 7541: :method GET, :scheme http, :path /, :authority grpc.example.com:9090 literal; then :status 200
REQUEST = b"\x82\x86\x84\x01\x15grpc.example.com:9090"
RESPONSE = b"\x88"


def joined() -> Join:
    return Join(
        WORKLOADS.__getitem__,
        lambda identity: "",
        lambda who, peer, now: "",
        lambda who, name, answers, now: None,
        lambda name: False,
        lambda monotonic: monotonic,
        lambda cookie: None,
    )


def active(join: Join) -> dict[tuple[object, ...], float]:
    metrics, _ = make()
    metrics.active_requests(join.open_requests())
    return read(metrics, c.HTTP_ACTIVE, *KEYS)


def test_open_requests_are_counted_by_workload_method_scheme_and_server() -> None:
    join = joined()
    for cookie in range(23):
        assert join.add(sighting(cookie + 1, cookie % 2)) is None
    join.add(sighting(100, 2, b"POST" + HEAD[3:]))
    join.add(sighting(101, 2, role="server"))
    join.add(sighting(102, 2, b"GET / HTTP/1.0\r\n\r\n"))
    join.add(sighting(103, 2, b"GET http://far.example:8000/ HTTP/1.1\r\nHost: x\r\n\r\n", port=3128))
    assert len(list(join.open_requests())) == 5
    assert active(join) == {
        ("0.service", "GET", "http", "api.example.com", 80): 12,
        ("1.service", "GET", "http", "api.example.com", 80): 11,
        ("2.service", "POST", "http", "api.example.com", 80): 1,
        ("2.service", "GET", "http", "192.0.2.1", 80): 1,
        ("2.service", "GET", "http", "far.example", 8000): 1,
    }
    list(join.expire(10**15))
    assert active(join) == {}


def test_open_streams_count_until_they_end() -> None:
    join = joined()
    sent = [headers(2 * n + 1, REQUEST) for n in range(23)]
    join.add(frames(7, *sent))
    key = ("1.service", "GET", "http", "grpc.example.com", 8080)
    assert active(join) == {key: 23}
    assert active(join) == {key: 23}  # to be asked takes nothing away
    answers = [headers(2 * n + 1, RESPONSE) for n in range(11)]
    join.add(frames(7, *answers, out=False))
    assert active(join) == {key: 12}
    assert len(list(join.expire(2_000))) == 11
    list(join.expire((STREAM_SECONDS + 60) * 10**9))
    assert active(join) == {}


def test_streams_inside_tls_have_the_port_of_their_authority() -> None:
    join = joined()
    join.add(frames(1 << 63, headers(1, REQUEST))._replace(port=0, peer=""))
    assert active(join) == {("1.service", "GET", "https", "grpc.example.com", 9090): 1}


def test_requests_of_a_connection_that_closed_are_over() -> None:
    join = joined()
    for cookie in range(23):
        join.add(sighting(cookie + 1, 1))
        join.add(frames(cookie + 101, headers(1, REQUEST)))
    for cookie in (*range(1, 24), *range(101, 124)):
        join.add(sighting(cookie, 1, b"")._replace(kind=decode.CLOSED))
    assert active(join) == {}
