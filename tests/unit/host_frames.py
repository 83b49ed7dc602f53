"""bpf/lib/frames.h compiled for the host, for the tests that need a digest."""

from __future__ import annotations

import ctypes as c
import itertools
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
MOST = 1280  # of a record's digest: DIGEST_MOST + DIGEST_CHUNK

OFF, FIRST, START, MIDWAY, ON, SEEK = range(6)  # enum walking


class _Told(c.Structure):
    _fields_ = (
        ("told", c.c_uint32),
        ("left", c.c_uint32),
        ("piece", c.c_uint32),
        ("broken", c.c_uint32),
        ("length", c.c_uint32),
        ("bytes", c.c_uint8 * MOST),
    )


class Told(NamedTuple):
    """A record of one direction's digest; `piece`: which piece of the stream it came with."""

    told: int
    left: int
    piece: int
    broken: bool
    data: bytes


Walk = Callable[..., list[Told]]


def compiled(folder: Path) -> Walk:
    """walk(stream, pieces, state=FIRST, memory=False): pieces are (at, length), in the order they come.
    `walk.lost` is how often a place was lost."""
    path = folder / "frames.so"
    flags = ["-std=gnu11", "-O1", "-g", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-shared", "-fPIC"]
    subprocess.run(
        ["cc", *flags, "-I", str(HERE.parents[1] / "bpf"), str(HERE / "bpf_host.c"), "-o", str(path)], check=True
    )
    library = c.CDLL(str(path))
    room = 20_000
    answers = (_Told * room)()

    def run(
        stream: bytes, pieces: Iterable[tuple[int, int]] | None = None, state: int = FIRST, memory: bool = False
    ) -> list[Told]:
        flat = list(itertools.chain.from_iterable(pieces if pieces is not None else [(0, len(stream))]))
        lost = c.c_uint32()
        count = library.host_frames(
            stream, (c.c_uint32 * len(flat))(*flat), len(flat) // 2, state, memory, answers, room, c.byref(lost)
        )
        run.lost = lost.value  # type: ignore[attr-defined]
        assert count < room
        return [
            Told(a.told, a.left, a.piece, bool(a.broken), bytes(memoryview(a.bytes)[: a.length]))
            for a in answers[:count]
        ]

    return run
