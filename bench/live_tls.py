"""What an application pays for HTTP/1.1 in TLS: its request rate with an agent, with probes that do nothing, with none.

Both ends are C programs (lab/clients/tlsload.c) on one CPU, in the watched cgroup, that open a copy of libssl of their
own, so that no probe concerns anybody else. The agent puts its probes on that file; by turns with it, a program of two
instructions sits on the same functions, put there by the same code. What the kernel takes for a hit is in both; what
the agent's programs do, on packets too, is the difference.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator

from bench.raw import empty_program
from bench.report import Row, compared, progress
from bench.world import Agent, cpus, pin_path
from exporter.kernel import bpf
from exporter.kernel.probes import TLS_PROBES
from exporter.kernel.tls_libraries import OPENSSL, TlsLibraries
from lab import Cgroup, Lab, LabError
from lab.clients import compiled, private_libssl
from lab.net import POD4
from lab.servers import make_certificate

_NUMBER = 10_000  # requests of a run
_RUNS = 2  # in each phase
_NONE, _EMPTY, _AGENT = "none", "empty", "agent"
_REQUESTS = "http_client_request_duration_seconds_count"


def rows(quick: bool) -> Iterator[Row]:
    rates: dict[str, list[float]] = {_NONE: [], _EMPTY: [], _AGENT: []}
    rounds = 2 if quick else 8
    with Lab() as lab, Cgroup("bench") as cgroup, pin_path() as pins, _Ends(lab, cgroup) as ends:
        # Requests come faster than at most times; what is told of all of them is in the measurement.
        agent = Agent(cgroup, pins, cpus()[1], {"EBFW_TLS_UPROBES": "true", "EBFW_RING_BYTES": "8MiB"})
        for number in range(rounds):
            for phase in (_NONE, _EMPTY, _AGENT) if number % 2 == 0 else (_AGENT, _EMPTY, _NONE):
                progress.step(f"round {number + 1} of {rounds}, HTTP/1.1 in TLS, probes: {phase}")
                with _probes(phase, ends, agent):
                    rates[phase] += [ends.rate() for _ in range(_RUNS)]
                    if phase == _AGENT:
                        _all_told(agent)

    def row(title: str, ours: str, theirs: str, reference: str, bound: float | None, note: str) -> Row:
        name = f"request rate, HTTP/1.1 in TLS{title}"
        row = compared(name, rates[ours], rates[theirs], "1/s", reference, bound, note)
        return row._replace(at_least=True)

    yield row("", _AGENT, _NONE, "without agent", None, "both ends on one CPU; eight hits of probes a request")
    yield row(", the hits alone", _EMPTY, _NONE, "without probes", None, "the agent's places, empty programs")
    yield row(
        ", beyond the hits", _AGENT, _EMPTY, "empty probes", 0.9, "the agent's programs, on packets too; all told"
    )


def _all_told(agent: Agent) -> None:
    """Raises LabError unless every request was seen: else less was measured than was asked for."""
    deadline = time.monotonic() + 10
    told = 0
    while told != _RUNS * _NUMBER:
        if time.monotonic() > deadline:
            raise LabError(f"{told} requests in TLS were told of {_RUNS * _NUMBER}; lost: {agent.lost()}")
        time.sleep(0.5)
        told = int(sum(agent.samples(_REQUESTS).values()))


@contextlib.contextmanager
def _probes(phase: str, ends: _Ends, agent: Agent) -> Iterator[None]:
    if phase == _AGENT:
        with agent:
            # The server has the library mapped.
            deadline = time.monotonic() + 30
            while not sum(agent.samples("ebfw_uprobe_attached").values()):
                if time.monotonic() > deadline:
                    raise LabError(f"the agent put no probe on {ends.library}: {' | '.join(agent.words[-3:])}")
                time.sleep(0.2)
            yield
    elif phase == _EMPTY:
        program = empty_program(bpf.KPROBE, bpf.UPROBE_MULTI)
        try:
            libraries = TlsLibraries({probe.name: program for probe in TLS_PROBES})
            try:
                coverage = libraries.examine(ends.library, ends.library)[1]
                if coverage != OPENSSL:
                    raise LabError(f"empty probes on {ends.library}: {coverage}")
                yield
            finally:
                libraries.close()
        finally:
            os.close(program)
    else:
        yield


class _Ends:
    """A server that is there to stay, and a client for each run; a context manager."""

    def __init__(self, lab: Lab, cgroup: Cgroup) -> None:
        self._lab, self._cgroup = lab, cgroup
        self._program = str(compiled("tlsload"))
        library = private_libssl(lab.directory)
        if library is None:
            raise LabError("this Python has TLS built in: there is no libssl to put a probe on")
        self.library = str(library)

    def _start(self, *words: str) -> subprocess.Popen[str]:
        return self._cgroup.popen(
            ["taskset", "-c", str(cpus()[0]), self._program, *words],
            netns=self._lab.pods,
            names=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _Ends:
        folder = self._lab.directory
        make_certificate(folder, {})
        self._server = self._start("serve", self.library, str(folder / "cert.pem"), str(folder / "key.pem"), POD4)
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        if not answer:
            raise LabError("the TLS server did not start")
        self._port = str(json.loads(answer)["ready"])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=10)

    def rate(self) -> float:
        """Requests a second of one client."""
        client = self._start(self.library, POD4, self._port, str(_NUMBER))
        try:
            said = client.communicate(timeout=120)[0]
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        if client.returncode:
            raise LabError("the TLS client failed")
        return float(json.loads(said)["n"] / json.loads(said)["wall_s"])
