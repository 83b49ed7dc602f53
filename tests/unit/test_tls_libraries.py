"""Which class a file is in, what is put on it, and what happens when there is no room or no luck; which processes are
looked at, and when. The kernel's part is played by /dev/null."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter.health import losses
from exporter.kernel import bpf, returns, tls_libraries, tls_processes
from exporter.kernel.probes import UNLINKED
from exporter.kernel.tls_libraries import (
    BORINGSSL,
    COVERAGE,
    GNUTLS,
    GO,
    NONE,
    OPENSSL,
    STATIC,
    UNKNOWN,
    UNPROBED,
    TlsLibraries,
)
from exporter.kernel.tls_processes import TlsProcesses
from tests.unit.test_elf import go_binary

PROGRAMS = {probe.name: 1000 + n for n, probe in enumerate(p for group in UNLINKED.values() for p in group)}


class Kernel:
    """What was put where. `multi`, `perf`: what each way to put a probe fails with."""

    def __init__(self) -> None:
        self.links: list[tuple[int, tuple[int, ...], bool]] = []
        self.multi = self.perf = 0
        self.asked = 0

    def uprobe_multi(self, program: int, path: str, offsets: list[int], at_return: bool = False) -> int:
        self.asked += 1
        return self._put(self.multi, program, tuple(offsets), at_return)

    def uprobe(self, program: int, path: str, offset: int, at_return: bool = False) -> int:
        return self._put(self.perf, program, (offset,), at_return)

    def _put(self, error: int, program: int, offsets: tuple[int, ...], at_return: bool) -> int:
        if error:
            raise OSError(error, os.strerror(error))
        self.links.append((program, offsets, at_return))
        return os.open(os.devnull, os.O_RDONLY)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(bpf, "uprobe_multi", made.uprobe_multi)
    monkeypatch.setattr(bpf, "uprobe", made.uprobe)
    return made


@pytest.fixture
def libraries(kernel: Kernel) -> Iterator[TlsLibraries]:
    before = len(os.listdir("/proc/self/fd"))
    made = TlsLibraries(PROGRAMS)
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


def build(folder: Path, name: str, functions: str, *flags: str) -> str:
    body = "".join(f"int {function}(void) {{ return 1; }}\n" for function in functions.split())
    source = folder / "x.c"
    source.write_text(body + ("int main(void) { return 0; }\n" if not flags else ""))
    subprocess.run(["cc", "-o", folder / name, source, *flags], check=True)
    return str(folder / name)


SHARED = ("-shared", "-fPIC")
SSL = "SSL_write SSL_write_ex SSL_read SSL_read_ex SSL_free"


@pytest.mark.parametrize(
    ("name", "functions", "flags", "coverage", "probes"),
    [
        ("libssl.so.3", SSL, SHARED, OPENSSL, 9),
        ("libssl-1a2b3c.so.1.1", SSL, SHARED, OPENSSL, 9),
        ("libssl.so", "SSL_write SSL_read SSL_free SSL_CTX_set_grease_enabled", SHARED, BORINGSSL, 5),
        ("node", SSL, (), STATIC, 9),
        ("libgnutls.so.30", "gnutls_record_send gnutls_record_recv gnutls_deinit", SHARED, GNUTLS, 5),
        ("libgnutls-openssl.so.27", SSL, SHARED, NONE, 0),
        ("libssl3.so", "SSL_GetChannelInfo SSL_ImportFD", SHARED, NONE, 0),
        ("libc.so.6", "printf_of_ours", SHARED, NONE, 0),
        ("reader", "SSL_read SSL_free", SHARED, NONE, 0),
    ],
)
def test_classes(
    libraries: TlsLibraries, kernel: Kernel, tmp_path: Path, name: str, functions: str, flags: tuple[str, ...],
    coverage: str, probes: int,
) -> None:  # fmt: skip
    path = build(tmp_path, name, functions, *flags)
    file, found = libraries.examine(path, path)
    assert (found, file is not None) == (coverage, coverage != NONE)
    assert sum(len(offsets) for _, offsets, _ in kernel.links) == probes
    assert set(COVERAGE) >= {found}
    for program, _, at_return in kernel.links:
        assert at_return == (program in (PROGRAMS["ssl_write_return"], PROGRAMS["ssl_read_return"]))
    again = len(kernel.links)
    assert libraries.examine(path, path) == (file, found)
    assert len(kernel.links) == again
    assert sum(libraries.by_coverage().values()) == len(libraries) == (coverage != NONE)


def test_go(libraries: TlsLibraries, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is put on a Go binary until it is known where its Read returns; what sends comes last."""
    (tmp_path / "go").write_bytes(go_binary())
    path = str(tmp_path / "go")
    wait = threading.Event()
    monkeypatch.setattr(returns, "find", lambda codes: wait.wait(10) and [[3, 9]])
    file, coverage = libraries.examine(path, path)
    assert (coverage, len(libraries), kernel.links) == (GO, 0, [])
    assert libraries.examine(path, path) == (file, GO)
    wait.set()
    libraries._slow.submit(int).result()
    assert kernel.links == [
        (PROGRAMS["go_read"], (0x1030,), False),
        (PROGRAMS["go_read_return"], (0x1033, 0x1039), False),
        (PROGRAMS["go_write"], (0x1010,), False),
    ]
    assert libraries.by_coverage()[GO] == 1


def test_go_that_returns_nowhere(
    libraries: TlsLibraries, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests without answers would be told as failed: rather none."""
    (tmp_path / "go").write_bytes(go_binary())
    monkeypatch.setattr(returns, "find", lambda codes: [[] for _ in codes])
    assert libraries.examine(str(tmp_path / "go"), "/go")[1] == GO
    libraries._slow.submit(int).result()
    assert libraries.examine(str(tmp_path / "go"), "/go")[1] == UNPROBED
    assert (kernel.links, len(libraries)) == ([], 0)


def test_the_hosts_own(
    libraries: TlsLibraries, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the whole host watched: probed before anybody maps them, once however many names they have, for good."""
    build(tmp_path, "libssl.so.3", SSL, *SHARED)
    (tmp_path / "libssl.so").symlink_to("libssl.so.3")
    build(tmp_path, "libssl_fips_module.so", SSL, *SHARED)
    monkeypatch.setattr(tls_libraries, "_FOLDERS", (str(tmp_path), str(tmp_path / "nothing")))
    libraries.system()
    assert len(libraries) == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
    libraries.used(set())
    assert len(libraries) == 1


def test_a_kernel_without_multi(libraries: TlsLibraries, kernel: Kernel, tmp_path: Path) -> None:
    """One attempt; from then on a perf event for each place."""
    kernel.multi = errno.EINVAL
    for n in range(2):
        path = build(tmp_path, f"libssl.so.{n}", SSL, *SHARED)
        assert libraries.examine(path, path)[1] == OPENSSL
    assert kernel.asked == 1
    assert len(kernel.links) == 18


def test_a_place_that_is_refused(libraries: TlsLibraries, kernel: Kernel, tmp_path: Path) -> None:
    """Neither way: the file stays unprobed and is not tried again; others are, and in the better way."""
    path = build(tmp_path, "libssl.so.3", SSL, *SHARED)
    before = losses.snapshot().get(("attribution", "tls_library_refused"), 0)
    kernel.multi = kernel.perf = errno.EINVAL
    file, coverage = libraries.examine(path, path)
    assert (file is not None, coverage, len(libraries)) == (True, UNPROBED, 0)
    kernel.multi = kernel.perf = 0
    assert libraries.examine(path, path) == (file, UNPROBED)
    assert losses.snapshot()["attribution", "tls_library_refused"] == before + 1
    other = build(tmp_path, "libssl.so.4", SSL, *SHARED)
    assert libraries.examine(other, other)[1] == OPENSSL
    assert len(kernel.links) == 7  # one a program, however many places


def test_full(libraries: TlsLibraries, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room while all are in use: counted. Who has not been used for longest makes room."""
    monkeypatch.setattr(tls_libraries, "FILES", 2)
    paths = [build(tmp_path, f"libssl.so.{n}", SSL, *SHARED) for n in range(3)]
    files = [libraries.examine(path, path)[0] for path in paths[:2]]
    before = losses.snapshot().get(("table", "tls_libraries_full"), 0)
    assert libraries.examine(paths[2], paths[2])[1] == UNPROBED
    assert losses.snapshot()["table", "tls_libraries_full"] == before + 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 7)
    assert files[1] is not None
    libraries.used({files[1]})
    assert libraries.examine(paths[2], paths[2])[1] == OPENSSL
    assert len(libraries) == 2
    assert libraries.examine(paths[1], paths[1]) == (files[1], OPENSSL)
    monkeypatch.setattr(time, "monotonic", lambda: now + 30)
    libraries.used(set())
    assert len(libraries) == 0


def test_what_is_no_file_is_not_opened(libraries: TlsLibraries, tmp_path: Path) -> None:
    """Opening a pipe would wait for its other end, and a device does whatever it does."""
    os.mkfifo(tmp_path / "libssl.so")
    before = losses.snapshot().get(("attribution", "tls_library_unreadable"), 0)
    for path in (str(tmp_path / "libssl.so"), "/dev/zero", str(tmp_path), str(tmp_path / "nothing")):
        assert libraries.examine(path, "/x/libssl.so") == (None, NONE)
    assert losses.snapshot()["attribution", "tls_library_unreadable"] == before + 4


# --- processes ----------------------------------------------------------------------------------------------------


class Executions:
    """The ring of programs that began."""

    def __init__(self) -> None:
        self.fd = -1
        self.pids: list[int] = []

    def drain(self) -> list[bytes]:
        pids, self.pids = self.pids, []
        return [tls_processes.wire.EXECUTION.pack(0, pid, 0) for pid in pids]


class World:
    """A cgroup that is a folder, and time that is moved by hand."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.executions = folder, Executions()
        self.now = time.monotonic()
        self.list()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        programs = {name: fd for name, fd in PROGRAMS.items() if name != "exec"}
        self.tls = TlsProcesses(programs, self.executions, folder, everywhere=False, start=False)  # type: ignore[arg-type]

    def list(self, *pids: int) -> None:
        (self.folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def pass_(self, seconds: float, step: float = 0.05) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += step
            self.tls.work()


@pytest.fixture
def world(tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "cgroup").mkdir()
    made = World(tmp_path / "cgroup", monkeypatch)
    yield made
    monkeypatch.undo()
    made.tls.close()


@pytest.fixture
def mapper(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A process that has mapped a file as code."""
    started = []

    def start(path: str) -> subprocess.Popen[str]:
        code = (
            "import mmap, sys\nwith open(sys.argv[1], 'rb') as f:\n"
            " m = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)\n"
            "print('mapped', flush=True)\nsys.stdin.read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", code, path], text=True, **pipes))  # type: ignore[call-overload]
        assert started[-1].stdout.readline() == "mapped\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="map_files of others needs root")


@needs_root
@pytest.mark.parametrize("name", ["libssl.so.3", "libssl with space.so", "libssl\nnew\\line.so"])
def test_a_process(world: World, kernel: Kernel, tmp_path: Path, mapper: Callable[..., object], name: str) -> None:
    """Told of, looked at, probed; its connections have its class; forgotten when it is gone."""
    process = mapper(build(tmp_path, name, SSL, *SHARED))
    world.list(process.pid)  # type: ignore[attr-defined]
    world.executions.pids = [process.pid]  # type: ignore[attr-defined]
    world.pass_(0.1)
    assert len(world.tls.libraries) == 1
    world.tls.tell([process.pid], [process.pid, process.pid, 0, 0x7FFFFFFF])  # type: ignore[attr-defined]
    world.pass_(0.1)
    assert world.tls.take_connections() == {OPENSSL: 2, UNKNOWN: 2}
    process.kill()  # type: ignore[attr-defined]
    process.communicate()  # type: ignore[attr-defined]
    world.list()
    world.pass_(60, 1)
    assert (len(world.tls.libraries), world.tls._processes) == (0, {})


@needs_root
def test_a_file_that_goes_with_its_process(
    world: World, tmp_path: Path, mapper: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Deleted, but still mapped: what an upgrade leaves."""
    path = build(tmp_path, "libssl.so.3", SSL, *SHARED)
    process = mapper(path)
    os.unlink(path)
    world.list(process.pid)
    world.pass_(5, 0.5)
    assert len(world.tls.libraries) == 1


@needs_root
def test_a_process_that_ends_while_it_is_looked_at(
    world: World, tmp_path: Path, mapper: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found before may be the lesser half: its connections have the class of the next that runs the same."""
    path = build(tmp_path, "libssl.so.3", SSL, *SHARED)
    process, other = mapper(path), mapper(path)
    real = world.tls.libraries.examine

    def examine(place: str, name: str) -> tuple[tls_libraries.File | None, str]:
        if name != path:
            return None, GNUTLS
        process.kill()
        process.wait()
        return real(place, name)

    monkeypatch.setattr(world.tls.libraries, "examine", examine)
    world.executions.pids = [process.pid]
    world.tls.work()
    world.tls.tell([], [process.pid])
    world.tls.work()
    assert world.tls.take_connections() == {UNKNOWN: 1}
    world.executions.pids = [other.pid]
    world.tls.work()
    world.tls.tell([], [process.pid, other.pid])
    world.tls.work()
    assert world.tls.take_connections() == {OPENSSL: 2}


@needs_root
def test_a_process_that_ends_while_its_mappings_are_read(
    world: World, tmp_path: Path, mapper: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends the list where it is, without an error: what was on the rest of it is not known."""
    process = mapper(build(tmp_path, "libssl.so.3", SSL, *SHARED))
    lines = Path(f"/proc/{process.pid}/maps").read_bytes().splitlines(keepends=True)
    half = b"".join(line for line in lines if b"libssl" not in line)
    process.kill()
    process.wait()
    monkeypatch.setattr(tls_processes, "_read", lambda path: half if path.endswith("maps") else b"")
    world.executions.pids = [process.pid]
    world.tls.work()
    world.tls.tell([], [process.pid])
    world.tls.work()
    assert world.tls.take_connections() == {UNKNOWN: 1}


def test_looks_are_spaced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a process begins another program, it is looked at as one: 12 times in its first 6 seconds, once
    in a minute at last."""
    looks: list[float] = []
    real = world.tls._look

    def look(pid: int, process: object) -> None:
        looks.append(world.now)
        real(pid, process)  # type: ignore[arg-type]

    monkeypatch.setattr(world.tls, "_look", look)
    world.list(os.getpid())
    world.executions.pids = [os.getpid()] * 20
    world.pass_(0.001, 0.001)
    world.executions.pids = [os.getpid()] * 20
    began = world.now
    world.pass_(6, 0.001)
    assert 9 <= len([at for at in looks if at > began]) <= 12
    world.pass_(300, 0.5)
    assert len([at for at in looks if at > began + 120]) in (2, 3)


def test_looking_is_limited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 processes at once: what looking may cost is kept, and all are looked at in the end."""
    cost = 0.001
    spent = [0.0]

    def look(pid: int, process: tls_processes._Process) -> None:
        spent[0] += cost
        process.looked, process.step = world.now, 11

    monkeypatch.setattr(world.tls, "_look", look)
    monkeypatch.setattr(time, "thread_time", lambda: spent[0])
    world.list(*range(100_000, 110_000))
    world.pass_(10, 0.02)
    assert spent[0] < tls_processes._CPU_BURST + 10 * tls_processes._CPU_SHARE + 16 * cost
    assert world.tls._pause() > 0 or not world.tls._due
    world.pass_(200, 0.05)
    assert all(process.looked for process in world.tls._processes.values())


def test_a_bound_on_processes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_processes, "_PROCESSES", 10)
    monkeypatch.setattr(world.tls, "_look", lambda pid, process: None)
    before = losses.snapshot().get(("table", "tls_processes_full"), 0)
    world.executions.pids = list(range(100_000, 100_030))
    world.tls.work()
    assert len(world.tls._processes) == 10
    assert losses.snapshot()["table", "tls_processes_full"] == before + 20


def test_fuse_is_not_opened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process mapped from a FUSE file system is left alone; the answer is remembered by device."""
    mountinfo = (
        b"36 35 0:29 / /mnt/a rw,noatime shared:1 - fuse.sshfs host: rw\n"
        b"37 35 0:30 / /mnt/b rw,noatime - overlay overlay rw\n"
    )
    read: list[str] = []
    monkeypatch.setattr(tls_processes, "_read", lambda path: read.append(path) or mountinfo)
    monkeypatch.setattr(world.tls.libraries, "examine", lambda path, name: (None, "examined"))
    assert world.tls._examine(1, b"1000-2000", b"00:1d 5", "/mnt/a/libssl.so") == (None, NONE)
    assert world.tls._examine(1, b"1000-2000", b"00:1d 6", "/mnt/a/x") == (None, NONE)
    assert world.tls._examine(1, b"1000-2000", b"00:1e 5", "/mnt/b/libssl.so") == (None, "examined")
    assert world.tls._examine(1, b"1000-2000", b"fe:00 5", "/usr/lib/libssl.so") == (None, "examined")
    assert len(read) == 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what the kernel writes there")
def test_mappings_are_read() -> None:
    """The lines of /proc/PID/maps that count, with an address below 2^32 and strange names."""
    text = (
        b"00400000-00713000 r-xp 00000000 fe:00 9988399                            /tmp/x/go client\n"
        b"00713000-00a53000 r--p 00313000 fe:00 9988399                            /tmp/x/go client\n"
        b"7f0000000000-7f0000001000 rwxp 00000000 00:00 0 \n"
        b"7f1000000000-7f1000001000 --xs 00001000 00:2f 12                         /a/lib\\012ssl.so (deleted)\n"
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    )
    assert tls_processes._CODE.findall(text) == [
        (b"00400000-00713000", b"fe:00 9988399", b"/tmp/x/go client"),
        (b"7f1000000000-7f1000001000", b"00:2f 12", b"/a/lib\\012ssl.so (deleted)"),
    ]
