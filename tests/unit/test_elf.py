"""Functions in files: found where they are, in whatever way a linker lists them; and no file makes the reader fail."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.kernel import golang, returns
from exporter.kernel.elf import Elf, Malformed

NAMES = (b"SSL_write", b"SSL_read", b"gnutls_record_send")
# Each function is known by a number in its code. A longer name ends in a wanted one; one wanted name is no function.
SOURCE = """
int SSL_write(void) { return 0x1a2b3c01; }
int SSL_read(void) { return 0x1a2b3c02; }
int my_SSL_write(void) { return 0x1a2b3c03; }
int gnutls_record_send = 1;
int main(void) { return SSL_write() + SSL_read() + my_SSL_write(); }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("elf")
    (made / "a.c").write_text(SOURCE)
    return made


def build(folder: Path, *flags: str) -> Path:
    out = folder / ("out" + "".join(flags).replace("/", ""))
    subprocess.run(["cc", "-O1", "-o", out, folder / "a.c", *flags], check=True)
    return out


def opened(path: Path) -> Iterator[Elf]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield Elf(fd)
    finally:
        os.close(fd)


def numbers(elf: Elf, found: dict[bytes, int]) -> dict[bytes, int]:
    """The number that each function returns, read at its offset."""
    return {
        name: next(n for n in range(1, 4) if struct.pack("<I", 0x1A2B3C00 + n) in elf.read(offset, 24))
        for name, offset in found.items()
    }


@pytest.mark.skipif(platform.machine() != "x86_64", reason="constants stand in the code as they are on x86-64 only")
class TestSymbols:
    @pytest.mark.parametrize("flags", [("-shared", "-fPIC"), ("-rdynamic",), ("-shared", "-fPIC", "-s")])
    def test_exported(self, folder: Path, flags: tuple[str, ...]) -> None:
        for elf in opened(build(folder, *flags)):
            assert numbers(elf, elf.exported(NAMES)) == {b"SSL_write": 1, b"SSL_read": 2}

    @pytest.mark.parametrize("flags", [("-shared", "-fPIC"), ("-rdynamic",), ("-no-pie",), ("-static",)])
    def test_listed(self, folder: Path, flags: tuple[str, ...]) -> None:
        for elf in opened(build(folder, *flags)):
            assert numbers(elf, elf.listed(NAMES)) == {b"SSL_write": 1, b"SSL_read": 2}

    def test_an_old_hash_table(self, folder: Path) -> None:
        """Without a GNU hash table the symbols are there all the same."""
        for elf in opened(build(folder, "-shared", "-fPIC", "-s", "-Wl,--hash-style=sysv")):
            assert elf.exported(NAMES) == {}
            assert numbers(elf, elf.listed(NAMES)) == {b"SSL_write": 1, b"SSL_read": 2}

    def test_stripped(self, folder: Path) -> None:
        for elf in opened(build(folder, "-s")):
            assert elf.exported(NAMES) == elf.listed(NAMES) == {}

    def test_what_is_imported_is_not_there(self, folder: Path) -> None:
        (folder / "b.c").write_text("int SSL_write(void); int main(void) { return SSL_write(); }")
        out = folder / "importer"
        subprocess.run(["cc", "-o", out, folder / "b.c", "-Wl,--unresolved-symbols=ignore-all"], check=True)
        for elf in opened(out):
            assert elf.exported(NAMES) == elf.listed(NAMES) == {}


# --- Go -----------------------------------------------------------------------------------------------------------

WRITE, READ = b"crypto/tls.(*Conn).Write", b"crypto/tls.(*Conn).Read"


def go_binary(magic: int = 0xFFFFFFF1, text: int = 0, module: bool = False, text_section: int = 0x401000) -> bytes:
    """A Go binary as far as its function table goes: three functions of 16, 32 and 48 bytes at 0x401000, mapped from
    offset 0x1000 on. Where they begin is said by the header (`text`), by moduledata (`module`) or by .text alone."""
    names = b"\0" + b"\0".join((b"runtime.rt0", READ, WRITE)) + b"\0"
    name_at = [names.index(b"\0" + name + b"\0") + 1 for name in (b"runtime.rt0", WRITE, READ)]
    entries = [0, 16, 48, 96]
    table = 3 * 8 + 4
    descriptions = b"".join(
        struct.pack("<IiIIIIIBBBB", entry, name, *[0] * 9) for entry, name in zip(entries[:3], name_at, strict=True)
    )
    functab = b"".join(struct.pack("<II", entry, table + i * 32) for i, entry in enumerate(entries[:3]))
    functab += struct.pack("<I", entries[3])
    head = struct.Struct("<I2xBB8Q")
    pclntab = head.pack(
        magic, 1, 8, 3, 0, text, head.size, head.size + len(names), 0, 0, head.size + len(names) + 5
    ) + names + bytes(5) + functab + descriptions  # fmt: skip
    pclntab_at, address = 0x2000, 0x402000
    data_at = 0x3000
    data = bytes(64)
    if module:
        data += struct.pack("<QQ", address, address + head.size).ljust(176, b"\0") + struct.pack("<Q", 0x401000)
    strings = b"\0.text\0.gopclntab\0.noptrdata\0.shstrtab\0"
    strings_at = data_at + len(data)
    sections = [
        (0,) * 10,
        (1, 1, 6, text_section, 0x1000, 96, 0, 0, 0, 0),
        (7, 1, 2, address, pclntab_at, len(pclntab), 0, 0, 0, 0),
        (18, 1, 3, 0x403000, data_at, len(data), 0, 0, 0, 0),
        (29, 3, 0, 0, strings_at, len(strings), 0, 0, 0, 0),
    ]
    sections_at = strings_at + len(strings)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, 0x401000, 64, sections_at, 0, 64, 56, 1, 64, len(sections), 4
    )
    program = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0, 0x4000, 0x4000, 0x1000)
    image = bytearray((header + program).ljust(data_at, b"\0"))
    image[pclntab_at : pclntab_at + len(pclntab)] = pclntab
    return bytes(image) + data + strings + b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in sections)


class TestGo:
    @pytest.mark.parametrize(
        "binary",
        [
            go_binary(magic=0xFFFFFFF0, text=0x401000),  # Go 1.18
            go_binary(text=0x401000, text_section=0x400F00),  # Go 1.20, C code before Go's
            go_binary(module=True, text_section=0x400F00),  # Go 1.26, likewise
            go_binary(),  # only the section says it
        ],
    )
    def test_functions(self, tmp_path: Path, binary: bytes) -> None:
        (tmp_path / "go").write_bytes(binary)
        for elf in opened(tmp_path / "go"):
            assert golang.functions(elf, (WRITE, READ, b"main.main")) == {WRITE: (0x1010, 32), READ: (0x1030, 48)}

    @pytest.mark.parametrize("magic", [0xFFFFFFFA, 0xFFFFFFFB, 0])
    def test_older_go(self, tmp_path: Path, magic: int) -> None:
        (tmp_path / "go").write_bytes(go_binary(magic=magic))
        for elf in opened(tmp_path / "go"):
            assert golang.functions(elf, (WRITE,)) is None

    def test_not_go(self) -> None:
        for elf in opened(Path("/proc/self/exe")):
            assert golang.functions(elf, (WRITE,)) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
def test_returns() -> None:
    """c3 is a return only where an instruction begins."""
    code = bytes.fromhex("b8c3c3c3c3" "c3" "90" "48b8c3c3c3c3c3c3c3c3" "c3" "f3c3" "cc")  # fmt: skip
    assert returns.find([code, b"\xc3", b""]) == [[5, 17], [0], []]


def test_returns_of_what_is_no_code() -> None:
    assert returns.find([bytes.fromhex("c30f0f0f0fff")]) == [[]]


# --- whatever it is -----------------------------------------------------------------------------------------------


def look(path: Path) -> None:
    """All that is done with an unknown file."""
    for elf in opened(path):
        elf.exported(NAMES)
        elf.listed(NAMES)
        golang.functions(elf, (WRITE, READ))


def test_no_file_makes_it_fail(folder: Path, tmp_path: Path) -> None:
    """Cut, and with bytes changed where the structure is: Malformed, or an answer; nothing else, and soon."""
    dice = random.Random(23)
    whole = [build(folder, "-shared", "-fPIC").read_bytes(), go_binary(module=True), go_binary(text=0x401000)]
    target = tmp_path / "file"
    for original in whole:
        hot = [at for at in range(len(original)) if original[at]]
        for _ in range(700):
            data = bytearray(original)
            if dice.random() < 0.2:
                del data[dice.randrange(len(data)) :]
            for _ in range(dice.randrange(1, 6)):
                if data:
                    at = min(dice.choice(hot), len(data) - 1)
                    value = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
                    data[at : at + dice.choice((1, 1, 4, 8))] = bytes([value]) * dice.choice((1, 1, 4, 8))
            target.write_bytes(data)
            with contextlib.suppress(Malformed):
                look(target)


@pytest.mark.parametrize("text", [b"", b"\x7fELF", b"not an ELF file" * 1000, b"\x7fELF\x02\x01" + b"\xff" * 400])
def test_other_files(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(Malformed):
        look(tmp_path / "file")


def test_a_table_of_terabytes(tmp_path: Path) -> None:
    """A sparse file that is as large as its headers say."""
    path = tmp_path / "sparse"
    path.write_bytes(go_binary())
    rows = bytearray(path.read_bytes())
    sections_at = struct.unpack_from("<Q", rows, 40)[0]
    struct.pack_into("<Q", rows, sections_at + 2 * 64 + 32, 1 << 40)  # .gopclntab's size
    struct.pack_into("<Q", rows, 0x2000 + 8 + 7 * 8, 1 << 12)
    path.write_bytes(rows)
    os.truncate(path, 1 << 41)
    with pytest.raises(Malformed):
        look(path)
