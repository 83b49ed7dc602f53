"""Header blocks of HTTP/2 (RFC 7541): libnghttp2's inflater, bound by ctypes.

In: the header blocks of one direction of one connection, in the order they were sent. Out: their fields. Both ends of
a connection build up the same table of fields and send numbers into it; who joins late, or missed a block, does not
know what a number stands for. Such a reader starts from a table full of `UNKNOWN` fields: what is newer than that it
learns as it comes, and what it cannot know it calls unknown. Not its job: frames, and what a field means.

The library is a system package (Debian: libnghttp2-14); `available()` says whether it is there.
"""

from __future__ import annotations

import ctypes as c
import struct
from typing import Any

UNKNOWN = b"?"  # the name of a field that nobody can know; no real name has this character (RFC 9110 section 5.6.2)

BLOCK_BYTES = 32 << 10  # a longer block is not read; servers take 8 to 16 KiB
FIELDS = 1024  # of one block
TABLE_BYTES = 16 << 10  # the largest table that either end may ask for; nearly all keep the 4,096 of RFC 9113
DEFAULT_TABLE_BYTES = 4096

_EMIT, _FINAL = 2, 1
# One UNKNOWN field is 33 bytes of table (RFC 7541 section 4.1): a literal that is indexed, with a name of one byte.
_FILL = b"\x40\x01" + UNKNOWN + b"\x00"
_FILLING = _FILL * (DEFAULT_TABLE_BYTES // 33)
_NUMBERS = b"".join(bytes([n]) for n in range(0x80, 0xFF))  # one-byte references to fields of the table

_library: c.PyDLL | None
try:
    # No call blocks or calls back, so none needs to let go of the interpreter.
    _library = c.PyDLL("libnghttp2.so.14")
except OSError:
    _library = None
else:
    _library.nghttp2_hd_inflate_new.argtypes = [c.POINTER(c.c_void_p)]
    _library.nghttp2_hd_inflate_del.argtypes = [c.c_void_p]
    _library.nghttp2_hd_inflate_change_table_size.argtypes = [c.c_void_p, c.c_size_t]
    _library.nghttp2_hd_inflate_end_headers.argtypes = [c.c_void_p]
    _library.nghttp2_hd_inflate_hd2.argtypes = [c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p, c.c_size_t, c.c_int]
    _library.nghttp2_hd_inflate_hd2.restype = c.c_ssize_t
    _inflate, _end = _library.nghttp2_hd_inflate_hd2, _library.nghttp2_hd_inflate_end_headers

# The block being read, and nghttp2_nv (two pointers, two lengths, flags) with the flags of the call behind it. One
# for all: the pipeline has one thread.
_block = bytearray(BLOCK_BYTES)
_block_at = c.addressof((c.c_char * BLOCK_BYTES).from_buffer(_block))
_answer = bytearray(48)
_answer_at = c.addressof((c.c_char * 48).from_buffer(_answer))
# All of memory as one array: a slice of it costs a fifth of ctypes.string_at. Only what the library points at is read.
_memory: Any = (c.c_char * (1 << 56)).from_address(0)
_read_answer = struct.Struct("@PPNNB7xi4x").unpack_from


def available() -> bool:
    """Is the library there?"""
    return _library is not None


class Inflater:
    """One direction of one connection. `midway`: blocks before the first that we get were not seen. Holds memory
    outside Python's, up to about twice TABLE_BYTES; it is freed with this object."""

    __slots__ = ("_fields", "_handle")

    def __init__(self, midway: bool = False) -> None:
        self._handle: int | None = None
        self._start(midway)

    def _start(self, midway: bool) -> None:
        self._free()
        assert _library is not None
        handle = c.c_void_p()
        if _library.nghttp2_hd_inflate_new(c.byref(handle)):
            raise MemoryError("nghttp2_hd_inflate_new")
        self._handle = handle.value
        # SETTINGS need not be read: whoever changes the size of the table says so in its next block.
        _library.nghttp2_hd_inflate_change_table_size(self._handle, TABLE_BYTES)
        self._fields: dict[bytes, list[tuple[bytes, bytes]]] = {}
        if midway:
            self._inflate(_FILLING)

    def forget(self) -> None:
        """A block was missed: from here on only what comes is known."""
        self._start(midway=True)

    def inflate(self, block: bytes) -> list[tuple[bytes, bytes]] | None:
        """The fields of the next block, (name, value); a name is `UNKNOWN` where it cannot be known. None where the
        block cannot be read: then all that was known is forgotten."""
        # Numbers alone leave the table as it is: the same numbers mean the same until the next literal.
        numbers = not block.translate(None, _NUMBERS)
        if numbers:
            known = self._fields.get(block)
            if known is not None:
                return known
        fields = self._inflate(block)
        if fields is None:
            self.forget()
        elif not numbers:
            self._fields.clear()
        elif len(self._fields) < 64:
            self._fields[block] = fields
        return fields

    def _inflate(self, block: bytes) -> list[tuple[bytes, bytes]] | None:
        left = len(block)
        if left > BLOCK_BYTES:
            return None
        _block[:left] = block
        at, handle = _block_at, self._handle
        fields: list[tuple[bytes, bytes]] = []
        while True:
            taken = _inflate(handle, _answer_at, _answer_at + 40, at, left, 1)
            if taken < 0:
                return None
            at += taken
            left -= taken
            name, value, name_size, value_size, _, flags = _read_answer(_answer)
            if flags & _EMIT:
                fields.append((_memory[name : name + name_size], _memory[value : value + value_size]))
                if len(fields) > FIELDS:
                    return None
            elif flags & _FINAL:
                _end(handle)
                return fields
            elif not left or not taken:
                return None

    def _free(self) -> None:
        if self._handle is not None and _library is not None:
            _library.nghttp2_hd_inflate_del(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self._free()
