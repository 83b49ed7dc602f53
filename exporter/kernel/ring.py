"""Drains the ring buffer through mapped memory, on the caller's timer; no callback, no copy but the record itself.

In: the ring's descriptor. Out: records as bytes. The kernel wakes nobody unless the ring fills (bpf/records.h): the
pipeline sleeps in epoll for a moment and then takes what is there.

Layout (kernel/bpf/ringbuf.c): one page with the consumer's position, one with the producer's, then the data.
"""

from __future__ import annotations

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
        # The kernel would show the ring twice in a row, so that no record is in two pieces. All pages of a mapping
        # count as the process's memory at once; one record a lap put together is cheaper.
        self._producer = mmap.mmap(fd, page + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        # One store of 8 bytes: the kernel must never read half a position.
        self._position = memoryview(self._consumer)[:8].cast("Q")

    def drain(self, limit: int = 100_000) -> list[bytes]:
        """What has come since, oldest first, at most `limit` records."""
        data, base, mask = self._producer, mmap.PAGESIZE, self._mask
        position = self._position[0]
        records: list[bytes] = []
        append, unpack = records.append, _HEADER.unpack_from
        end = _U64.unpack_from(data, 0)[0]
        while position < end and len(records) < limit:
            lap = position & ~mask
            lap_end, shift = lap + mask + 1, base - lap
            stop, length = min(end, lap_end), 0
            while position < stop and len(records) < limit:
                at = position + shift
                (length,) = unpack(data, at)
                if length >= _DISCARD:
                    if length & _BUSY:
                        end = position
                        break
                    position += ((length & ~_DISCARD) + 15) & ~7
                    continue
                append(data[at + 8 : at + 8 + length])
                position += (length + 15) & ~7
            if position > lap_end and length < _DISCARD:  # it goes on where the ring begins
                records[-1] += data[base : base + length - len(records[-1])]
        self._position[0] = position
        return records

    def fill(self) -> float:
        """Share of the ring that is unread, 0 to 1."""
        end: int = _U64.unpack_from(self._producer, 0)[0]
        return (end - self._position[0]) / self._size

    def close(self) -> None:
        self._position.release()
        self._consumer.close()
        self._producer.close()
