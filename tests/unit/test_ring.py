"""Records out of a ring's memory: whole, in order, none twice, wherever the ring's end falls.

The ring is a file with the kernel's layout. Excluded: what the kernel writes there (tests/kernel).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.kernel.ring import Ring

SIZE = 4096
BUSY, DISCARD = 1 << 31, 1 << 30


class Kernel:
    """The producer's side: as kernel/bpf/ringbuf.c has it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + SIZE)
        self.end = 0

    def write(self, content: bytes, flags: int = 0) -> bool:
        """False where there is no room."""
        room = (len(content) + 15) & ~7
        (read,) = struct.unpack("<Q", os.pread(self.fd, 8, 0))
        if self.end + room - read > SIZE - 1:
            return False
        data = (struct.pack("<II", len(content) | flags, 0) + content).ljust(room, b"\xee")
        at = self.end % SIZE
        os.pwrite(self.fd, data[: SIZE - at], 2 * mmap.PAGESIZE + at)
        os.pwrite(self.fd, data[SIZE - at :], 2 * mmap.PAGESIZE)
        self.end += room
        os.pwrite(self.fd, struct.pack("<Q", self.end), mmap.PAGESIZE)
        return True

    def flag(self, position: int, header: int) -> None:
        os.pwrite(self.fd, struct.pack("<I", header), 2 * mmap.PAGESIZE + position % SIZE)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    os.close(kernel.fd)


@given(
    st.lists(st.tuples(st.integers(1, 1500), st.booleans()), max_size=60),
    st.integers(1, 7),
)
def test_records_come_whole_and_in_order(sizes: list[tuple[int, bool]], limit: int) -> None:
    kernel = Kernel()
    ring = Ring(kernel.fd, SIZE)
    want, got = [], []
    for number, (size, discarded) in enumerate(sizes):
        content = bytes([number & 255]) * size
        while not kernel.write(content, DISCARD if discarded else 0):
            taken = ring.drain(limit)
            assert len(taken) <= limit
            got += taken
        if not discarded:
            want.append(content)
    while taken := ring.drain(limit):
        got += taken
    assert got == want
    assert ring.fill() == 0
    ring.close()
    os.close(kernel.fd)


def test_each_place_of_the_end(kernel: Kernel) -> None:
    ring = Ring(kernel.fd, SIZE)
    for shift in range(8, 1032, 8):  # every split of a record of 1,016 bytes, its header's on its own included
        kernel.end = SIZE * (shift + 1) - shift
        for at in (0, mmap.PAGESIZE):
            os.pwrite(kernel.fd, struct.pack("<Q", kernel.end), at)
        content = os.urandom(1016)
        assert kernel.write(content)
        assert kernel.write(b"after")
        assert ring.drain() == [content, b"after"]
    ring.close()


def test_what_is_still_written_is_waited_for(kernel: Kernel) -> None:
    ring = Ring(kernel.fd, SIZE)
    kernel.write(b"one")
    kernel.write(b"two", BUSY)
    kernel.write(b"three")
    assert ring.drain() == [b"one"]
    assert ring.drain() == []
    kernel.flag(16, 3)
    assert ring.drain() == [b"two", b"three"]
    ring.close()
