"""The agent as a process: started as anybody would start it, on a cgroup of its own, watched from outside.

Comes in: the lab's network and servers (one for the whole run), a fresh cgroup and pin path for each `Host`. Goes
out: agents whose lines, log, /metrics and kernel objects tests read, by bpftool where the kernel is concerned. When
a Host closes it lets the product clean up after itself, then looks for what is left (pins, mounts, programs, maps,
cgroups, processes), removes that by force, and fails the test for it. Not its job: what the numbers mean.

Every process in a watched cgroup runs with a private copy of libssl: no probe sits on the system's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab import Cgroup, Lab
from lab.clients import cache_folder, private_libssl
from lab.dns import Entry
from lab.net import SERVERS4, SERVERS6, preflight
from lab.servers import Servers
from tests.pipeline.collector import Collector
from tests.pipeline.prometheus_server import PrometheusServer

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = 8  # that a whole agent has on its cgroup
START_SECONDS = 60.0  # two seconds on an idle machine; tests share theirs
T = TypeVar("T")

POD_UID = "6a1f3f0e-8c1d-4b52-9b0a-3f6d2c1e9a77"
CONTAINER_ID = "4f1c" * 16
POD = (
    f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_UID.replace('-', '_')}.slice"
    f"/cri-containerd-{CONTAINER_ID}.scope"
)


def eventually(look: Callable[[], T], seconds: float = 10.0) -> T:
    """What `look` returns once that is true in the sense of `if`. Fails the test with its last answer."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"still {found!r} after {seconds:g} s")
        time.sleep(0.05)


def bpftool(*arguments: str) -> Any:
    done = subprocess.run(("bpftool", "-j", *arguments), capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout.strip() else []


class Samples:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._rows = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def rows(self, name: str, **labels: str) -> list[Any]:
        """The samples of a series that have these labels."""
        wanted = labels.items()
        return [row for row in self._rows if row.name == name and wanted <= row.labels.items()]

    def total(self, name: str, **labels: str) -> int:
        return int(sum(row.value for row in self.rows(name, **labels)))

    def lost(self, stage: str, cause: str) -> int:
        return self.total("ebfw_records_lost_total", ebfw_stage=stage, ebfw_cause=cause)


class Agent:
    """One process of the product. `tree` is the checkout that it runs from."""

    def __init__(
        self,
        host: Host,
        number: int,
        settings: dict[str, str],
        command: Sequence[str] = (),
        stdout: int | None = None,
        tree: Path = REPO,
    ) -> None:
        self.host = host
        self._out, self._err = host.directory / f"out{number}", host.directory / f"err{number}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-m", "exporter"],
                cwd=tree,
                env=host.environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> Agent:
        """Attached, and through its first round of work."""
        eventually(lambda: self.process.poll() is not None or " in " in self._attached(), START_SECONDS)
        if self.address:
            eventually(lambda: self.ended() or self.metrics().rows("ebfw_table_size", ebfw_table="ring"))
        assert not self.ended(), self.log
        self.host.remember()
        return self

    def _attached(self) -> str:
        return next((line for line in self.log.splitlines() if "attached to" in line), "")

    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def output(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """Whole lines of standard output."""
        return [line for line in self.output.split("\n")[:-1] if line]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def log(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def address(self) -> str:
        found = re.search(r"metrics at http://([^/]+)/metrics", self.log)
        return found[1] if found else ""

    def metrics(self) -> Samples:
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as answer:
            return Samples(answer.read().decode())

    def settled(self) -> Samples:
        """/metrics once the counters in it have stood still over a reading of the kernel's (every 2 s)."""
        before = self.metrics()
        for _ in range(10):
            time.sleep(2.3)
            after = self.metrics()
            flows = ("ebfw_network_io_bytes_total", "ebfw_events_total", "ebfw_tcp_connections_total")
            if all(after.total(name) == before.total(name) for name in flows):
                return after
            before = after
        pytest.fail("the counters do not come to rest")

    def memory(self) -> int:
        """Resident bytes."""
        (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(line) * 1024

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 15.0) -> int:
        """Send a signal and wait; the exit status."""
        if not self.ended():
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL."""
        self.host.remember()
        self.process.kill()
        self.process.wait()


class Host:
    """A cgroup (`shop`, hand-made, and a pod, a unit and a container beside it), a pin path, agents."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.pins = directory / "pins"
        self.agents: list[Agent] = []
        self._maps: set[int] = set()
        self._programs: set[int] = set()

    def __enter__(self) -> Host:
        self.cgroup = Cgroup("pipe.slice").__enter__()
        self.shop = self.cgroup.child("shop")
        return self

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        """What an agent runs with: nothing of ours that it reads, but `settings`."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("EBFW_", "OTEL_", "PYTHONSAFEPATH"))}
        return {
            **ours,
            "EBFW_CGROUP": str(self.cgroup.path),
            "EBFW_BPF_PIN_PATH": str(self.pins),
            "EBFW_METRICS_ADDR": "127.0.0.1:0",
            "EBFW_CACHE_PATH": str(cache_folder() / "programs"),
            **settings,
        }

    def start(
        self, *, tree: Path = REPO, stdout: int | None = None, command: Sequence[str] = (), **settings: str
    ) -> Agent:
        """Start an agent; `.ready()` waits for it. `command`: what makes the agent's process of its own."""
        agent = Agent(self, len(self.agents), settings, command, stdout=stdout, tree=tree)
        self.agents.append(agent)
        return agent

    def ebfw(self, *arguments: str, command: Sequence[str] = (), **settings: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands to the end."""
        return subprocess.run(
            [*command, sys.executable, "-m", "exporter", *arguments],
            cwd=REPO,
            env=self.environment(settings),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )

    # --- what is in the kernel, as bpftool sees it ----------------------------------------------------------

    def attached(self) -> list[dict[str, Any]]:
        """Programs on the cgroup and on those below it."""
        found = []
        for folder, _, _ in os.walk(self.cgroup.path):
            found += bpftool("cgroup", "show", folder)
        return sorted(found, key=lambda row: row["id"])

    def pinned(self, kind: str) -> dict[str, int]:
        """Ids of pinned objects ("map", "link", "prog") by the name of the pin."""
        found = {}
        for row in bpftool("-f", kind, "show"):
            for path in row.get("pinned", ()):
                if Path(path).is_relative_to(self.directory):
                    found[Path(path).name] = int(row["id"])
        return found

    def programs(self) -> set[int]:
        """Every program that uses a map of ours, attached or not."""
        self._maps |= set(self.pinned("map").values())
        return {row["id"] for row in bpftool("prog", "show") if self._maps & set(row.get("map_ids", ()))}

    def remember(self) -> None:
        """Note what is there, so that at the end it can be missed."""
        self._programs |= self.programs()

    # --- the end --------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Living processes that were started with something below our directory in their environment."""
        mark, found = os.fsencode(self.directory) + b"/", {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def _mounts(self) -> list[str]:
        mounts = [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [point for point in mounts if Path(point).is_relative_to(self.directory)]

    def _objects(self) -> set[int]:
        """Programs and maps of ours that the kernel still has; it frees them a moment after their last use."""
        programs = {row["id"] for row in bpftool("prog", "show")} & self._programs
        return programs | {row["id"] for row in bpftool("map", "show")} & self._maps

    def left_behind(self) -> list[str]:
        """What is left of the product now, in words; empty when it has cleaned up."""
        deadline = time.monotonic() + 20  # after RCU grace periods, which a busy machine stretches
        while self._objects() and time.monotonic() < deadline:
            time.sleep(0.1)
        kept = self._objects()
        rows = [row for kind in ("prog", "map") for row in bpftool(kind, "show") if row["id"] in kept]
        found = [f"{row['type']} {row.get('name', '')} {row['id']}" for row in rows]
        found += [f"program {row['name']} on the cgroup" for row in self.attached()]
        found += [f"mount {point}" for point in self._mounts()]
        if self.pins.exists():
            found += [f"pin {path}" for path in self.pins.rglob("*")] + [f"folder {self.pins}"]
        return found

    def __exit__(self, *_: object) -> None:
        problems = []
        try:
            for agent in self.agents:
                try:
                    agent.stop()
                except subprocess.TimeoutExpired:
                    problems.append(f"agent {agent.pid} did not end on SIGTERM")
                    agent.kill()
            if self.pins.exists():  # the test killed its agent, or asked it to leave the pins
                done = self.ebfw("detach")
                if done.returncode:
                    problems.append(f"detach: {done.stderr}")
            problems += self.left_behind()
        finally:
            self.cgroup.kill()
            problems += self._force()
        assert not problems, "\n".join(problems)

    def _force(self) -> list[str]:
        """Whatever happened: nothing of this test outlives it."""
        problems = []
        with contextlib.suppress(AssertionError, pytest.fail.Exception):
            eventually(lambda: not self.processes(), 3)
        for pid, what in self.processes().items():
            problems.append(f"process {pid}: {what}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for point in reversed(self._mounts()):
            subprocess.run(("umount", "--lazy", point), check=False)
        self.cgroup.__exit__(None, None, None)
        if self.cgroup.path.exists():
            problems.append(f"cgroup {self.cgroup.path}")
        return problems


class World:
    """The lab, its servers, a private libssl; what clients are run with."""

    def __init__(self, lab: Lab, servers: Servers, libraries: Path) -> None:
        self.lab, self.servers, self.libraries = lab, servers, libraries

    def environment(self, libraries: Path | None = None) -> dict[str, str]:
        """For processes in a watched cgroup."""
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str((libraries or self.libraries) / "lib"),
            "CURL_CA_BUNDLE": str(self.servers.ca),
            "SSL_CERT_FILE": str(self.servers.ca),
        }

    def private(self, name: str) -> Path:
        """A directory with another copy of libssl in lib/."""
        directory = self.libraries / name
        directory.mkdir(exist_ok=True)
        if private_libssl(directory) is None:
            pytest.skip("this Python has TLS built in: there is no libssl to put a probe on")
        return directory

    def run(self, cgroup: Cgroup, *argv: str, check: bool = True) -> str:
        """Run a client to its end in the cgroup and the pods' namespace; its standard output."""
        done = cgroup.run(argv, netns=self.lab.pods, env=self.environment(), capture_output=True, text=True, timeout=30)
        if check and done.returncode:
            pytest.fail(f"{argv}: exit status {done.returncode}: {done.stderr}")
        return str(done.stdout)

    def curl(self, cgroup: Cgroup, *arguments: str, check: bool = True) -> None:
        self.run(cgroup, "curl", "-sS", "-m", "10", "-o", os.devnull, *arguments, check=check)

    def python(self, cgroup: Cgroup, code: str, *arguments: str) -> str:
        return self.run(cgroup, sys.executable, "-c", code, *arguments)

    def popen(self, cgroup: Cgroup, code: str, *arguments: str, libraries: Path | None = None) -> subprocess.Popen[str]:
        """A Python client with pipes; it ends when its standard input does, or with its cgroup."""
        return cgroup.popen(
            (sys.executable, "-uc", code, *arguments),
            netns=self.lab.pods,
            env=self.environment(libraries),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def holder(self, cgroup: Cgroup) -> Iterator[None]:
        """A process in the cgroup that has the private libssl mapped, as any service does that is there to stay."""
        process = self.popen(cgroup, "import ssl, sys; print('ready'); sys.stdin.read()")
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.stdin.close()
            process.wait(10)
            process.stdout.close()


# Sends COUNT datagrams of BYTES, PAUSE seconds between two; says how many went.
UDP = """
import socket, sys, time
address, pause = sys.argv[1], float(sys.argv[5])
port, count, size = map(int, sys.argv[2:5])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
s.connect((address, port))
for n in range(count):
    s.send(bytes(size))
    if pause: time.sleep(pause)
print(count)
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    try:
        preflight()
    except Exception as error:
        pytest.skip(str(error))
    for tool in ("bpftool", "curl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    both = (SERVERS4[0], SERVERS6[0])
    names = {f"{name}.lab.example": Entry(both) for name in ("inside", "outside")}
    with Lab() as lab:
        with Servers(lab, names) as servers:
            found = World(lab, servers, tmp_path_factory.mktemp("tls"))
            found.libraries = found.private("shared")
            yield found
        names_of_lab = lab.name
    left = [*Path("/run/netns").glob(f"{names_of_lab}*"), *([lab.directory] if lab.directory.exists() else [])]
    assert not left


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A real one, for the whole run; it scrapes `prometheus.target`, whoever listens there."""
    with PrometheusServer(tmp_path_factory.mktemp("prometheus")) as server:
        yield server


@pytest.fixture(scope="session")
def collector(tmp_path_factory: pytest.TempPathFactory, prometheus: PrometheusServer) -> Iterator[Collector]:
    """A real one, for the whole run; its metrics go on to `prometheus`. Tests that stop one start their own."""
    with Collector(tmp_path_factory.mktemp("collector"), prometheus.otlp) as found:
        yield found


@pytest.fixture
def host(world: World, tmp_path: Path) -> Iterator[Host]:
    """A Host for one test."""
    with Host(world, tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def _marks(request: pytest.FixtureRequest) -> None:
    """Nothing here works without root; say so once, not in every file."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
