"""Which plaintext functions a file has, and the probes that sit on them.

In: a descriptor of a file that some process has mapped as code. Out: a coverage class and probes. A probe sits on a
file, which processes outside the watched subtree may share; the program asks the kernel whether the task is in the
subtree and reports no other (bpf/tls.h). Not its job: which processes there are (tls_processes.py).
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import resource
import stat
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import NamedTuple

from exporter.health import features, losses
from exporter.kernel import bpf, golang, returns
from exporter.kernel.elf import Elf, Malformed

log = logging.getLogger("ebfw.tls")

FILES = 256  # probed at once
_REMEMBERED = 1024  # files that were examined; an examination takes a millisecond, a Go binary's 100
_UNUSED_SECONDS = 8.0  # after which a file that nobody maps loses its probes
_DESCRIPTORS = 8192  # FILES with a dozen links each; the usual limit of 1,024 is too low

OPENSSL, BORINGSSL, GNUTLS, GO, STATIC, UNPROBED, NONE, UNKNOWN = (
    "openssl",
    "boringssl",
    "gnutls",
    "go",
    "openssl_static",
    "unprobed",
    "none",
    "unknown",
)
# The classes of ebfw.tls.connections, best evidence first: of two in one process the first counts.
COVERAGE: dict[str, str] = {
    GO: "Go's crypto/tls (Go 1.18 or newer, stripped or not): requests are seen",
    STATIC: "OpenSSL inside the program or another library, found by its symbols (Node): requests are seen",
    OPENSSL: "the library libssl: requests are seen",
    BORINGSSL: "BoringSSL, found by its symbols: requests are seen",
    GNUTLS: "the library libgnutls: requests are seen",
    UNPROBED: "one of the above whose functions could not be probed: requests are not seen",
    NONE: "no function that we know: rustls, NSS, Java, OpenSSL inside a stripped program; requests are not seen",
    UNKNOWN: "the process was gone before it was looked at: requests may have been missed",
}

_READ = (("ssl_read", False), ("ssl_read_return", True))
_WRITE = (("ssl_write_return", True), ("ssl_write", False))
# Function -> what runs there: program, and whether where the function returns. In the order in which they are probed:
# what sends is last. A request that is seen while the answer is not would be given the answer of the next one.
FUNCTIONS: dict[bytes, tuple[tuple[str, bool], ...]] = {
    b"SSL_free": (("ssl_free", False),),
    b"SSL_read": _READ,
    b"SSL_read_ex": (("ssl_read_ex", False), ("ssl_read_return", True)),
    b"SSL_write": _WRITE,
    b"SSL_write_ex": (("ssl_write_return", True), ("ssl_write_ex", False)),
    # The same arguments and results as OpenSSL's
    b"gnutls_deinit": (("ssl_free", False),),
    b"gnutls_record_recv": _READ,
    b"gnutls_record_send": _WRITE,
}
_MARK = b"SSL_CTX_set_grease_enabled"  # BoringSSL has it, OpenSSL has not
_SENDS = {b"SSL_write", b"gnutls_record_send"}  # without one of them a file has nothing for us
_GO_WRITE, _GO_READ, _GO_CLOSE = b"crypto/tls.(*Conn).Write", b"crypto/tls.(*Conn).Read", b"crypto/tls.(*Conn).Close"

_LIBSSL = re.compile(r"/libssl[^/]*\.so[^/]*$")
_SYSTEM = re.compile(r"/lib(ssl|gnutls)\.so[.0-9]*$")
_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib64", "/lib")
_OVERLAYFS = 0x794C7630

File = tuple[int, int, int, int]  # what a file is known by: device, inode, time of change, size


class Point(NamedTuple):
    """Where a program goes."""

    program: str
    offset: int  # in the file
    at_return: bool = False


class Found(NamedTuple):
    coverage: str
    points: tuple[Point, ...]
    go: Mapping[bytes, golang.Function] = MappingProxyType({})  # of a Go binary, whose points are not known yet


class _Probed:
    __slots__ = ("coverage", "fds", "keep", "used")

    def __init__(self, coverage: str, fds: list[int], keep: bool) -> None:
        self.coverage, self.fds, self.keep = coverage, fds, keep
        self.used = time.monotonic()


class TlsLibraries:
    """Probed files. `programs`: descriptors by name. One thread calls; a helper thread attaches what takes long."""

    def __init__(self, programs: Mapping[str, int]) -> None:
        self._programs = programs
        self._probed: dict[File, _Probed] = {}
        self._known: OrderedDict[File, Found] = OrderedDict()
        self._refused: OrderedDict[File, None] = OrderedDict()
        self._coming: set[File] = set()  # Go binaries that the helper thread is at
        self._multi = True  # uprobe_multi links, until the kernel says that it has none
        self._slow = ThreadPoolExecutor(1, "tls-probes")
        _allow_descriptors()

    def __len__(self) -> int:
        return len(self._probed)

    def by_coverage(self) -> dict[str, int]:
        """Files with probes, by class; all classes that have any functions."""
        counts = dict.fromkeys((GO, STATIC, OPENSSL, BORINGSSL, GNUTLS), 0)
        for probed in list(self._probed.values()):
            counts[probed.coverage] += 1
        return counts

    # --- files ----------------------------------------------------------------------------------------------------

    def examine(self, path: str, name: str, keep: bool = False) -> tuple[File | None, str]:
        """Put probes on a file if it has functions for them: what it is known by (None where it has none) and its
        class. `path`: how to open it; `name`: what its process calls it."""
        try:
            with _regular(path) as fd:
                file = identity(fd)
                if file in self._probed:
                    self._probed[file].keep |= keep
                    return file, self._probed[file].coverage
                found = self._found(file, fd, name)
                if found.coverage == NONE:
                    return None, NONE
                if file in self._refused:
                    return file, UNPROBED
                if file in self._coming:
                    return file, found.coverage
                return file, self._attach(file, fd, found, keep, name)
        except (OSError, Malformed):
            if "ssl" in name or "gnutls" in name:
                losses.add("attribution", "tls_library_unreadable")
            return None, NONE

    def _found(self, file: File, fd: int, name: str) -> Found:
        found = self._known.get(file)
        if found is None:
            found = self._known[file] = examine(fd, name, self._programs)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found

    def _attach(self, file: File, fd: int, found: Found, keep: bool, name: str) -> str:
        if len(self._probed) + len(self._coming) >= FILES and not self._make_room():
            losses.add("table", "tls_libraries_full")
            return UNPROBED
        if found.go:
            self._coming.add(file)
            self._slow.submit(self._attach_go, file, os.dup(fd), found, keep, name)
            return found.coverage
        return self._attach_points(file, fd, found, keep, name)

    def _attach_go(self, file: File, fd: int, found: Found, keep: bool, name: str) -> None:
        """In the helper thread: a child process finds out where Go's Read returns."""
        try:
            elf = Elf(fd)
            read = found.go[_GO_READ]
            ends = returns.find([elf.read(read.offset, read.size)])[0]
            if not ends:
                raise Malformed("no return instruction")
            points = [Point("go_close", found.go[_GO_CLOSE].offset)] if _GO_CLOSE in found.go else []
            points += [Point("go_read", read.offset), *(Point("go_read_return", read.offset + at) for at in ends)]
            points += [Point("go_write", found.go[_GO_WRITE].offset)]
            found = self._known[file] = Found(GO, tuple(points))
            self._attach_points(file, fd, found, keep, name)
        except (OSError, Malformed):
            losses.add("attribution", "go_returns_unknown")
            self._refuse(file)
        finally:
            os.close(fd)
            self._coming.discard(file)

    def _attach_points(self, file: File, fd: int, found: Found, keep: bool, name: str) -> str:
        fds: list[int] = []
        try:
            self._put(fds, fd, found.points)
        except OSError as error:
            _close(fds)
            if not features.active("tls_uprobes"):
                features.set("tls_uprobes", False, f"HTTP requests inside TLS ({bpf.why(error, 'putting a uprobe')})")
            losses.add("attribution", "tls_library_refused")
            self._refuse(file)
            return UNPROBED
        self._probed[file] = _Probed(found.coverage, fds, keep)
        features.set("tls_uprobes", True, "")
        log.debug("probes are on %s (%s)", name, found.coverage)
        return found.coverage

    def _refuse(self, file: File) -> None:
        self._refused[file] = None
        if len(self._refused) > _REMEMBERED:
            self._refused.popitem(last=False)

    def _put(self, fds: list[int], fd: int, points: tuple[Point, ...]) -> None:
        """One link for each program, or one perf event for each point. The descriptor's own path: the file's may be
        in another mount namespace, or gone."""
        path = f"/proc/self/fd/{fd}"
        groups: dict[tuple[str, bool], list[int]] = {}
        for point in points:
            groups.setdefault((point.program, point.at_return), []).append(point.offset)
        for (program, at_return), offsets in groups.items():
            if self._multi:
                try:
                    fds.append(bpf.uprobe_multi(self._programs[program], path, offsets, at_return))
                    continue
                except OSError:
                    if fds:
                        raise
                    fds.append(bpf.uprobe(self._programs[program], path, offsets.pop(0), at_return))
                    self._multi = False  # the kernel's fault: the place is good enough for a perf event
            fds.extend(bpf.uprobe(self._programs[program], path, offset, at_return) for offset in offsets)

    # --- and their end --------------------------------------------------------------------------------------------

    def used(self, files: set[File]) -> None:
        """These files are mapped by some process now. What was not for a while loses its probes."""
        now = time.monotonic()
        for file, probed in list(self._probed.items()):
            if file in files or probed.keep:
                probed.used = now
            elif now - probed.used > _UNUSED_SECONDS:
                self._drop(file)

    def _make_room(self) -> bool:
        """Drop the file that has been without a process for longest; False where each has one."""
        now = time.monotonic()
        unused = [
            (probed.used, file)
            for file, probed in list(self._probed.items())
            if not probed.keep and probed.used < now - 6
        ]
        if unused:
            self._drop(min(unused)[1])
        return bool(unused)

    def _drop(self, file: File) -> None:
        # The kernel waits for a grace period with each: 40 to 140 ms.
        self._slow.submit(_close, self._probed.pop(file).fds)

    def system(self) -> None:
        """Probe the host's own libraries, for good: for an agent that watches the whole host."""
        for path in _system_libraries():
            self.examine(path, path, keep=True)

    def close(self) -> None:
        """All at once: grace periods that run side by side take as long as one."""
        self._slow.shutdown(wait=True, cancel_futures=False)
        fds = [fd for probed in self._probed.values() for fd in probed.fds]
        self._probed.clear()
        if fds:
            with ThreadPoolExecutor(min(32, len(fds))) as pool:
                pool.map(os.close, fds)


def examine(fd: int, name: str, programs: Mapping[str, int]) -> Found:
    """The functions of a file, as far as there are programs for them. `name` tells libssl from what holds a copy of
    it. Raises Malformed or OSError."""
    elf = Elf(fd)
    wanted = (*FUNCTIONS, _MARK)
    symbols = elf.exported(wanted)
    if "libgnutls-openssl" in name:  # SSL_write there is a wrapper: libgnutls would tell the same once more
        return Found(NONE, ())
    if not symbols:
        found = golang.functions(elf, (_GO_WRITE, _GO_READ, _GO_CLOSE))
        if found is not None:
            return _go(found, programs)
        symbols = elf.listed(wanted)
    if not symbols.keys() & _SENDS:
        return Found(NONE, ())
    points = tuple(
        Point(program, symbols[function], at_return)
        for function, probes in FUNCTIONS.items()
        for program, at_return in probes
        if function in symbols and program in programs
    )
    if b"gnutls_record_send" in symbols:
        return Found(GNUTLS, points)
    if _MARK in symbols:
        return Found(BORINGSSL, points)
    return Found(OPENSSL if _LIBSSL.search(name) else STATIC, points)


def _go(found: dict[bytes, golang.Function], programs: Mapping[str, int]) -> Found:
    if not {_GO_WRITE, _GO_READ} <= found.keys() or "go_write" not in programs:
        return Found(NONE, ())
    return Found(GO, (), found)


@contextmanager
def _regular(path: str) -> Iterator[int]:
    """A regular file, open for reading. What a process has mapped may be a device, and opening one does things."""
    where = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(where).st_mode):
            raise Malformed("not a regular file")
        fd = os.open(f"/proc/self/fd/{where}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(where)
    try:
        yield fd
    finally:
        os.close(fd)


def identity(fd: int) -> File:
    """What the kernel would call the same file. On overlayfs each container has a device number of its own, while the
    uprobe sits on the inode below, which the containers of one image share: two probes there would report everything
    twice. Layers on one file system, the rule, keep the inode's number; so there the device does not count."""
    status = os.fstat(fd)
    return (
        0 if _filesystem(fd) == _OVERLAYFS else status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_size,
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _filesystem(fd: int) -> int:
    """f_type of statfs(2), the first word of its answer on 64-bit machines."""
    answer = (ctypes.c_uint64 * 32)()
    return int(answer[0]) if _libc.fstatfs(fd, ctypes.byref(answer)) == 0 else 0


def _system_libraries() -> Iterator[str]:
    for folder in _FOLDERS:
        with suppress(OSError):
            for name in sorted(os.listdir(folder)):
                if _SYSTEM.search("/" + name):
                    yield os.path.join(folder, name)


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if 0 <= soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
