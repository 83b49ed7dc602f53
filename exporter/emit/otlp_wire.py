"""Protobuf's wire format, as much of it as spans and log records need: plain values to bytes.

Comes in: keys and Python values. Goes out: encoded KeyValue fields. Not its job: which fields there are
(otlp_records.py).

Building a message of protobuf's for each attribute costs more than all the rest of a span, and each is an arena
of 1 to 3 KiB; bytes can be kept and joined. Source: protobuf.dev, "Encoding"; opentelemetry-proto 1.x
(common.proto, AnyValue and KeyValue), whose parser the tests hold this against.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

Value = str | bool | int | float | Sequence[str]

_pack_double = struct.Struct("<d").pack
_SIGNED = 1 << 64


def varint(number: int) -> bytes:
    """A number from 0 to 2**64 - 1, in base 128, the lowest digits first."""
    if number < 0x80:
        return bytes((number,))
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def sized(tag: bytes, body: bytes) -> bytes:
    """A field of wire type 2: tag, length, body."""
    return tag + varint(len(body)) + body


def text(value: str, limit: int | None = None) -> bytes:
    """UTF-8, cut to `limit` characters. A lone surrogate (undecodable bytes in a name) would make a receiver refuse
    the whole request: it becomes a question mark."""
    return (value if limit is None else value[:limit]).encode("utf-8", "replace")


def any_value(value: Value, limit: int | None = None) -> bytes:
    """The body of an AnyValue."""
    if isinstance(value, str):
        return sized(b"\x0a", text(value, limit))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + varint(value % _SIGNED)
    if isinstance(value, float):
        return b"\x21" + _pack_double(value)
    return sized(b"\x2a", b"".join([sized(b"\x0a", any_value(item, limit)) for item in value]))


def attribute(tag: bytes, key: str, value: Value, limit: int | None = None) -> bytes:
    """One KeyValue as a field `tag` of what it belongs to."""
    return sized(tag, sized(b"\x0a", key.encode()) + sized(b"\x12", any_value(value, limit)))


class Text:
    """Encodes one string attribute many times: everything before the value is made once."""

    __slots__ = ("_key", "_limit", "_more", "_tag")

    def __init__(self, tag: bytes, key: str, limit: int | None = None) -> None:
        self._tag, self._limit = tag, limit
        self._key = sized(b"\x0a", key.encode()) + b"\x12"
        self._more = len(self._key) + 1

    def __call__(self, value: str) -> bytes:
        body = (value if self._limit is None else value[: self._limit]).encode("utf-8", "replace")
        size = len(body)
        whole = self._more + 2 + size
        if whole < 0x80:  # all three lengths take one byte
            return b"%b%c%b%c\x0a%c%b" % (self._tag, whole, self._key, size + 2, size, body)
        inner = b"\x0a" + varint(size) + body
        outer = self._key + varint(len(inner)) + inner
        return self._tag + varint(len(outer)) + outer


class Number:
    """Encodes one integer attribute many times. Values from 0 to 2**63 - 1."""

    __slots__ = ("_long", "_prefix", "_short", "_tag")

    def __init__(self, tag: bytes, key: str) -> None:
        self._tag = tag
        self._prefix = sized(b"\x0a", key.encode()) + b"\x12"
        size = len(self._prefix)
        self._short = tag + bytes((size + 3,)) + self._prefix + b"\x02\x18"
        self._long = tag + bytes((size + 5,)) + self._prefix + b"\x04\x18"

    def __call__(self, value: int) -> bytes:
        if value < 0x80:
            return b"%b%c" % (self._short, value)
        if 0x4000 <= value < 0x200000:
            return b"%b%c%c%c" % (self._long, value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14)
        inner = b"\x18" + varint(value)
        outer = self._prefix + varint(len(inner)) + inner
        return self._tag + varint(len(outer)) + outer
