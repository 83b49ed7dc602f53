"""Cgroups of our own: made under the cgroup2 root, entered before exec, emptied and removed at the end.

In: a name. Out: a directory in cgroup2, its id (what the kernel side sees) and processes that were born in
it. Not its job: controllers and limits (hybrid hosts have none on cgroup2), and what a cgroup means to the
agent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from lab.net import Namespace

# Every name that a lab makes outside its own namespaces is PREFIX-PID-N[-...]; see net.sweep.
PREFIX = "ebfw-lab"
_numbers = itertools.count(1)

# Enters cgroup, network namespace and private /etc files, in this order, then becomes the program: the pid
# stays that of the first shell. "0" means the writer itself, in whatever pid namespace. A shell instead of
# preexec_fn, because Python between fork and exec can deadlock in a threaded parent.
_ENTER = """
cgroup=$1 netns=$2 etc=$3; shift 3
[ -z "$cgroup" ] || echo 0 >"$cgroup/cgroup.procs" || exit 125
[ -n "$netns" ] || exec "$@"
[ -n "$etc" ] || exec nsenter --net="$netns" -- "$@"
exec nsenter --net="$netns" -- unshare --mount --propagation private -- sh -c '
for file in hosts resolv.conf nsswitch.conf; do
    [ ! -e "/etc/$file" ] || mount --bind "$0/$file" "/etc/$file" || exit 125
done
exec "$@"' "$etc" "$@"
"""


class LabError(Exception):
    """The lab cannot be made or used here; the text says why and what to do next."""


def unique(name: str = "") -> str:
    """A name that carries this process's pid, so that `net.sweep` can tell the leftovers of the dead."""
    return "-".join(filter(None, (PREFIX, str(os.getpid()), str(next(_numbers)), name)))


def cgroup2_root() -> Path:
    """Where cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where.encode().decode("unicode_escape"))
    raise LabError("cgroup2 is not mounted; try: mount -t cgroup2 none /sys/fs/cgroup")


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the stack (SystemExit) where they would have ended the process at
    once, so that what was made is removed. Only in the main thread, and only where nobody else handles
    them."""
    saved: dict[signal.Signals, Any] = {}

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                saved[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP wait: a removal that was begun is finished."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def entering(
    argv: Sequence[str | Path],
    *,
    cgroup: Path | None = None,
    netns: Path | None = None,
    etc: Path | None = None,
) -> list[str]:
    """The command that runs `argv` in the cgroup, the network namespace and with its /etc/{hosts,resolv.conf,
    nsswitch.conf} from `etc`. Exit status 125: a place could not be entered; 127: the program is not there.
    Raises FileNotFoundError where that can be told beforehand."""
    words = [str(word) for word in argv]
    if shutil.which(words[0]) is None:
        raise FileNotFoundError(words[0])
    return ["sh", "-c", _ENTER, PREFIX, str(cgroup or ""), str(netns or ""), str(etc or ""), *words]


class Cgroup:
    """A cgroup of ours; a context manager. On exit everything in it and below is killed and removed.

    `path` is its directory, `name` the last part. The top one is named uniquely (PREFIX-PID-N-name); `child`
    makes nested ones, whose names are taken as they are ("shop", "kubepods.slice/…/cri-containerd-….scope").
    """

    def __init__(self, name: str, *, parent: Cgroup | None = None) -> None:
        self.path: Path = parent.path / name if parent else cgroup2_root() / unique(name)
        self.name = self.path.name
        self._guard = contextlib.ExitStack()

    def __enter__(self) -> Cgroup:
        with contextlib.ExitStack() as undo:
            undo.enter_context(signals_raise())
            undo.callback(self.remove)
            self._make()
            self._guard = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.close()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise LabError(f"cannot make the cgroup {self.path}: {error.strerror}; run this as root") from error
        except OSError as error:
            raise LabError(f"cannot make the cgroup {self.path}: {error.strerror}; is cgroup2 writable?") from error

    @property
    def id(self) -> int:
        """The kernel's cgroup id: the inode number, on 64-bit kernels from 5.5 on."""
        return self.path.stat().st_ino

    @property
    def relative(self) -> str:
        """The path below the cgroup2 root, as /proc/PID/cgroup shows it: "/ebfw-lab-…"."""
        return "/" + str(self.path.relative_to(cgroup2_root()))

    def child(self, name: str) -> Cgroup:
        """A nested cgroup, there at once; goes with its parent, or with its own `with`."""
        child = Cgroup(name, parent=self)
        child._make()
        return child

    def command(self, argv: Sequence[str | Path], *, netns: Namespace | None = None, names: bool = True) -> list[str]:
        """`argv` wrapped so that it runs in this cgroup and, if given, in `netns`; `names`: with the lab's
        DNS as its resolver (in a mount namespace of its own)."""
        etc = netns.etc if netns and names else None
        return entering(argv, cgroup=self.path, netns=netns.path if netns else None, etc=etc)

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        netns: Namespace | None = None,
        names: bool = True,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """subprocess.Popen in this cgroup; the pid is the program's. The process is inside before exec."""
        return subprocess.Popen(self.command(argv, netns=netns, names=names), **options)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        netns: Namespace | None = None,
        names: bool = True,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """subprocess.run in this cgroup."""
        return subprocess.run(self.command(argv, netns=netns, names=names), **options)

    def pids(self) -> list[int]:
        """Processes in this cgroup and below it."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.path):
            with contextlib.suppress(OSError):
                found += map(int, (Path(directory) / "cgroup.procs").read_text().split())
        return found

    def kill(self) -> None:
        """SIGKILL to whatever is inside, and to nothing else."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self, timeout: float = 20.0) -> None:
        """Kills what is inside and removes the tree. A killed process leaves its cgroup a little later than
        the signal (much later on an emulated CPU), hence the retries. Raises LabError after `timeout`
        seconds."""
        with undisturbed():
            deadline = time.monotonic() + timeout
            while self.path.exists():
                self.kill()
                for directory, _, _ in os.walk(self.path, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
                if time.monotonic() > deadline:
                    raise LabError(f"cannot remove the cgroup {self.path}: still in it: {self.pids()}")
                if self.path.exists():
                    time.sleep(0.02)
