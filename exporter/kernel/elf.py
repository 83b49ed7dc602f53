"""Reads what uprobes need out of an ELF file: where functions begin, as file offsets.

In: a descriptor of a file that may be anything, since it is whatever a container runs. Out: offsets, or `Malformed`
(a ValueError) and nothing else. Reads by range with pread: a file that says it has a table of a terabyte is refused,
not mapped. Source: System V ABI, chapters 4 and 5; the GNU hash section as glibc's elf/dl-lookup.c walks it.

Own code, weighed against pyelftools: that builds an object for each symbol (seconds for Node's 80,000, where hash
look-ups and byte searches take milliseconds), reads without bounds, and knows nothing of Go's function table, which is
half of the work.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_DYN = struct.Struct("<QQ")
_PT_LOAD, _PT_DYNAMIC, _EXECUTABLE = 1, 2, 1
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_DT_STRTAB, _DT_SYMTAB, _DT_GNU_HASH = 5, 6, 0x6FFFFEF5
_STT_FUNC = 2

_CHUNK = 43_690 * _SYM.size  # about 1 MiB; whole symbols
_HEADERS = 1024  # program headers, sections, entries of the dynamic table
_TABLE_BYTES = 128 << 20  # a table that is read from end to end
_CHAIN = 256  # symbols in one hash bucket: real ones have a handful
_SPELLINGS = 8  # places in a string table where one name stands; more than one where it ends longer ones
_MATCHES = 1024  # of a search in one chunk; a file made to match everywhere costs no more


class Malformed(ValueError):
    """Not a file that we can read functions from."""


class Section(NamedTuple):
    name: bytes
    kind: int
    address: int
    offset: int
    size: int
    link: int


class Elf:
    """A 64-bit little-endian ELF file. The descriptor stays the caller's; the headers are read at once."""

    def __init__(self, fd: int) -> None:
        self._fd, self.size = fd, os.fstat(fd).st_size
        ident, _, _, _, _, phoff, self._shoff, _, _, phsize, phnum, shsize, shnum, self._section_names = _EHDR.unpack(
            self.read(0, _EHDR.size)
        )
        if ident[:6] != b"\x7fELF\x02\x01" or phsize != _PHDR.size or phnum > _HEADERS:
            raise Malformed("not a 64-bit little-endian ELF file")
        # (address, size, file offset, flags) of what is mapped from the file
        self.loads: list[tuple[int, int, int, int]] = []
        self._dynamic = (0, 0)
        for kind, flags, offset, address, _, size, _, _ in _PHDR.iter_unpack(self.read(phoff, phnum * _PHDR.size)):
            if kind == _PT_LOAD:
                self.loads.append((address, size, offset, flags))
            elif kind == _PT_DYNAMIC:
                self._dynamic = (offset, size)
        self._section_count = shnum if shsize == _SHDR.size and shnum <= _HEADERS else 0

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises Malformed where the file has none, OSError where it cannot be read."""
        if size < 0 or offset < 0 or offset + size > self.size or size > _TABLE_BYTES:
            raise Malformed("a table lies outside the file")
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise Malformed("the file became shorter")
        return data

    def chunks(self, offset: int, size: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
        """(position, bytes) of a range, a piece at a time; each piece repeats the last `overlap` bytes."""
        if size > _TABLE_BYTES:
            raise Malformed("a table is too large")
        at = 0
        while at < size:
            piece = self.read(offset + at, min(_CHUNK + overlap, size - at))
            yield at, piece
            at += _CHUNK

    def offset(self, address: int, flags: int = 0) -> int:
        """Where in the file a mapped address comes from; `flags`: what its segment must allow."""
        for start, size, offset, allowed in self.loads:
            if start <= address < start + size and allowed & flags == flags:
                return address - start + offset
        raise Malformed("an address that no segment holds")

    def sections(self) -> list[Section]:
        """All sections; none where the file was stripped of their headers."""
        if not self._section_count:
            return []
        rows = list(_SHDR.iter_unpack(self.read(self._shoff, self._section_count * _SHDR.size)))
        if self._section_names >= len(rows):
            return []
        names = self.read(rows[self._section_names][4], min(rows[self._section_names][5], 1 << 16))
        return [
            Section(names[row[0] : max(names.find(b"\0", row[0]), 0)], row[1], row[3], row[4], row[5], row[6])
            for row in rows
        ]

    # --- functions by name ------------------------------------------------------------------------------------

    def _function(self, symbol: tuple[int, int, int, int, int, int]) -> int | None:
        """The file offset of a symbol that is a function defined here."""
        _, info, _, section, address, _ = symbol
        if info & 15 != _STT_FUNC or not section:
            return None
        try:
            return self.offset(address, _EXECUTABLE)
        except Malformed:
            return None

    def exported(self, names: Iterable[bytes]) -> dict[bytes, int]:
        """File offsets of functions that the file gives to others, by the hash table that the dynamic linker itself
        uses: some ten bytes are read for each name, however many there are."""
        entries = dict(_DYN.iter_unpack(self._dynamic_table()))
        if not {_DT_GNU_HASH, _DT_SYMTAB, _DT_STRTAB} <= entries.keys():
            return {}
        table, symbols, strings = (self.offset(entries[tag]) for tag in (_DT_GNU_HASH, _DT_SYMTAB, _DT_STRTAB))
        buckets, first, blooms, shift = struct.unpack("<IIII", self.read(table, 16))
        if not buckets or not blooms:
            return {}
        found: dict[bytes, int] = {}
        for name in names:
            hashed = _gnu_hash(name)
            (bloom,) = struct.unpack("<Q", self.read(table + 16 + (hashed >> 6) % blooms * 8, 8))
            if not (bloom >> (hashed & 63)) & (bloom >> ((hashed >> (shift & 31)) & 63)) & 1:
                continue
            at_buckets = table + 16 + blooms * 8
            at_chains = at_buckets + buckets * 4
            (index,) = struct.unpack("<I", self.read(at_buckets + hashed % buckets * 4, 4))
            if index < first:
                continue
            for _ in range(_CHAIN):
                (other,) = struct.unpack("<I", self.read(at_chains + (index - first) * 4, 4))
                if other | 1 == hashed | 1:
                    symbol = _SYM.unpack(self.read(symbols + index * _SYM.size, _SYM.size))
                    offset = self._function(symbol)
                    if offset is not None and self._is_at(strings + symbol[0], name):
                        found[name] = offset
                        break
                if other & 1:  # the end of its bucket
                    break
                index += 1
        return found

    def _dynamic_table(self) -> bytes:
        offset, size = self._dynamic
        return self.read(offset, min(size - size % _DYN.size, _HEADERS * _DYN.size))

    def _is_at(self, offset: int, name: bytes) -> bool:
        try:
            return self.read(offset, len(name) + 1) == name + b"\0"
        except Malformed:
            return False

    def listed(self, names: Iterable[bytes]) -> dict[bytes, int]:
        """File offsets of functions in the symbol tables that no hash leads into (.symtab; .dynsym of old
        toolchains). Reads them from end to end, by byte search: 20 ms for Node's 10 MB."""
        found: dict[bytes, int] = {}
        sections = self.sections()
        for section in sections:
            if section.kind not in (_SHT_SYMTAB, _SHT_DYNSYM) or section.link >= len(sections):
                continue
            wanted = self._spellings(sections[section.link], set(names) - found.keys())
            if not wanted:
                continue
            for _, piece in self.chunks(section.offset, section.size - section.size % _SYM.size):
                for word, name in wanted.items():
                    for at in matches(piece, word):
                        if at % _SYM.size == 0 and name not in found:
                            offset = self._function(_SYM.unpack_from(piece, at))
                            if offset is not None:
                                found[name] = offset
        return found

    def _spellings(self, strings: Section, names: Iterable[bytes]) -> dict[bytes, bytes]:
        """How a symbol refers to these names: the offset in the string table, as it stands in the file. Linkers let a
        name be the end of a longer one, so each may stand in several places."""
        wanted: dict[bytes, bytes] = {}
        ends = {name: name + b"\0" for name in names}
        longest = max(map(len, ends.values()), default=0)
        for position, piece in self.chunks(strings.offset, strings.size, longest - 1 if longest else 0):
            for name, end in ends.items():
                for at in matches(piece, end):
                    if len(wanted) < _SPELLINGS * len(ends) and position + at < 1 << 32:
                        wanted[struct.pack("<I", position + at)] = name
        return wanted


def matches(piece: bytes, word: bytes) -> Iterator[int]:
    """Where a word stands in a chunk; the first thousand places."""
    at = -1
    for _ in range(_MATCHES):
        at = piece.find(word, at + 1)
        if at < 0:
            return
        yield at


def _gnu_hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value
