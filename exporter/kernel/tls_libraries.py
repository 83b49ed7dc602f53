"""Finds OpenSSL in the processes of a cgroup subtree and puts the TLS probe on it.

In: the pids of the subtree. Out: uprobes on what writes, reads and frees, one set a library file. A probe sits on a
file, which processes outside may share; the program asks the kernel whether the task is in the subtree and reports no
other (bpf/tls.h). Where the whole host is watched, the system's own libraries are probed before anyone maps them.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from exporter.health import features, losses
from exporter.kernel import bpf

# Function -> program, and whether it runs where the function returns.
PROBES: dict[bytes, tuple[tuple[str, bool], ...]] = {
    b"SSL_write": (("ssl_write", False),),
    b"SSL_write_ex": (("ssl_write", False),),
    b"SSL_read": (("ssl_read", False), ("ssl_read_return", True)),
    b"SSL_read_ex": (("ssl_read_ex", False), ("ssl_read_return", True)),
    b"SSL_free": (("ssl_free", False),),
}
LIBRARIES = 256  # probed at once; a library is dropped when no process maps it any more
_SSL = re.compile(r"/libssl[^/]*\.so[^/]*$")
_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib64", "/lib")


class Library(NamedTuple):
    device: int
    inode: int


class TlsLibraries:
    """`programs`: descriptors of the programs of probes.TLS_PROBES. `everywhere`: the whole host is watched."""

    def __init__(self, programs: dict[str, int], cgroup: Path, everywhere: bool) -> None:
        self._programs, self._cgroup, self._everywhere = programs, cgroup, everywhere
        self._probes: dict[Library, list[int]] = {}
        self._hopeless: set[Library] = set()
        if everywhere:
            for path in self._system_libraries():
                self._probe(path)

    def __len__(self) -> int:
        return sum(map(len, self._probes.values()))

    @staticmethod
    def _system_libraries() -> Iterator[str]:
        for folder in _FOLDERS:
            try:
                entries = sorted(os.listdir(folder))
            except OSError:
                continue
            for name in entries:
                if _SSL.search("/" + name):
                    yield os.path.join(folder, name)

    def pids(self) -> Iterator[int]:
        """Processes in the subtree now."""
        for folder, _, _ in os.walk(self._cgroup):
            try:
                with open(os.path.join(folder, "cgroup.procs"), encoding="ascii") as text:
                    yield from map(int, text.read().split())
            except (OSError, ValueError):
                continue  # removed meanwhile, or a threaded cgroup

    def scan(self) -> None:
        """Look at every process of the subtree; drop what nobody maps any more."""
        mapped: set[Library] = set()
        for pid in self.pids():
            mapped.update(self.look_at(pid))
        if not self._everywhere:
            for library in set(self._probes) - mapped:
                for fd in self._probes.pop(library):
                    os.close(fd)

    def look_at(self, pid: int) -> Iterable[Library]:
        """The TLS libraries that a process maps; probes those that have no probe yet."""
        found: dict[Library, str] = {}
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as text:
                for line in text:
                    if "libssl" not in line:
                        continue
                    fields = line.split(None, 5)
                    if len(fields) == 6 and _SSL.search(fields[5].rstrip("\n")):
                        major, minor = fields[3].split(":")
                        library = Library(os.makedev(int(major, 16), int(minor, 16)), int(fields[4]))
                        found[library] = fields[0]
        except OSError:
            return ()
        for library, span in found.items():
            if library not in self._probes and library not in self._hopeless:
                self._probe(f"/proc/{pid}/map_files/{span}", library)
        return found

    def _probe(self, path: str, library: Library | None = None) -> None:
        try:
            status = os.stat(path)
            where = library or Library(status.st_dev, status.st_ino)
            if where in self._probes or where in self._hopeless:
                return
            if len(self._probes) >= LIBRARIES:
                losses.add("table", "tls_libraries_full")
                return
            offsets = symbol_offsets(path, PROBES)
        except (OSError, ValueError, struct.error, IndexError):
            losses.add("attribution", "tls_library_unreadable")
            if library is not None and len(self._hopeless) < LIBRARIES:
                self._hopeless.add(library)
            return
        fds: list[int] = []
        try:
            for symbol, offset in offsets.items():
                for program, returns in PROBES[symbol]:
                    fds.append(bpf.uprobe(self._programs[program], path, offset, returns))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            features.set("tls_uprobes", False, f"HTTP requests inside TLS ({bpf.why(error, 'putting a uprobe')})")
            if len(self._hopeless) < LIBRARIES:
                self._hopeless.add(where)
            return
        self._probes[where] = fds
        features.set("tls_uprobes", True, "")

    def close(self) -> None:
        for fds in self._probes.values():
            for fd in fds:
                os.close(fd)
        self._probes.clear()


def symbol_offsets(path: str, symbols: Iterable[bytes]) -> dict[bytes, int]:
    """File offsets of functions in a 64-bit little-endian ELF library's dynamic symbol table (System V ABI, chapters 4
    and 5). Only those found. Raises ValueError where the file is none."""
    wanted, found = set(symbols), {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        program_at, section_at = struct.unpack_from("<QQ", data, 32)
        program_size, programs, section_size, sections = struct.unpack_from("<HHHH", data, 54)
        loads = []
        for index in range(programs):
            kind, flags, offset, address, _, size = struct.unpack_from(
                "<IIQQQQ", data, program_at + index * program_size
            )
            if kind == 1 and flags & 1:  # PT_LOAD, executable
                loads.append((address, size, offset))
        for index in range(sections):
            head = section_at + index * section_size
            if struct.unpack_from("<I", data, head + 4)[0] != 11:  # SHT_DYNSYM
                continue
            offset, size, link = struct.unpack_from("<QQI", data, head + 24)
            strings, strings_size = struct.unpack_from("<QQ", data, section_at + link * section_size + 24)
            for at in range(offset, offset + size, 24):
                name_at, info, _, where, address = struct.unpack_from("<IBBHQ", data, at)
                if info & 15 != 2 or not where or name_at >= strings_size:  # STT_FUNC, defined
                    continue
                end = data.find(b"\0", strings + name_at, strings + strings_size)
                name = data[strings + name_at : end]
                if name in wanted:
                    for base, length, file_at in loads:
                        if base <= address < base + length:
                            found[name] = address - base + file_at
    return found
