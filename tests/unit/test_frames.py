"""bpf/lib/frames.h on the host: the digest of a stream of frames, whole, cut anywhere, sent again, with holes, hostile.

Held against a digest made here of the whole stream. Not tested here: what userland makes of it (test_http2.py), and
that the verifier takes the same code.
"""

from __future__ import annotations

import itertools
import random
import struct
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.host_frames import MIDWAY, START, Told, Walk

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
TOLD = {HEADERS, RST, PUSH, GOAWAY, CONTINUATION}


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def wire(self) -> bytes:
        head = struct.pack("!IBBI", len(self.payload), self.kind, self.flags, self.stream)[1:]
        return head + self.payload


def header(length: int, kind: int, flags: int, stream: int) -> bytes:
    return struct.pack("!IBBI", length, kind, flags, stream)[1:]


def digest(frames: list[Frame]) -> bytes:
    out = b""
    stream = length = 0
    for frame in frames:
        if frame.kind == DATA:
            size = len(frame.payload)
            if frame.flags & 8 and size:
                size = max(0, size - 1 - frame.payload[0])
            if stream and (stream != frame.stream or length + size > 0x7FFFFF):
                out += header(length, DATA, 0, stream)
                length = 0
            stream = frame.stream
            length += size
            if frame.flags & 1:
                out += header(length, DATA, 1, stream)
                stream = length = 0
        elif frame.kind in TOLD:
            if stream:
                out += header(length, DATA, 0, stream)
                stream = length = 0
            out += frame.wire
    return out


@st.composite
def a_frame(draw: st.DrawFn) -> Frame:
    kind = draw(
        st.sampled_from([DATA, DATA, DATA, HEADERS, HEADERS, RST, SETTINGS, PING, WINDOW, CONTINUATION, 2, 5, 7, 12])
    )
    stream = draw(st.sampled_from([1, 1, 1, 3, 5, 0x7FFFFFFF]))
    if kind in (SETTINGS, PING, GOAWAY):
        stream = 0
    size = {PRIORITY: 5, RST: 4, PING: 8, WINDOW: 4}.get(kind)
    if size is None:
        size = draw(st.sampled_from([0, 1, 2, 9, 40, 300]) | st.integers(0, 900))
    payload = draw(st.binary(min_size=min(size, 12), max_size=min(size, 12))).ljust(size, b"\x08")
    return Frame(kind, draw(st.sampled_from([0, 1, 4, 5, 8, 9, 13])), stream, payload)


STREAMS = st.lists(a_frame(), max_size=40)


def joined(records: list[Told]) -> bytes:
    """The digest, after a look at how its pieces say where they stand."""
    whole = b""
    for record in records:
        assert record.told == len(whole)
        assert not record.broken
        whole += record.data
    at = 0
    starts = set()
    while at < len(whole):
        starts.add(at)
        at += 9 + (int.from_bytes(whole[at : at + 3], "big") if whole[at + 3] != DATA else 0)
        for record in records:
            if record.told < at and record.told not in starts and record.told > max(starts):
                assert record.left == at - record.told
    for record in records:
        if record.told in starts:
            assert record.left == 0
    return whole


def cut(cuts: list[int], length: int) -> list[tuple[int, int]]:
    edges = sorted({0, length, *(c % (length + 1) for c in cuts)})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@FEW
@given(frames=STREAMS, cuts=st.lists(st.integers(0, 20_000), max_size=30), memory=st.booleans())
def test_a_digest_however_the_stream_is_cut(walk: Walk, frames: list[Frame], cuts: list[int], memory: bool) -> None:
    first = Frame(SETTINGS, 0, 0, bytes(12))
    stream = PREFACE + first.wire + b"".join(frame.wire for frame in frames)
    assert joined(walk(stream, memory=memory)) == digest(frames)
    assert joined(walk(stream, cut(cuts, len(stream)), memory=memory)) == digest(frames)
    assert joined(walk(stream[24:], cut(cuts, len(stream) - 24), START, memory)) == digest(frames)


@FEW
@given(frames=STREAMS, cuts=st.lists(st.integers(0, 20_000), max_size=30), rng=st.randoms(use_true_random=False))
def test_segments_sent_again(walk: Walk, frames: list[Frame], cuts: list[int], rng: random.Random) -> None:
    stream = b"".join(frame.wire for frame in [Frame(SETTINGS, 0, 0, b""), *frames])
    pieces = []
    for at, length in cut(cuts, len(stream)):
        back = rng.randrange(at + 1) if rng.random() < 0.3 else 0
        pieces.append((at - back, length + back))
        if rng.random() < 0.3:
            pieces.append((rng.randrange(at + 1), 1))
    assert joined(walk(stream, pieces, START)) == digest(frames)


def test_every_byte_alone(walk: Walk) -> None:
    frames = [
        Frame(HEADERS, 4, 1, b"h" * 30),
        Frame(DATA, 8, 1, b"\x05" + b"d" * 20),
        Frame(DATA, 8, 1, b"\x00"),
        Frame(DATA, 9, 1, b"\x01d\x00"),
        Frame(RST, 0, 3, bytes(4)),
    ]
    stream = PREFACE + Frame(SETTINGS, 0, 0, b"").wire + b"".join(frame.wire for frame in frames)
    told = joined(walk(stream, [(n, 1) for n in range(len(stream))]))
    assert told == digest(frames) == frames[0].wire + header(15 + 0 + 1, DATA, 1, 1) + frames[4].wire


def test_a_large_body_is_one_header(walk: Walk) -> None:
    frames = [Frame(HEADERS, 4, 1, b"h"), *[Frame(DATA, 0, 1, bytes(16384))] * 300, Frame(DATA, 1, 1, b"")]
    stream = Frame(SETTINGS, 0, 0, b"").wire + b"".join(frame.wire for frame in frames)
    pieces = [(at, min(65160, len(stream) - at)) for at in range(0, len(stream), 65160)]
    records = walk(stream, pieces, START)
    assert [record.data for record in records] == [frames[0].wire, header(300 * 16384, DATA, 1, 1)]


def test_more_than_a_length_can_say(walk: Walk) -> None:
    frames = [Frame(DATA, 0, 1, bytes(0xFFFFF0))] * 3
    stream = b"".join(frame.wire for frame in frames) + Frame(DATA, 1, 1, b"").wire
    assert joined(walk(stream, state=START)) == header(0xFFFFF0, 0, 0, 1) * 3 + header(0, 0, 1, 1)


def test_many_frames_in_one_piece(walk: Walk) -> None:
    """Within what one program may run; beyond that the place is lost, and counted."""
    for count, lost in ((1000, 0), (1100, 1)):
        frames = [Frame(HEADERS, 5, 2 * n + 1, b"h" * 20) for n in range(count)]
        stream = b"".join(frame.wire for frame in frames)
        records = walk(stream, state=START)
        assert walk.lost == lost  # type: ignore[attr-defined]
        told = b"".join(record.data for record in records)
        assert digest(frames).startswith(told)
        assert (told == digest(frames)) == (not lost)


def test_a_hole_in_a_body_does_no_harm(walk: Walk) -> None:
    body = Frame(DATA, 1, 1, bytes(10_000))
    stream = Frame(HEADERS, 4, 1, b"h").wire + body.wire + Frame(HEADERS, 5, 3, b"i").wire
    pieces = [(0, 1000), (3000, 2000), (1000, 2000), (5000, len(stream) - 5000)]
    assert joined(walk(stream, pieces, START)) == digest([Frame(HEADERS, 4, 1, b"h"), body, Frame(HEADERS, 5, 3, b"i")])
    assert walk.lost == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", range(20))
def test_a_large_body_out_of_order(walk: Walk, order: int) -> None:
    """Segments that overtake others, or are missing and come again much later, as TCP has it after a loss."""
    rng = random.Random(order)
    frames = [
        Frame(HEADERS, 4, 1, b"h" * 30),
        *[Frame(DATA, 0, 1, rng.randbytes(16384))] * 100,
        Frame(DATA, 0, 1, bytes(777)),
        Frame(HEADERS, 5, 1, b"trailers"),
    ]
    stream = b"".join(frame.wire for frame in frames)
    pieces = [(at, min(1448, len(stream) - at)) for at in range(0, len(stream), 1448)]
    first, last = 15, len(pieces) - 30  # between the first frames and the last ones
    for _ in range(8):
        at = rng.randrange(first, last)
        pieces.insert(rng.randrange(at, last), pieces.pop(at))
    assert joined(walk(stream, pieces, START)) == digest(frames)
    assert walk.lost == 0  # type: ignore[attr-defined]


def test_a_bridge_that_does_not_hold_is_a_loss(walk: Walk) -> None:
    """What is missing was not as the frames before."""
    frames = [
        Frame(HEADERS, 4, 1, b"h" * 30),
        *[Frame(DATA, 0, 1, b"\1" * 4000)] * 3,
        Frame(DATA, 0, 1, b"\1" * 700),
        *[Frame(DATA, 0, 1, b"\1" * 4000)] * 3,
    ]
    stream = b"".join(frame.wire for frame in frames)
    gone = 39 + 3 * 4009 - 500
    records = walk(stream, [(0, gone), (gone + 1000, len(stream) - gone - 1000)], START)
    assert walk.lost == 1  # type: ignore[attr-defined]
    assert [(r.data, r.broken) for r in records] == [(frames[0].wire, False), (b"", True)]


def test_after_another_hole_it_goes_on_where_a_piece_begins_with_a_frame(walk: Walk) -> None:
    one, two, three = (Frame(HEADERS, 5, n, b"h" * 50) for n in (1, 3, 5))
    stream = one.wire + two.wire + three.wire
    size = len(one.wire)
    records = walk(stream, [(0, size), (size + 10, size - 10), (2 * size, size)], START)
    assert [(r.data, r.broken, r.told) for r in records] == [
        (one.wire, False, 0),
        (b"", True, size),  # told at once
        (three.wire, False, size),
    ]
    assert walk.lost == 1  # type: ignore[attr-defined]
    records = walk(stream, [(0, size + 20), (size + 30, size - 30), (2 * size, size)], START)
    assert [(r.data, r.broken, r.told) for r in records] == [
        (one.wire + two.wire[:20], False, 0),
        (b"", True, size + 20),
        (three.wire, False, size + 20),
    ]


def test_midway(walk: Walk) -> None:
    """From the first piece that begins with what must be a frame."""
    frame = Frame(HEADERS, 5, 7, b"h" * 50)
    rest = b"x" * 100
    records = walk(rest + frame.wire + frame.wire[:12], [(0, 100), (100, 59), (159, 12)], MIDWAY)
    assert [(r.data, r.broken) for r in records] == [(frame.wire, True), (frame.wire[:12], False)]


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(40),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(30),
        b"\x00\x00\x00\x25\x00\x00\x00\x03" + b"kafka" * 8,
        b"\x00\x00\x04\x08\x00\x00\x00\x09" + b"produce" * 8,  # a WINDOW_UPDATE by its first nine bytes
        random.Random(1).randbytes(200),
    ],
)
def test_midway_in_what_is_no_http2(walk: Walk, first: bytes) -> None:
    assert walk(first * 5, [(n * len(first), len(first)) for n in range(5)], MIDWAY) == []
    assert walk(first * 5, state=MIDWAY) == []


def test_it_gives_up(walk: Walk) -> None:
    frame = Frame(HEADERS, 5, 7, b"h" * 50)
    noise = [(n * 60, 60) for n in range(63)]
    assert len(walk(b"x" * 3780 + frame.wire, [*noise, (3780, 59)], MIDWAY)) == 1
    assert walk(b"x" * 3840 + frame.wire, [*noise, (3780, 60), (3840, 59)], MIDWAY) == []


def test_a_preface_without_settings_is_none(walk: Walk) -> None:
    assert walk(PREFACE + Frame(HEADERS, 5, 1, b"h" * 50).wire) == []


@FEW
@given(data=st.binary(max_size=4000), state=st.integers(0, 5), cuts=st.lists(st.integers(0, 5000), max_size=20))
def test_anything(walk: Walk, data: bytes, state: int, cuts: list[int]) -> None:
    for memory in (False, True):
        for record in walk(data, cut(cuts, len(data)), state, memory):
            assert len(record.data) <= 1280
            assert record.data or record.broken
