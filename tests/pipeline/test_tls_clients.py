"""Every kind of TLS client that is covered, and one that is not: 23 requests in, 23 events out, with their outcome.

One agent for the whole file, which has never seen any of their files: each client runs from a private copy of its
program and of its libraries. It says "ready", is found, and then makes a request for each line that it gets.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import Cgroup
from lab.net import SERVERS4, SERVERS6
from lab.tools import tool
from tests.pipeline.conftest import Agent, Host, World, eventually

pytestmark = pytest.mark.kernel

N = 23
BODY = "this is the lab\n"

NODE = """
const https = require('https'), fs = require('fs');
const [path, method] = process.argv.slice(-2);
const agent = new https.Agent({keepAlive: true, maxSockets: 1, ca: fs.readFileSync(process.env.SSL_CERT_FILE)});
let n = 0;
require('readline').createInterface({input: process.stdin}).on('line', () => {
  const i = n++;
  https.request({host: 'inside.lab.example', path: `${path}/${i}?key=canary`, method, agent}, answer => {
    answer.resume().on('end', () => console.log(i));
  }).end();
}).on('close', () => agent.destroy());
console.log('ready');
"""

PYTHON = """
import http.client, ssl, sys
path, method = sys.argv[1:]
c = http.client.HTTPSConnection("inside.lab.example", timeout=10, context=ssl.create_default_context())
print("ready", flush=True)
for n, line in enumerate(sys.stdin):
    c.request(method, f"{path}/{n}?key=canary")
    c.getresponse().read()
    print(n, flush=True)
c.close()
"""


class Client:
    """One that runs. `ask()` has it make its next request and waits for the answer."""

    def __init__(self, process: subprocess.Popen[str], answer: str, request: str = "\n") -> None:
        self.process, self._answer, self._request = process, answer, request
        self._asked = 0

    def until(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if word in line:
                return
        pytest.fail(f"the client ended before it said {word!r}")

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(self._request.replace("%d", str(self._asked)))
        self.process.stdin.flush()
        self._asked += 1
        self.until(self._answer)


class Kind:
    """A client's files, made once, and how it is started."""

    def __init__(self, world: World, folder: Path, name: str) -> None:
        self.world, self.name = world, name
        self.folder = folder / name
        self.folder.mkdir()
        self.environment = world.environment(self.folder)
        self.file = getattr(self, "_" + name.replace("-", "_"))()  # the one that gets the probes
        self.method = {"node": "PUT", "python": "DELETE"}.get(name, "GET")
        self.coverage = {"node": "openssl_static", "gnutls": "gnutls", "python": "openssl"}.get(name, "go")

    def _copy(self, path: Path) -> Path:
        return Path(shutil.copy(path, self.folder))

    def _node(self) -> Path:
        return self._copy(tool("node"))

    def _goclient(self) -> Path:
        return self._copy(tool("goclient"))

    def _goclient_stripped(self) -> Path:
        return self._copy(tool("goclient-stripped"))

    def _python(self) -> Path:
        private = self.world.private(f"{self.folder.parent.name}-python")
        self.environment = self.world.environment(private)
        return next((private / "lib").glob("libssl*"))

    def _gnutls(self) -> Path:
        library = next(
            Path(line.split(" => ")[1].split(" ")[0])
            for line in subprocess.run(["ldd", str(shutil.which("gnutls-cli"))], capture_output=True, text=True)
            .stdout.splitlines()
            if "libgnutls.so" in line
        )  # fmt: skip
        (self.folder / "lib").mkdir()
        return Path(shutil.copy(library, self.folder / "lib"))

    def command(self, path: str) -> list[str]:
        if self.name == "node":
            return [str(self.file), "-e", NODE, "--", path, self.method]
        if self.name == "python":
            return [sys.executable, "-uc", PYTHON, path, self.method]
        if self.name == "gnutls":
            ca = f"--x509cafile={self.world.servers.ca}"
            return ["gnutls-cli", ca, "-p", "443", "--logfile=/dev/stderr", "inside.lab.example"]
        url = f"https://inside.lab.example{path}/0?key=canary"
        return [str(self.file), "-url", url, "-n", str(N), "-wait", "-ca", str(self.world.servers.ca)]

    @contextlib.contextmanager
    def run(self, cgroup: Cgroup, path: str) -> Iterator[Client]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = cgroup.popen(self.command(path), netns=self.world.lab.pods, env=self.environment, **pipes)
        answer, request = "", "\n"
        if self.name == "gnutls":
            answer = BODY.strip()
            request = f"GET {path}/%d?key=canary HTTP/1.1\r\nHost: inside.lab.example\r\n\r\n"
        client = Client(process, answer, request)
        try:
            if self.name in ("node", "python"):
                client.until("ready")
            yield client
        finally:
            process.communicate(timeout=20)


@pytest.fixture(scope="module")
def agent(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with Host(world, tmp_path_factory.mktemp("clients")) as host:
        yield host.start(EBFW_OUTPUT="json", EBFW_LOG_LEVEL="debug").ready()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def requests(agent: Agent, part: str) -> list[dict[str, Any]]:
    return [e for e in agent.events if e["kind"] == "https" and part in e.get("path", "")]


def connections(agent: Agent, coverage: str) -> int:
    return agent.metrics().total("ebfw_tls_connections_total", ebfw_tls_coverage=coverage)


@pytest.mark.parametrize("name", ["python", "gnutls", "node", "goclient", "goclient-stripped"])
def test_client(agent: Agent, world: World, folder: Path, name: str) -> None:
    """Inside: each request once, with its answer, and its connection in its class. Outside, with the same files while
    they are probed: nothing."""
    kind = Kind(world, folder, name)
    before = connections(agent, kind.coverage)
    with kind.run(agent.host.shop, f"/{name}") as client:
        eventually(lambda: f"probes are on {kind.file} ({kind.coverage})" in agent.log, 20)
        for _ in range(N):
            client.ask()
        with Cgroup("elsewhere") as outside, kind.run(outside, f"/out-{name}") as other:
            for _ in range(N):
                other.ask()
        eventually(lambda: connections(agent, kind.coverage) == before + 1)
    found = eventually(lambda: len(requests(agent, f"/{name}/")) >= N and requests(agent, f"/{name}/"))
    time.sleep(0.5)
    numbers = [0] * N if kind.coverage == "go" else range(N)  # Go's client has one URL
    assert [event["path"] for event in requests(agent, f"/{name}/")] == [f"/{name}/{n}?key=REDACTED" for n in numbers]
    for event in found:
        assert (event["dst"], event["port"]) in {(SERVERS4[0], 443), (SERVERS6[0], 443)}
        assert event["src_port"] == found[0]["src_port"]
        assert (event["method"], event["domain"], event["name_source"]) == (kind.method, "inside.lab.example", "host")
        assert (event["http_status"], event["response_bytes"]) == (200, len(BODY))
        assert 0 < event["first_byte_ms"] <= event["duration_ms"]
        assert (event["pid"], event["workload"]["name"]) == (client.process.pid, "shop")
    assert not requests(agent, f"/out-{name}/")
    targets = [row["target"] for row in world.servers.log("https", "request")]
    assert sum(target.startswith(f"/{name}/") for target in targets) == N
    assert sum(target.startswith(f"/out-{name}/") for target in targets) == N


def test_short_lives(agent: Agent, world: World) -> None:
    """One request each by N processes, one after the other, with a library that nobody had seen: the first may go
    unseen, no other, and all have their class."""
    private = world.private("short")
    before = connections(agent, "openssl"), agent.metrics().total("ebfw_tls_connections_total")
    for n in range(N):
        argv = ("curl", "-sS", "-m", "20", f"https://inside.lab.example/short/{n}")
        done = agent.host.shop.run(argv, netns=world.lab.pods, env=world.environment(private), capture_output=True)
        assert done.stdout == BODY.encode(), done.stderr
    eventually(lambda: agent.metrics().total("ebfw_tls_connections_total") == before[1] + N)
    time.sleep(0.5)
    seen = [event["path"] for event in requests(agent, "/short/")]
    assert seen in ([f"/short/{n}" for n in range(N)], [f"/short/{n}" for n in range(1, N)])
    assert connections(agent, "openssl") - before[0] in (N, N - 1)


def test_many_at_once(agent: Agent, world: World) -> None:
    """200 processes that begin together, with a library that is probed: 200 requests, 200 connections. Of a few it
    may be too late to say what they had mapped; these are unknown, and never none."""
    private = world.private("many")
    holder = world.popen(agent.host.shop, "import ssl, sys; print('ready'); sys.stdin.read()", libraries=private)
    library = next((private / "lib").glob("libssl*"))
    eventually(lambda: f"probes are on {library}" in agent.log, 20)
    before = {coverage: connections(agent, coverage) for coverage in ("openssl", "unknown", "none")}
    name = f"inside.lab.example:443:{SERVERS4[0]}"  # 400 questions at once are too many for the lab
    processes = [
        agent.host.shop.popen(
            ("curl", "-sS", "-m", "60", "--resolve", name, f"https://inside.lab.example/many/{n}"),
            netns=world.lab.pods,
            env=world.environment(private),
            stdout=subprocess.DEVNULL,
        )
        for n in range(200)
    ]
    assert [process.wait(60) for process in processes] == [0] * 200
    found = eventually(lambda: len(requests(agent, "/many/")) >= 200 and requests(agent, "/many/"))
    time.sleep(0.5)
    assert len(requests(agent, "/many/")) == 200
    assert {event["path"] for event in found} == {f"/many/{n}" for n in range(200)}
    assert {event["pid"] for event in found} == {process.pid for process in processes}
    assert {event["http_status"] for event in found} == {200}
    after = eventually(
        lambda: (
            (now := {coverage: connections(agent, coverage) - old for coverage, old in before.items()})
            and sum(now.values()) == 200
            and now
        )
    )
    assert after["none"] == 0
    assert after["openssl"] >= 100
    holder.communicate(timeout=10)


def test_without_a_library(agent: Agent, world: World) -> None:
    """A ClientHello of a program's own making: its connection counts, as one that is not seen into."""
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context = ssl.create_default_context()
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="inside.lab.example").do_handshake()
    before = connections(agent, "none")
    code = "import socket, sys; s = socket.create_connection(('inside.lab.example', 443)); "
    code += "s.sendall(bytes.fromhex(sys.argv[1])); s.recv(10); s.close(); sys.stdin.read()"
    process = world.popen(agent.host.shop, code, hello.read().hex())
    eventually(lambda: connections(agent, "none") == before + 1)
    process.communicate(timeout=10)
    assert "first TLS connection of class none: no function that we know" in agent.log
