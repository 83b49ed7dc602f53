"""hpack: libnghttp2's inflater held against the `hpack` library's encoder, and what is told of tables not known."""

from __future__ import annotations

import gc
from pathlib import Path

import hpack as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.hpack import BLOCK_BYTES, TABLE_BYTES, UNKNOWN, Inflater

NAMES = st.sampled_from([b":path", b":method", b":status", b"cookie", b"x-a", b"x-b", b"x-cc", b"grpc-timeout"])
VALUES = st.sampled_from([b"", b"GET", b"/", b"200", b"v" * 300]) | st.binary(max_size=40)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=12)


class Peer:
    """An encoder as a real one would be: it may resize its table between blocks."""

    def __init__(self) -> None:
        self.encoder = reference.Encoder()

    def block(self, fields: list[tuple[bytes, bytes]], huffman: bool = True, size: int | None = None) -> bytes:
        if size is not None:
            self.encoder.header_table_size = size
        return self.encoder.encode(fields, huffman=huffman)


STEPS = st.lists(st.tuples(FIELDS, st.booleans(), st.none() | st.integers(0, TABLE_BYTES)), max_size=25)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_what_went_in_comes_out(steps: list[tuple[list[tuple[bytes, bytes]], bool, int | None]]) -> None:
    peer, inflater = Peer(), Inflater()
    for fields, huffman, size in steps:
        assert inflater.inflate(peer.block(fields, huffman, size)) == fields


def truth_or_unknown(got: list[tuple[bytes, bytes]] | None, fields: list[tuple[bytes, bytes]]) -> None:
    assert got is not None
    assert len(got) == len(fields)
    for (name, value), field in zip(got, fields, strict=True):
        if name != UNKNOWN:
            assert (name, value) == field


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, missed=st.sets(st.integers(0, 24)), default_size=st.booleans())
def test_after_a_missed_block_a_field_is_right_or_unknown(
    steps: list[tuple[list[tuple[bytes, bytes]], bool, int | None]], missed: set[int], default_size: bool
) -> None:
    peer, inflater = Peer(), Inflater()
    for number, (fields, huffman, _) in enumerate(steps):
        block = peer.block(fields, huffman)
        if number in missed:
            inflater.forget()
        else:
            truth_or_unknown(inflater.inflate(block), fields)


def test_midway() -> None:
    peer = Peer()
    fields = [(b":method", b"GET"), (b":path", b"/a"), (b"x-a", b"b")]
    peer.block(fields)
    inflater = Inflater(midway=True)
    assert inflater.inflate(peer.block(fields)) == [(b":method", b"GET"), (UNKNOWN, b""), (UNKNOWN, b"")]
    fields[1] = (b":path", b"/b")
    assert inflater.inflate(peer.block(fields)) == [(b":method", b"GET"), (b":path", b"/b"), (UNKNOWN, b"")]
    assert inflater.inflate(peer.block(fields)) == [(b":method", b"GET"), (b":path", b"/b"), (UNKNOWN, b"")]
    # a value for a name that is not known makes a field that is not known
    peer = Peer()
    peer.block([(b"x-a", b"1")])
    inflater = Inflater(midway=True)
    for _ in range(2):
        assert inflater.inflate(peer.block([(b"x-a", b"2")])) == [(UNKNOWN, b"2")]


def test_a_table_of_another_size_than_we_think() -> None:
    """The other end allowed more than the 4,096 that we fill: what lies beyond cannot be read, and is not guessed."""
    peer = Peer()
    peer.encoder.header_table_size = 16_000
    for n in range(300):
        peer.block([(b"x-%d" % n, b"")])
    inflater = Inflater(midway=True)
    assert inflater.inflate(peer.block([(b"x-20", b"")])) is None
    assert inflater.inflate(peer.block([(b"x-290", b""), (b":method", b"GET")])) == [
        (UNKNOWN, b""),
        (b":method", b"GET"),
    ]


def test_numbers_mean_the_same_until_the_next_literal() -> None:
    """The short cut for blocks of numbers alone."""
    peer, inflater = Peer(), Inflater()
    for n in range(200):
        fields = [(b":method", b"GET"), (b":path", b"/%d" % (n // 3))]
        assert inflater.inflate(peer.block(fields)) == fields
        assert inflater.inflate(peer.block([(b"x-a", b"%d" % (n // 50))])) == [(b"x-a", b"%d" % (n // 50))]


def test_hostile_blocks() -> None:
    inflater = Inflater()
    for block in (
        b"\x80",
        b"\xff\xff\xff\xff\xff\xff",
        b"\x40",
        b"\x00\x05ab",
        b"\x3f\xff\xff\xff\x0f",
        b"\x7f\x80\x80",
    ):
        assert inflater.inflate(block) is None
        assert inflater.inflate(b"\x82") == [(b":method", b"GET")]
    assert inflater.inflate(b"") == []
    assert inflater.inflate(bytes(BLOCK_BYTES + 1)) is None
    assert inflater.inflate(b"\x82" * BLOCK_BYTES) is None  # a bomb: few bytes, many fields
    assert inflater.inflate(b"\x3f\xe1\x7f") == []  # 16,384
    assert inflater.inflate(b"\x3f\xe2\x7f") is None  # one more


@settings(max_examples=300, deadline=None)
@given(blocks=st.lists(st.binary(max_size=200), max_size=8), midway=st.booleans())
def test_anything(blocks: list[bytes], midway: bool) -> None:
    inflater = Inflater(midway)
    for block in blocks:
        fields = inflater.inflate(block)
        assert fields is None or all(isinstance(name, bytes) and isinstance(value, bytes) for name, value in fields)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_bounded_and_freed() -> None:
    """4,000 connections one after the other, each with its table full and then forgotten."""
    fill = b"\x3f\xe1\x7f" + b"".join(b"\x40\x02%02d\x7f\x81\x07" % n + b"v" * 1024 for n in range(16))

    def some(count: int) -> None:
        for _ in range(count):
            inflater = Inflater()
            assert inflater.inflate(fill) is not None
            inflater.forget()

    some(200)
    gc.collect()
    before = resident()
    some(4000)
    gc.collect()
    assert resident() - before < 2 << 20
    held = [Inflater() for _ in range(200)]
    before = resident()
    for inflater in held:
        for _ in range(5):
            assert inflater.inflate(fill) is not None
    assert resident() - before < 200 * 3 * TABLE_BYTES
