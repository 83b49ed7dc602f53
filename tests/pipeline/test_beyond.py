"""What nobody else tells, end to end: peer groups (D21), the inventory over restarts (D20), hygiene (D22)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.net import SERVERS4
from lab.servers import PORTS
from tests.pipeline.conftest import Agent, Host, World, eventually

pytestmark = pytest.mark.kernel

N = 23
SERVER = SERVERS4[0]
EVERYTHING = "exclude: {cidrs: [], domainSuffixes: []}\n"

# COUNT connections to ADDRESS, PORT; each sends 100 bytes and reads to the end of the echo.
TCP = """
import socket, sys
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for _ in range(count):
    with socket.create_connection((address, port), 10) as s:
        s.sendall(bytes(100))
        s.shutdown(socket.SHUT_WR)
        while s.recv(4096): pass
"""


def settings(host: Host, **more: str) -> dict[str, str]:
    config = host.directory / "all.yaml"
    config.write_text(EVERYTHING)
    return {"EBFW_CONFIG": str(config), "EBFW_OUTPUT": "json", **more}


def news(agent: Agent) -> list[dict[str, Any]]:
    return [event for event in agent.events if event["kind"] == "new"]


def test_d20_inventory_over_a_crash_and_a_restart(host: Host, world: World) -> None:
    path = host.directory / "state" / "inventory.json"
    path.parent.mkdir()
    here = settings(host, EBFW_INVENTORY=str(path), EBFW_OUTPUT="json")
    port = PORTS["tcp_echo"]
    agent = host.start(**here).ready()
    world.python(host.shop, TCP, SERVER, str(port), str(N))
    world.curl(host.shop, "--resolve", f"inside.lab.example:443:{SERVER}", "https://inside.lab.example/")
    eventually(lambda: len(news(agent)) >= 2)
    found = {(event["domain"], event["port"], event["name_source"]) for event in news(agent)}
    assert found == {(SERVER, port, "address"), ("inside.lab.example", PORTS["https"], "sni")}
    eventually(lambda: path.exists() and len(destinations(path)) == 2, 20)
    sent = agent.settled().total("ebfw_network_io_bytes_total", server_address=SERVER, network_io_direction="transmit")
    eventually(lambda: destinations(path)[SERVER, port]["connections"] == N, 20)

    agent.kill()
    again = host.start(**here).ready()
    world.python(host.shop, TCP, SERVER, str(port), "1")
    world.curl(host.shop, f"http://{SERVER}/")
    eventually(lambda: news(again), 20)
    assert again.stop() == 0
    assert {(event["domain"], event["port"]) for event in news(again)} == {(SERVER, PORTS["http"])}
    row = destinations(path)[SERVER, port]
    assert row["connections"] == N + 1
    assert row["executables"] == ["python3"] or row["executables"][0].startswith("python")
    assert sent < row["tx_bytes"] < sent + 1000

    shown = host.ebfw("inventory", "--workload", "shop", EBFW_INVENTORY=str(path))
    assert shown.returncode == 0, shown.stderr
    header, *lines = (line.split("\t") for line in shown.stdout.splitlines())
    assert len(lines) == 3
    assert {dict(zip(header, line, strict=True))["WORKLOAD"] for line in lines} == {"shop"}


def destinations(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    (workload,) = json.loads(path.read_text())["workloads"]
    return {(row["name"], row["port"]): row for row in workload["destinations"]}


def test_d20_without_the_setting_there_is_no_inventory(host: Host, world: World) -> None:
    agent = host.start(**settings(host)).ready()
    world.curl(host.shop, f"http://{SERVER}/")
    eventually(lambda: any(event["kind"] == "close" for event in agent.events))
    assert agent.stop() == 0
    assert news(agent) == []


def test_d21_groups_on_lines_and_counters_and_read_again(host: Host, world: World) -> None:
    path = host.directory / "groups.yaml"
    path.write_text(f"groups: {{lab: {{cidrs: [{SERVER}/32]}}}}\n")
    agent = host.start(**settings(host, EBFW_PEER_GROUPS=str(path))).ready()
    port = PORTS["tcp_echo"]
    world.python(host.shop, TCP, SERVER, str(port), str(N))
    eventually(lambda: sum(event["kind"] == "close" for event in agent.events) == N)
    assert {event.get("group") for event in agent.events} == {"lab"}
    metrics = agent.settled()
    counted = metrics.total("ebfw_tcp_connections_total", ebfw_peer_group="lab", ebfw_connection_state="opened")
    assert counted == N
    assert metrics.total("ebfw_tcp_connect_duration_seconds_count", ebfw_peer_group="lab") == N

    path.write_text("groups: {lab: {cidr: []}}\n")
    eventually(lambda: "did you mean cidrs?" in agent.log, 20)
    path.write_text(f"groups: {{other: {{cidrs: [{SERVER}/16]}}}}\n")
    eventually(lambda: "read again" in agent.log, 20)
    world.python(host.shop, TCP, SERVER, str(port), "1")
    eventually(lambda: agent.events[-1]["kind"] == "close" and agent.events[-1].get("group") == "other")


def test_d21_a_mistake_at_start_is_one_sentence(host: Host) -> None:
    path = host.directory / "groups.yaml"
    path.write_text("groups:\n  s3:\n    domain: []\n")
    done = host.ebfw(EBFW_PEER_GROUPS=str(path))
    assert done.returncode == 2
    assert done.stderr == f"ebfw: {path}:3: groups.s3.domain: there is no such key; did you mean domains?\n"
    assert host.left_behind() == []


def test_d22_credentials_in_the_clear_are_marked_and_never_shown(host: Host, world: World) -> None:
    agent = host.start(**settings(host, EBFW_INSPECT_HEADERS="true")).ready()
    secret = "CanaryHygieneA1b2C3d4E5"
    for n in range(N):
        credentials = (("-H", f"Authorization: Bearer {secret}"), ("-u", f"user:{secret}"), ("-b", f"id={secret}"), ())
        world.curl(host.shop, *credentials[n % 4], f"http://{SERVER}/{n}")
    eventually(lambda: sum(event["kind"] == "close" for event in agent.events) == N)
    marked = {event["path"]: event.get("cleartext_credentials", False) for event in agent.events if "path" in event}
    assert marked == {f"/{n}": n % 4 != 3 for n in range(N)}
    metrics = agent.settled()
    labels = {"service_name": "shop", "ebfw_hygiene_finding": "cleartext_credentials"}
    with_credentials = sum(marked.values())
    assert metrics.total("ebfw_hygiene_findings_total", **labels) == with_credentials
    assert metrics.total("ebfw_hygiene_checked_total", **labels) == N
    assert metrics.total("ebfw_hygiene_http_connections_total", service_name="shop") == N
    assert metrics.total("ebfw_hygiene_http_requests_total", service_name="shop") == N
    assert metrics.rows("ebfw_hygiene_time_seconds_total", service_name="shop", ebfw_hygiene_phase="connect")
    assert metrics.total("ebfw_hygiene_ports_available") > 1000
    assert secret not in agent.output + agent.log + metrics.text


# COUNT connections to ADDRESS, each with two requests. Told by a line, WAITING of them begin a third, whose body never
# comes whole. All stay open until standard input ends.
HTTP = """
import socket, sys
address, count, waiting = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sockets = [socket.create_connection((address, 80), 10) for _ in range(count)]
for s in sockets:
    for _ in range(2):
        s.sendall(b"GET /bytes/100 HTTP/1.1\\r\\nHost: inside.lab.example\\r\\n\\r\\n")
        answer = b""
        while len(answer.partition(b"\\r\\n\\r\\n")[2]) < 100:
            answer += s.recv(4096)
print("answered")
sys.stdin.readline()
for s in sockets[:waiting]:
    s.sendall(b"POST /echo HTTP/1.1\\r\\nHost: inside.lab.example\\r\\nContent-Length: 10\\r\\n\\r\\nhalf")
sys.stdin.read()
"""


def test_connections_that_carried_requests(host: Host, world: World) -> None:
    """23 connections in, 23 open, active or idle, exactly 23 durations out. Requests that wait say for whom."""
    waiting = 11
    wanted = "http.client.open_connections,http.client.connection.duration"
    agent = host.start(**settings(host, EBFW_METRICS_OPT_IN=wanted)).ready()
    server = {"service_name": "shop", "server_address": "inside.lab.example", "server_port": "80"}
    opened = "http_client_open_connections"
    client = world.popen(host.shop, HTTP, SERVER, str(N), str(waiting))
    assert client.stdout is not None
    assert client.stdin is not None
    assert client.stdout.readline() == "answered\n"
    world.python(host.shop, TCP, SERVER, str(PORTS["tcp_echo"]), "3")  # carry no requests
    eventually(lambda: agent.metrics().total(opened, http_connection_state="idle", **server) == N)
    page = agent.metrics()
    assert page.total(opened) == page.total(opened, **server) == N
    assert page.total("http_client_connection_duration_seconds_count") == 0
    client.stdin.write("\n")
    client.stdin.flush()
    eventually(lambda: agent.metrics().total(opened, http_connection_state="active", **server) == waiting)
    page = agent.metrics()
    assert page.total(opened, http_connection_state="idle", **server) == N - waiting
    active = {**server, "http_request_method": "POST", "url_scheme": "http"}
    assert page.total("http_client_active_requests") == page.total("http_client_active_requests", **active) == waiting
    client.communicate()
    eventually(lambda: agent.metrics().total(opened) == 0)
    page = agent.settled()
    assert page.total("http_client_active_requests") == 0
    lasted = "http_client_connection_duration_seconds_count"
    assert page.total(lasted) == page.total(lasted, network_protocol_version="1.1", **server) == N
    assert page.total("ebfw_hygiene_http_requests_total", service_name="shop") == 2 * N + waiting
    assert not [row for row in page.rows("ebfw_records_lost_total") if row.value]
