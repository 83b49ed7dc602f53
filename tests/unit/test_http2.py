"""http2: conversations of two `h2` endpoints in memory, digested by bpf/lib/frames.h, told exactly; with holes, never
wrongly; hostile input, never an exception."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from exporter.health import losses
from exporter.http2 import CLOSED, CONNECTIONS, GOAWAY, LOST, MIDWAY, STREAM_SECONDS, STREAMS, Finished, Http2
from tests.conversation import TRACE, Conversation, Request
from tests.unit.host_frames import FIRST, START, Told, Walk
from tests.unit.host_frames import MIDWAY as FROM_MIDWAY

FEW = settings(
    max_examples=60,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ME = 7  # the connection


Piece = tuple[bool, Told, int]  # by the client?, the record, time


def digested(walk: Walk, said: list[tuple[bool, bytes]], rng: random.Random | None, state: int = FIRST) -> list[Piece]:
    """The records of both directions, in the order of the conversation, each thing said cut at random places."""
    pieces: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    times: dict[bool, list[int]] = {True: [], False: []}
    streams = {side: b"".join(data for who, data in said if who == side) for side in (True, False)}
    at = {True: 0, False: 0}
    for time, (who, data) in enumerate(said, 1):
        edges = {0, len(data)}
        if rng is not None:
            edges |= {rng.randrange(len(data) + 1) for _ in range(rng.randrange(6))}
        for a, b in itertools.pairwise(sorted(edges)):
            pieces[who].append((at[who] + a, b - a))
            times[who].append(time * 1000)
        at[who] += len(data)
    found: list[Piece] = []
    for who in (True, False):
        first = state if who or state != FIRST else START
        records = walk(streams[who], pieces[who], first, rng is not None and rng.random() < 0.5)
        found += [(who, record, times[who][record.piece]) for record in records]
    return sorted(found, key=lambda piece: piece[2])


def fed(http2: Http2[str], pieces: Iterable[Piece], connection: int = ME) -> list[Finished[str]]:
    out = []
    for sent, told, time in pieces:
        out += http2.add(connection, sent, told.told, told.left, told.broken, told.data, time, f"at {time}")
    return out


def check(finished: Finished[str], request: Request, sequence: int) -> None:
    assert finished.context == f"at {finished.began}"
    assert (finished.method, finished.scheme, finished.authority, finished.path) == (
        request.method,
        "http",
        "shop.example:8080",
        request.path,
    )
    assert finished.headers == request.headers
    assert finished.traceparent == dict(request.headers).get("traceparent", "")
    assert finished.status == request.status
    assert finished.first_byte is not None
    assert finished.began <= finished.first_byte <= finished.ended
    assert finished.sequence == sequence
    assert finished.partial == ""
    grpc = dict(request.trailers).get("grpc-status")
    if request.reset:
        assert finished.error == "cancel"
        assert (finished.request_size, finished.response_size) == (sum(request.body), None)
        assert finished.grpc_status is None
    else:
        assert finished.error == ""
        assert (finished.request_size, finished.response_size) == (sum(request.body), sum(request.answer))
        assert finished.grpc_status == (int(grpc) if grpc is not None else None)


SIZES = st.lists(st.sampled_from([0, 1, 5, 300, 9000]), max_size=3).map(tuple)
HEADERS = st.lists(
    st.sampled_from(
        [
            ("x-a", "1"),
            ("x-b", "2"),
            ("traceparent", TRACE),
            ("cookie", "c" * 9000),
            ("big", "b" * 17000),
            ("te", "trailers"),
        ]
    ),
    max_size=3,
    unique_by=lambda field: field[0],
).map(tuple)
REQUESTS = st.builds(
    Request,
    st.sampled_from(["GET", "POST"]),
    st.sampled_from(["/", "/a?b=c", "/shop.Orders/Get"]) | st.integers(0, 99).map(lambda n: f"/n/{n}"),
    HEADERS,
    SIZES,
    st.sampled_from([0, 0, 1, 40]),
    st.booleans(),
    st.sampled_from([200, 204, 404, 503]),
    SIZES,
    st.sampled_from([(), (), (("grpc-status", "0"),), (("grpc-status", "14"), ("grpc-message", "down"))]),
    st.sampled_from(["", "", "", "client", "server"]),
    st.booleans(),
)


def talk(requests: list[Request], rng: random.Random, table: int = 4096) -> tuple[Conversation, dict[int, int]]:
    """All requests, some at once, answered in any order. Which stream each was."""
    talk = Conversation(table)
    open_: list[tuple[int, Request]] = []
    streams = {}
    for n, request in enumerate(requests):
        stream = talk.ask(request)
        streams[n] = stream
        open_.append((stream, request))
        while open_ and rng.random() < 0.6:
            talk.answer(*open_.pop(rng.randrange(len(open_))))
    while open_:
        talk.answer(*open_.pop(rng.randrange(len(open_))))
    return talk, streams


@FEW
@given(
    requests=st.lists(REQUESTS, max_size=12),
    rng=st.randoms(use_true_random=False),
    table=st.sampled_from([4096, 0, 100, 16384]),
)
def test_a_conversation(walk: Walk, requests: list[Request], rng: random.Random, table: int) -> None:
    made, streams = talk(requests, rng, table)
    http2: Http2[str] = Http2()
    found = fed(http2, digested(walk, made.said, rng))
    assert not http2.closed(ME, 10**9)
    assert sorted(one.sequence for one in found) == list(range(1, len(requests) + 1))
    for one in found:
        check(one, requests[one.sequence - 1], one.sequence)
    assert sorted(streams.values()) == [2 * n + 1 for n in range(len(requests))]


@FEW
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    rng=st.randoms(use_true_random=False),
    gone=st.sets(st.integers(0, 60), min_size=1, max_size=6),
)
def test_with_records_lost_nothing_is_wrong(
    walk: Walk, requests: list[Request], rng: random.Random, gone: set[int]
) -> None:
    """Records that found no room in the ring: what is told is true or empty, and marked."""
    made, _ = talk(requests, rng)
    pieces = digested(walk, made.said, rng)
    left = [piece for n, piece in enumerate(pieces) if n not in gone]
    http2: Http2[str] = Http2()
    found = fed(http2, left) + http2.closed(ME, 10**9)
    assert len(found) <= len(requests)
    paths = {request.path for request in requests} | {""}
    fields = {field for request in requests for field in request.headers}
    sizes = {sum(request.body) for request in requests} | {None}
    answers = {sum(request.answer) for request in requests} | {None}
    first = next((n for n, piece in enumerate(pieces) if n in gone), None)
    for one in found:
        assert one.method in ("GET", "POST", "")
        assert one.scheme in ("http", "")
        assert one.authority in ("shop.example:8080", "")
        assert one.path in paths
        assert set(one.headers) <= fields
        assert one.request_size in sizes
        assert one.response_size in answers
        assert one.grpc_status in (None, 0, 14)
        if first is not None and one.ended > pieces[first][2] and any(p[2] > pieces[first][2] for p in left):
            last = [p for p in left if p[2] <= one.ended]
            if one.partial == "":
                # nothing after the hole has come yet in the direction that has it
                assert not any(p[0] == pieces[first][0] and p[1].told > pieces[first][1].told for p in last[:-1])


def test_the_agent_starts_midway(walk: Walk) -> None:
    """Half of the conversation was not seen: what follows is marked; a name from the table of before is not told."""
    requests = [Request("POST", f"/{n % 3}", (("x-a", "1"),), (10,), answer=(20,)) for n in range(10)]
    made = Conversation()
    for request in requests[:5]:
        made.answer(made.ask(request), request)
    before = len(made.said)
    for request in requests[5:]:
        made.answer(made.ask(request), request)
    new = Request("POST", "/new", body=(1, 2), answer=(3,), trailers=(("grpc-status", "5"),))
    made.answer(made.ask(new), new)
    made.answer(made.ask(new), new)
    http2: Http2[str] = Http2()
    found = fed(http2, digested(walk, made.said[before:], None, FROM_MIDWAY))
    assert len(found) == 7
    assert {one.partial for one in found} == {MIDWAY}
    assert {one.sequence for one in found} == {0}
    assert [one.path for one in found] == ["", "", "", "", "", "/new", "/new"]
    assert [one.method for one in found] == ["POST"] * 7  # of the static table
    assert {one.authority for one in found} == {""}
    assert [one.status for one in found] == [200] * 7
    assert [(one.request_size, one.response_size) for one in found] == [
        (10, None),  # the other direction was met after this request: some of its response may be from before
        *[(10, 20)] * 4,
        *[(3, 3)] * 2,
    ]
    assert [one.grpc_status for one in found[-2:]] == [5, 5]


def test_a_lost_request_is_not_told_and_the_next_is_marked(walk: Walk) -> None:
    requests = [Request(path=f"/{n}") for n in range(3)]
    made = Conversation()
    for request in requests:
        made.answer(made.ask(request), request)
    pieces = digested(walk, made.said, None)
    asked = [n for n, piece in enumerate(pieces) if piece[0]]
    http2: Http2[str] = Http2()
    found = fed(http2, [piece for n, piece in enumerate(pieces) if n != asked[1]])
    assert [(one.path, one.status, one.partial, one.sequence) for one in found] == [
        ("/0", 200, "", 1),
        ("/2", 200, LOST, 0),
    ]


def test_the_end_of_the_connection(walk: Walk) -> None:
    made = Conversation()
    first, second = Request(path="/first"), Request("POST", "/second", body=(5,), answer=(1,))
    made.ask(first)
    stream = made.ask(second)
    made.server.send_headers(stream, [(":status", "200")])
    made.flush()
    http2: Http2[str] = Http2()
    pieces = digested(walk, made.said, None)
    assert fed(http2, pieces) == []
    found = http2.closed(ME, 99_000)
    assert [(one.path, one.status, one.error, one.ended) for one in found] == [
        ("/first", 0, CLOSED, 99_000),
        ("/second", 200, CLOSED, 99_000),
    ]
    assert [(one.request_size, one.response_size) for one in found] == [(0, None), (5, None)]
    assert [one.first_byte for one in found] == [None, pieces[-1][2]]
    assert http2.closed(ME, 99_000) == []


def test_goaway_ends_what_the_server_will_not_do(walk: Walk) -> None:
    made = Conversation()
    one, two = Request(path="/one"), Request(path="/two")
    first, _ = made.ask(one), made.ask(two)
    goaway = struct.pack("!IBBI", 8, 7, 0, 0)[1:] + struct.pack("!II", first, 0)
    made.said.append((False, goaway))
    http2: Http2[str] = Http2()
    found = fed(http2, digested(walk, made.said, None))
    assert [(done.path, done.error, done.status) for done in found] == [("/two", GOAWAY, 0)]
    assert [done.path for done in http2.closed(ME, 1)] == ["/one"]


def test_a_response_before_the_request_is_over(walk: Walk) -> None:
    """The server answers at once and then resets: the response counts."""
    made = Conversation()
    stream = made.client.get_next_available_stream_id()
    head = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/early")]
    made.client.send_headers(stream, head)
    made.flush()
    made.server.send_headers(stream, [(":status", "413")], end_stream=True)
    made.flush()
    told = len(made.said)
    made.server.reset_stream(stream, 0)
    made.flush()
    http2: Http2[str] = Http2()
    (found,) = fed(http2, digested(walk, made.said, None))
    assert (found.status, found.error, found.request_size, found.response_size) == (413, "", None, 0)
    assert found.ended == told * 1000


def headers_only(count: int, first: int = 1) -> bytes:
    block = b"\x82\x86\x84\x41\x01a"
    return b"".join(struct.pack("!IBBI", len(block), 1, 5, first + 2 * n)[1:] + block for n in range(count))


def test_bounds() -> None:
    http2: Http2[str] = Http2()
    before = losses.snapshot()

    def lost(cause: str) -> int:
        return losses.snapshot().get(("join", cause), 0) - before.get(("join", cause), 0)

    told = 0
    for n in range(STREAMS + 10):
        data = headers_only(1, 1 + 2 * n)
        http2.add(ME, True, told, 0, False, data, n, "")
        told += len(data)
    assert lost("h2_streams_full") == 10
    for n in range(CONNECTIONS + 10):
        http2.add(1000 + n, True, 0, 0, False, headers_only(1), 5000 + n, "")
    assert len(http2) == CONNECTIONS
    assert lost("h2_connections_full") == 11
    now = (STREAM_SECONDS + 100) * 10**9
    assert [one.error for one in http2.expire(now)] == ["timeout"] * CONNECTIONS
    assert not list(http2.expire(now * 2))


def test_a_header_block_without_an_end() -> None:
    """CONTINUATION for ever: given up, and the connection marked."""
    http2: Http2[str] = Http2()
    told = 0
    frame = struct.pack("!IBBI", 700, 1, 0, 1)[1:] + bytes(700)
    for n in range(1000):
        assert http2.add(ME, True, told, 0, False, frame, n, "") == []
        told += len(frame)
        frame = struct.pack("!IBBI", 700, 9, 0, 1)[1:] + bytes(700)
    assert http2.add(ME, True, told, 0, False, headers_only(1, 3), 1, "") == []
    told += len(headers_only(1))
    answer = struct.pack("!IBBI", 1, 1, 5, 3)[1:] + b"\x88"
    (found,) = http2.add(ME, False, 0, 0, False, answer, 2, "")
    assert (found.method, found.status, found.partial) == ("GET", 200, LOST)


def test_a_frame_larger_than_any_block() -> None:
    http2: Http2[str] = Http2()
    told = 0
    frame = struct.pack("!IBBI", 1 << 20, 1, 4, 1)[1:]
    http2.add(ME, True, 0, 0, False, frame + bytes(700), 1, "")
    told += 709
    left = (1 << 20) - 700
    while left:
        take = min(left, 768)
        http2.add(ME, True, told, left, False, bytes(take), 1, "")
        told, left = told + take, left - take
    http2.add(ME, True, told, 0, False, headers_only(1, 3), 1, "")
    (found,) = http2.closed(ME, 9)
    assert (found.method, found.partial) == ("GET", LOST)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 40) | st.none(),
            st.integers(0, 40) | st.integers(0, 2**32 - 1),
            st.booleans(),
            st.binary(max_size=120) | st.integers(1, 3).map(lambda n: headers_only(n)),
        ),
        max_size=20,
    )
)
def test_anything(pieces: list[tuple[bool, int | None, int, bool, bytes]]) -> None:
    http2: Http2[str] = Http2()
    told = {True: 0, False: 0}
    for sent, place, left, broken, data in pieces:
        at = told[sent] if place is None else place
        http2.add(ME, sent, at, left, broken, data, 1, "")
        told[sent] = at + len(data)
    http2.closed(ME, 2)


@FEW
@given(requests=st.lists(REQUESTS, max_size=6), rng=st.randoms(use_true_random=False), flips=st.integers(1, 20))
def test_a_conversation_with_bytes_changed(walk: Walk, requests: list[Request], rng: random.Random, flips: int) -> None:
    made, _ = talk(requests, rng)
    said: list[tuple[bool, bytes]] = []
    for who, data in made.said:
        changed = bytearray(data)
        for _ in range(flips):
            if rng.random() < 0.2:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        said.append((who, bytes(changed)))
    http2: Http2[str] = Http2()
    fed(http2, digested(walk, said, rng))
    http2.closed(ME, 1)


@pytest.mark.parametrize("call", [lambda h: h.closed(1, 1), lambda h: list(h.expire(10**12))])
def test_nothing(call: Callable[[Any], list[Any]]) -> None:
    assert call(Http2()) == []
