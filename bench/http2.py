"""HTTP/2 as the kernel tells it: digests of requests and their answers, with header blocks of a real encoder.

In: a talk. Out: records of two requests with their answers. The first names its fields, the second is numbers into the
table that the first has left, but for its path, as from any client that goes on. It leaves the table as it found it:
so it may come again and again, if offset and stream move with it, which Producer (raw.py) sees to.
"""

from __future__ import annotations

import ctypes as c
import struct
from collections.abc import Sequence

from bench.packets import Talk
from exporter.kernel import wire
from lab import LabError

_DATA, _HEADERS = 0, 1
_END_STREAM, _END_HEADERS = 1, 4
_TABLE_BYTES = 4096
_BODY = 600

Fields = Sequence[tuple[bytes, bytes]]


def exchanges(talk: Talk) -> tuple[list[bytes], list[bytes]]:
    """Of one connection: the records of its first request and its answer; those of the next one, and of all others.
    Raises LabError where libnghttp2 is missing."""
    asked = (
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", talk.name.encode()),
        (b":path", f"/v1/items/{talk.number % 100}?page=2".encode()),
        (b"user-agent", b"curl/8.5.0"),
        (b"accept", b"application/json"),
        (b"accept-encoding", b"gzip"),
    )
    answered = (
        (b":status", b"200"),
        (b"content-type", b"application/json"),
        (b"content-length", str(_BODY).encode()),
    )
    out, back = _blocks(asked, 2), _blocks(answered, 2)
    first: list[bytes] = []
    next_: list[bytes] = []
    told = {wire.RECORD_FRAMES_OUT: 0, wire.RECORD_FRAMES_IN: 0}
    for records, stream, request, answer in ((first, 1, out[0], back[0]), (next_, 3, out[1], back[1])):
        for kind, digest in (
            (wire.RECORD_FRAMES_OUT, _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, request)),
            (
                wire.RECORD_FRAMES_IN,  # of a body there is the header alone
                _frame(_HEADERS, _END_HEADERS, stream, answer) + _header(_DATA, _END_STREAM, stream, _BODY),
            ),
        ):
            records.append(
                talk.record(
                    kind, 6, talk.peer, 80, name=talk.name_id, length=len(digest), offset=told[kind], payload=digest
                )
            )
            told[kind] += len(digest)
    return first, next_


def streams(record: bytes) -> list[int]:
    """Where in a record the numbers of its frames' streams are; none in one that is no digest of HTTP/2."""
    if record[wire.Record.kind.offset] not in (wire.RECORD_FRAMES_OUT, wire.RECORD_FRAMES_IN):
        return []
    found, at = [], wire.RECORD.size
    while at < len(record):
        found.append(at + 5)
        at += 9 + (int.from_bytes(record[at : at + 3], "big") if record[at + 3] != _DATA else 0)
    return found


def _header(kind: int, flags: int, stream: int, length: int) -> bytes:
    return length.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _header(kind, flags, stream, len(payload)) + payload


class _Pair(c.Structure):
    """nghttp2_nv"""

    _fields_ = (
        ("name", c.c_char_p),
        ("value", c.c_char_p),
        ("name_length", c.c_size_t),
        ("value_length", c.c_size_t),
        ("flags", c.c_uint8),
    )


def _blocks(fields: Fields, count: int) -> list[bytes]:
    """The header blocks of one direction of a connection that says the same `count` times and could go on."""
    try:
        library = c.CDLL("libnghttp2.so.14")
    except OSError:
        raise LabError("libnghttp2.so.14 is missing; try: apt-get install libnghttp2-14") from None
    library.nghttp2_hd_deflate_hd.restype = c.c_ssize_t
    library.nghttp2_hd_deflate_hd.argtypes = [c.c_void_p, c.c_char_p, c.c_size_t, c.c_void_p, c.c_size_t]
    library.nghttp2_hd_deflate_del.argtypes = [c.c_void_p]
    pairs = (_Pair * len(fields))(*(_Pair(name, value, len(name), len(value), 0) for name, value in fields))
    deflater = c.c_void_p()
    if library.nghttp2_hd_deflate_new(c.byref(deflater), c.c_size_t(_TABLE_BYTES)):
        raise MemoryError("nghttp2_hd_deflate_new")
    found = []
    try:
        for _ in range(count + 1):
            room = c.create_string_buffer(4096)
            length = library.nghttp2_hd_deflate_hd(deflater, room, len(room), pairs, len(fields))
            if length < 0:
                raise LabError(f"nghttp2_hd_deflate_hd: {length}")
            found.append(room.raw[:length])
    finally:
        library.nghttp2_hd_deflate_del(deflater)
    if found[-1] != found[-2]:
        raise LabError("a header block that comes again differs: it may not be repeated")
    return found[:count]
