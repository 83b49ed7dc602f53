"""Finds functions in a Go binary, stripped or not: the runtime's own function table (.gopclntab) is always there.

In: an ELF file. Out: for each name, where the function lies in the file and how long it is. Go 1.18 and newer (two
magic numbers), 64-bit little-endian. Source: the Go distribution, runtime/symtab.go (pcHeader, moduledata, functab)
and internal/abi/symtab.go. Not its job: what to do with a function, or where it returns (returns.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from exporter.kernel.elf import Elf, Malformed, Section, matches

_MAGICS = (0xFFFFFFF0, 0xFFFFFFF1)  # Go 1.18, Go 1.20
_HEADER = struct.Struct("<I2xBB8Q")
_TEXT_IN_MODULE = 176  # moduledata.text: a pointer, six slices, findfunctab, minpc and maxpc lie before it
_RELATIVES = (8, 1027)  # R_X86_64_RELATIVE, R_AARCH64_RELATIVE
_CODE_BYTES = 1 << 16  # a longer function is none of those that we look for
_CANDIDATES = 1024


class Function(NamedTuple):
    offset: int  # in the file
    size: int


def functions(elf: Elf, names: Iterable[bytes]) -> dict[bytes, Function] | None:
    """Those of the functions ("crypto/tls.(*Conn).Write") that the binary has; None where it is not a Go binary.
    Raises Malformed where its table contradicts itself."""
    sections = elf.sections()
    section = next((s for s in sections if s.name.endswith(b".gopclntab")), None)
    if section is None or section.size < _HEADER.size:
        return None
    magic, _, pointer, count, _, text, names_at, names_end, _, _, table_at = _HEADER.unpack(
        elf.read(section.offset, _HEADER.size)
    )
    if magic not in _MAGICS or pointer != 8:
        return None
    if not _HEADER.size <= names_at <= names_end <= table_at <= section.size or count > section.size // 8:
        raise Malformed("Go's function table contradicts itself")
    base, room = section.offset + table_at, section.size - table_at
    starts = _name_offsets(elf, section.offset + names_at, names_end - names_at, set(names))
    found: dict[bytes, Function] = {}
    for name, start in starts.items():
        place = _entry(elf, base, room, count, start)
        if place is None:  # a name that was inlined everywhere
            continue
        text = text or _text_start(elf, sections, section, names_at)
        address = text + place[0]
        size = place[1] - place[0]
        if 0 < size <= _CODE_BYTES:
            found[name] = Function(elf.offset(address, 1), size)
    return found


def _name_offsets(elf: Elf, offset: int, size: int, names: set[bytes]) -> dict[bytes, int]:
    """Where each name begins in the table of names."""
    found: dict[bytes, int] = {}
    longest = max(map(len, names), default=0) + 2
    for position, piece in elf.chunks(offset, size, longest):
        for name in names - found.keys():
            at = piece.find(b"\0" + name + b"\0")
            if at >= 0:
                found[name] = position + at + 1
        if len(found) == len(names):
            break
    return found


def _entry(elf: Elf, base: int, room: int, count: int, name: int) -> tuple[int, int] | None:
    """Begin and end, from the start of the text, of the function whose name stands at `name`.

    Its description (entry, name, ...) is found by byte search over all descriptions and then proven: the sorted table
    of entries must lead back to it. A loop over the 100,000 functions of a large binary would take 50 ms."""
    wanted = struct.pack("<I", name)
    table = (count * 2 + 1) * 4
    tries = 0
    for position, piece in elf.chunks(base, room, 8):
        for at in matches(piece, wanted):
            description = position + at - 4
            if description >= table and description % 4 == 0 and at >= 4 and tries < _CANDIDATES:
                tries += 1
                (entry,) = struct.unpack_from("<I", piece, at - 4)
                end = _lookup(elf, base, count, entry, description)
                if end is not None:
                    return entry, end
    return None


def _lookup(elf: Elf, base: int, count: int, entry: int, description: int) -> int | None:
    """The end of the function that begins at `entry`, if the table says that `description` is its own."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        here, at, following = struct.unpack("<III", elf.read(base + middle * 8, 12))
        if here == entry:
            return following if at == description else None
        low, high = (middle + 1, high) if here < entry else (low, middle)
    return None


def _text_start(elf: Elf, sections: list[Section], table: Section, names_at: int) -> int:
    """The address that entries count from. Until Go 1.25 the table's header says it; then it is in the runtime's
    moduledata, which begins with pointers to the table and to its names. In a position-independent binary both are
    relocations. Without either it is the text section's, which is right where the C linker added nothing to it."""
    pointers = struct.pack("<QQ", table.address, table.address + names_at)
    for section in sections:
        if section.name in (b".go.module", b".noptrdata", b".data", b".data.rel.ro"):
            for _, piece in elf.chunks(section.offset, section.size, _TEXT_IN_MODULE + 8):
                at = piece.find(pointers)
                if 0 <= at <= len(piece) - _TEXT_IN_MODULE - 8:
                    text: int = struct.unpack_from("<Q", piece, at + _TEXT_IN_MODULE)[0]
                    return text
    for section in sections:
        if section.kind == 4:  # SHT_RELA
            for module in _relocated_to(elf, section, table.address):
                if _relocation(elf, section, module + 8) == table.address + names_at:
                    text = _relocation(elf, section, module + _TEXT_IN_MODULE)
                    if text:
                        return text
    return next((section.address for section in sections if section.name == b".text"), 0)


def _relocated_to(elf: Elf, section: Section, address: int) -> list[int]:
    """Where relocations put this address."""
    found: list[int] = []
    for kind in _RELATIVES:
        wanted = struct.pack("<QQ", kind, address)
        for _, piece in elf.chunks(section.offset, section.size - section.size % 24):
            for at in matches(piece, wanted):
                if at % 24 == 8 and len(found) < 16:
                    found.append(struct.unpack_from("<Q", piece, at - 8)[0])
    return found


def _relocation(elf: Elf, section: Section, where: int) -> int:
    """What a relocation puts at this address; 0 where there is none."""
    wanted = struct.pack("<Q", where)
    for _, piece in elf.chunks(section.offset, section.size - section.size % 24):
        for at in matches(piece, wanted):
            if at % 24 == 0 and struct.unpack_from("<Q", piece, at + 8)[0] in _RELATIVES:
                value: int = struct.unpack_from("<Q", piece, at + 16)[0]
                return value
    return 0
