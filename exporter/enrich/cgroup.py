"""cgroup id -> Workload: what the kernel says of a socket's owner, read as a pod, container, unit or session.

In: the cgroup ids in the kernel's records; the cgroup2 tree. Out: `events.Workload`. Not its job: what a path says
(cgroup_path.py), the names of containers and addresses (names.py), what a process was started with (environ.py).

A cgroup's id is the inode number of its directory and a kernfs file handle at once (Linux 5.5 and later), so
an id becomes a path without a search. A removed cgroup has neither; therefore the tree is watched, ids are
known before a first packet, and a removed one is remembered for TOMBSTONE seconds. inotify reports mkdir and
rmdir of every process, in other cgroup namespaces too: all cgroup2 mounts share one superblock.

The reason for its length: watch, cache and tombstones are one state machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from exporter.enrich import environ
from exporter.enrich.cgroup_path import parse
from exporter.enrich.names import ContainerInfo, ContainerNames
from exporter.errors import NotPermitted, Unsupported
from exporter.events import Workload
from exporter.health import losses

# --- the root ---------------------------------------------------------------------------------------------

CGROUP2_MAGIC = 0x63677270
_OCTAL = re.compile(r"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


def find_root(mounts: str | os.PathLike[str] = "/proc/self/mounts") -> Path:
    """Where cgroup2 is mounted: the host's root if any mount shows it, else the first mount there is.

    Finds /sys/fs/cgroup (unified), /sys/fs/cgroup/unified (hybrid) and, in a container, wherever the host's
    tree has been mounted. Raises Unsupported where there is none.
    """
    found = []
    for line in Path(mounts).read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] == "cgroup2":
            found.append(Path(_OCTAL.sub(lambda m: chr(int(m[1], 8)), fields[1])))
    if not found:
        raise Unsupported(
            "no cgroup2 file system is mounted here; on a cgroup v1 host boot with "
            "systemd.unified_cgroup_hierarchy=1 or run `mount -t cgroup2 none /sys/fs/cgroup/unified`; "
            "in a container mount the host's /sys/fs/cgroup into it"
        )
    return next((path for path in found if is_host_root(path)), found[0])


def is_host_root(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is the root of the host's cgroup2 hierarchy, not of a cgroup namespace or a subtree.

    kernfs gives the root of a hierarchy the inode number 1; a namespace's root shows its cgroup's own number.
    """
    buffer = ctypes.create_string_buffer(256)
    try:
        inode = os.stat(path).st_ino
    except OSError:
        return False
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    magic = struct.unpack_from("@l", buffer.raw)[0]  # f_type comes first, a long on every 64-bit machine
    return inode == 1 and magic == CGROUP2_MAGIC


def root_problem(path: str | os.PathLike[str]) -> str:
    """'' if `path` is the host's cgroup2 root, else one sentence on what is wrong and what to do."""
    if is_host_root(path):
        return ""
    return (
        f"{os.fspath(path)} is not the root of the host's cgroup2 hierarchy, so only a part of the host "
        "would be seen; run in the host's cgroup namespace (Docker: --cgroupns=host; Kubernetes: privileged, "
        "with a hostPath volume of /sys/fs/cgroup)"
    )


# --- ids, resolved ----------------------------------------------------------------------------------------

LIVE = 65_536
TOMBSTONES = 8_192
TOMBSTONE = 300.0  # s
UNKNOWN = 4_096
RETRY = 1.0  # s until an unknown id is tried again
HANDLES = 2_000  # handle look-ups a second, about 10 us each
TRIES = 8  # processes of a cgroup whose environment is read
EVENTS = 256  # inotify events a poll
SLICE = 0.002  # s of walking the tree a poll
RESCAN = 60.0  # s; a safety net where inotify sees everything
RESCAN_BLIND = 10.0  # s; where it does not

_FILEID_KERNFS = 0xFE
_HANDLE = struct.Struct("IiQ")  # struct file_handle with kernfs' 8 bytes
_EVENT = struct.Struct("iIII")  # struct inotify_event without the name
_IN_CREATE, _IN_DELETE = 0x100, 0x200
_IN_Q_OVERFLOW, _IN_ISDIR = 0x4000, 0x40000000
_IN_MASK = _IN_CREATE | _IN_DELETE | 0x01000000 | 0x02000000  # | ONLYDIR | DONT_FOLLOW


class Workloads:
    """Every cgroup's Workload by id. One thread; `lookup` on the hot path, `poll` from the pipeline's timer.

    Call `scan()` once, then `poll()` every few ten milliseconds. Needs CAP_DAC_READ_SEARCH to resolve an id
    that the watch has not told; without it the tree is walked instead, a slice at each poll. A look-up that
    finds the workload adds to `hits` or `tombstone_hits`, any other to `misses`; the rest: see __init__.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        names: ContainerNames | None = None,
        clock: Callable[[], float] = time.monotonic,
        watch: bool = True,
    ) -> None:
        """`root` is the mount point of cgroup2; `names`, if given, names containers. Raises NotPermitted."""
        self._root = os.path.realpath(root)
        self._names = names
        self._clock = clock
        self._live: dict[int, Workload] = {}
        self._ids: dict[str, int] = {}  # raw path below the root ("" is the root) -> id
        self._paths: dict[int, str] = {}
        self._tombs: dict[int, tuple[Workload, float]] = {}  # in the order of their expiry
        self._unknown: dict[int, tuple[Workload, float]] = {}
        self._waiting: dict[str, list[int]] = {}  # container id -> cgroups that want its name
        self._changed: list[int] = []
        self._tries: dict[int, int] = {}  # cgroup id -> processes whose environment was read
        self._watches: dict[int, str] = {}
        self._wds: dict[str, int] = {}
        self._unwatched: set[str] = (
            set()
        )  # found no watch (fs.inotify.max_user_watches); in the tree by the last reading
        self._events: deque[tuple[int, int, str]] = deque()
        self._walk: Iterator[None] | None = None
        self._walked: set[str] = set()
        self._arrivals: deque[Iterator[None]] = deque()  # walks of new cgroups that had children already
        self._rescan_at = 0.0
        self._window, self._in_window = 0.0, 0
        self.handles = True  # open_by_handle_at works
        self.watching = False  # inotify sees every cgroup
        self.hits = 0
        self.tombstone_hits = 0  # removed cgroups that were remembered
        self.misses = 0  # answered "unknown"
        try:
            self._mount = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError as e:
            raise NotPermitted(f"{self._root} cannot be read ({e.strerror}): run as root") from e
        self._inotify = -1
        if watch:
            self._inotify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            self.watching = self._inotify >= 0

    def lookup(self, cgroup_id: int) -> Workload:
        """The Workload with this cgroup id, also for a while after its end; kind `unknown` if not found."""
        workload = self._live.get(cgroup_id)
        if workload is not None:
            self.hits += 1
            return workload
        return self._miss(cgroup_id)

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Workload]:
        """Every cgroup that exists now."""
        return list(self._live.values())

    def fileno(self) -> int:
        """Readable when cgroups came or went; -1 without inotify. Who polls then misses fewer short ones."""
        return self._inotify

    def scan(self) -> int:
        """Read the whole tree now (tens of microseconds a cgroup, once); return how many there are."""
        self._begin_walk()
        while self._step_walk(float("inf")):
            pass
        return len(self._live)

    def poll(self) -> list[int]:
        """Take in what happened to the tree; never blocks, bounded work. Return the ids that got a name."""
        now = self._clock()
        self._drain(now)
        if self._walk is None and now >= self._rescan_at:
            self._begin_walk()
        if self._arrivals:
            self._step_arrivals(SLICE)
        if self._walk is not None:
            self._step_walk(SLICE)
        for cgroup_id in list(_expired(self._tombs, now)):
            del self._tombs[cgroup_id]
        if self._names is not None:
            for container_id, info in self._names.answers():
                for cgroup_id in self._waiting.pop(container_id, ()):
                    self._name(cgroup_id, info)
        changed, self._changed = self._changed, []
        return changed

    def close(self) -> None:
        """Give back the file descriptors; `names` is its maker's to close."""
        for fd in (self._inotify, self._mount):
            if fd >= 0:
                os.close(fd)
        self._inotify = self._mount = -1

    # A miss

    def _miss(self, cgroup_id: int) -> Workload:
        tomb = self._tombs.get(cgroup_id)
        if tomb is not None:
            self.tombstone_hits += 1
            return tomb[0]
        now = self._clock()
        known = self._unknown.get(cgroup_id)
        if known is not None and now < known[1]:
            self.misses += 1
            return known[0]
        unknown = Workload(cgroup_id, "", "unknown", "unknown")
        if cgroup_id and self.handles:
            if now >= self._window:
                self._window, self._in_window = now + 1.0, 0
            self._in_window += 1
            if self._in_window > HANDLES:
                self.misses += 1
                losses.add("attribution", "cgroup_lookups_throttled")
                return unknown
            found = self._by_handle(cgroup_id, now)
            if found is not None:
                self._unknown.pop(cgroup_id, None)
                self.hits += 1
                return found
        if cgroup_id and not self.handles:
            self._rescan_at = min(self._rescan_at, now + RETRY)
        self.misses += 1
        self._unknown.pop(cgroup_id, None)
        if len(self._unknown) >= UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[cgroup_id] = (unknown, now + RETRY)
        return unknown

    def _by_handle(self, cgroup_id: int, now: float) -> Workload | None:
        handle = _HANDLE.pack(8, _FILEID_KERNFS, cgroup_id)
        fd = _libc.open_by_handle_at(self._mount, handle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if fd < 0:
            if ctypes.get_errno() in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                self.handles = False
            return None  # ESTALE: no such cgroup, or not any more
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            return None
        finally:
            os.close(fd)
        # Outside the mount (a cgroup namespace's) the path is relative to nothing that we know.
        if path != self._root and not path.startswith(self._root + "/"):
            return None
        relative = path[len(self._root) :]
        self._add(relative)
        workload = self._live.get(cgroup_id)
        if workload is None and relative.endswith(" (deleted)"):  # removed between the two calls
            workload = parse(relative.removesuffix(" (deleted)"), cgroup_id)
            self._bury(workload, now)
        return workload

    # The tree

    def _add(self, path: str) -> bool:
        """Learn the cgroup at `path`; whether it may have children that are not known yet."""
        full = self._root + path
        if path not in self._wds:
            self._watch(path, full)  # before looking: what is made from here on is reported
        try:
            status = os.stat(full, follow_symlinks=False)
        except OSError:
            self._unwatch(path)
            return False
        cgroup_id = status.st_ino
        old = self._ids.get(path)
        if old != cgroup_id:
            if old is not None:
                self._remove(path)
                self._watch(path, full)  # the old watch is on the directory that is gone
            if len(self._live) >= LIVE:
                self._forget(next(iter(self._live)))  # its watch stays: it may have children
                losses.add("attribution", "cgroups_full")
            self._ids[path] = cgroup_id
            self._paths[cgroup_id] = path
            self._live[cgroup_id] = parse(path or "/", cgroup_id)
            self._tombs.pop(cgroup_id, None)
            self._unknown.pop(cgroup_id, None)
            self._ask(cgroup_id)
        # A directory's link count is 2 and one for each child; kernfs keeps to that.
        return status.st_nlink != 2

    def _visit(self, start: str, visited: set[str]) -> Iterator[None]:
        """Walk the tree below `start`, one cgroup at a step."""
        stack = [start]
        while stack:
            path = stack.pop()
            visited.add(path)
            if self._add(path):
                with contextlib.suppress(OSError), os.scandir(self._root + path) as entries:
                    stack.extend(f"{path}/{e.name}" for e in entries if e.is_dir(follow_symlinks=False))
            yield

    def _begin_walk(self) -> None:
        self._walked = set()
        self._walk = self._visit("", self._walked)

    def _step_walk(self, seconds: float) -> bool:
        """Go on with the walk for about `seconds`; False when it is finished."""
        assert self._walk is not None
        end = time.monotonic() + seconds
        for _ in self._walk:
            if time.monotonic() >= end:
                return True
        for path in (self._ids.keys() | self._wds.keys() | self._unwatched) - self._walked:
            if not os.path.isdir(self._root + path):
                self._remove(path)
        self._walk, self._walked = None, set()
        blind = not self.watching or len(self._wds) < len(self._ids)
        self._rescan_at = self._clock() + (RESCAN_BLIND if blind else RESCAN)
        return False

    def _remove(self, path: str) -> None:
        """The cgroup at `path` is gone: remember it as a tombstone."""
        self._unwatch(path)
        cgroup_id = self._ids.get(path)
        if cgroup_id is not None:
            workload = self._live[cgroup_id]
            self._forget(cgroup_id)
            self._bury(workload, self._clock())

    def _forget(self, cgroup_id: int) -> None:
        del self._ids[self._paths.pop(cgroup_id)], self._live[cgroup_id]
        self._tries.pop(cgroup_id, None)

    def _bury(self, workload: Workload, now: float) -> None:
        self._tombs.pop(workload.cgroup_id, None)
        if len(self._tombs) >= TOMBSTONES:
            del self._tombs[next(iter(self._tombs))]
            losses.add("attribution", "cgroups_full")
        self._tombs[workload.cgroup_id] = (workload, now + TOMBSTONE)

    # The watch

    def _watch(self, path: str, full: str) -> None:
        if self._inotify < 0:
            return
        wd = _libc.inotify_add_watch(self._inotify, os.fsencode(full), _IN_MASK)
        if wd >= 0:
            self._watches[wd], self._wds[path] = path, wd
            self._unwatched.discard(path)
        elif ctypes.get_errno() in (errno.ENOSPC, errno.ENOMEM):
            self.watching = False
            if path not in self._unwatched:  # each reading of the tree tries again
                self._unwatched.add(path)
                losses.add("attribution", "cgroup_unwatched")

    def _unwatch(self, path: str) -> None:
        # kernfs sends no IN_IGNORED for a removed directory: a watch left behind pins its inode for good.
        self._unwatched.discard(path)
        wd = self._wds.pop(path, None)
        if wd is not None:
            del self._watches[wd]
            _libc.inotify_rm_watch(self._inotify, wd)

    def _drain(self, now: float) -> None:
        room = EVENTS
        while room > 0:
            if not self._events and not self._read():
                return
            while self._events and room > 0:
                room -= 1
                wd, mask, name = self._events.popleft()
                if mask & _IN_Q_OVERFLOW:
                    losses.add("attribution", "cgroup_events_full")  # the tree is read anew
                    self._begin_walk()
                parent = self._watches.get(wd)
                if parent is None or not mask & _IN_ISDIR:
                    continue
                path = f"{parent}/{name}"
                if mask & _IN_DELETE:
                    self._remove(path)
                elif mask & _IN_CREATE:
                    self._arrived(path)

    def _arrived(self, path: str) -> None:
        """A cgroup was made: learn it at once, and soon what was made in it before it had a watch."""
        visit = self._visit(path, set())
        next(visit)
        if path not in self._ids:
            losses.add("attribution", "cgroup_gone")
        else:
            self._arrivals.append(visit)

    def _step_arrivals(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._arrivals and time.monotonic() < end:
            if next(self._arrivals[0], self) is self:
                self._arrivals.popleft()

    def _read(self) -> bool:
        if self._inotify < 0:
            return False
        try:
            data = os.read(self._inotify, 65_536)
        except BlockingIOError:
            return False
        offset = 0
        while offset < len(data):
            wd, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            self._events.append((wd, mask, name))
        return True

    # What workloads say of themselves

    def look_at(self, pid: int) -> None:
        """Take the resource attributes that a process was started with for its workload's. A few processes of each
        cgroup are looked at; the first that has any speaks for all. Who logs in speaks for nobody."""
        cgroup_id = self._ids.get(environ.cgroup_path(pid))
        workload = self._live.get(cgroup_id) if cgroup_id is not None else None
        if cgroup_id is None or workload is None or workload.given or workload.kind in ("host", "session"):
            return
        tries = self._tries.get(cgroup_id, 0)
        if tries < TRIES:
            self._tries[cgroup_id] = tries + 1
            if given := environ.read(pid):
                self._live[cgroup_id] = workload._replace(given=given)
                self._changed.append(cgroup_id)

    # Container names

    def _ask(self, cgroup_id: int) -> None:
        workload = self._live[cgroup_id]
        if self._names is None or not workload.container_id:
            return
        if workload.runtime not in ("", "docker", "podman"):
            return
        info = self._names.ask(workload.container_id)
        if info is not None:
            self._name(cgroup_id, info)
        elif self._names.waiting(workload.container_id):
            self._waiting.setdefault(workload.container_id, []).append(cgroup_id)

    def _name(self, cgroup_id: int, info: ContainerInfo | None) -> None:
        if info is None:
            return
        if cgroup_id in self._live:
            self._live[cgroup_id] = _named(self._live[cgroup_id], info)
        elif cgroup_id in self._tombs:
            workload, until = self._tombs[cgroup_id]
            self._tombs[cgroup_id] = (_named(workload, info), until)
        else:
            return
        self._changed.append(cgroup_id)


def _named(workload: Workload, info: ContainerInfo) -> Workload:
    if workload.kind != "pod":
        return workload._replace(name=info.name, container_name=info.name, image=info.image)
    return workload._replace(
        name=info.pod_name or workload.name,
        pod_name=info.pod_name,
        namespace=info.namespace,
        container_name=info.container_name,
        image=info.image,
    )


def _expired(tombs: dict[int, tuple[Workload, float]], now: float) -> Iterator[int]:
    for cgroup_id, (_, until) in tombs.items():
        if until > now:
            return
        yield cgroup_id
