"""What an application pays: user and system time of both ends, watched by an agent and not.

Both ends are C programs (lab/clients/loadgen.c) on one CPU, over the loopback device of a namespace of their own but
between documentation addresses, so that all of it is told, not excluded. The agent runs on another CPU: what it costs
itself is another row. Each run in the watched cgroup is divided by its neighbour of the same second in a cgroup beside
it, which has no program: on a machine that others use, too, agents that come and go between the two would put seconds
between them, in which its speed changes by more than what is measured. Requests inside TLS, where probes are hit, are
in live_tls.py.

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
    runs: int = 24  # watched, and as many not


class _Result(NamedTuple):
    cpu: float  # seconds an operation, both ends
    rate: float  # operations a second of wall time
    mbytes: float  # megabytes a second


_LOADS = {
    "pingpong": _Load("pingpong", 10_000, runs=72),
    "hello": _Load("hello", 2_000, runs=72),
    "http": _Load("http", 20_000),
    "dns": _Load("dns", 8_000, 53, runs=72),
    "dns fresh": _Load("dns", 10_000, 53, ("-f",)),
    "bulk": _Load("bulk", 12_000),
}
_GO_REQUESTS, _GO_RUNS, _GO_PORTS = 2_000, 72, {True: 8080, False: 8081}
_READ = 0.3  # seconds after which the agent has read what a run has left in the ring


def rows(quick: bool) -> Iterator[Row]:
    with (
        Lab() as lab,
        Cgroup("bench") as watched,
        Cgroup("unwatched") as unwatched,
        pin_path() as pins,
        contextlib.ExitStack() as guard,
    ):
        cgroups = {True: watched, False: unwatched}
        agent = Agent(watched, pins, cpus()[1])
        guard.callback(agent.stop)
        agent.start()
        benches = {on: _Live(lab, cgroup) for on, cgroup in cgroups.items()}
        goes = {on: guard.enter_context(_Go(lab, cgroup, _GO_PORTS[on])) for on, cgroup in cgroups.items()}
        go_rates: dict[bool, list[float]] = {True: [], False: []}
        results: dict[bool, dict[str, list[_Result]]] = {on: {name: [] for name in _LOADS} for on in cgroups}

        def turns(number: int) -> tuple[bool, bool]:
            return (False, True) if number % 2 == 0 else (True, False)

        for name, load in _LOADS.items():
            for number in range(4 if quick else load.runs):
                progress.step(f"{name}, run {number + 1} of {load.runs}")
                for on in turns(number):
                    results[on][name].append(benches[on].run(load))
                    if on:
                        time.sleep(_READ)
        for number in range(4 if quick else _GO_RUNS):
            progress.step(f"Go, run {number + 1} of {_GO_RUNS}")
            for on in turns(number):
                go_rates[on].append(goes[on].rate())
                if on:
                    time.sleep(_READ)

    def cpu(title: str, name: str, bound: float | None, note: str) -> Row:
        ours, theirs = ([r.cpu * 1e6 for r in side[name]] for side in (results[True], results[False]))
        return compared(f"application CPU, {title}", ours, theirs, "us/op", "not watched", bound, note)

    yield cpu("ping-pong", "pingpong", 1.05, "64 B there and back")
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
            [r.rate for r in results[True][name]],
            [r.rate for r in results[False][name]],
            "1/s",
            "not watched",
            note="both ends on one CPU",
        )
    rate = compared(
        "request rate, HTTP/1.1, Go's net/http",
        go_rates[True],
        go_rates[False],
        "1/s",
        "not watched",
        0.95,
        "client and server with an access log, on one CPU",
    )
    yield rate._replace(at_least=True)
    yield compared(
        "throughput, bulk",
        [r.mbytes for r in results[True]["bulk"]],
        [r.mbytes for r in results[False]["bulk"]],
        "MB/s",
        "not watched",
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

    def __init__(self, lab: Lab, cgroup: Cgroup, port: int) -> None:
        self._lab, self._cgroup, self._port = lab, cgroup, port
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
        self._server = self._start("-serve", f"{POD4}:{self._port}")
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
        client = self._start("-url", f"http://{POD4}:{self._port}/", "-n", str(number))
        client.communicate(timeout=60)
        return client.returncode, time.monotonic() - began

    def rate(self) -> float:
        """Requests a second, one after another on one connection."""
        failed, seconds = self._request(_GO_REQUESTS)
        if failed:
            raise LabError("a request of the Go client had no answer")
        return _GO_REQUESTS / (seconds - self._before)
