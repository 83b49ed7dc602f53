"""Whether the agent's memory is flat while workloads and destinations come and go, for ten minutes.

Real traffic: every other second a workload begins in a cgroup of its own, and is gone six seconds later; meanwhile it
looks up names, sends datagrams and makes requests, to destinations that nobody had before it and nobody has after.
The agent forgets in tenths of its usual times (with --quick sixtieths), so that in the first half already as much goes
as comes. What it holds is pushed and scraped. A run in which something was lost, or nothing was forgotten, is void.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from bench.process import receiver
from bench.report import Row, progress
from bench.world import Agent, cpus, pin_path
from lab import Cgroup, Lab, LabError
from lab.clients import compiled
from lab.net import RESOLVER4, SERVERS4, Namespace

_SECONDS, _QUICK = 600, 60
_LIFE, _EVERY = 6.0, 2.0  # of a workload; until the next one
_SERVER = SERVERS4[2]

# The agent, with all that it keeps kept for a part of the time only. A name that is not there is an error.
_AGENT = """
import sys
from exporter import __main__, agent
from exporter.emit import store
from exporter.enrich import cgroup, names
for module, name in (
    (agent, "IDLE_FLOW_SECONDS"), (store, "IDLE_SECONDS"), (store, "ENDED_SECONDS"), (cgroup, "TOMBSTONE"),
    (names, "TTL_FLOOR"), (names, "TTL_CAP"),
):
    setattr(module, name, type(getattr(module, name))(getattr(module, name) / {part}))
sys.argv = ["ebfw"]
sys.exit(__main__.main())
"""

# Forty rounds a second, for so long; says how many it made.
_WORKLOAD = """
import socket, sys, time
number, seconds, server = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
began, n = time.monotonic(), 0
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    while (now := time.monotonic() - began) < seconds:
        if n > now * 40:
            time.sleep(n / 40 - now)
        name = f"n{n % 40}.w{number}.example"
        socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)
        place = number * 240 + n
        s.sendto(bytes(64), (f"198.51.100.{100 + place % 20}", 10000 + place // 20 % 50000))
        if n % 8 == 0:
            with socket.create_connection((server, 80), 10) as c:
                c.sendall(f"GET /p/{n} HTTP/1.1\\r\\nHost: {name}\\r\\nConnection: close\\r\\n\\r\\n".encode())
                c.recv(4096)
        n += 1
print(n)
"""


class _Sample(NamedTuple):
    at: float  # seconds
    rss: float  # MB
    flows: int


def rows(quick: bool) -> Iterator[Row]:
    seconds, part = (_QUICK, 60) if quick else (_SECONDS, 10)
    with contextlib.ExitStack() as stack:
        lab, cgroup = stack.enter_context(Lab()), stack.enter_context(Cgroup("bench"))
        pins, url = stack.enter_context(pin_path()), stack.enter_context(receiver())
        for mode, address, port in (("dns", RESOLVER4, 53), ("http", _SERVER, 80)):
            stack.enter_context(_serving(lab.world, mode, address, port))
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_METRIC_EXPORT_INTERVAL": "5000"}
        agent = Agent(cgroup, pins, cpus()[1], environment)
        agent.command = (sys.executable, "-c", _AGENT.replace("{part}", str(part)))
        stack.enter_context(agent)
        crowd = _Crowd(lab, cgroup)
        stack.callback(crowd.close)
        samples: list[_Sample] = []
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            crowd.turn(now)
            used = agent.samples("ebfw_table_used")
            flows = next((int(n) for labels, n in used.items() if 'ebfw_table="flows"' in labels), 0)
            samples.append(_Sample(now, agent.rss()["VmRSS"], flows))
            progress.step(
                f"churn: {now:.0f} of {seconds} s, {crowd.begun} workloads, {flows:,} flows, {samples[-1].rss:.0f} MB"
            )
            time.sleep(0.5)
        crowd.close()
        if lost := agent.lost():
            raise LabError(f"lost: {lost}")
    most = max(sample.flows for sample in samples)
    if not 0 < most < crowd.rounds * 0.8:
        raise LabError(f"{most} flows at once after {crowd.rounds} destinations: nothing was forgotten")
    # The largest of a tenth: a push or a scrape may be under way or not.
    at_half, at_end = (
        max(sample.rss for sample in samples if end - 0.1 < sample.at / seconds <= end) for end in (0.5, 1.0)
    )
    yield Row(
        f"agent RSS, {seconds} s of churn",
        at_end,
        "MB",
        "after half of it",
        at_half,
        at_end / at_half,
        1.03,
        note=f"{crowd.begun} workloads, {crowd.rounds:,} destinations, at most {most:,} flows at once; "
        f"forgets in 1/{part} of its times",
    )


@contextlib.contextmanager
def _serving(where: Namespace, mode: str, address: str, port: int) -> Iterator[None]:
    process = where.popen([compiled(), "serve", mode, address, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise LabError(f"the {mode} server did not start")
        yield
    finally:
        process.terminate()
        process.communicate()


class _Crowd:
    """Workloads that come and go. `turn` often, `close` at the end."""

    def __init__(self, lab: Lab, cgroup: Cgroup) -> None:
        self._lab, self._cgroup = lab, cgroup
        self._alive: list[tuple[Cgroup, subprocess.Popen[str]]] = []
        self.begun = self.rounds = 0

    def turn(self, now: float) -> None:
        """Begin those that are due, bury those that are done."""
        if now >= self.begun * _EVERY:
            home = self._cgroup.child(f"churn-{self.begun}.service")
            argv = (sys.executable, "-c", _WORKLOAD, str(self.begun), str(_LIFE), _SERVER)
            self._alive.append((home, home.popen(argv, netns=self._lab.pods, stdout=subprocess.PIPE, text=True)))
            self.begun += 1
        for one in list(self._alive):
            if one[1].poll() is not None:
                self._bury(*one)
                self._alive.remove(one)

    def close(self) -> None:
        while self._alive:
            self._bury(*self._alive.pop())

    def _bury(self, home: Cgroup, process: subprocess.Popen[str]) -> None:
        said = process.communicate(timeout=_LIFE + 20)[0]
        if process.returncode:
            raise LabError("a workload failed")
        self.rounds += int(said)
        home.remove()
