"""DNS pairing without a kernel: streams cut, reordered and lost; search lists told apart from failures (D3).

Excluded: what the kernel ships (tests/kernel/test_lookups.py), reading a message (test_dns.py).
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exporter import decode, lookups
from exporter.emit.console import JsonFormat, TextFormat
from exporter.emit.logs import Notable
from exporter.emit.spans import step
from exporter.events import Event, Workload
from exporter.health import losses
from exporter.kernel import wire
from exporter.lookups import Lookups
from lab import dns

SECOND = 1_000_000_000
MS = 1_000_000
WHO = Workload(7, "/a.service", "unit", "a.service")


def answer_to(query: bytes, *addresses: str, rcode: int = 0) -> bytes:
    records = b"".join(
        b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + bytes(map(int, address.split("."))) for address in addresses
    )
    return query[:2] + struct.pack("!HHHHH", 0x8180 | rcode, 1, len(addresses), 0, 0) + query[12:] + records


def record(
    kind: int, when: int, payload: bytes, *, tcp: bool = False, offset: int = 0, flags: int = 0, pid: int = 42,
    cookie: int = 5, cgroup: int = 7,
) -> Any:  # fmt: skip
    made = wire.Record(
        time_ns=when, cgroup=cgroup, cookie=cookie, pid=pid, peer_port=53, kind=kind, transport=6 if tcp else 17,
        role=1, flags=flags, length=len(payload), offset=offset & 0xFFFFFFFF,
    )  # fmt: skip
    return decode.decode(bytes(made) + payload)


class World:
    def __init__(self) -> None:
        self.learned: list[tuple[str, tuple[tuple[str, int], ...]]] = []
        self.lookups = Lookups(
            lambda cgroup: WHO._replace(cgroup_id=cgroup),
            lambda who, name, addresses, now: self.learned.append((name, addresses)),
            lambda name: False,
            lambda monotonic: monotonic,
        )
        self.events: list[Event] = []
        self.id = 0

    def ask(self, name: str, when: int, rcode: int = 0, took: int = 5 * MS, kind: str = "A", **more: Any) -> None:
        """A question over UDP and its answer."""
        self.id += 1
        query = dns.query(name, kind, id=self.id)
        self.lookups.query(record(wire.RECORD_DNS_QUERY, when, query, **more))
        addresses = () if rcode else ("192.0.2.1",)
        event = self.lookups.answer(
            record(wire.RECORD_DNS_ANSWER, when + took, answer_to(query, *addresses, rcode=rcode), **more)
        )
        if event is not None:
            self.events.append(event)

    def pieces(self, kind: int, parts: list[tuple[int, bytes]], when: int = 0, **more: Any) -> None:
        """(sequence number, bytes), in the order in which the kernel saw them."""
        for n, (sequence, data) in enumerate(parts):
            piece = record(kind, when + n, data, tcp=True, offset=sequence, **more)
            if kind == wire.RECORD_DNS_QUERY:
                self.lookups.query_piece(piece)
            else:
                event = self.lookups.answer_piece(piece)
                if event is not None:
                    self.events.append(event)

    def expire(self, now: int) -> list[Event]:
        found = list(self.lookups.expire(now))
        self.events += found
        return found

    @property
    def told(self) -> list[tuple[str, str, bool]]:
        return [(event.domain, event.status, event.search_expansion) for event in self.events]


@pytest.fixture
def world() -> World:
    return World()


# --- search lists ---------------------------------------------------------------------------------------------

ENDINGS = ("shop.svc.cluster.local", "svc.cluster.local", "cluster.local")


def search(world: World, name: str, endings: tuple[str, ...], *, last: int, when: int = SECOND, **more: Any) -> None:
    """What a resolver asks one after the other; all but the last do not exist."""
    for ending in endings:
        world.ask(f"{name}.{ending}", when, rcode=3, **more)
        when += 6 * MS
    world.ask(name, when, rcode=last, **more)


def test_d3_endings_of_a_name_that_exists_are_no_failures(world: World) -> None:
    search(world, "api.example.com", ENDINGS, last=0)
    assert world.told == [("api.example.com", "NOERROR", False)]
    world.expire(2 * SECOND)
    assert sorted(world.told[1:]) == sorted((f"api.example.com.{e}", "NXDOMAIN", True) for e in ENDINGS)
    assert world.expire(9 * SECOND) == []
    assert len(world.lookups) == 0


def test_d3_a_name_found_by_its_ending(world: World) -> None:
    for n, ending in enumerate(ENDINGS[:2]):
        world.ask(f"web.{ending}", SECOND + 6 * n * MS, rcode=3)
    world.ask("web.cluster.local", SECOND + 12 * MS)
    world.expire(SECOND + 20 * MS)
    assert sorted(world.told) == [
        ("web.cluster.local", "NOERROR", False),
        ("web.shop.svc.cluster.local", "NXDOMAIN", True),
        ("web.svc.cluster.local", "NXDOMAIN", True),
    ]


def test_d3_endings_that_have_nothing_in_common_are_known_once_seen(world: World) -> None:
    search(world, "db.example.com", ("lab.test", "corp.invalid"), last=0)
    world.ask("web.lab.test", 3 * SECOND, rcode=3)
    world.ask("web.corp.invalid", 3 * SECOND + 6 * MS)
    world.expire(9 * SECOND)
    assert ("web.lab.test", "NXDOMAIN", True) in world.told


def test_d3_a_name_that_does_not_exist_at_all_is_one_failure(world: World) -> None:
    search(world, "nobody.example.com", ENDINGS, last=3)
    assert world.told == []
    assert world.expire(SECOND + 500 * MS) == []
    world.expire(3 * SECOND)
    assert [told for told in world.told if not told[2]] == [("nobody.example.com", "NXDOMAIN", False)]
    assert len(world.told) == 4


@pytest.mark.parametrize(
    ("first", "second", "more", "apart"),
    [
        ("www.google.com", "www.example.com", {}, 6 * MS),  # two names that begin alike
        ("a.example.com", "b.example.com", {}, 6 * MS),
        ("web.svc.cluster.local", "web.cluster.local", {}, 500 * MS),  # not one after the other
        ("api.example.com.local", "api.example.com", {"pid": 43}, 6 * MS),
        ("api.example.com.local", "api.example.com", {"cgroup": 8}, 6 * MS),
        ("api.example.com.local", "api.example.com", {"kind": "AAAA"}, 6 * MS),
        ("api.example.com.local", "api.example.com", {}, 1500 * MS),
        ("xapi.example.com", "api.example.com", {}, 6 * MS),
    ],
)
def test_d3_what_is_a_failure_stays_one(
    world: World, first: str, second: str, more: dict[str, Any], apart: int
) -> None:
    world.ask(first, SECOND, rcode=3)
    if apart > SECOND:
        world.expire(SECOND + apart)
    world.ask(second, SECOND + apart, **more)
    world.expire(9 * SECOND)
    assert (first, "NXDOMAIN", False) in world.told
    assert len(world.told) == 2


def test_d3_a_parallel_question_for_the_other_type_is_a_search_of_its_own(world: World) -> None:
    for kind in ("A", "AAAA"):
        search(world, "api.example.com", ENDINGS, last=0, kind=kind)
    world.expire(9 * SECOND)
    assert sum(event.search_expansion for event in world.events) == 6
    assert len(world.events) == 8


def test_d3_other_failures_are_told_at_once(world: World) -> None:
    world.ask("a.example", SECOND, rcode=2)
    world.ask("b.example", SECOND, rcode=5)
    assert [status for _, status, _ in world.told] == ["SERVFAIL", "REFUSED"]


def test_d3_what_is_held_comes_at_the_end_too(world: World) -> None:
    world.ask("a.example", SECOND, rcode=3)
    assert [event.domain for event in world.lookups.close()] == ["a.example"]
    assert len(world.lookups) == 0


def test_d3_what_is_held_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "HELD", 10)
    for n in range(100):
        world.ask(f"h{n}.example", SECOND + n, rcode=3)
    assert len(world.lookups) <= 10
    world.expire(9 * SECOND)
    assert len(world.told) == 100
    assert world.lookups._searches == {}


# --- streams --------------------------------------------------------------------------------------------------


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack("!H", len(message)) + message for message in messages)


def conversation(count: int) -> tuple[bytes, bytes, list[str]]:
    """Questions and answers as two streams, and the names."""
    names = [f"h{n}.example.com" for n in range(count)]
    queries = [dns.query(name, "A", id=n) for n, name in enumerate(names)]
    return framed(*queries), framed(*(answer_to(query, f"192.0.2.{n}") for n, query in enumerate(queries))), names


def cut(data: bytes, sizes: list[int], start: int) -> list[tuple[int, bytes]]:
    """Segments with their sequence numbers, which may wrap."""
    parts, at = [], 0
    for size in [*sizes, len(data)]:
        if at < len(data):
            parts.append(((start + at) & 0xFFFFFFFF, data[at : at + size]))
            at += size
    return parts


@given(
    st.lists(st.integers(1, 90), max_size=30), st.lists(st.integers(1, 90), max_size=30),
    st.integers(0, 0xFFFFFFFF), st.integers(0, 2**32), st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_d3_a_stream_cut_anywhere_and_out_of_order(
    ours: list[int], theirs: list[int], start: int, seed: int, again: bool
) -> None:
    world = World()
    asked, answered, names = conversation(7)
    world.pieces(wire.RECORD_DNS_QUERY, cut(asked, ours, start))
    parts = cut(answered, theirs, start)
    shuffled = random.Random(seed)
    # Neighbours change places, and some come twice: what a network does. The connection's first segment is first.
    for at in range(1, len(parts) - 1, 2):
        if shuffled.random() < 0.5:
            parts[at], parts[at + 1] = parts[at + 1], parts[at]
    if again:
        parts += shuffled.sample(parts, len(parts) // 2)
    world.pieces(wire.RECORD_DNS_ANSWER, parts, when=100)
    world.expire(200)
    assert sorted(event.domain for event in world.events) == names
    assert all(event.transport == "tcp" and event.answers for event in world.events)
    world.lookups.closed(5)
    assert len(world.lookups) == 0


def test_d3_the_first_segment_may_come_second(world: World) -> None:
    asked, answered, names = conversation(3)
    world.pieces(wire.RECORD_DNS_QUERY, [(1, asked)])
    first, second = cut(answered, [70], 1000)
    world.pieces(wire.RECORD_DNS_ANSWER, [second, first], when=100)
    world.expire(200)
    assert sorted(event.domain for event in world.events) == names


def test_d3_times_are_the_first_byte_asked_and_the_last_answered(world: World) -> None:
    query = dns.query("a.example.com", "A", id=1)
    world.pieces(wire.RECORD_DNS_QUERY, [(1, framed(query)[:2]), (3, query)], when=1000)
    answer = framed(answer_to(query, "192.0.2.1"))
    world.pieces(wire.RECORD_DNS_ANSWER, [(1, answer[:20]), (21, answer[20:])], when=9000)
    (event,) = world.events
    assert (event.time, event.duration) == (1000, 8001)
    assert world.learned == [("a.example.com", (("192.0.2.1", 60),))]


def test_d3_a_lost_piece_costs_its_own_messages_only(world: World) -> None:
    names = [f"h{n}.example.com" for n in range(40)]
    queries = [dns.query(name, "A", id=n) for n, name in enumerate(names)]
    at, asked, answered = 1, [], []
    for query in queries:
        asked.append((at, framed(query)))
        at += len(framed(query))
    at = 1
    for query in queries:
        answered.append((at, framed(answer_to(query, "192.0.2.1"))))
        at += len(answered[-1][1])
    before = losses.snapshot().get(("join", "dns_stream_gap"), 0)
    world.pieces(wire.RECORD_DNS_QUERY, asked)
    world.pieces(wire.RECORD_DNS_ANSWER, [piece for n, piece in enumerate(answered) if n != 11], when=100)
    world.expire(200)
    assert sorted(event.domain for event in world.events) == sorted(set(names) - {"h11.example.com"})
    assert losses.snapshot()["join", "dns_stream_gap"] == before + 1
    (late,) = world.expire(6 * SECOND)
    assert (late.domain, late.status) == ("h11.example.com", "timeout")


def test_d3_what_the_kernel_cut_off_is_read_as_far_as_it_came(world: World) -> None:
    one, two = dns.query("big.example.com", "A", id=1), dns.query("small.example.com", "A", id=2)
    world.pieces(wire.RECORD_DNS_QUERY, [(1, framed(one, two))])
    big = framed(answer_to(one, *[f"198.51.100.{n}" for n in range(200)]))
    small = framed(answer_to(two, "192.0.2.1"))
    flags = wire.RECORD_TRUNCATED
    world.pieces(wire.RECORD_DNS_ANSWER, [(1, big[:2048])], when=100, flags=flags)
    world.pieces(wire.RECORD_DNS_ANSWER, [(1 + len(big), small)], when=110)
    world.expire(200)
    found = {event.domain: event.answers for event in world.events}
    assert found["big.example.com"][:2] == ("198.51.100.0", "198.51.100.1")
    assert found["small.example.com"] == ("192.0.2.1",)


def test_d3_a_connection_met_midway_finds_its_step(world: World) -> None:
    asked, _, _ = conversation(5)
    parts = cut(asked, [15], 1)
    world.pieces(wire.RECORD_DNS_QUERY, parts[1:])
    third = dns.query("third.example.com", "A", id=99)
    world.pieces(wire.RECORD_DNS_QUERY, [(1 + len(asked), framed(third))], when=50)
    world.pieces(wire.RECORD_DNS_ANSWER, [(7000, framed(answer_to(third, "192.0.2.1")))], when=100)
    world.expire(200)
    assert [event.domain for event in world.events] == ["third.example.com"]


@given(st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=80), st.booleans()), max_size=60), st.booleans())
@example([(at, b"a", False) for at in range(60, 0, -1)], True)  # each is before what was the first
@settings(max_examples=300, deadline=None)
def test_d3_any_bytes_are_no_error_and_nothing_grows(parts: list[tuple[int, bytes, bool]], asking: bool) -> None:
    world = World()
    kind = wire.RECORD_DNS_QUERY if asking else wire.RECORD_DNS_ANSWER
    for sequence, data, whole in parts:
        world.pieces(kind, [(sequence, data)], flags=0 if whole else wire.RECORD_TRUNCATED)
    for stream in world.lookups._streams.values():
        assert len(stream.buffer) <= 65_537
        assert len(stream.early) <= lookups.WAITING + 1


def test_d3_streams_are_bounded_and_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "STREAMS", 20)
    for cookie in range(100):
        world.pieces(wire.RECORD_DNS_QUERY, [(1, b"\0\x40" + bytes(6))], cookie=cookie)
    assert len(world.lookups) <= 20
    world.expire(61 * SECOND)
    assert len(world.lookups) == 0


def test_d3_a_step_of_a_search_list_is_no_failure_anywhere(world: World) -> None:
    search(world, "api.example.com", ENDINGS[:1], last=0)
    (event,) = world.expire(2 * SECOND)
    assert event.status == "NXDOMAIN"
    assert Notable().of(event) is None
    told = step(event)
    assert not told.failed
    assert dict(told.attributes)["ebfw.dns.search_expansion"] is True
    assert json.loads(JsonFormat().line(event))["search_expansion"] is True
    assert " search=true" in TextFormat().line(event)
    for text in (JsonFormat().line(world.events[0]), TextFormat().line(world.events[0])):
        assert "search" not in text
