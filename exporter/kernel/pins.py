"""Where pinned objects live: finds or mounts a bpffs, and takes everything away again.

bpffs is often not mounted outside systemd hosts. Then ebfw mounts one, and whoever removes the last pin unmounts it:
the agent at a clean exit, or `ebfw detach`. A mount that ebfw did not make is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from exporter.errors import KernelError, NotPermitted, PinError
from exporter.kernel import bpf

_SYSTEM = Path("/sys/fs/bpf")
_MARK = "ebfw-mounted"  # a folder in the root of a bpffs: we mounted it
_KERNELS_OWN = ("maps.debug", "progs.debug")  # on a fresh bpffs, where the kernel was built with BPF_PRELOAD
_libc = ctypes.CDLL(None, use_errno=True)


def _mounts() -> dict[str, str]:
    """Mount point -> file system type; the last mount on a point is the one in force."""
    found = {}
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as text:
        for line in text:
            _, point, kind = line.split(" ")[:3]
            found[point.encode().decode("unicode_escape")] = kind
    return found


def mounted_at(path: Path) -> Path | None:
    """The mount point of the bpffs that holds the path; None where it would not lie on a bpffs."""
    mounts = _mounts()
    for folder in (path, *path.parents):
        kind = mounts.get(str(folder))
        if kind is not None:
            return folder if kind == "bpf" else None
    return None


def _mount(target: Path) -> None:
    if _libc.mount(b"bpf", os.fsencode(target), b"bpf", 0, b"mode=0700") < 0:
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise bpf.why(error, f"mounting a BPF file system on {target}")


def prepare(path: Path) -> None:
    """Make sure that `path` is a folder on a bpffs."""
    try:
        if mounted_at(path) is None:
            target = _SYSTEM if _SYSTEM in path.parents and _SYSTEM.is_dir() else path
            new = not target.exists()
            # Its parents are not ours to make: nobody would remove them. A spelling mistake ends here, too.
            target.mkdir(exist_ok=True)
            try:
                _mount(target)
            except KernelError:
                if new:
                    _remove_folder(target)
                raise
            (target / _MARK).mkdir()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except FileNotFoundError:
        raise PinError(
            f"cannot pin below {path}: {path.parent} does not exist. Make it, or set EBFW_BPF_PIN_PATH to another path."
        ) from None
    except PermissionError as error:
        raise NotPermitted(f"cannot make {path}: {error.strerror}. Run as root, or set EBFW_BPF_PIN_PATH.") from None
    except OSError as error:
        raise PinError(f"cannot pin below {path}: {error.strerror}. Set EBFW_BPF_PIN_PATH to another path.") from None


def problem(path: Path) -> str:
    """What keeps us from pinning below the path, tried out without leaving anything there; "" for nothing."""
    try:
        point = mounted_at(path)
        if point is None and _SYSTEM not in path.parents and not path.parent.is_dir():
            return f"cannot pin below {path}: {path.parent} does not exist"
        with tempfile.TemporaryDirectory(prefix="ebfw_check_", dir=point) as folder:
            if point is None:
                _mount(Path(folder))
                _unmount(Path(folder))
    except OSError as error:
        return f"cannot pin below {path}: {error.strerror}"
    except KernelError as error:
        return str(error)
    return ""


def entries(path: Path) -> list[Path]:
    """What ebfw pinned, links first. A fresh bpffs holds files of the kernel's own, which stay."""
    ours = [entry for entry in path.iterdir() if entry.name.startswith(("link_", "map_", "prog_"))]
    return sorted(ours, key=lambda entry: not entry.name.startswith("link_"))


def remove_entries(path: Path) -> list[str]:
    """Detach every link below the path and remove every pin; their names."""
    gone = []
    for entry in entries(path):
        if entry.name.startswith("link_"):
            try:
                link = bpf.get_pinned(str(entry))
                try:
                    bpf.link_detach(link)
                finally:
                    os.close(link)
            except OSError:
                pass  # its cgroup is gone; removing the last pin of a link detaches it too
        elif entry.name.startswith("map_frames_"):
            _empty(entry)
        entry.unlink()
        gone.append(entry.name)
    return gone


def _empty(entry: Path) -> None:
    """Take the program out of a program array. It calls itself through that array: the two hold each other, and the
    kernel's own way out of that, when the last pin goes, was seen to fail at times."""
    with contextlib.suppress(OSError):
        array = bpf.get_pinned(str(entry))
        try:
            bpf.map_delete(array, bytes(4))
        finally:
            os.close(array)


class Lock:
    """One agent a pin path: held as long as the process lives. `advice`: what to do about another that has it."""

    def __init__(self, path: Path, advice: str = "Stop it first, or set EBFW_BPF_PIN_PATH to another path.") -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(self._fd)
            os.close(self._fd)
            raise PinError(
                f"another ebfw runs with the pin path {path}{f' (process {holder})' if holder else ''}. {advice}"
            ) from None

    def release(self) -> None:
        os.close(self._fd)


def _holder(fd: int) -> int:
    """The process that has the lock on the open file; 0 where that is not to be known, as from another PID namespace:
    the kernel leaves its locks out there, or calls their holder 0 or -1."""
    found = os.fstat(fd)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as text:
        for line in text:
            words = line.split()
            if words[1] == "FLOCK" and words[5] == file:
                return max(int(words[4]), 0)
    return 0


def remove(path: Path, before_unmount: Callable[[], None] = lambda: None) -> list[str]:
    """Detach every link below the path, remove every pin, and unmount what ebfw mounted. The names of what went.
    What others keep in the folder or on the file system stays, and so do these.

    `before_unmount` lets go of descriptors on the file system, which would keep it busy."""
    point = mounted_at(path)
    if point is None or not path.is_dir():
        before_unmount()
        return []
    gone = remove_entries(path)
    before_unmount()
    if point != path:
        _remove_folder(path)
    names = {entry.name for entry in point.iterdir()}
    if _MARK in names and not names - {_MARK, *_KERNELS_OWN}:
        _unmount(point)
        if point == path:
            _remove_folder(path)
    return gone


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's things are in it
        path.rmdir()


def _unmount(path: Path) -> None:
    if _libc.umount2(os.fsencode(path), 0) < 0:
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise bpf.why(error, f"unmounting {path}")
