"""Watches the processes of the subtree and looks for TLS functions in what they have mapped.

In: programs that begin (a ring of its own, which wakes us), processes that the pipeline met, and every few seconds the
list of all. Out: probes, put by TlsLibraries, and for each TLS connection the coverage class of its process.

A thread of its own: a probe takes milliseconds to attach, a file may lie on a disk that sleeps, and the pipeline should
wait for neither. Libraries are mapped after a program has begun, by its loader or much later; so a process is looked
at again and again, at growing distances. Looking costs about a microsecond for each line of /proc/PID/maps; it may
take a twentieth of a core, and waits where it would take more.

Processes that live 100 ms: the first look comes a millisecond after execve, and probes on a library that was never
seen are in force some 10 ms after the loader has mapped it (before Linux 6.6, with perf events, about 100 ms). What is
probed stays so while anybody maps it and a few seconds longer, so only the first short process of its kind may go
unseen: of twelve curls with a library each, one request each, nine were seen here. 1,000 processes cost 0.3 % of a
core.
"""

from __future__ import annotations

import heapq
import logging
import os
import re
import select
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from exporter.health import features, losses
from exporter.kernel import bpf, wire
from exporter.kernel.ring import Ring
from exporter.kernel.tls_libraries import COVERAGE, NONE, UNKNOWN, File, TlsLibraries

log = logging.getLogger("ebfw.tls")

SCAN_SECONDS = 4.0
# After a program has begun, seconds to the next look. The loader maps libraries in the first millisecond or two, an
# interpreter in the first hundred; the last distance goes on for ever.
_DISTANCES = (0.0015, 0.003, 0.006, 0.012, 0.03, 0.06, 0.15, 0.4, 1.0, 4.0, 15.0, 60.0)
_GATHER = 0.0005
_FOUND_BY_SCAN = 8  # where in _DISTANCES a process begins that has been there for a while
_PROCESSES = 32_768
_GONE_SECONDS = 10.0  # a process that is gone is remembered for so long: its last records are still to come
_ASKED = 16_384  # connections that wait for their class
_MAPPINGS = 8192
_MAPPING_SECONDS = 600.0  # an inode's number may become another file's
_PROGRAMS = 1024
_CPU_SHARE, _CPU_BURST = 0.05, 0.5

# Mapped as code, from a file: where, device and inode, name
_CODE = re.compile(rb"^([0-9a-f]+-[0-9a-f]+) ..x. [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+ [1-9][0-9]*) +(.*)$", re.M)
_RANK = {coverage: rank for rank, coverage in enumerate(COVERAGE)}


class _Process:
    __slots__ = ("coverage", "due", "files", "gone", "looked", "program", "step")

    def __init__(self, step: int) -> None:
        self.coverage = UNKNOWN
        self.files: tuple[File, ...] = ()
        self.looked = 0.0  # when, CLOCK_MONOTONIC seconds; 0 = not yet
        self.due = 0.0  # its one entry in the heap
        self.gone = 0.0
        self.program = b""  # device and inode of what it runs
        self.step = step


class TlsProcesses:
    """`programs`: descriptors by name. `executions`: the ring that tells of programs that begin. `everywhere`: the
    whole host is watched, and its libraries are probed before anybody maps them. What is there at the start is probed
    when this returns."""

    def __init__(
        self, programs: Mapping[str, int], executions: Ring, cgroup: Path, everywhere: bool, start: bool = True
    ) -> None:
        self.libraries = TlsLibraries(programs)
        self._executions, self._cgroup = executions, cgroup
        self._processes: dict[int, _Process] = {}
        self._due: list[tuple[float, int]] = []
        self._mappings: OrderedDict[bytes, tuple[float, File | None, str]] = OrderedDict()
        self._fuse: dict[bytes, bool] = {}
        self._programs: OrderedDict[bytes, str] = OrderedDict()  # class of the last process that ran it and had one
        self._met: deque[int] = deque(maxlen=_ASKED)
        self._connections: deque[int] = deque(maxlen=_ASKED)
        self._counts: Counter[str] = Counter()
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._allowance, self._charged = _CPU_BURST, time.monotonic()
        self._next_scan = 0.0
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tracepoint = self._watch_executions(programs.get("exec"))
        if everywhere:
            self.libraries.system()
        self._scan(time.monotonic())
        self._look_at_due(all_of_them=True)
        self._thread = threading.Thread(target=self._run, name="tls-processes", daemon=True)
        if start:
            self._thread.start()

    def _watch_executions(self, program: int | None) -> int:
        """The tracepoint's link; -1 where there is none, and the scan alone finds processes."""
        if program is None:
            return -1
        try:
            link = bpf.raw_tracepoint(program, "sched_process_exec")
        except OSError as error:
            features.set(
                "exec", False, f"TLS libraries of processes that live a few seconds ({bpf.why(error, 'exec')})"
            )
            return -1
        features.set("exec", True)
        return link

    # --- for the pipeline -----------------------------------------------------------------------------------------

    def tell(self, met: Iterable[int], connections: Iterable[int]) -> None:
        """Processes that something was seen of, and those of the TLS connections that began (0: not known)."""
        new = [pid for pid in met if pid not in self._processes]
        self._met.extend(new)
        before = len(self._connections)
        self._connections.extend(connections)
        if new or len(self._connections) > before:
            self._rouse()

    def take_connections(self) -> dict[str, int]:
        """TLS connections by coverage class since this was last called."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts

    def _rouse(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Take everything away."""
        self._stopping = True
        if self._thread.is_alive():
            self._rouse()
            self._thread.join()
        if self._tracepoint >= 0:
            os.close(self._tracepoint)
        os.close(self._wake)
        self.libraries.close()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.epoll()
        poll.register(self._executions.fd, select.EPOLLIN | select.EPOLLET)
        poll.register(self._wake, select.EPOLLIN)
        while not self._stopping:
            if poll.poll(self._pause()):
                time.sleep(_GATHER)  # those that come together are looked at together
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            try:
                self.work()
            except Exception:  # the thread must not die of one process; and it must not be silent
                losses.add("attribution", "tls_watch_failed")
                log.exception("looking for TLS libraries failed")
        poll.close()

    def _pause(self) -> float:
        now = time.monotonic()
        due = min(self._next_scan, self._due[0][0] if self._due else self._next_scan)
        if self._allowance < 0:
            due = max(due, now - self._allowance / _CPU_SHARE)
        return max(due - now, 0.0)

    def work(self) -> None:
        """One round: what has come, what is due."""
        now = time.monotonic()
        for data in self._executions.drain():
            pid = wire.EXECUTION.unpack(data)[1]
            self._begin(pid, 0, now)
        while self._met:
            pid = self._met.popleft()
            if pid not in self._processes:
                self._begin(pid, _FOUND_BY_SCAN, now)
        self._look_at_due()
        self._classify()
        if time.monotonic() >= self._next_scan:
            self._scan(time.monotonic())

    def _begin(self, pid: int, step: int, now: float) -> None:
        if len(self._processes) >= _PROCESSES and pid not in self._processes:
            losses.add("table", "tls_processes_full")
            return
        self._schedule(pid, _Process(step), now)

    def _schedule(self, pid: int, process: _Process, when: float) -> None:
        self._processes[pid] = process
        process.due = when
        heapq.heappush(self._due, (when, pid))

    def _look_at_due(self, all_of_them: bool = False) -> None:
        """Look at those whose time has come, within what looking may cost."""
        now, before = time.monotonic(), time.thread_time()
        self._allowance = min(_CPU_BURST, self._allowance + (now - self._charged) * _CPU_SHARE)
        self._charged = now
        looked = 0
        while self._due and self._due[0][0] <= now and (self._allowance >= 0 or all_of_them):
            when, pid = heapq.heappop(self._due)
            process = self._processes.get(pid)
            if process is None or process.gone or process.due != when:  # it began something else since
                continue
            self._look(pid, process)
            looked += 1
            if not process.gone:
                # A little more for some, so that those that were found together do not stay together.
                distance = _DISTANCES[min(process.step, len(_DISTANCES) - 1)] * (1 + (pid & 15) / 32)
                process.step += 1
                self._schedule(pid, process, time.monotonic() + distance)
            if looked % 16 == 0:
                spent, before = time.thread_time() - before, time.thread_time()
                self._allowance -= spent
        self._allowance -= time.thread_time() - before

    # --- one process ----------------------------------------------------------------------------------------------

    def _look(self, pid: int, process: _Process) -> None:
        now = time.monotonic()
        maps = _read(f"/proc/{pid}/maps")
        if not maps:  # ended; a zombie or a kernel thread has no mappings
            process.gone = process.gone or now
            return
        process.looked = now
        files: list[File] = []
        coverage = NONE
        new: list[tuple[bytes, bytes, bytes]] = []
        seen: set[bytes] = set()
        for span, key, name in _CODE.findall(maps):
            if not seen:  # the program itself lies below what its loader maps
                process.program = key
            if key in seen:
                continue
            seen.add(key)
            known = self._mappings.get(key)
            if known is None or known[0] < now:
                new.append((span, key, name))
                continue
            if known[1] is not None:
                files.append(known[1])
            if _RANK[known[2]] < _RANK[coverage]:
                coverage = known[2]
        # What calls itself so first: its process may be about to use it.
        new.sort(key=lambda row: 0 if b"ssl" in row[2] else 1 if b"gnutls" in row[2] else 2)
        for span, key, name in new:
            file, found = self._examine(pid, span, key, name.decode("utf-8", "surrogateescape"))
            if file is not None:
                files.append(file)
            if _RANK[found] < _RANK[coverage]:
                coverage = found
        # The kernel hands maps out by the page: of a process that ended meanwhile the rest is missing without an error,
        # and its files cannot be opened. What was found may be the lesser half: nothing is said of it.
        if not _alive(pid):
            process.gone = process.gone or now
            return
        process.files, process.coverage = tuple(files), coverage
        if coverage != NONE:
            self._programs[process.program] = coverage
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)

    def _examine(self, pid: int, span: bytes, key: bytes, name: str) -> tuple[File | None, str]:
        device = key.split(b" ")[0]
        start, end = span.split(b"-")  # maps pads to eight digits, map_files does not
        path = f"/proc/{pid}/map_files/{int(start, 16):x}-{int(end, 16):x}"
        if device.startswith(b"00:") and self._is_fuse(pid, device):
            # Whoever runs that file system decides when we get an answer, or whether.
            losses.add("attribution", "tls_library_on_fuse")
            file, coverage = None, NONE
        else:
            file, coverage = self.libraries.examine(path, name)
        if file is None and not os.path.lexists(path):
            return file, coverage  # it ended meanwhile: the file may be looked at in another process
        # A file with probes is asked for each time: TlsLibraries may have dropped it, and finds it by a dictionary.
        if coverage == NONE:
            self._mappings[key] = (time.monotonic() + _MAPPING_SECONDS, file, coverage)
        else:
            self._mappings[key] = (time.monotonic() + SCAN_SECONDS, file, coverage)
        if len(self._mappings) > _MAPPINGS:
            self._mappings.popitem(last=False)
        return file, coverage

    def _is_fuse(self, pid: int, device: bytes) -> bool:
        known = self._fuse.get(device)
        if known is None:
            word = b" %d:%d " % tuple(int(part, 16) for part in device.split(b":"))
            lines = [line for line in _read(f"/proc/{pid}/mountinfo").splitlines() if word in line]
            known = any(line.partition(b" - ")[2].startswith(b"fuse") for line in lines)
            if len(self._fuse) >= _MAPPINGS:
                self._fuse.clear()
            self._fuse[device] = known
        return known

    # --- all of them ----------------------------------------------------------------------------------------------

    def pids(self) -> Iterator[int]:
        """Processes in the subtree now."""
        for folder, _, _ in os.walk(self._cgroup):
            with suppress(OSError, ValueError):  # removed meanwhile, or a threaded cgroup
                yield from map(int, _read(os.path.join(folder, "cgroup.procs")).split())

    def _scan(self, now: float) -> None:
        """Find processes that nobody told of, forget those that are gone, and so are the files that only they had."""
        self._next_scan = now + SCAN_SECONDS
        alive = set(self.pids())
        for pid in alive - self._processes.keys():
            self._begin(pid, _FOUND_BY_SCAN, now)
        files: set[File] = set()
        for pid, process in list(self._processes.items()):
            if pid in alive and not process.gone:
                files.update(process.files)
            elif not process.gone:
                process.gone = now
            elif pid in alive:  # the number has a new owner, of which nobody told: it was forked
                self._begin(pid, _FOUND_BY_SCAN, now)
            elif now - process.gone > _GONE_SECONDS:
                del self._processes[pid]
        self.libraries.used(files)

    # --- connections ----------------------------------------------------------------------------------------------

    def _classify(self) -> None:
        """A connection has sent its ClientHello: whatever encrypts it is mapped by now."""
        while self._connections:
            pid = self._connections.popleft()
            process = self._processes.get(pid)
            if pid and (process is None or (process.coverage in (NONE, UNKNOWN) and not process.gone)):
                if process is None:
                    self._begin(pid, _FOUND_BY_SCAN, time.monotonic())
                    process = self._processes.get(pid)
                # A young one may have mapped it since the last look, however short ago that was.
                if process is not None and (process.step < _FOUND_BY_SCAN or time.monotonic() - process.looked > 1.0):
                    self._look(pid, process)
            coverage = process.coverage if process is not None else UNKNOWN
            if process is not None and process.gone and coverage in (NONE, UNKNOWN):
                # The last look came before its loader was done, or too late; what others had that ran the same, it had.
                coverage = self._programs.get(process.program, UNKNOWN)
            with self._lock:
                self._counts[coverage] += 1
            if coverage not in self._told:
                self._told.add(coverage)
                log.info("first TLS connection of class %s: %s", coverage, COVERAGE[coverage])


def _alive(pid: int) -> bool:
    """Whether it has mappings: a zombie and a kernel thread have none, and no program."""
    try:
        os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
    return True


def _read(path: str) -> bytes:
    """A whole file of /proc; b"" where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    pieces = []
    try:
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
    except OSError:
        return b""
    finally:
        os.close(fd)
    return b"".join(pieces)
