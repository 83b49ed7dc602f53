"""Drains the ring buffer through mapped memory, on the caller's timer; no callback, no copy but the record itself.

In: the ring's descriptor. Out: records as bytes. The kernel wakes nobody unless the ring fills (bpf/records.h): the
pipeline sleeps in epoll for a moment and then takes what is there.

Layout (kernel/bpf/ringbuf.c): one page with the consumer's position, one with the producer's, then the data, mapped
twice in a row so that a record that wraps is contiguous.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

_BUSY, _DISCARD = 1 << 31, 1 << 30
_HEADER = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Ring:
    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self._size, self._mask = size, size - 1
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        # One store of 8 bytes: the kernel must never read half a position.
        self._position = ctypes.c_uint64.from_buffer(self._consumer)

    def drain(self, limit: int = 100_000) -> list[bytes]:
        """What has come since, oldest first, at most `limit` records."""
        data, base, mask = self._producer, mmap.PAGESIZE, self._mask
        position = self._position.value
        records: list[bytes] = []
        append, unpack = records.append, _HEADER.unpack_from
        end = _U64.unpack_from(data, 0)[0]
        while position < end and len(records) < limit:
            at = base + (position & mask)
            (length,) = unpack(data, at)
            if length & _BUSY:
                break
            size = length & ~_DISCARD
            if not length & _DISCARD:
                append(data[at + 8 : at + 8 + size])
            position += (size + 15) & ~7
        self._position.value = position
        return records

    def fill(self) -> float:
        """Share of the ring that is unread, 0 to 1."""
        end: int = _U64.unpack_from(self._producer, 0)[0]
        return (end - self._position.value) / self._size

    def close(self) -> None:
        del self._position
        self._consumer.close()
        self._producer.close()
