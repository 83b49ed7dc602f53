"""HTTP/2 over plain TCP: conversations of two `h2` endpoints, replayed over a real connection, told exactly.

The client's side is in the watched cgroup, the server's outside. Each says its next piece once it has got all that
the other said before. Real clients and servers: tests/pipeline/test_http2.py.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import random
import socket
import threading
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from exporter.events import CLOSE, HTTP
from lab.net import SERVERS4, SERVERS6, Namespace
from tests.conversation import TRACE, Conversation, Request

from .conftest import N, Watch, attach

pytestmark = pytest.mark.kernel


class Seen(NamedTuple):
    method: str
    path: str
    status: int
    error: str
    sent: int | None
    got: int | None
    grpc: int | None
    sequence: int
    partial: str


def expected(requests: list[Request]) -> list[Seen]:
    found = []
    for n, request in enumerate(requests, 1):
        grpc = dict(request.trailers).get("grpc-status")
        sizes = (sum(request.body), sum(request.answer))
        number = None if grpc is None else int(grpc)
        found.append(Seen(request.method, request.path, request.status, "", *sizes, number, n, ""))
    return found


def seen(events: list[Any]) -> list[Seen]:
    found = []
    for event in events:
        x = event.exchange
        assert (x.version, x.scheme) == ("2", "http")
        found.append(
            Seen(
                event.method,
                event.path,
                x.status,
                x.error,
                x.request_size,
                x.response_size,
                x.grpc_status,
                x.sequence,
                x.partial,
            )
        )
    return sorted(found, key=lambda one: one.sequence)


CLIENT = """
import base64, zlib
s = make(A["peer"])
# What is missing between two frames, or comes late, cannot be read: so windows that no queue on the way drops of, and
# one CPU for both ends, since a veth pair has a queue for each and packets of a sender that moves overtake each other.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.connect((A["peer"], A["port"]))
if A["first"]:
    s.recv(A["first"], socket.MSG_PEEK | socket.MSG_WAITALL)
for n, (mine, text) in enumerate(A["said"]):
    data = zlib.decompress(base64.b64decode(text))
    if n == A["pause_at"]:
        pause(half=True)
    if mine:
        cut = A["cut"] * (n > 0) or len(data)
        for at in range(0, len(data), cut):
            s.sendall(data[at : at + cut])
    else:
        exactly(s, len(data))
if A["reset"]:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
else:
    finish(s)
"""


@contextlib.contextmanager
def answering(netns: Namespace, address: str, said: list[tuple[bool, bytes]], first: bytes, cut: int) -> Iterator[int]:
    """The server's side, outside the cgroup; its port. `first`: what it says before it has heard anything."""
    with netns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    sock.bind((address, 0))
    sock.listen(10)
    sock.settimeout(60)

    def talk() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this thread: see CLIENT
        with contextlib.suppress(OSError):
            connection, _ = sock.accept()
            with connection:
                connection.settimeout(60)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(first)
                for mine, data in said:
                    if mine:
                        left = len(data)
                        while left and (got := connection.recv(min(left, 1 << 20))):
                            left -= len(got)
                    else:
                        for at in range(0, len(data), cut or len(data)):
                            connection.sendall(data[at : at + (cut or len(data))])
                while connection.recv(65536):
                    pass

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        sock.close()
        thread.join()


@pytest.fixture
def replay(lab, start, watch):
    """replay(said): over one connection; the events of its requests. `during` is called at the client's pause;
    `eager`: the server's first words come before the client's."""

    def go(
        said, address=SERVERS4[0], cut=0, cut_answers=0, pause_at=-1, during=None, eager=False, reset=False, watch=watch
    ) -> list[Any]:
        first = b""
        mine = theirs = list(said)
        if eager:
            at, then, *_ = [n for n, piece in enumerate(said) if not piece[0]]
            first = said[at][1]
            theirs = [*said[:at], *said[at + 1 :]]
            mine = [*said[:at], *said[at + 1 : then], (False, first + said[then][1]), *said[then + 1 :]]
        text = [(who, base64.b64encode(zlib.compress(data)).decode()) for who, data in mine]
        with answering(lab.world, address, theirs, first, cut_answers) as port:
            client = start(
                CLIENT, peer=address, port=port, said=text, cut=cut, pause_at=pause_at, reset=reset, first=len(first)
            )
            if pause_at >= 0:
                client.wait_for("half")
                during()
                client.go()
            client.finish()
        return watch.until(lambda w: w.of(CLOSE)).of(HTTP)

    return go


def talk(requests: list[Request], together: int = 1) -> Conversation:
    """So many requests open at a time, answered in reverse."""
    made = Conversation()
    for at in range(0, len(requests), together):
        streams = [(made.ask(request), request) for request in requests[at : at + together]]
        for stream, request in reversed(streams):
            made.answer(stream, request)
    return made


def some(count: int = N) -> list[Request]:
    return [
        Request(
            "POST" if n % 2 else "GET",
            f"/shop.Orders/{n}",
            (("traceparent", TRACE),) if n % 3 else (),
            (n, 5) if n % 2 else (),
            padding=7 * (n % 4 == 1),
            interim=n % 5 == 0,
            status=200 if n % 7 else 503,
            answer=(n,) * (n % 3),
            trailers=(("grpc-status", str(n % 17)),) if n % 2 else (),
        )
        for n in range(count)
    ]


@pytest.mark.core
@pytest.mark.parametrize("address", [SERVERS4[0], SERVERS6[0]], ids=["v4", "v6"])
def test_requests(replay, watch, address):
    """23 on one connection, one after the other: method, authority, path, status, gRPC status, sizes, trace."""
    requests = some()
    events = replay(talk(requests).said, address)
    assert seen(events) == expected(requests)
    for event, request in zip(events, requests, strict=True):
        assert (event.domain, event.name_source) == ("shop.example", "host")
        assert event.exchange.traceparent == dict(request.headers).get("traceparent", "")
        assert 0 < event.exchange.first_byte <= event.duration
    (closed,) = watch.of(CLOSE)
    assert {event.cookie for event in events} == {closed.cookie}
    assert {event.pid for event in events} == {closed.pid} != {0}


@pytest.mark.core
def test_ten_at_a_time(replay):
    requests = some(60)
    assert seen(replay(talk(requests, 10).said)) == expected(requests)


@pytest.mark.core
@pytest.mark.parametrize(("cut", "cut_answers"), [(1, 0), (0, 1), (13, 11)])
def test_in_small_segments(replay, cut, cut_answers):
    """But for the client's first: its preface must come in one piece."""
    requests = some(8)
    assert seen(replay(talk(requests, 4).said, cut=cut, cut_answers=cut_answers)) == expected(requests)


@pytest.mark.core
def test_large_bodies(replay):
    """5 MB each way, each in frames of 16 KiB, and another request between."""
    body = (16384,) * 305
    requests = [
        Request("POST", "/up", body=body),
        Request("GET", "/small", answer=(3,)),
        Request("GET", "/down", answer=body, trailers=(("grpc-status", "0"),)),
        Request("POST", "/both", body=body, answer=body),
    ]
    assert seen(replay(talk(requests).said)) == expected(requests)


@pytest.mark.core
def test_many_frames_in_a_write(replay):
    """A thousand requests and a thousand answers, each side's in one go."""
    requests = [Request("GET", f"/{n % 10}", answer=(1,)) for n in range(900)]
    made = Conversation()
    before = len(made.said)
    streams = [made.ask(request) for request in requests]
    for stream, request in zip(streams, requests, strict=True):
        made.answer(stream, request)
    said = made.said[:before]
    for side, part in itertools.groupby(made.said[before:], key=lambda piece: piece[0]):
        said.append((side, b"".join(data for _, data in part)))
    assert seen(replay(said)) == expected(requests)


@pytest.mark.core
def test_a_server_that_speaks_first(replay):
    """Its SETTINGS come before the client has shown that this is HTTP/2."""
    requests = some(3)
    assert seen(replay(talk(requests).said, eager=True)) == expected(requests)


@pytest.mark.core
def test_the_connection_ends_before_the_answer(replay):
    made = Conversation()
    made.ask(Request(path="/never"))
    made.ask(Request("POST", "/neither", body=(4,)))
    for reset, error in ((False, "connection_closed"), (True, "connection_reset")):
        found = seen(replay(made.said, reset=reset)[-2:])
        assert [one.error for one in found] == [error, error]
        assert [(one.path, one.status, one.sent, one.got) for one in found] == [
            ("/never", 0, 0, None),
            ("/neither", 0, 4, None),
        ]


def partly(made: Conversation, requests: list[Request]) -> int:
    """How many pieces have been said when half of the requests are answered."""
    for request in requests[: len(requests) // 2]:
        made.answer(made.ask(request), request)
    return len(made.said)


@pytest.mark.core
def test_the_agent_starts_midway(replay, cgroup, tmp_path, programs):
    """What follows is told, marked; what would need the table of before is empty; nothing is wrong."""
    requests = some(20)
    made = Conversation()
    half = partly(made, requests)
    for request in requests[10:]:
        made.answer(made.ask(request), request)
    late: list[Watch] = []
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            tap = stack.enter_context(attach(cgroup.path, tmp_path / "late"))
            late.append(Watch(tap, {cgroup.id}))

        replay(made.said, pause_at=half, during=begin)
        # a socket older than the agent has no record of its end
        found = seen(late[0].until(lambda w: len(w.of(HTTP)) >= 10).of(HTTP))
    assert len(found) == 10
    assert {one.partial for one in found} == {"midway"}
    assert {one.sequence for one in found} == {0}
    for one, request in zip(found, requests[10:], strict=True):
        assert one.method == request.method
        assert one.status in ((200,) if request.status == 200 else (request.status, 0))  # 200 needs no table
        assert one.path in (request.path, "")
        assert one.grpc in (expected([request])[0].grpc, None)
        assert one.sent == sum(request.body)
        assert one.got in (sum(request.answer), None)
    assert found[-1].path == requests[-1].path


@pytest.mark.core
def test_records_that_found_no_room(replay, cgroup, tmp_path, programs):
    """A ring that holds some twenty records, not read while 100 requests pass: what is told of them is true; what comes
    after is marked."""
    requests = [Request("POST", f"/{n}", body=(n,), answer=(n,)) for n in range(106)]
    made = Conversation()
    for request in requests[:100]:
        made.answer(made.ask(request), request)
    full = len(made.said)
    for request in requests[100:]:
        made.answer(made.ask(request), request)
    with attach(cgroup.path, tmp_path / "small", ring_bytes=1 << 12) as tap:
        watch = Watch(tap, {cgroup.id})
        replay(made.said, pause_at=full, during=lambda: watch.settle())
        found = seen(watch.until(lambda w: w.of(CLOSE)).of(HTTP))
        assert watch.tallies()["ring/full"] > 0
    by_path = {request.path: request for request in requests}
    marked = [one for one in found if one.partial]
    assert marked
    assert {one.partial for one in marked} == {"lost"}
    for one in found:
        assert one.method in ("POST", "")
        if one.path:
            request = by_path[one.path]
            assert one.sent in (sum(request.body), None)
            assert one.got in (sum(request.answer), None)


def test_what_only_looks_like_http2(replay, watch):
    """Noise behind a preface, and binary protocols: no request, and the connection is left alone."""
    rng = random.Random(5)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for said in (
        [(True, preface + rng.randbytes(300)), (False, b"x" * 50)],
        [(True, preface + preface), (False, b"x" * 50)],
        [(True, b"\0\0\1\1\5" + rng.randbytes(300)), (False, b"x" * 50)],
        [(True, preface), (False, b"HTTP/1.1 400 Bad Request\r\n\r\n")],
    ):
        assert replay(said) == []
    watch.losses_expected = True
