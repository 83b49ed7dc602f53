"""A thin binding to bpf(2) and perf_event_open(2): file descriptors and bytes in, file descriptors and bytes out.

Every call raises OSError as the kernel answered (`why()` turns it into a sentence); nothing is retried. What the
calls are for is decided elsewhere. Command numbers and attribute layouts: include/uapi/linux/bpf.h, which is ABI.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from exporter.errors import KernelError, NotPermitted, Unsupported

_libc = ctypes.CDLL(None, use_errno=True)
_SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}
_NR_BPF, _NR_PERF_EVENT_OPEN = _SYSCALLS.get(platform.machine(), (0, 0))

(
    _MAP_CREATE,
    _MAP_LOOKUP,
    _MAP_UPDATE,
    _MAP_DELETE,
    _MAP_NEXT,
    _PROG_LOAD,
    _OBJ_PIN,
    _OBJ_GET,
) = range(8)
_TEST_RUN, _OBJ_INFO, _RAW_TRACEPOINT_OPEN, _BTF_LOAD = 10, 15, 17, 18
_LOOKUP_BATCH, _LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 24, 28, 29, 34

# enum bpf_map_type
HASH, ARRAY, PROG_ARRAY, PERCPU_ARRAY, CGROUP_ARRAY, LRU_HASH, LPM_TRIE = 1, 2, 3, 6, 8, 9, 11
STACK, SK_STORAGE, RINGBUF = 23, 24, 27
# map_flags
NO_PREALLOC, MMAPABLE = 1, 1 << 10

# enum bpf_prog_type and enum bpf_attach_type, of those we use
KPROBE, CGROUP_SKB, CGROUP_SOCK, SOCK_OPS, RAW_TRACEPOINT, CGROUP_SOCK_ADDR = 2, 8, 9, 13, 17, 18
INGRESS, EGRESS, SOCK_OPS_ATTACH = 0, 1, 3
CONNECT4, CONNECT6, SENDMSG4, SENDMSG6, SOCK_RELEASE, UPROBE_MULTI = 10, 11, 14, 15, 34, 48

LICENSE = b"GPL"


def why(error: OSError, doing: str) -> KernelError:
    """An OSError of this module as an error for people: what was tried, and what to do."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            f"{doing}: the kernel does not permit it. Run as root, or give CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN "
            "and CAP_SYS_ADMIN; in a container: privileged."
        )
    if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, 524):
        return Unsupported(f"{doing}: this kernel ({platform.release()}) does not support it.")
    return KernelError(f"{doing}: {error.strerror or os.strerror(error.errno or 0)}")


def lift_memlock_limit() -> None:
    """Before 5.11 BPF memory counts against RLIMIT_MEMLOCK (64 KiB by default). Some containers refuse; then the
    first map that does not fit says so."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _call(command: int, attributes: bytes) -> tuple[int, ctypes.Array[ctypes.c_char]]:
    if not _NR_BPF:
        raise OSError(errno.ENOSYS, f"ebfw does not know the system calls of {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _libc.syscall(_NR_BPF, command, buffer, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result, buffer


def _path(path: str) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(os.fsencode(path))


# --- maps ---------------------------------------------------------------------------------------------------------


def map_create(
    kind: int,
    key: int,
    value: int,
    entries: int,
    flags: int = 0,
    name: str = "",
    btf: tuple[int, int, int] = (0, 0, 0),
) -> int:
    """A new map's descriptor. `btf`: (BTF fd, key type id, value type id), which only socket storage needs."""
    attributes = struct.pack(
        "<IIIIIII16sIIIIIQ", kind, key, value, entries, flags, 0, 0, name.encode()[:15], 0, *btf, 0, 0
    )
    return _call(_MAP_CREATE, attributes)[0]


def btf_for_storage(value_size: int) -> int:
    """A BTF object with a 32-bit int (id 1), a byte (id 2) and an array of bytes (id 3) of the given size.

    Socket storage maps must describe their key and value; the kernel looks at no more than their sizes."""

    def integer(name: int, size: int) -> bytes:
        return struct.pack("<IIII", name, 1 << 24, size, size * 8)

    types = integer(1, 4) + integer(5, 1) + struct.pack("<IIIIII", 0, 3 << 24, 0, 2, 1, value_size)
    strings = b"\0u32\0u8\0"
    blob = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
    data = ctypes.create_string_buffer(blob, len(blob))
    return _call(_BTF_LOAD, struct.pack("<QQIII", ctypes.addressof(data), 0, len(blob), 0, 0) + bytes(4))[0]


def _element(command: int, fd: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None, flags: int = 0) -> None:
    # addressof, for ctypes.cast would leave a cycle behind: garbage of each call, until the collector comes.
    key_buffer = ctypes.create_string_buffer(key, len(key)) if key else None
    key_at = ctypes.addressof(key_buffer) if key_buffer is not None else 0
    value_at = ctypes.addressof(value) if value is not None else 0
    _call(command, struct.pack("<IIQQQ", fd, 0, key_at, value_at, flags))


def map_lookup(fd: int, key: bytes, size: int) -> bytes | None:
    value = ctypes.create_string_buffer(size)
    try:
        _element(_MAP_LOOKUP, fd, key, value)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Set an element; for a stack (key b""), push one."""
    _element(_MAP_UPDATE, fd, key, ctypes.create_string_buffer(value, len(value)), flags)


def map_delete(fd: int, key: bytes) -> bool:
    try:
        _element(_MAP_DELETE, fd, key, None)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_push_range(fd: int, first: int, after: int) -> None:
    """Push the numbers first..after-1 on a stack of u32, the highest first. One buffer for all: 0.5 us each."""
    value = ctypes.c_uint32()
    attributes = ctypes.create_string_buffer(struct.pack("<IIQQQ", fd, 0, 0, ctypes.addressof(value), 0), 32)
    call, number = _libc.syscall, _NR_BPF
    for slot in range(after - 1, first - 1, -1):
        value.value = slot
        if call(number, _MAP_UPDATE, attributes, 32) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def map_keys(fd: int, size: int) -> Iterator[bytes]:
    """Every key, one call each; for small maps and where batches are missing."""
    key: bytes | None = None
    following = ctypes.create_string_buffer(size)
    while True:
        try:
            _element(_MAP_NEXT, fd, key or b"", following)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        key = following.raw
        yield key


class BatchReader:
    """Reads a whole hash map, thousands of entries a call, into buffers that are kept between reads.

    A hash batch ends at a bucket's end and fails with ENOSPC when a bucket does not fit: `chunk` is far more than
    any bucket of a hash holds."""

    def __init__(self, fd: int, key: int, value: int, chunk: int = 4096) -> None:
        self._fd, self._key, self._value, self._chunk = fd, key, value, chunk
        self._keys = ctypes.create_string_buffer(key * chunk)
        self._values = ctypes.create_string_buffer(value * chunk)
        self._position = ctypes.create_string_buffer(max(key, 8))

    def chunks(self) -> Iterator[tuple[memoryview, memoryview, int]]:
        """(keys, values, how many) for each chunk; the views are valid until the next one is asked for."""
        into = 0
        while True:
            attributes = struct.pack(
                "<QQQQIIQQ",
                into,
                ctypes.addressof(self._position),
                ctypes.addressof(self._keys),
                ctypes.addressof(self._values),
                self._chunk,
                self._fd,
                0,
                0,
            )
            buffer = ctypes.create_string_buffer(attributes, len(attributes))
            result = _libc.syscall(_NR_BPF, _LOOKUP_BATCH, buffer, len(attributes))
            code = ctypes.get_errno() if result < 0 else 0
            if code and code != errno.ENOENT:
                raise OSError(code, os.strerror(code))
            count = struct.unpack_from("<I", buffer, 32)[0]
            if count:
                yield memoryview(self._keys), memoryview(self._values), count
            if code:  # ENOENT: that was the last
                return
            into = ctypes.addressof(self._position)


# --- programs, links, pins ----------------------------------------------------------------------------------------


class Refused(KernelError):
    """The verifier refused a program; `log` says why."""

    def __init__(self, text: str, log: str) -> None:
        super().__init__(text)
        self.log = log


def prog_load(kind: int, instructions: bytes, name: str, expected_attach: int = 0) -> int:
    """Load a program. The verifier's log is asked for only after a refusal: with it, loading takes longer."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(LICENSE)

    def attributes(level: int, size: int, log: int) -> bytes:
        return struct.pack(
            "<IIQQIIQII16sII",
            kind,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            level,
            size,
            log,
            0,
            0,
            name.encode()[:15],
            0,
            expected_attach,
        )

    try:
        return _call(_PROG_LOAD, attributes(0, 0, 0))[0]
    except OSError as error:
        if error.errno == errno.EPERM:
            raise
        size = 1 << 24
        log = ctypes.create_string_buffer(size)
        try:
            return _call(_PROG_LOAD, attributes(1, size, ctypes.addressof(log)))[0]
        except OSError:
            text = log.value.decode(errors="replace")
            last = [line for line in text.splitlines() if line.strip() and not line.startswith("processed")][-1:]
            raise Refused(
                f"the kernel refuses program {name} ({os.strerror(error.errno or 0)}): {' '.join(last)}", text
            ) from None


def link_create(program: int, target: int, attach: int) -> int:
    return _call(_LINK_CREATE, struct.pack("<IIIIQQ", program, target, attach, 0, 0, 0))[0]


def link_update(link: int, program: int) -> None:
    _call(_LINK_UPDATE, struct.pack("<IIII", link, program, 0, 0))


def link_detach(link: int) -> None:
    _call(_LINK_DETACH, struct.pack("<I", link))


def pin(fd: int, path: str) -> None:
    name = _path(path)
    _call(_OBJ_PIN, struct.pack("<QII", ctypes.addressof(name), fd, 0))


def get_pinned(path: str) -> int:
    name = _path(path)
    return _call(_OBJ_GET, struct.pack("<QII", ctypes.addressof(name), 0, 0))[0]


def _info(fd: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    _call(_OBJ_INFO, struct.pack("<IIQ", fd, size, ctypes.addressof(info)))
    return info.raw


class LinkInfo(NamedTuple):
    id: int
    program_id: int
    cgroup_id: int
    attach: int


def link_info(fd: int) -> LinkInfo:
    """Of a cgroup link (struct bpf_link_info)."""
    raw = _info(fd, 32)
    _, link, program = struct.unpack_from("<III", raw, 0)
    cgroup, attach = struct.unpack_from("<QI", raw, 16)
    return LinkInfo(link, program, cgroup, attach)


class MapInfo(NamedTuple):
    id: int
    kind: int
    key: int
    value: int
    entries: int


def map_info(fd: int) -> MapInfo:
    kind, number, key, value, entries = struct.unpack_from("<IIIII", _info(fd, 80), 0)
    return MapInfo(number, kind, key, value, entries)


def map_memory(fd: int) -> int:
    """Bytes that the kernel accounts to the map (`memlock` in its fdinfo)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as text:
        for line in text:
            if line.startswith("memlock:"):
                return int(line.split()[1])
    return 0


def test_run(program: int, packet: bytes, repeat: int = 1) -> tuple[int, int]:  # noqa: PT028  # a system call
    """BPF_PROG_TEST_RUN on an Ethernet frame: (return value, nanoseconds a run)."""
    data = ctypes.create_string_buffer(packet, len(packet))
    out = ctypes.create_string_buffer(len(packet) + 256)
    attributes = struct.pack(
        "<IIIIQQIIIIQQ",
        program,
        0,
        len(packet),
        len(out),
        ctypes.addressof(data),
        ctypes.addressof(out),
        repeat,
        0,
        0,
        0,
        0,
        0,
    )
    buffer = _call(_TEST_RUN, attributes)[1]
    return struct.unpack_from("<I", buffer, 4)[0], struct.unpack_from("<I", buffer, 36)[0]


# --- tracepoints and uprobes ---------------------------------------------------------------------------------------

_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408


def raw_tracepoint(program: int, name: str) -> int:
    """Run a program at a tracepoint of the whole machine, until the descriptor is closed. Needs no tracefs."""
    text = _path(name)
    return _call(_RAW_TRACEPOINT_OPEN, struct.pack("<QI", ctypes.addressof(text), program) + bytes(4))[0]


def uprobe_multi(program: int, path: str, offsets: Sequence[int], at_return: bool = False) -> int:
    """Put a uprobe on several offsets of a file, for all processes, and run the program there; since Linux 6.6, and
    for programs that were loaded for it (UPROBE_MULTI). Closing the descriptor takes the probes away. Several
    in a row take about 10 ms, whatever the number of offsets, and perf events 10 to 50 ms each."""
    name, where = _path(path), (ctypes.c_uint64 * len(offsets))(*offsets)
    attributes = struct.pack(
        "<IIIIQQQQIIII",
        program,
        0,
        UPROBE_MULTI,
        0,
        ctypes.addressof(name),
        ctypes.addressof(where),
        0,
        0,
        len(offsets),
        int(at_return),
        0,
        0,
    )
    return _call(_LINK_CREATE, attributes)[0]


def uprobe(program: int, path: str, offset: int, at_return: bool = False) -> int:
    """Put a uprobe on a file's offset, for all processes, and run the program there; on every kernel. Closing the
    descriptor, or the death of its owner, takes the probe away: no kernel keeps it."""
    with open("/sys/bus/event_source/devices/uprobe/type", encoding="ascii") as text:
        kind = int(text.read())
    attr = bytearray(112)
    name = _path(path)
    struct.pack_into("<IIQQQQQ", attr, 0, kind, 112, int(at_return), 1, 0, 0, 0)
    struct.pack_into("<I", attr, 48, 1)  # wakeup_events
    struct.pack_into("<QQ", attr, 56, ctypes.addressof(name), offset)
    buffer = ctypes.create_string_buffer(bytes(attr), 112)
    fd = _libc.syscall(_NR_PERF_EVENT_OPEN, buffer, -1, 0, -1, 8)  # PERF_FLAG_FD_CLOEXEC
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        fcntl.ioctl(fd, _IOC_SET_BPF, program)
        fcntl.ioctl(fd, _IOC_ENABLE, 0)
    except OSError:
        os.close(fd)
        raise
    return int(fd)
