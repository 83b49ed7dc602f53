"""HTTP/2 and gRPC of real clients, with real servers: 23 requests in, exactly 23 events out, with their outcome.

One agent for the file. In plaintext whatever speaks HTTP/2 by prior knowledge is seen; inside TLS what the probes on
libraries see (test_tls_clients.py says which). grpcio has BoringSSL inside it and no symbols: of its TLS nothing is.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.tools import tool
from tests.pipeline.conftest import Agent, Host, World, eventually

pytestmark = pytest.mark.kernel

N = 23
PLAIN, TLS, NGHTTPD = 9080, 9444, 9081  # not the lab's own ports
NAME = "inside.lab.example"


class Server:
    """One that runs outside the watched cgroup, in the servers' namespace. What it says goes to a file: some say a line
    for each request, and a pipe that nobody reads would stop them."""

    def __init__(self, world: World, argv: Sequence[str], log: Path, ready: str) -> None:
        with log.open("wb") as out:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": out, "stderr": out}
            self.process = world.lab.world.popen(argv, **pipes)
        eventually(lambda: ready in log.read_text() or self.process.poll() is not None, 20)
        assert self.process.poll() is None, log.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


GRPC_SERVER = """
import sys, grpc
from concurrent import futures
class Any(grpc.GenericRpcHandler):
    def service(self, details):
        def unary(request, context):
            code = int(details.method.rpartition("/")[2])
            if code:
                context.abort(list(grpc.StatusCode)[code], "as asked")
            return request
        return grpc.unary_unary_rpc_method_handler(unary)
server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Any()])
server.add_insecure_port("0.0.0.0:50051")
pair = (open(sys.argv[2], "rb").read(), open(sys.argv[1], "rb").read())
server.add_secure_port("0.0.0.0:50052", grpc.ssl_server_credentials([pair]))
server.start()
print("listening", flush=True)
sys.stdin.read()
"""

GRPC_CLIENT = """
import sys, grpc
target, secure, count = sys.argv[1], sys.argv[2] == "tls", int(sys.argv[3])
if secure:
    channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(open(sys.argv[4], "rb").read()))
else:
    channel = grpc.insecure_channel(target)
for n in range(count):
    call = channel.unary_unary(f"/shop.Orders/{n % 17}")
    try:
        call(b"x" * n, timeout=20)
    except grpc.RpcError as error:
        assert error.code().value[0] == n % 17, error
channel.close()
"""

HTTPX = """
import sys, ssl, httpx
url, count = sys.argv[1], int(sys.argv[2])
context = ssl.create_default_context()
with httpx.Client(http1=False, http2=True, verify=context, trust_env=False, timeout=20) as client:
    for n in range(count):
        answer = client.post(f"{url}/echo/{n}?key=canary", content=b"b" * (1000 * n))
        assert answer.http_version == "HTTP/2", answer.http_version
        assert len(answer.content) == (1000 * n or 16)
"""


@pytest.fixture(scope="module")
def servers(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    logs = tmp_path_factory.mktemp("servers")
    keys = [str(world.servers.directory / name) for name in ("cert.pem", "key.pem")]
    go = str(tool("goclient"))
    with contextlib.ExitStack() as stack:
        for n, (argv, ready) in enumerate(
            (
                ([go, "-serve", f"0.0.0.0:{PLAIN}"], "listening"),
                ([go, "-serve", f"0.0.0.0:{TLS}", "-tls", "-cert", keys[0], "-key", keys[1]], "listening"),
                (["nghttpd", "--no-tls", "--echo-upload", "-d", str(world.servers.directory), str(NGHTTPD)], ""),
                ([sys.executable, "-uc", GRPC_SERVER, *keys], "listening"),
            )
        ):
            stack.callback(Server(world, argv, logs / str(n), ready).end)
        yield


@pytest.fixture(scope="module")
def agent(world: World, servers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with Host(world, tmp_path_factory.mktemp("http2")) as host, world.holder(host.shop):
        yield host.start(EBFW_OUTPUT="json", EBFW_LOG_LEVEL="debug").ready()


_before = 0  # events of earlier tests


@pytest.fixture(autouse=True)
def _events_of_this_test(request: pytest.FixtureRequest) -> None:
    global _before
    _before = len(request.getfixturevalue("agent").events) if "agent" in request.fixturenames else 0


def events(agent: Agent) -> list[dict[str, Any]]:
    return agent.events[_before:]


def requests(agent: Agent, kind: str) -> list[dict[str, Any]]:
    return [e for e in events(agent) if e["kind"] == kind]


def told(agent: Agent, part: str, count: int = N) -> list[dict[str, Any]]:
    """The events with this in their path, once there are `count`; no more come."""

    def look() -> list[dict[str, Any]]:
        return [e for e in events(agent) if e["kind"] in ("http", "https") and part in e.get("path", "")]

    eventually(lambda: len(look()) >= count, 20)
    time.sleep(0.5)
    found = look()
    assert len(found) == count, found
    for event in found:
        assert (event["http_version"], event["domain"], event["name_source"]) == ("2", NAME, "host")
        assert "partial" not in event, event
        assert "canary" not in str(event)
    return found


def sizes(events: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(e["request_bytes"], e["response_bytes"]) for e in events]


@pytest.mark.parametrize(
    ("kind", "port", "option"), [("http", PLAIN, "--http2-prior-knowledge"), ("https", TLS, "--http2")]
)
def test_curl(agent: Agent, world: World, kind: str, port: int, option: str) -> None:
    """On one connection inside TLS; one each in plaintext, where curl 7.88 cannot use a connection again."""
    url = f"{kind}://{NAME}:{port}/status/%s?key=canary&by=curl-{kind}"
    for part in ["[200-222]"] if kind == "https" else map(str, range(200, 223)):
        world.run(agent.host.shop, "curl", "-sS", "-m", "20", option, "-o", "/dev/null", "-X", "DELETE", url % part)
    found = told(agent, "/status/")
    assert [e["http_status"] for e in found] == list(range(200, 223))
    assert [e["sequence"] for e in found] == (list(range(1, 24)) if kind == "https" else [1] * 23)
    assert {(e["method"], e["domain"], e["scheme"], e["comm"]) for e in found} == {("DELETE", NAME, kind, "curl")}


@pytest.mark.parametrize(("kind", "port"), [("http", PLAIN), ("https", TLS)])
def test_ten_streams_at_a_time(agent: Agent, world: World, kind: str, port: int) -> None:
    """nghttp2's own load generator: 230 requests on one connection."""
    url = f"{kind}://{NAME}:{port}/bytes/321?by=h2load-{kind}"
    world.run(agent.host.shop, "h2load", "-n", "230", "-c", "1", "-m", "10", url)
    found = told(agent, "/bytes/321", 230)
    assert sorted(e["sequence"] for e in found) == list(range(1, 231))
    assert {(e["method"], e["http_status"]) for e in found} == {("GET", 200)}
    assert set(sizes(found)) == {(0, 321)}


def test_nghttp(agent: Agent, world: World, tmp_path: Path) -> None:
    """nghttp with nghttpd: 23 uploads, padded, with trailers, echoed."""
    body = tmp_path / "body"
    body.write_bytes(b"n" * 100_003)
    urls = [f"http://{NAME}:{NGHTTPD}/nghttp/{n}" for n in range(N)]
    world.run(agent.host.shop, "nghttp", "-n", "-b", "16", "--trailer", "x-t: 1", "-d", str(body), *urls)
    found = told(agent, "/nghttp/")
    assert sorted(e["path"] for e in found) == sorted(f"/nghttp/{n}" for n in range(N))
    assert {(e["method"], e["http_status"]) for e in found} == {("POST", 200)}
    assert set(sizes(found)) == {(100_003, 100_003)}


@pytest.mark.parametrize(("kind", "port"), [("http", PLAIN), ("https", TLS)])
def test_httpx(agent: Agent, world: World, kind: str, port: int) -> None:
    world.python(agent.host.shop, HTTPX, f"{kind}://{NAME}:{port}/{kind}", str(N))
    found = told(agent, f"/{kind}/echo/")
    assert [e["path"] for e in found] == [f"/{kind}/echo/{n}?key=REDACTED" for n in range(N)]
    assert sizes(found) == [(1000 * n, 1000 * n or 16) for n in range(N)]
    assert {(e["method"], e["http_status"], e["kind"]) for e in found} == {("POST", 200, kind)}


@pytest.mark.parametrize(("kind", "port"), [("http", PLAIN), ("https", TLS)])
def test_go(agent: Agent, world: World, tmp_path: Path, kind: str, port: int) -> None:
    """gRPC by Go's own HTTP/2; the program is found before its first request."""
    program = shutil.copy(tool("goclient"), tmp_path / f"go-{kind}")
    url = f"{kind}://{NAME}:{port}/fail/{'5' if kind == 'http' else '14'}"
    argv = [program, "-url", url, "-n", str(N), "-wait", "-grpc", "-post", "100", "-ca", str(world.servers.ca)]
    process = agent.host.shop.popen(
        argv,
        netns=world.lab.pods,
        env=world.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if kind == "https":
        eventually(lambda: f"probes are on {program} (go)" in agent.log, 20)
    out, _ = process.communicate("\n" * N, timeout=30)
    assert out.count("grpc-status") == N, out
    found = told(agent, "/fail/5" if kind == "http" else "/fail/14")
    assert {(e["method"], e["http_status"], e["kind"]) for e in found} == {("POST", 200, kind)}
    assert {e["grpc_status"] for e in found} == {5 if kind == "http" else 14}
    assert {e["request_bytes"] for e in found} == {105}
    assert [e["sequence"] for e in found] == list(range(1, 24))


def test_grpcio(agent: Agent, world: World) -> None:
    world.python(agent.host.shop, GRPC_CLIENT, f"{NAME}:50051", "plain", str(N))
    found = told(agent, "/shop.Orders/")
    assert [e["path"] for e in found] == [f"/shop.Orders/{n % 17}" for n in range(N)]
    assert [e["grpc_status"] for e in found] == [n % 17 for n in range(N)]
    assert [e["request_bytes"] for e in found] == [5 + n for n in range(N)]
    assert {(e["method"], e["http_status"], e["domain"]) for e in found} == {("POST", 200, NAME)}


def test_grpcio_inside_tls_is_not_seen(agent: Agent, world: World) -> None:
    """Its connection and server name are; nothing is made up."""
    world.python(agent.host.shop, GRPC_CLIENT, f"{NAME}:50052", "tls", str(N), str(world.servers.ca))
    eventually(lambda: [e for e in events(agent) if e["kind"] == "close" and e["port"] == 50052])
    assert {e["domain"] for e in events(agent) if e["kind"] == "tls"} == {NAME}
    assert not [e for e in events(agent) if e["kind"] in ("http", "https")]


@pytest.mark.parametrize(("kind", "port"), [("http", PLAIN), ("https", TLS)])
def test_large_bodies(agent: Agent, world: World, tmp_path: Path, kind: str, port: int) -> None:
    """5 MB up, and the same back."""
    body = tmp_path / "body"
    body.write_bytes(b"5" * 5_000_000)
    option = "--http2-prior-knowledge" if kind == "http" else "--http2"
    url = f"{kind}://{NAME}:{port}/large"
    command = ["curl", "-sS", "-m", "30", option, "-o", "/dev/null", "--data-binary", f"@{body}", url]
    world.run(agent.host.shop, *command)
    (found,) = told(agent, "/large", 1)
    assert sizes([found]) == [(5_000_000, 5_000_000)]
    assert found["duration_ms"] >= found["first_byte_ms"]


def test_the_agent_starts_midway(world: World, servers: None, tmp_path: Path) -> None:
    """A connection that is older than the agent: its requests are told, marked; a name that only the table of before
    knows is not told."""
    program = shutil.copy(tool("goclient"), tmp_path / "go-midway")
    argv = [program, "-url", f"http://{NAME}:{PLAIN}/echo/midway", "-n", "20", "-wait", "-h2"]
    with Host(world, tmp_path / "host") as host, world.holder(host.shop):
        host.directory.mkdir(exist_ok=True)
        process = host.shop.popen(
            argv,
            netns=world.lab.pods,
            env=world.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(count: int) -> None:
            for _ in range(count):
                process.stdin.write("\n")
                process.stdin.flush()
                assert '"status":200' in process.stdout.readline().replace(" ", "")

        ask(10)
        agent = host.start(EBFW_OUTPUT="json").ready()
        ask(10)
        process.communicate(timeout=10)
        eventually(lambda: len(requests(agent, "http")) >= 9)
        time.sleep(0.5)
        found = requests(agent, "http")
        assert len(found) in (9, 10)
        assert {e["partial"] for e in found} == {"midway"}
        assert {e.get("path", "") for e in found} <= {"", "/echo/midway"}
        assert {e.get("method", "") for e in found} <= {"", "GET"}
        assert {e["http_status"] for e in found} == {200}
        assert not [e for e in found if "sequence" in e]
