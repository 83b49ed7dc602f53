"""The real kernel, in a child cgroup and network namespaces of its own.

In: root, cgroup2, bcc. Out: fixtures. One `Kernel` is attached for the whole folder to one parent cgroup; every test
runs its workload in a fresh child of it and sees what that child did and nothing else. Tests that need a kernel side
of their own (other excludes, a small table, a late start) attach one with `attached`. The far side, outside the
watched subtree, is `servers`; `Capture` (tcpdump), `servers.log`, ss and nstat are what the counts are held against.

EBFW_TEST_SLOW: by how much waiting times are multiplied (an emulated CPU: 10). Nothing stays behind after a failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from exporter import decode as decoding
from exporter.decode import Sighting, address, decode, transport, whole
from exporter.enrich.names import Names
from exporter.events import Counts, Event, Workload
from exporter.health import losses
from exporter.join import Join
from exporter.kernel import build, maps, pins, wire
from exporter.kernel.probes import Kernel
from lab import Cgroup, Lab, sweep
from lab.net import Namespace
from lab.servers import Servers

SLOW = int(os.environ.get("EBFW_TEST_SLOW") or 1)
N = 23  # a prime: no factor of batching or of doubling hides in it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = "" if os.geteuid() == 0 else "needs root"
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.kernel)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


# --- what was seen ------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Which row of the flow table."""

    role: str
    transport: str
    peer: str
    port: int
    kind: int = wire.FLOW_PEER
    name: str = ""


def client(peer: str, port: int, name: str = "", transport: str = "tcp") -> Place:
    return Place("client", transport, peer, port, wire.FLOW_PEER, name)


def server(port: int, transport: str = "tcp") -> Place:
    return Place("server", transport, "", port, wire.FLOW_INBOUND)


class Tap:
    """One attached kernel side; keeps all that it has said."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.records: list[bytes] = []
        self.sightings: list[Sighting] = []
        self.totals: dict[maps.FlowKey, tuple[int, ...]] = {}
        self.fallen: list[maps.Row] = []  # a counter that went backwards; must stay empty

    def pump(self) -> None:
        # Loss counters and rows first: what they count was told in the ring no later.
        for row in self.kernel.flow_table.read(time.monotonic(), time.monotonic_ns()):
            if min(row.delta) < 0:
                self.fallen.append(row)
            before = self.totals.get(row.key, (0,) * 12)
            self.totals[row.key] = tuple(map(int.__add__, before, row.delta))
        for data in self.kernel.ring.drain():
            sighting = whole(data)
            assert sighting is not None, f"unreadable record: {data!r}"
            self.records.append(data)
            self.sightings.append(sighting)


def _settle(pump: Callable[[], object], state: Callable[[], object]) -> None:
    """Until nothing has moved for a while."""
    quiet = 0.06 * min(SLOW, 5)
    pump()
    last, since = state(), time.monotonic()
    deadline = since + 10 * SLOW
    while time.monotonic() - since < quiet and time.monotonic() < deadline:
        time.sleep(0.02)
        pump()
        now = state()
        if now != last:
            last, since = now, time.monotonic()


class Watch:
    """What one cgroup (and what is below it, by `ids`) did: rows and events. `ids` None: whoever it was."""

    def __init__(self, tap: Tap, ids: set[int] | None, hidden: Callable[[str], bool] = lambda name: False) -> None:
        self.tap, self.ids = tap, ids
        tap.pump()
        self._next = len(tap.sightings)
        self._totals = dict(tap.totals)
        self._tallies = tap.kernel.tallies()
        self.sightings: list[Sighting] = []
        self.events: list[Event] = []
        names = Names()
        self.join = Join(
            lambda cgroup: Workload(cgroup, f"/{cgroup}", "unit", f"w{cgroup}", unit=f"w{cgroup}"),
            tap.kernel.names.get,
            names.name_for,
            names.learn_for,
            hidden,
            lambda monotonic: monotonic,
            tap.kernel.received,
        )

    def pump(self) -> Watch:
        self.tap.pump()
        tap = self.tap
        for record, sighting in zip(tap.records[self._next :], tap.sightings[self._next :], strict=True):
            if self.ids is None or sighting.cgroup in self.ids:
                self.sightings.append(sighting)
                decoded = decode(record)
                event = self.join.add(decoded) if decoded is not None else None
                if event is not None:
                    self.events.append(event)
        self.events.extend(self.join.expire(0))
        self._next = len(self.tap.sightings)
        return self

    def expire(self, ahead: float = 0) -> Watch:
        """What was held back, or never answered, `ahead` seconds from now."""
        self.events += self.join.expire(time.monotonic_ns() + int(ahead * 1e9))
        return self

    @property
    def moved(self) -> dict[maps.FlowKey, Counts]:
        """By how much each row moved since the watch began."""
        found = {}
        for key, values in self.tap.totals.items():
            if self.ids is not None and key.cgroup not in self.ids:
                continue
            before = self._totals.get(key, (0,) * 12)
            if values != before:
                found[key] = Counts._make(map(int.__sub__, values, before))
        return found

    @property
    def rows(self) -> dict[Place, Counts]:
        found: dict[Place, Counts] = {}
        for key, counts in self.moved.items():
            place = Place(
                wire.ROLES[key.role],
                transport(key.transport),
                address(key.peer),
                key.port,
                key.kind,
                self.tap.kernel.names.get(key.name),
            )
            found[place] = add(found.get(place, Counts()), counts)
        return found

    @property
    def total(self) -> Counts:
        return add(*self.moved.values())

    def row(self, place: Place) -> Counts:
        return self.rows.get(place, Counts())

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    def tallies(self) -> dict[str, int]:
        """What moved since the watch began, as "stage/cause"."""
        now = self.tap.kernel.tallies()
        return {f"{a}/{b}": n - self._tallies[a, b] for (a, b), n in now.items() if n != self._tallies[a, b]}

    def until(self, condition: Callable[[Watch], object], seconds: float = 10) -> Watch:
        """Wait for the condition, and then until all is quiet. Fails with all that was seen."""
        deadline = time.monotonic() + seconds * SLOW
        while not condition(self.pump()):
            assert time.monotonic() < deadline, f"never came\n{self.describe()}"
            time.sleep(0.02)
        return self.settle()

    def settle(self) -> Watch:
        _settle(self.pump, lambda: (len(self.sightings), self.tap.totals.copy()))
        return self

    def describe(self) -> str:
        lines = ["rows:", *(f"  {place} {counts}" for place, counts in sorted(self.rows.items()))]
        lines += ["sightings:", *(f"  {s.kind} {s.peer}:{s.port} {s.outcome} {s.flags}" for s in self.sightings[:60])]
        return "\n".join([*lines, f"tallies: {self.tallies()}"])


def add(*counts: Counts) -> Counts:
    return Counts._make(map(sum, zip(*counts, strict=True))) if counts else Counts()


# --- the folder's -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="package")
def programs() -> Iterator[dict[str, bytes]]:
    """The instructions, compiled once; every Kernel in this folder gets these."""
    code = build.compile_programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_programs", lambda: code)
        yield code


@pytest.fixture(scope="package")
def lab() -> Iterator[Lab]:
    sweep()
    with Lab(gso=False) as made:
        yield made


@pytest.fixture(scope="package")
def servers(lab: Lab) -> Iterator[Servers]:
    with Servers(lab) as running:
        yield running


@contextlib.contextmanager
def attach(
    cgroup: Path,
    pin_path: Path,
    *,
    flows: int = 4096,
    ring_bytes: int = 1 << 21,
    exclude: Iterable[Any] = (),
    suffixes: Iterable[str] = (),
    unpin: bool = True,
) -> Iterator[Tap]:
    """A kernel side on this cgroup; everything is removed, also when the test fails. `unpin` False: the next one
    on the same path adopts it."""
    kernel = Kernel(pin_path, cgroup, flows, ring_bytes)
    done = False
    try:
        kernel.attach(exclude, suffixes)
        yield Tap(kernel)
        done = True
    finally:
        kernel.close(unpin=unpin or not done)
        if (unpin or not done) and pin_path.is_dir() and pins.mounted_at(pin_path) == pin_path:
            pins.remove(pin_path)


@pytest.fixture(scope="package")
def parent() -> Iterator[Cgroup]:
    with Cgroup("test") as made:
        yield made


@pytest.fixture(scope="package")
def tap(programs: dict[str, bytes], parent: Cgroup, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tap]:
    """The folder's kernel side, without excludes."""
    with attach(parent.path, tmp_path_factory.mktemp("pins") / "p") as made:
        yield made


_numbers = itertools.count(1)


@pytest.fixture
def cgroup(parent: Cgroup) -> Iterator[Cgroup]:
    """This test's own, below the watched one."""
    child = parent.child(f"t{next(_numbers)}")
    yield child
    child.remove()


@pytest.fixture
def watch(tap: Tap, cgroup: Cgroup) -> Iterator[Watch]:
    """What this test's cgroup did. No test may lose a record unless it says so (`losses_expected`)."""
    lost = losses.snapshot()
    made = Watch(tap, {cgroup.id})
    made.losses_expected = False  # type: ignore[attr-defined]
    yield made
    made.pump()
    assert not tap.fallen
    if not made.losses_expected:  # type: ignore[attr-defined]
        assert losses.snapshot() == lost
        assert not made.tallies()


# --- the near side ------------------------------------------------------------------------------------------------

_PRELUDE = Path(__file__).with_name("near_side.py")


class Client:
    """A program in a cgroup and a namespace: near_side.py, then the given lines. `said`: what it told, once it is
    done; `wait_for` for one that goes on; `go` lets its next `pause()` end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid
        self.said: list[dict[str, Any]] = []

    def wait_for(self, key: str) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))
            if key in self.said[-1]:
                return self.said[-1][key]
        raise AssertionError(f"the client ended without {key!r}: {self.said} {self._complaint()}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _complaint(self) -> str:
        return self.process.stderr.read() if self.process.stderr else ""

    def finish(self, seconds: float = 60) -> Client:
        try:
            out, err = self.process.communicate(timeout=seconds * SLOW)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"the client did not end: {out}{err}") from None
        assert self.process.returncode == 0, err
        self.said += [json.loads(line) for line in out.splitlines()]
        return self

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def __getitem__(self, key: str) -> Any:
        return next(said[key] for said in self.said if key in said)


@pytest.fixture
def start(lab: Lab, servers: Servers, cgroup: Cgroup) -> Iterator[Callable[..., Client]]:
    """start(lines, cgroup=…, netns=…, names=…, through=…, **variables): a Client that has begun; `through`: a command
    that runs what follows it. The servers run."""
    started: list[Client] = []

    def begin(
        lines: str,
        *,
        cgroup: Cgroup | None = cgroup,
        netns: Namespace = lab.pods,
        names: bool = False,
        through: Iterable[str] = (),
        **variables: Any,
    ) -> Client:
        argv = [*through, sys.executable, "-I", "-S", "-c", _PRELUDE.read_text() + "\n" + lines]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if cgroup is None:
            process = netns.popen(argv, **pipes)
        else:
            process = cgroup.popen(argv, netns=netns, names=names, **pipes)
        started.append(Client(process))
        assert process.stdin is not None
        process.stdin.write(json.dumps(variables) + "\n")
        process.stdin.flush()
        return started[-1]

    yield begin
    for one in started:
        one.end()


@pytest.fixture
def run(start: Callable[..., Client]) -> Callable[..., Client]:
    """As `start`, and wait for its end."""
    return lambda lines, **variables: start(lines, **variables).finish()


@contextlib.contextmanager
def far_echo(netns: Namespace, address: str, kind: socket.SocketKind, port: int = 0) -> Iterator[int]:
    """An echo server in a namespace, outside the cgroup; its port."""
    with netns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    if kind == socket.SOCK_STREAM:
        sock.listen(100)
    sock.settimeout(0.1)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                if kind == socket.SOCK_STREAM:
                    connection, _ = sock.accept()
                    connection.settimeout(20)
                    while data := connection.recv(4096):
                        connection.sendall(data)
                    connection.close()
                else:
                    sock.sendto(*sock.recvfrom(4096))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        sock.close()


# --- other tools --------------------------------------------------------------------------------------------------


class Packets(NamedTuple):
    """What tcpdump saw: IP bytes and packets, by direction."""

    tx_bytes: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    rx_packets: int = 0


class Capture:
    """tcpdump in a namespace; a context manager. `packets(ours)` once it has ended: tx is what came from `ours`."""

    def __init__(self, netns: Namespace, expression: str, file: Path, device: str = "eth0") -> None:
        self._argv = ["tcpdump", "-i", device, "-n", "-U", "--immediate-mode", "-s", "128", "-Z", "root"]
        self._argv += ["-w", str(file), *expression.split()]
        self._netns, self._file = netns, file
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Capture:
        self.process = self._netns.popen(self._argv, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "listening on" in line:
                return self
        raise AssertionError("tcpdump did not start")

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        time.sleep(0.05 * SLOW)
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr is not None
        summary = self.process.stderr.read()
        self.process.wait()
        self.process.stderr.close()
        assert "\n0 packets dropped by kernel" in summary, summary

    def headers(self) -> Iterator[tuple[bytes, int]]:
        """Each packet's first bytes from its IP header on, and its length in bytes (pcap, Ethernet)."""
        data = self._file.read_bytes()
        assert data[:4] == b"\xd4\xc3\xb2\xa1"
        at = 24
        while at < len(data):
            kept, length = struct.unpack_from("<II", data, at + 8)
            yield data[at + 16 + 14 : at + 16 + kept], length - 14
            at += 16 + kept

    def packets(self, *ours: bytes, synacks6: bool = True) -> Packets:
        """`ours`: packed addresses of our end; with a port in network order behind it for a loopback capture.
        `synacks6` False: without the SYN-ACKs over IPv6."""
        total = [0, 0, 0, 0]
        for head, length in self.headers():
            if not synacks6 and head[0] >> 4 == 6 and head[6] == 6 and head[40 + 13] & 0x12 == 0x12:
                continue
            if head[0] >> 4 == 4:
                length = struct.unpack_from("!H", head, 2)[0]
                source, ports = head[12:16], head[(head[0] & 15) * 4 :]
            else:
                source, ports = head[8:24], head[40:]
            out = any(mine in (source, source + ports[:2]) for mine in ours)
            total[0 if out else 2] += length
            total[1 if out else 3] += 1
        return Packets(*total)


def sees_synacks6() -> bool:
    """Older kernels (seen on 5.10) do not run egress programs on the SYN-ACKs of an IPv6 listener, which belong to a
    request socket: nobody can count these there, one packet a connection."""
    return tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 13)


@pytest.fixture
def capture(lab: Lab, tmp_path: Path) -> Callable[..., Capture]:
    def make(expression: str, *, netns: Namespace = lab.pods, device: str = "eth0") -> Capture:
        return Capture(netns, expression, tmp_path / f"{next(_numbers)}.pcap", device)

    return make


def nstat(netns: Namespace, name: str) -> int:
    """A counter of the namespace's SNMP tables since it was made."""
    done = netns.run(["nstat", "-asz", name], capture_output=True, text=True, check=True)
    return next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(name))


FAILED, OPENED, CLOSED = decoding.FAILED, decoding.OPENED, decoding.CLOSED
