"""What the product does not need of bpf(2): programs written as raw instructions, a program by its link's pin.

In: numbers. Out: instructions, descriptors. Instruction format: Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from bench.http2 import streams
from exporter.kernel import bpf, wire

_PROG_GET_FD_BY_ID, _MAP_LOOKUP_AND_DELETE = 13, 21
NO_WAKEUP, FORCE_WAKEUP = 1, 2


def _code(*lines: tuple[int, int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<BBhi", op, dst | src << 4, off, imm) for op, dst, src, off, imm in lines)


def _map(register: int, fd: int) -> tuple[tuple[int, int, int, int, int], ...]:
    return (0x18, register, 1, 0, fd), (0, 0, 0, 0, 0)


def _call(helper: int) -> tuple[int, int, int, int, int]:
    return 0x85, 0, 0, 0, helper


_EXIT = (0x95, 0, 0, 0, 0)
_HEAD = struct.Struct(
    "<IIII"
)  # of a template: its length, by how much its offset moves, where two streams' numbers are


def _next_stream(field: int, value: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """Add two to the number, in the network's order, at the place that this field of the template's head names."""
    return (
        (0x61, 1, 6, field, 0),
        (0x25, 1, 0, 0, value - _HEAD.size - 4),  # out
        (0xBF, 2, 6, 0, 0),
        (0x0F, 2, 1, 0, 0),
        (0x61, 3, 2, _HEAD.size, 0),
        (0xDC, 3, 0, 0, 32),  # to the network's order and back: one instruction
        (0x07, 3, 0, 0, 2),
        (0xDC, 3, 0, 0, 32),
        (0x63, 2, 3, _HEAD.size, 0),
    )


def empty_program(kind: int = bpf.CGROUP_SKB, attach: int = bpf.EGRESS) -> int:
    """A program of two instructions: return 1, which lets a packet pass and is nothing to a uprobe."""
    return bpf.prog_load(kind, _code((0xB7, 0, 0, 0, 1), _EXIT), "bench_empty", attach)


def program_of(link_pin: Path) -> int:
    """The descriptor of the program behind a pinned link."""
    link = bpf.get_pinned(str(link_pin))
    try:
        number = bpf.link_info(link).program_id
    finally:
        os.close(link)
    return bpf._call(_PROG_GET_FD_BY_ID, struct.pack("<III", number, 0, 0))[0]


def pop(stack: int) -> int:
    """Take a u32 off a stack map. Raises OSError ENOENT when it is empty."""
    value = ctypes.c_uint32()
    bpf._call(_MAP_LOOKUP_AND_DELETE, struct.pack("<IIQQQ", stack, 0, 0, ctypes.addressof(value), 0))
    return value.value


class Producer:
    """Puts records into a ring from the kernel's side, which alone can write there: BPF_PROG_TEST_RUN of a program
    that copies templates, in turn, with the time of now in their first eight bytes. With `wake` each wakes the reader,
    else none does. A digest of HTTP/2 moves on each time: its offset by its length, its streams to the client's next;
    it may have one template in each direction of a connection. Context manager."""

    def __init__(self, ring: int, templates: Sequence[bytes], wake: bool = False) -> None:
        room = max(map(len, templates))
        value = _HEAD.size + (room + 7 & ~7)
        self._templates = bpf.map_create(bpf.ARRAY, 4, value, len(templates), 0, "bench_records")
        self._state = bpf.map_create(bpf.ARRAY, 4, 16, 1, 0, "bench_state")
        for index, template in enumerate(templates):
            places = streams(template)
            if len(places) > 2:
                raise ValueError(f"{len(places)} frames in a template")
            # The place of no stream is in the time, which is written anew.
            head = _HEAD.pack(
                len(template), len(template) - wire.RECORD.size if places else 0, *places, *(0, 0)[len(places) :]
            )
            data = head + template.ljust(value - _HEAD.size, b"\0")
            bpf.map_update(self._templates, struct.pack("<I", index), data)
        offset = _HEAD.size + wire.Record.offset.offset
        lines = [
            (0x62, 10, 0, -4, 0),  # key = 0
            *_map(1, self._state),
            (0xBF, 2, 10, 0, 0),
            (0x07, 2, 0, 0, -4),
            _call(1),
            (0x15, 0, 0, 0, 0),  # [0] no state: out
            (0xBF, 7, 0, 0, 0),
            (0x79, 1, 7, 0, 0),
            (0xBF, 2, 1, 0, 0),
            (0x07, 2, 0, 0, 1),
            (0x7B, 7, 2, 0, 0),  # state.next += 1
            (0x97, 1, 0, 0, len(templates)),
            (0x63, 10, 1, -4, 0),
            *_map(1, self._templates),
            (0xBF, 2, 10, 0, 0),
            (0x07, 2, 0, 0, -4),
            _call(1),
            (0x15, 0, 0, 0, 0),  # [1] no template: out
            (0xBF, 6, 0, 0, 0),
            _call(5),  # ktime_get_ns
            (0x7B, 6, 0, _HEAD.size, 0),
            (0x61, 3, 6, 0, 0),
            (0x25, 3, 0, 0, value - _HEAD.size),  # [2] the verifier wants a bound
            (0xBF, 2, 6, 0, 0),
            (0x07, 2, 0, 0, _HEAD.size),
            *_map(1, ring),
            (0xB7, 4, 0, 0, FORCE_WAKEUP if wake else NO_WAKEUP),
            _call(130),  # ringbuf_output
            (0x15, 0, 0, 3, 0),
            (0x79, 1, 7, 8, 0),
            (0x07, 1, 0, 0, 1),
            (0x7B, 7, 1, 8, 0),  # state.lost += 1
            (0x61, 1, 6, 4, 0),
            (0x15, 1, 0, 0, 0),  # [3] it stays as it is: out
            (0x61, 2, 6, offset, 0),
            (0x0F, 2, 1, 0, 0),
            (0x63, 6, 2, offset, 0),  # record.offset += length of the digest
            *_next_stream(8, value),
            *_next_stream(12, value),
            (0xB7, 0, 0, 0, 1),
            _EXIT,
        ]
        out = len(lines) - 2
        for at, line in enumerate(lines):
            if line[0] in (0x15, 0x25) and line[3] == 0:
                lines[at] = (*line[:3], out - at - 1, line[4])
        self._program = bpf.prog_load(bpf.CGROUP_SKB, _code(*lines), "bench_producer", bpf.EGRESS)
        self._frame = bytes(12) + b"\x08\x00" + bytes(64)

    def put(self, count: int) -> None:
        """The next `count` records."""
        if count:
            bpf.test_run(self._program, self._frame, count)

    def state(self) -> tuple[int, int]:
        """(records tried so far, of which found no room)."""
        raw = bpf.map_lookup(self._state, bytes(4), 16) or bytes(16)
        tried, lost = struct.unpack("<QQ", raw)
        return tried, lost

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._program, self._templates, self._state):
            os.close(fd)
