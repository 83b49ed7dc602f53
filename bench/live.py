"""What an application pays: user and system time of both ends, watched by an agent and not.

Both ends are C programs (lab/clients/loadgen.c) on one CPU, over the loopback device of a namespace of their own but
between documentation addresses, so that all of it is told, not excluded. The agent runs on another CPU: what it costs
itself is another row. Each run in the watched cgroup is divided by its neighbour of the same second in a cgroup beside
it, which has no program: on a machine that others use, too, agents that come and go between the two would put seconds
between them, in which its speed changes by more than what is measured. Requests inside TLS, where probes are hit, are
in live_tls.py.

Those C programs do nothing else: no application pays so much. What one pays that parses, schedules and writes a log
shows a client and server of Go's net/http, likewise on one CPU. Clients that are watched and that are not take turns of
some milliseconds and are replaced after 2,000 requests, as the speed of one varies twofold with where its memory lies.
What the agent does on its CPU meanwhile slows both alike.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
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
    "pingpong": _Load("pingpong", 5_000, runs=288),
    "hello": _Load("hello", 2_000, runs=72),
    "http": _Load("http", 20_000),
    "dns": _Load("dns", 8_000, 53, runs=72),
    "dns fresh": _Load("dns", 10_000, 53, ("-f",)),
    "bulk": _Load("bulk", 12_000),
}
_GO_PORTS = {True: 8080, False: 8081}
_GO_REQUESTS, _GO_TURNS, _GO_CLIENTS = 200, 10, 300  # in a turn, of a client, one after another
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
        servers = {on: guard.enter_context(_GoServer(lab, cgroup, _GO_PORTS[on])) for on, cgroup in cgroups.items()}
        for number in range(4 if quick else _GO_CLIENTS):
            progress.step(f"Go, client {number + 1} of {_GO_CLIENTS}")
            with contextlib.ExitStack() as both:
                clients = {on: both.enter_context(server.client()) for on, server in servers.items()}
                for turn in range(_GO_TURNS):
                    for on in turns(turn):
                        go_rates[on].append(clients[on]())

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

    def run(self, load: _Load) -> _Result:
        cpu, client = self._ends(load)
        if client["lost"]:
            raise RuntimeError(f"{load.mode}: {client['lost']} answers did not come")
        count = int(client["n"])
        return _Result(cpu / count, count / client["wall_s"], client["bytes"] / client["wall_s"] / 1e6)

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


class _GoServer:
    """A server of Go's net/http, and clients of it on the same CPU; a context manager."""

    def __init__(self, lab: Lab, cgroup: Cgroup, port: int) -> None:
        self._lab, self._cgroup, self._address = lab, cgroup, f"{POD4}:{port}"
        self._program = REPOSITORY / ".venv/tools/goclient"
        if not self._program.exists():
            raise LabError("the Go client is not built; run: scripts/tools goclient")

    def _start(self, *words: str) -> subprocess.Popen[str]:
        return self._cgroup.popen(
            ["taskset", "-c", str(cpus()[0]), str(self._program), *words],
            netns=self._lab.pods,
            names=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # a line for each request, written all the same
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _GoServer:
        self._server = self._start("-serve", self._address)
        deadline = time.monotonic() + 10
        while (attempt := self._start("-url", f"http://{self._address}/")).communicate() and attempt.returncode:
            if time.monotonic() > deadline:
                self.__exit__()
                raise LabError("the Go server does not answer")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # it ends with its input

    @contextlib.contextmanager
    def client(self) -> Iterator[Callable[[], float]]:
        """A process with one connection; the call makes requests one after another, and says how many a second."""
        client = self._start("-url", f"http://{self._address}/", "-turns")
        orders, answers = client.stdin, client.stderr
        assert orders is not None
        assert answers is not None

        def rate() -> float:
            print(_GO_REQUESTS, file=orders, flush=True)
            seconds = answers.readline()
            try:
                return _GO_REQUESTS / float(seconds)
            except ValueError:
                raise LabError(f"a request of the Go client had no answer: {seconds.strip()}") from None

        try:
            yield rate
        finally:
            client.communicate()
