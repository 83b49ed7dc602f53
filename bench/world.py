"""What the measurements share: a place of their own (cgroups, namespaces, pins), the agent as a process, its cost.

In: a cgroup. Out: an agent that runs as a user would run it, watched from outside. Everything that is made here goes
when its context ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from exporter.kernel import bpf, pins
from exporter.kernel.probes import Kernel
from lab import Cgroup, LabError
from lab.cgroup import unique

REPOSITORY = Path(__file__).resolve().parent.parent
FLOWS, RING = 65_536, 2 << 20  # the product's defaults


def cpus() -> tuple[int, int]:
    """(where the load runs, where the agent runs): two if there are two."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


@contextlib.contextmanager
def pinned_to(cpu: int) -> Iterator[None]:
    """This thread runs on that CPU alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def pin_path() -> Iterator[Path]:
    """A path for pins; what is pinned there at the end is detached and removed."""
    path = Path("/run") / unique("bench-pins")
    try:
        yield path
    finally:
        if path.is_dir():
            pins.remove(path)
        if path.is_dir():
            path.rmdir()


@contextlib.contextmanager
def attached(cgroup: Path) -> Iterator[Kernel]:
    """The kernel side in this process, without an agent."""
    with pin_path() as path:
        kernel = Kernel(path, cgroup, FLOWS, RING)
        kernel.attach((), ())
        try:
            yield kernel
        finally:
            kernel.close(unpin=True)


class Agent:
    """`python -m exporter` as a process. `start` returns when everything is attached; a context manager."""

    command: Sequence[str] = (sys.executable, "-m", "exporter")

    def __init__(
        self,
        cgroup: Cgroup,
        pins_at: Path,
        cpu: int | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path = REPOSITORY,
    ) -> None:
        self.pins, self._cpu, self._folder = pins_at, cpu, folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("EBFW_", "OTEL_"))},
            "EBFW_CGROUP": str(cgroup.path),
            "EBFW_BPF_PIN_PATH": str(pins_at),
            "EBFW_METRICS_ADDR": "127.0.0.1:0",
            "EBFW_OUTPUT": "none",
            "EBFW_TLS_UPROBES": "false",
            "EBFW_CACHE_PATH": "",
            **(environment or {}),
        }
        self._process: subprocess.Popen[str] | None = None
        self.words: list[str] = []
        self.seconds = 0.0  # from exec to attached

    def start(self) -> Agent:
        attached = threading.Event()
        self.words, self.seconds = [], 0.0  # not those of a life before
        began = time.perf_counter()
        process = self._process = subprocess.Popen(
            self.command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if self._cpu is not None:
            os.sched_setaffinity(process.pid, {self._cpu})  # threads and children inherit it

        def listen() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                if "attached to" in line:
                    self.seconds = time.perf_counter() - began
                    attached.set()
                self.words = [*self.words[-50:], line.rstrip()]
            attached.set()

        self._listener = threading.Thread(target=listen, daemon=True)
        self._listener.start()
        if not attached.wait(60) or not self.seconds:
            self.stop()
            raise LabError(f"the agent did not attach: {' | '.join(self.words[-3:])}")
        return self

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listener.join(5)
        assert process.stderr is not None
        process.stderr.close()

    def __enter__(self) -> Agent:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise LabError(f"the agent ended: {' | '.join(self.words[-3:])}")
        return self._process.pid

    def cpu_seconds(self) -> float:
        """User and system time of all its threads, those that ended included."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> dict[str, float]:
        """MB by kind: VmRSS, RssAnon, RssFile, RssShmem."""
        found = {}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "RssAnon", "RssFile", "RssShmem"):
                found[name] = int(rest.split()[0]) * 1024 / 1e6
        return found

    def samples(self, name: str) -> dict[str, float]:
        """One series of its own metrics, values by labels as they are written."""
        found = re.search(r"http://\S+/metrics", "\n".join(self.words))
        if found is None:
            raise LabError("the agent does not say where its metrics are")
        with urllib.request.urlopen(found[0], timeout=60) as page:
            lines = [line for line in page.read().decode().splitlines() if line.startswith(name + "{")]
        return {labels: float(value) for labels, _, value in (line.rpartition(" ") for line in lines)}

    def lost(self) -> dict[str, float]:
        """What its own metrics say was lost, by their labels; without what it says of other times."""
        return {labels: value for labels, value in self.samples("ebfw_records_lost_total").items() if value}

    def map(self, name: str) -> int:
        """A descriptor of one of its maps; the caller closes it."""
        return bpf.get_pinned(str(self.pins / f"map_{name}"))
