"""What an application pays: user and system time of both ends, with and without an agent that runs.

Both ends are C programs (lab/clients/loadgen.c) on one CPU, in the watched cgroup, over the loopback device of a
namespace of their own but between documentation addresses, so that all of it is told, not excluded. The agent runs on
another CPU: what it costs itself is another row. Short runs by turns, in the order off on on off; each run is divided
by the one that is its counterpart in the other phase, so that a slow drift of the machine falls out. Requests inside
TLS, where probes are hit, are in live_tls.py.

Those C programs do nothing else: no application pays so much. What one pays that parses, schedules and writes a log
shows a client and server of Go's net/http, likewise on one CPU.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench import live_tls
from bench.report import Row, compared, progress
from bench.world import REPOSITORY, Agent, cpus, pin_path
from lab import Cgroup, Lab, LabError
from lab.clients import compiled
from lab.net import POD4


class _Load(NamedTuple):
    mode: str
    number: int
    port: int = 0
    options: tuple[str, ...] = ()


class _Result(NamedTuple):
    cpu: float  # seconds an operation, both ends
    rate: float  # operations a second of wall time
    mbytes: float  # megabytes a second


_LOADS = {
    "pingpong": _Load("pingpong", 20_000),
    "hello": _Load("hello", 4_000),
    "http": _Load("http", 20_000),
    "dns": _Load("dns", 16_000, 53),
    "dns fresh": _Load("dns", 10_000, 53, ("-f",)),
    "bulk": _Load("bulk", 12_000),
}
_RUNS = 2  # of each load in each phase
_GO_REQUESTS, _GO_PORT = 4_000, 8080


def rows(quick: bool) -> Iterator[Row]:
    with Lab() as lab, Cgroup("bench") as cgroup, pin_path() as pins, contextlib.ExitStack() as guard:
        bench = _Live(lab, cgroup)
        go = guard.enter_context(_Go(lab, cgroup))
        go_rates: dict[bool, list[float]] = {False: [], True: []}
        without: dict[str, list[_Result]] = {name: [] for name in _LOADS}
        with_agent: dict[str, list[_Result]] = {name: [] for name in _LOADS}
        rounds = 2 if quick else 12
        agent = Agent(cgroup, pins, cpus()[1])
        try:
            running = False
            for number in range(rounds):
                # off on, on off, off on, ...: the agent is started every other round only
                for on in (False, True) if number % 2 == 0 else (True, False):
                    if on and not running:
                        agent.start()
                    elif running and not on:
                        agent.stop()
                    running = on
                    for name, load in _LOADS.items():
                        progress.step(f"round {number + 1} of {rounds}, {name} {'with' if on else 'without'}")
                        (with_agent if on else without)[name] += [bench.run(load) for _ in range(_RUNS)]
                    progress.step(f"round {number + 1} of {rounds}, Go {'with' if on else 'without'}")
                    go_rates[on] += [go.rate() for _ in range(_RUNS)]
        finally:
            agent.stop()

    def cpu(title: str, name: str, bound: float | None, note: str) -> Row:
        ours, theirs = ([r.cpu * 1e6 for r in side[name]] for side in (with_agent, without))
        return compared(f"application CPU, {title}", ours, theirs, "us/op", "without agent", bound, note)

    runs = rounds * _RUNS
    yield cpu("ping-pong", "pingpong", 1.05, f"64 B there and back; {runs} runs each")
    yield cpu("connect + ClientHello + close", "hello", 1.2, "1.7 KB hello, name last")
    yield cpu("HTTP/1.1 request", "http", None, "one connection, 600 B of body")
    yield cpu("DNS query and answer", "dns", 1.10, "one unconnected socket")
    yield cpu("DNS, a fresh socket each", "dns fresh", None, "as resolvers in the C library do")
    yield cpu("bulk, 64 KiB writes", "bulk", None, "")
    for title, name in (
        ("ping-pong", "pingpong"),
        ("connect + hello", "hello"),
        ("DNS", "dns"),
        ("HTTP/1.1, programs that do nothing else", "http"),
    ):
        yield compared(
            f"request rate, {title}",
            [r.rate for r in with_agent[name]],
            [r.rate for r in without[name]],
            "1/s",
            "without agent",
            note="both ends on one CPU",
        )
    rate = compared(
        "request rate, HTTP/1.1, Go's net/http",
        go_rates[True],
        go_rates[False],
        "1/s",
        "without agent",
        0.95,
        "client and server with an access log, on one CPU",
    )
    yield rate._replace(at_least=True)
    yield compared(
        "throughput, bulk",
        [r.mbytes for r in with_agent["bulk"]],
        [r.mbytes for r in without["bulk"]],
        "MB/s",
        "without agent",
        note="both ends on one CPU",
    )
    yield from live_tls.rows(quick)


class _Live:
    def __init__(self, lab: Lab, cgroup: Cgroup) -> None:
        self._lab, self._cgroup = lab, cgroup
        self._program, self._cpu = str(compiled()), str(cpus()[0])
        # What it takes until the program runs (a shell, entering the namespace) is in its CPU time.
        self._before = 0.0
        self._before = statistics.median(self._ends(_Load("pingpong", 1))[0] for _ in range(5))

    def run(self, load: _Load) -> _Result:
        cpu, client = self._ends(load)
        if client["lost"]:
            raise RuntimeError(f"{load.mode}: {client['lost']} answers did not come")
        count = int(client["n"])
        return _Result((cpu - self._before) / count, count / client["wall_s"], client["bytes"] / client["wall_s"] / 1e6)

    def _start(self, *words: str) -> subprocess.Popen[str]:
        return self._cgroup.popen(
            ["taskset", "-c", self._cpu, self._program, *words],
            netns=self._lab.pods,
            names=False,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ends(self, load: _Load) -> tuple[float, dict[str, Any]]:
        """CPU seconds of both ends, and the client's report."""
        served = load.number if load.mode in ("hello", "dns") else 1
        server = self._start("serve", load.mode, POD4, str(load.port), "-n", str(served))
        try:
            assert server.stdout is not None
            port = json.loads(server.stdout.readline())["ready"]
            client = self._start(load.mode, POD4, str(port), "-n", str(load.number), *load.options)
            said = json.loads(client.communicate(timeout=60)[0])
            heard = json.loads(server.communicate(timeout=60)[0])
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
        return sum(end["user_s"] + end["system_s"] for end in (said, heard)), said


class _Go:
    """A server of Go's net/http, and a client for each run, on one CPU; a context manager."""

    def __init__(self, lab: Lab, cgroup: Cgroup) -> None:
        self._lab, self._cgroup = lab, cgroup
        self._program = REPOSITORY / ".venv/tools/goclient"
        if not self._program.exists():
            raise LabError("the Go client is not built; run: scripts/tools goclient")

    def _start(self, *words: str) -> subprocess.Popen[str]:
        return self._cgroup.popen(
            ["taskset", "-c", str(cpus()[0]), str(self._program), *words],
            netns=self._lab.pods,
            names=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Its end says that the process has ended. Without a pipe subprocess looks every 50 ms: a tenth of a run.
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _Go:
        self._server = self._start("-serve", f"{POD4}:{_GO_PORT}")
        deadline = time.monotonic() + 10
        while self._request(1)[0]:
            if time.monotonic() > deadline:
                self.__exit__()
                raise LabError("the Go server does not answer")
            time.sleep(0.1)
        self._before = statistics.median(self._request(1)[1] for _ in range(5))
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def _request(self, number: int) -> tuple[int, float]:
        """The client's exit status, and how many seconds it took."""
        began = time.monotonic()
        client = self._start("-url", f"http://{POD4}:{_GO_PORT}/", "-n", str(number))
        client.communicate(timeout=60)
        return client.returncode, time.monotonic() - began

    def rate(self) -> float:
        """Requests a second, one after another on one connection."""
        failed, seconds = self._request(_GO_REQUESTS)
        if failed:
            raise LabError("a request of the Go client had no answer")
        return _GO_REQUESTS / (seconds - self._before)
