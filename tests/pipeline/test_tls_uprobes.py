"""HTTP inside TLS, through the probes on a private libssl: 23 requests in, 23 events out, with who made them.

One agent for the whole file. The libraries that clients use differ where a test is about finding one.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab import Cgroup
from lab.net import POD4, SERVERS4, SERVERS6
from tests.pipeline.conftest import Agent, Host, World, eventually

pytestmark = pytest.mark.kernel

# COUNT requests over one connection, one a line of standard input; SSL_write_ex.
CLIENT = """
import http.client, ssl, sys
host, path, method = sys.argv[1:]
c = http.client.HTTPSConnection(host, timeout=10, context=ssl.create_default_context())
print("ready")
for n, line in enumerate(sys.stdin):
    c.request(method, f"{path}/{n}?secret=canary{n}", headers={"Host": "named.example"})
    c.getresponse().read()
    print(n)
c.close()
"""

# A TLS server that answers COUNT requests on one connection with what looks much like a request.
SERVER = """
import socket, ssl, sys
port, cert, key, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert, key)
listener = socket.create_server(("", port))
print("ready")
peer, _ = listener.accept()
tls = context.wrap_socket(peer, server_side=True)
for _ in range(count):
    tls.recv(65536)
    tls.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
tls.recv(1)
"""


@pytest.fixture(scope="module")
def agent(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with Host(world, tmp_path_factory.mktemp("uprobes")) as host, world.holder(host.shop):
        yield host.start(EBFW_OUTPUT="json").ready()


def requests(agent: Agent, part: str) -> list[dict[str, Any]]:
    """https events with this in their path."""
    return [e for e in agent.events if e["kind"] == "https" and part in e.get("path", "")]


def test_curl(agent: Agent, world: World) -> None:
    """SSL_write: 23 requests of one process over one connection."""
    shop = agent.host.shop
    argv = ("curl", "-sS", "-m", "20", "-X", "PUT", "https://inside.lab.example/curl/[1-23]?key=canary")
    process = shop.popen(argv, netns=world.lab.pods, env=world.environment(), stdout=subprocess.DEVNULL)
    assert process.wait(30) == 0
    found = eventually(lambda: len(requests(agent, "/curl/")) >= 23 and requests(agent, "/curl/"))
    time.sleep(0.2)
    assert len(requests(agent, "/curl/")) == 23
    assert [event["path"] for event in found] == [f"/curl/{n}?key=REDACTED" for n in range(1, 24)]
    for event in found:
        assert (event["method"], event["domain"], event["name_source"]) == ("PUT", "inside.lab.example", "host")
        assert (event["pid"], event["comm"]) == (process.pid, "curl")
        assert event["workload"]["name"] == "shop"
        assert (event["http_status"], event["http_version"], event["scheme"]) == (200, "1.1", "https")
        assert 0 < event["first_byte_ms"] <= event["duration_ms"]
        assert event["response_bytes"] == len("this is the lab\n")
    # The connection is its socket's.
    (tls,) = [event for event in agent.events if event["kind"] == "tls" and event["pid"] == process.pid]
    ends = [tuple(event[key] for key in ("src", "src_port", "dst", "port", "scope")) for event in found]
    assert ends == [tuple(tls[key] for key in ("src", "src_port", "dst", "port", "scope"))] * 23
    assert (tls["dst"], tls["port"]) in {(address, 443) for address in (SERVERS4[0], SERVERS6[0])}
    assert len([r for r in world.servers.log("https", "request") if r["target"].startswith("/curl/")]) == 23


def test_python(agent: Agent, world: World) -> None:
    """SSL_write_ex: 23 requests, each head in one write."""
    process = world.popen(agent.host.shop, CLIENT, "inside.lab.example", "/python", "DELETE")
    process.communicate("\n" * 23, timeout=30)
    found = eventually(lambda: len(requests(agent, "/python/")) >= 23 and requests(agent, "/python/"))
    time.sleep(0.2)
    assert len(requests(agent, "/python/")) == 23
    assert [event["path"] for event in found] == [f"/python/{n}?secret=REDACTED" for n in range(23)]
    for event in found:
        assert (event["method"], event["domain"]) == ("DELETE", "named.example")
        assert (event["http_status"], event["response_bytes"]) == (200, len("this is the lab\n"))
        assert event["pid"] == process.pid
        assert event["comm"].startswith("python")


def test_connections_of_one_process(agent: Agent, world: World) -> None:
    """Eight at once to one name, of which one cannot be told from another: the peer is known, no port of ours. Then 23
    one after another, each with its own."""
    code = """
import http.client, ssl, sys
context = ssl.create_default_context()
def connect():
    c = http.client.HTTPSConnection("inside.lab.example", timeout=10, context=context)
    c.connect()
    return c
def get(c, path):
    c.request("GET", path)
    c.getresponse().read()
many = [connect() for _ in range(8)]
for n, c in enumerate(many):
    get(c, f"/alike/{n}")
for c in many:
    c.close()
for n in range(23):
    c = connect()
    print("own", n, c.sock.getsockname()[1], flush=True)
    get(c, f"/own/{n}")
    c.close()
"""
    output = world.python(agent.host.shop, code)
    ports = [int(line.split()[2]) for line in output.splitlines() if line.startswith("own ")]
    eventually(lambda: len(requests(agent, "/own/")) >= 23)
    time.sleep(0.2)
    alike, own = requests(agent, "/alike/"), requests(agent, "/own/")
    assert (len(alike), len(own)) == (8, 23)
    assert all(event["port"] == 443 and "src_port" not in event for event in alike)
    assert len({event["dst"] for event in alike}) == 1
    assert [event["src_port"] for event in own] == ports
    assert {event["port"] for event in own} == {443}


def test_clients_that_are_killed_while_they_wait(agent: Agent, world: World) -> None:
    """Their libraries never hear of it: the request ends with its socket."""
    code = """
import http.client, os, signal, ssl
c = http.client.HTTPSConnection("inside.lab.example", timeout=10, context=ssl.create_default_context())
c.putrequest("POST", f"/killed/{os.getpid()}")
c.putheader("Content-Length", "5")
c.endheaders()
os.kill(os.getpid(), signal.SIGKILL)
"""
    clients = [world.popen(agent.host.shop, code) for _ in range(5)]
    assert [client.wait(30) for client in clients] == [-9] * 5
    found = eventually(lambda: len(requests(agent, "/killed/")) >= 5 and requests(agent, "/killed/"))
    assert {event["path"] for event in found} == {f"/killed/{client.pid}" for client in clients}
    for event in found:
        assert event["error"] in ("connection_reset", "connection_closed")
        assert "http_status" not in event
        assert event["duration_ms"] < 2_000


def test_what_a_server_writes_is_nothing(agent: Agent, world: World) -> None:
    """A server inside, its client outside: 23 answers through SSL_write_ex, no event."""
    host = agent.host
    directory = world.servers.directory
    server = world.popen(host.shop, SERVER, "8443", str(directory / "cert.pem"), str(directory / "key.pem"), "23")
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    before = agent.metrics().total("ebfw_events_total", kind="https")
    with Cgroup("client") as outside:
        url = f"https://{POD4}:8443/served/[1-23]"
        done = outside.run(
            ("curl", "-sSk", "-m", "20", url), netns=world.lab.pods, env=world.environment(), capture_output=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"ok" * 23
    server.communicate(timeout=10)
    time.sleep(0.3)
    assert agent.metrics().total("ebfw_events_total", kind="https") == before
    assert not requests(agent, "/served/")


def test_a_library_that_comes_later(agent: Agent, world: World) -> None:
    """A process with a libssl that nobody had mapped: seen from its second request on at the latest; and the probe
    goes when the process does, the others stay."""
    probes = agent.metrics().total("ebfw_uprobe_attached", ebfw_tls_coverage="openssl")
    process = world.popen(
        agent.host.shop, CLIENT, "inside.lab.example", "/late", "GET", libraries=world.private("late")
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for n in range(5):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{n}\n"
        time.sleep(0.4)
    eventually(lambda: [e for e in requests(agent, "/late/4")])
    seen = [int(event["path"].split("/")[2].split("?")[0]) for event in requests(agent, "/late/")]
    assert seen in ([0, 1, 2, 3, 4], [1, 2, 3, 4])
    eventually(lambda: agent.metrics().total("ebfw_uprobe_attached", ebfw_tls_coverage="openssl") == probes + 1)
    process.communicate(timeout=10)
    eventually(lambda: agent.metrics().total("ebfw_uprobe_attached", ebfw_tls_coverage="openssl") == probes, 30)
    assert probes == 1


def test_broken_libraries_are_counted(agent: Agent, world: World, tmp_path: os.PathLike[str]) -> None:
    """A file that calls itself libssl and is no ELF file: one loss, and no crash."""
    fake = agent.host.directory / "libssl.so.99"
    fake.write_bytes(b"not a library" * 1000)
    before = agent.metrics().lost("attribution", "tls_library_unreadable")
    code = """
import mmap, sys
with open(sys.argv[1], "rb") as f:
    m = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
print("mapped")
sys.stdin.read()
"""
    process = world.popen(agent.host.shop, code, str(fake))
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    eventually(lambda: agent.metrics().lost("attribution", "tls_library_unreadable") == before + 1, 15)
    process.communicate(timeout=10)


def test_uprobes_off(host: Host, world: World) -> None:
    with world.holder(host.shop):
        agent = host.start(EBFW_OUTPUT="json", EBFW_TLS_UPROBES="false").ready()
        world.curl(host.shop, "https://inside.lab.example/unseen")
        eventually(lambda: [event for event in agent.events if event["kind"] == "close"])
        assert {event["kind"] for event in agent.events} == {"dns", "connect", "tls", "close"}
        assert not agent.metrics().total("ebfw_uprobe_attached")


def test_d5_exclude_hides_what_is_inside_tls(host: Host, world: World) -> None:
    """The address of the server is excluded. Asked by name and by address it is counted, and not told."""
    config = host.directory / "exclude.yaml"
    config.write_text(f"exclude:\n  cidrs: [{SERVERS4[0]}/32, {SERVERS6[0]}/128]\n")
    with world.holder(host.shop):
        agent = host.start(EBFW_OUTPUT="json", EBFW_CONFIG=str(config)).ready()
        world.curl(host.shop, "https://inside.lab.example/hidden/[1-23]")
        world.curl(host.shop, "-k", f"https://{SERVERS4[0]}/hidden/[1-23]")
        count = "http_client_request_duration_seconds_count"
        eventually(lambda: agent.metrics().total(count, server_address="~excluded") == 46)
        assert agent.metrics().total(count) == 46
        assert agent.metrics().total("ebfw_filtered_total", kind="https") == 46
        assert {event["kind"] for event in agent.events} == {"dns"}  # which goes by the name that is asked for
        log = world.servers.log("https", "request")
        assert len([request for request in log if request["target"].startswith("/hidden/")]) == 46
