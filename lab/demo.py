"""`make demo`: ebfw at work on a small network of its own, live, then a summary; nothing stays behind.

In: `python -m lab.demo [--duration SECONDS]`, as root. Out: the agent's lines on standard output as they
come; what the demo itself says, and the summary, on standard error. Exit status 0 after a full run (Ctrl-C
included), 1 with a sentence on what to do next, 128 + N after signal N.
Not its job: any of the work. `net`, `servers` and `workload` make the world; the agent is the product as it
is installed, started as anybody would start it, and asked over /metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import workload
from lab.cgroup import undisturbed
from lab.clients import cache_folder, private_libssl
from lab.net import Cgroup, Lab, LabError, preflight, sweep
from lab.servers import Servers
from lab.summary import describe

_REPO = Path(__file__).resolve().parent.parent
_START_SECONDS = 90.0  # until /metrics answers; seconds on hardware, far more on an emulated CPU
_SETTLE_SECONDS = 1.5  # after the workload has ended, for the agent to drain and count what is under way


def say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stage(text: str) -> Iterator[None]:
    """Says what is being done, and how long it took where that was worth a word."""
    say(f"{text} ...")
    began = time.monotonic()
    yield
    if (took := time.monotonic() - began) > 2:
        say(f"  done in {took:.1f} s")


def _metrics_address() -> str:
    """127.0.0.1:9090, or another port when that one is taken."""
    for port in (9090, 0):
        with socket.socket() as probe:
            # HTTP servers set it too; without it a port with connections in TIME_WAIT looks taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                say(f"port {port} is taken, using another one for /metrics")
                continue
            return f"127.0.0.1:{probe.getsockname()[1]}"
    raise LabError("no free port on 127.0.0.1")


class Agent:
    """The seam to the product: a command, four settings, /metrics. A context manager.

    The agent has a session of its own: Ctrl-C reaches the demo alone, which first asks for the counters.
    """

    def __init__(self, lab: Lab, cgroup: Cgroup, command: str) -> None:
        self.address = _metrics_address()
        self._pins = Path("/sys/fs/bpf") / lab.name
        config = lab.directory / "ebfw.yaml"
        config.write_text(f"cgroup: {cgroup.path}\n")
        self._environment = {
            **os.environ,
            "EBFW_CONFIG": str(config),
            "EBFW_METRICS_ADDR": self.address,
            "EBFW_BPF_PIN_PATH": str(self._pins),
            "PYTHONUNBUFFERED": "1",
            "EBFW_CACHE_PATH": str(cache_folder() / "programs"),
            "EBFW_INVENTORY": "",  # all that a demo does is new
        }
        installed = Path(sys.executable).with_name("ebfw")
        self._command = [str(installed)] if installed.exists() else [sys.executable, "-m", "exporter"]
        if command:
            self._command = shlex.split(command)
        # Should the demo be killed outright, the agent is told to end.
        if shutil.which("setpriv"):
            self._command = ["setpriv", "--pdeathsig", "TERM", "--", *self._command]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Agent:
        self._process = subprocess.Popen(
            self._command, cwd=_REPO, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        began = told = time.monotonic()
        while True:
            self.check()
            try:
                self._get("/readyz")  # 503 until the programs are attached
                return
            except (OSError, http.client.HTTPException):
                now = time.monotonic()
                if now - began > _START_SECONDS:
                    raise LabError(f"the agent is not ready after {_START_SECONDS:.0f} s; try: ebfw check") from None
                if now - told > 2:
                    told = now
                    say(f"  waiting for the agent ({now - began:.0f} s)")
                time.sleep(0.1)

    def check(self) -> None:
        """Raises LabError when the agent has ended by itself."""
        if self._process and (status := self._process.poll()) is not None:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise LabError(f"the agent has ended ({how}); its own words are above, `ebfw check` tells more")

    def metrics(self) -> str:
        """The text of /metrics. Raises OSError and HTTPException."""
        return self._get("/metrics")

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if it does not end within ten seconds; then no pin of its is left."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with undisturbed():
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                say("the agent does not end within 10 s: killing it")
                process.kill()
                process.wait()
            if self._pins.exists():
                # A file on bpffs is a reference to a program, map or link; unlinking the last one frees it.
                if any(self._pins.iterdir()):
                    say(f"the agent left pins in {self._pins}: removing them")
                shutil.rmtree(self._pins, ignore_errors=True)


def _start_workload(lab: Lab, cgroup: Cgroup, servers: Servers, log: Path) -> list[subprocess.Popen[bytes]]:
    """One process per role in nested cgroups, named like the roles; the cgroup's end is theirs."""
    processes = []
    environment = dict(os.environ)
    # The agent attaches uprobes to the TLS library that it finds in use; every process of the host that has
    # the same file mapped would pay for them.
    if library := private_libssl(lab.directory):
        environment["LD_LIBRARY_PATH"] = str(library.parent)
    stderr = (lab.directory / "workload.stderr").open("a")
    for role in workload.ROLES:
        argv = [sys.executable, "-m", "lab.workload", role, "--ca", str(servers.ca), "--log", str(log)]
        process = cgroup.child(role).popen(
            argv + ([] if lab.ipv6 else ["--no-ipv6"]),
            netns=lab.pods,
            cwd=_REPO,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        processes.append(process)
    stderr.close()
    return processes


def _watch(agent: Agent, workers: list[subprocess.Popen[bytes]], lab: Lab, seconds: float) -> None:
    """Until the time is up, Ctrl-C or SIGTERM (see cgroup.signals_raise); ends early, with an error, when the
    agent or the workload does."""
    ends = time.monotonic() + seconds
    try:
        while time.monotonic() < ends:
            agent.check()
            if any(worker.poll() is not None for worker in workers):
                words = (lab.directory / "workload.stderr").read_text().strip() or "without a word"
                raise LabError(f"the workload has ended by itself: {words.splitlines()[-1]}")
            time.sleep(min(0.2, max(0.0, ends - time.monotonic())))
    except (KeyboardInterrupt, SystemExit):
        say("asked to end (once more: without a summary)")


def _done_by_workload(log: Path) -> tuple[Counter[str], list[str]]:
    """Steps done, by name, and what did not end as it should have."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    odd = [f"{row['role']}: {row['step']}: {row['note'] or 'did not fail'}" for row in rows if not row["expected"]]
    return Counter(row["step"] for row in rows), odd


def demo(duration: float | None, command: str) -> None:
    """The whole run. Raises LabError."""
    preflight()
    for path in sweep():
        say(f"removed what a killed demo left: {path}")
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        with _stage("making two network namespaces and a cgroup"):
            lab = enter(Lab())
            cgroup = enter(Cgroup("demo"))
        with _stage("starting DNS, HTTP, HTTPS, UDP and proxy servers"):
            servers = enter(Servers(lab, workload.NAMES))
            try:
                lab.dnat(*workload.LEDGER)
            except LabError as error:
                say(f"without DNAT: {error}")
        agent = Agent(lab, cgroup, command)
        with _stage(f"starting the agent on {cgroup.path}"):
            enter(agent)
        log = lab.directory / "workload.jsonl"
        log.touch()
        workers = _start_workload(lab, cgroup, servers, log)
        length = f"for {duration:.0f} s, or until Ctrl-C" if duration else "until Ctrl-C"
        say(f"{', '.join(workload.ROLES)} are at work {length}; metrics: http://{agent.address}/metrics")
        _watch(agent, workers, lab, duration or float("inf"))
        cgroup.kill()
        time.sleep(_SETTLE_SECONDS)
        steps, odd = _done_by_workload(log)
        try:
            text = agent.metrics()
        except (OSError, http.client.HTTPException) as error:
            raise LabError(f"http://{agent.address}/metrics does not answer: {error}") from error
        with _stage("stopping the agent and removing everything"):
            stack.close()
    print(describe(text, steps, odd, list(workload.ROLES)), file=sys.stderr)
    say(f"metrics were at http://{agent.address}/metrics; see the whole host with: make run")


def _positive(text: str) -> float:
    value = float(text)
    if value < 0:
        raise ValueError(text)
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--duration", type=_positive, default=20, help="seconds; 0: until Ctrl-C (20)")
    parser.add_argument("--agent", default="", metavar="COMMAND", help="another agent than the installed one")
    given = parser.parse_args(arguments)
    try:
        demo(given.duration or None, given.agent)
    except LabError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
