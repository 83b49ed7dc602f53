"""Done when: what runs inside the watched cgroup shows up everywhere, what runs outside nowhere, secrets never.

Two agents watch one cgroup at the same time, each from a pin path of its own: one prints text and pushes over gRPC,
the other prints JSON and pushes over HTTP. They see one round of traffic from inside, then one from outside.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from lab import Cgroup
from lab.net import POD4, SERVERS4, SERVERS6
from lab.servers import PORTS
from tests.pipeline.conftest import (
    CONTAINER_ID,
    POD,
    POD_UID,
    UDP,
    Agent,
    Host,
    Samples,
    World,
    eventually,
)
from tests.pipeline.otlp_receiver import Receiver, attributes

pytestmark = pytest.mark.kernel

CANARIES = {
    "query": "CanaryQ7hUe2kQx0Zr9sW3y",
    "user": "canaryuser4711",
    "password": "CanaryPw8sKx2Vw5nB1d",
    "path": "ghp_CanaryT0kenAb3dEf6hIj9LmN2pQr5tUv8xYz",
    "authorization": "CanaryBearerA1b2C3d4E5f6G7h8",
    "cookie": "CanaryCookieZ9y8X7w6V5u4",
}
HEADERS = (
    "-H",
    f"Authorization: Bearer {CANARIES['authorization']}",
    "-H",
    f"Cookie: session={CANARIES['cookie']}",
    "-H",
    "X-Plain: harmless",
)
QUICK = {
    "EBFW_LOGS": "all",
    "EBFW_CONNECTION_SPANS": "all",
    "EBFW_INSPECT_HEADERS": "true",
    "EBFW_NODE_NAME": "node-of-the-test",
    "OTEL_BSP_SCHEDULE_DELAY": "200",
    "OTEL_BLRP_SCHEDULE_DELAY": "200",
    "OTEL_METRIC_EXPORT_INTERVAL": "1000",
}

# A request as no good client writes it, over TCP and over TLS: user info in the target and in Referer.
RAW = """
import base64, socket, ssl, sys
host, path, user = sys.argv[1:]
url = f"http://{user}@{host}{path}"
basic = base64.b64encode(user.encode()).decode()
head = f"GET {url} HTTP/1.1\\r\\nHost: {host}\\r\\nReferer: {url}\\r\\nAuthorization: Basic {basic}\\r\\n"
for port in (80, 443):
    with socket.create_connection((host, port), 10) as s:
        if port == 443:
            s = ssl.create_default_context().wrap_socket(s, server_hostname=host)
        s.sendall((head + "Connection: close\\r\\n\\r\\n").encode())
        while s.recv(4096):
            pass
        s.close()
"""


class Seen(NamedTuple):
    """What two agents told about the same traffic."""

    text: list[str]
    json: list[dict[str, Any]]
    before: Samples  # of the agent that prints text, after the traffic from inside
    after: Samples  # after the traffic from outside
    pages: str  # both agents' /metrics at the end
    grpc: Receiver
    http: Receiver
    raw: str  # both outputs and logs
    pids: set[int]
    outside: int  # requests from outside that the servers did get
    agents: list[Agent]
    idle: float  # CPU seconds in a second without traffic, of the agent that pushes over HTTP
    memory: int


def round_of_traffic(world: World, cgroup: Cgroup, name: str) -> None:
    """Every signal, once from `cgroup`; `name` is in every name and path."""
    secret = f"/v1/{CANARIES['path']}/charge?token={CANARIES['query']}&page=2"
    host = f"{name}.lab.example"
    world.curl(cgroup, *HEADERS, f"https://{host}/{name}/tls{secret}")
    world.curl(cgroup, *HEADERS, f"http://{host}/{name}/plain{secret}")
    world.curl(cgroup, "--ipv6", f"http://{host}/{name}/six")
    user = f"{CANARIES['user']}:{CANARIES['password']}"
    world.python(cgroup, RAW, host, f"/{name}/raw{secret}", user)
    code = "import socket, sys; socket.getaddrinfo(sys.argv[1], 80, type=socket.SOCK_STREAM)"
    world.python(cgroup, code, f"{name}.lab.example")
    world.python(cgroup, UDP, SERVERS4[2], str(PORTS["udp_sink"]), "3", "100", "0")


@pytest.fixture(scope="module")
def seen(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    with (
        Receiver() as grpc,
        Receiver() as http,
        Host(world, tmp_path_factory.mktemp("agent")) as host,
        Cgroup("outside") as outside,
        world.holder(host.shop),
    ):
        second = str(host.directory / "pins-too")
        agents = [
            host.start(
                EBFW_OUTPUT="text",
                OTEL_EXPORTER_OTLP_ENDPOINT=grpc.grpc,
                OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
                **QUICK,
            ),
            host.start(
                EBFW_OUTPUT="json",
                EBFW_BPF_PIN_PATH=second,
                OTEL_EXPORTER_OTLP_ENDPOINT=http.http,
                **QUICK,
            ),
        ]
        for agent in agents:
            agent.ready()
        round_of_traffic(world, host.shop, "inside")
        for name, path in (("pod", POD), ("unit", "web.service"), ("docker", f"docker-{'9d' * 32}.scope")):
            world.curl(host.cgroup.child(path), f"http://{SERVERS4[3]}/who/{name}")
        eventually(lambda: all(a.output.count("/who/docker") for a in agents))
        before = agents[0].settled()
        told = len(agents[0].lines), len(agents[1].lines)
        requests = len(world.servers.log("http", "request")) + len(world.servers.log("https", "request"))
        cpu, at = agents[1].cpu(), time.monotonic()
        with world.holder(outside):
            round_of_traffic(world, outside, "outside")
            time.sleep(1)
        after = agents[0].settled()
        idle = (agents[1].cpu() - cpu) / (time.monotonic() - at)
        memory = agents[1].memory()
        outside_requests = (
            len(world.servers.log("http", "request")) + len(world.servers.log("https", "request")) - requests
        )
        assert told == (len(agents[0].lines), len(agents[1].lines))
        pages = agents[0].metrics().text + agents[1].metrics().text
        for agent in agents:
            assert agent.stop() == 0
        yield Seen(
            agents[0].lines,
            agents[1].events,
            before,
            after,
            pages,
            grpc,
            http,
            "".join(agent.output + agent.log for agent in agents),
            {agent.pid for agent in agents},
            outside_requests,
            agents,
            idle,
            memory,
        )


def test_text(seen: Seen) -> None:
    lines = [line for line in seen.text if line[0] != " "]  # the others are headers
    shop = [line for line in lines if " cgroup=shop" in line]
    assert len(lines) - len(shop) == 3 * 3  # pod, unit and container: a connect, a request and a close each
    name = r"inside\.lab\.example"
    path = r"/v1/REDACTED/charge\?token=REDACTED&page=REDACTED"
    patterns = (
        rf"DNS      203\.0\.113\.1 \? {name} \(A\)  cgroup=shop status=NOERROR took=\S+ answers=198\.51\.100\.1 proc=",
        rf"CONNECT  \S+ -> \S+:443  cgroup=shop status=ok took=\S+ rtt=\S+ proc=curl\[\d+\] name={name} via=dns",
        rf"TLS      \S+ -> {name}  \(\S+:443\)  cgroup=shop .*via=sni",
        rf"HTTPS    \[pid=\d+ curl\] GET {name}/inside/tls{path}  cgroup=shop.* via=host",
        rf"HTTP     \S+ -> GET {name}/inside/plain{path}  cgroup=shop .*via=host",
        rf"HTTP     2001:db8:1::1 -> GET {name}/inside/six  cgroup=shop",
        r"CONNECT  203\.0\.113\.1 -> 198\.51\.100\.3:8125  cgroup=shop status=ok proto=udp proc=python",
        r"CLOSE    2001:db8:1::1 -> \[2001:db8:2::1\]:80  cgroup=shop status=ok took=\S+ tx=\d+B rx=\d+B",
    )
    for pattern in patterns:
        assert [line for line in seen.text if re.match(pattern, line)], f"no line like {pattern}"
    assert [line for line in seen.text if f"pod=uid:{POD_UID}" in line and "/who/pod" in line]
    assert [line for line in seen.text if "unit=web.service" in line and "/who/unit" in line]
    assert [line for line in seen.text if f"container={'9d' * 6}" in line and "/who/docker" in line]


def test_json(seen: Seen) -> None:
    inside = [e for e in seen.json if e.get("workload", {}).get("name") == "shop"]
    kinds = Counter(event["kind"] for event in inside)
    assert kinds["tls"] == kinds["https"] == 2
    assert kinds["http"] == 3
    assert kinds["close"] == 5
    assert kinds["connect"] == 6  # five over TCP, one over UDP
    queries = [q for q in seen.agents[0].host.world.servers.log("dns", "query") if q["name"] == "inside.lab.example"]
    # one that a slow machine made the resolver send again is the same question
    assert kinds["dns"] == len({(*query["peer"], query["type"]) for query in queries})
    for kind, part in (("https", "tls"), ("http", "plain")):
        path = f"/inside/{part}/v1/REDACTED/charge?token=REDACTED&page=REDACTED"
        (request,) = [event for event in inside if event["kind"] == kind and event["path"] == path]
        assert (request["method"], request["domain"], request["comm"]) == ("GET", "inside.lab.example", "curl")
        headers = {pair["name"].lower(): pair["value"] for pair in request["headers"]}
        assert headers["x-plain"] == "harmless"
        assert headers["authorization"] == headers["cookie"] == "REDACTED"
    (six,) = [event for event in inside if event["kind"] == "http" and event["path"] == "/inside/six"]
    assert (six["src"], six["dst"], six["port"]) == ("2001:db8:1::1", SERVERS6[0], 80)
    (udp,) = [event for event in inside if event["kind"] == "connect" and event["port"] == PORTS["udp_sink"]]
    assert (udp["src"], udp["dst"]) == (POD4, SERVERS4[2])
    (pod,) = [event for event in seen.json if event["kind"] == "http" and event["path"] == "/who/pod"]
    assert pod["pod"]["uid"] == POD_UID
    assert pod["pod"]["node"] == "node-of-the-test"


def test_both_agents_tell_the_same(seen: Seen) -> None:
    kinds = Counter(line.split()[0].lower() for line in seen.text if line[0] != " ")
    assert kinds == Counter(event["kind"] for event in seen.json)


def test_metrics(seen: Seen, world: World) -> None:
    page = seen.before
    shop = {"service_name": "shop"}
    assert page.total(
        "ebfw_network_io_bytes_total", server_address=SERVERS4[2], network_io_direction="transmit", **shop
    ) == 3 * (100 + 28)
    assert (
        page.total("ebfw_network_packets_total", server_address=SERVERS4[2], network_io_direction="transmit", **shop)
        == 3
    )
    for state in ("opened", "closed"):
        assert page.total("ebfw_tcp_connections_total", ebfw_connection_state=state, **shop) == 5
    named = page.rows("ebfw_network_io_bytes_total", server_address="inside.lab.example", **shop)
    assert {row.labels["ebfw_peer_name_source"] for row in named} >= {"sni", "host"}
    assert page.total("dns_lookup_duration_seconds_count", dns_question_name="inside.lab.example", **shop) > 3
    assert page.rows("ebfw_workload_info", k8s_pod_uid=POD_UID, container_id=CONTAINER_ID)
    assert page.rows("ebfw_workload_info", ebfw_systemd_unit="web.service", service_name="web.service")
    assert page.total("ebfw_events_total", kind="https") == 2
    assert page.total("http_client_request_duration_seconds_count", http_response_status_code="200", **shop) == 5
    assert page.total("http_client_active_requests", **shop) == 0
    assert page.total("ebfw_tcp_open_connections", **shop) == 0
    assert page.total("ebfw_attribution_total", result="miss") == 0
    assert not [row for row in page.rows("ebfw_records_lost_total") if row.value]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_otlp(seen: Seen, protocol: str) -> None:
    receiver: Receiver = getattr(seen, protocol)
    shop = [(r, span) for r, span in receiver.spans() if r["service.name"] == "shop"]
    assert all(r["ebfw.workload.kind"] == "cgroup" for r, _ in shop)
    assert all(r["k8s.node.name"] == "node-of-the-test" for r, _ in shop)
    names = Counter(span.name for _, span in shop)
    assert names["DNS lookup inside.lab.example"] > 3
    assert names[f"socket connect [{SERVERS6[0]}]:80"] >= 1
    assert names[f"socket connect {SERVERS4[0]}:443"] + names[f"socket connect [{SERVERS6[0]}]:443"] == 2
    requests = [span for _, span in shop if span.name.startswith("GET /inside/")]
    assert len(requests) == 5
    roots = {span.span_id: span for _, span in shop if span.name == "connection"}
    steps = [span for _, span in shop if span.parent_span_id]
    assert len(roots) == sum(count for name, count in names.items() if name.startswith("socket connect"))
    for step in steps:  # D7
        root = roots[step.parent_span_id]
        assert step.trace_id == root.trace_id
        assert step.start_time_unix_nano >= root.start_time_unix_nano - 1_000_000
    assert {attributes(span)["http.response.status_code"] for span in requests} == {200}
    # D11, inside TLS too: each leads to the set-up of its own connection.
    for span in requests:
        (link,) = span.links
        root, made = attributes(roots[link.span_id]), attributes(span)
        assert link.trace_id == roots[link.span_id].trace_id
        for key in ("server.port", "network.peer.address", "network.peer.port", "network.local.port"):
            assert made[key] == root[key], key
    assert Counter(attributes(span)["url.scheme"] for span in requests) == {"http": 3, "https": 2}
    assert all(span.end_time_unix_nano > span.start_time_unix_nano for _, span in shop)
    assert all(abs(span.end_time_unix_nano - time.time_ns()) < 600e9 for _, span in shop)

    told = [attributes(log) for r, log in receiver.logs() if r["service.name"] == "shop"]
    paths = {log.get("url.path") for log in told}
    assert {"/inside/tls/v1/REDACTED/charge", "/inside/plain/v1/REDACTED/charge", "/inside/six"} <= paths
    assert {log.get("url.scheme") for log in told} >= {"http", "https"}
    assert PORTS["udp_sink"] in {log.get("server.port") for log in told}
    (pod,) = [r for r, log in receiver.logs() if attributes(log).get("url.path") == "/who/pod"]
    assert pod["k8s.pod.uid"] == POD_UID
    assert pod["container.id"] == CONTAINER_ID
    assert pod["container.runtime.name"] == "containerd"
    (unit,) = [r for r, log in receiver.logs() if attributes(log).get("url.path") == "/who/unit"]
    assert unit["ebfw.systemd.unit"] == "web.service"
    assert unit["service.name"] == "web.service"

    sent = {
        (attributes(point)["network.io.direction"]): point.as_int
        for r, _, point in receiver.points("ebfw.network.io")
        if r["service.name"] == "shop" and attributes(point)["server.address"] == SERVERS4[2]
    }
    assert sent == {"transmit": 3 * 128}
    assert [p for r, _, p in receiver.points("dns.lookup.duration") if r["service.name"] == "shop" and p.count]
    own = [r for r, _, _ in receiver.points("ebfw.events")]
    assert {r["service.name"] for r in own} == {"ebfw"}


def test_outside_is_nowhere(seen: Seen) -> None:
    assert seen.outside == 5  # they did happen
    assert "outside" not in seen.raw
    assert "outside" not in seen.pages
    for receiver in (seen.grpc, seen.http):
        assert "outside" not in repr([received.message for received in receiver.requests])
    for name in ("ebfw_network_io_bytes_total", "ebfw_events_total", "ebfw_tcp_connections_total"):
        assert seen.after.total(name) == seen.before.total(name)


def test_secrets_are_nowhere(seen: Seen, world: World) -> None:
    got = repr(world.servers.log("http", "request")) + repr(world.servers.log("https", "request"))
    places = {
        "text, JSON and log": seen.raw,
        "/metrics": seen.pages,
        "gRPC": repr([received.message for received in seen.grpc.requests]),
        "HTTP": repr([received.message for received in seen.http.requests]),
    }
    for what, canary in CANARIES.items():
        assert canary in got, f"the {what} was never sent"
        for place, text in places.items():
            assert canary not in text, f"{what} in {place}"
    assert "Y2FuYXJ5dXNlcjQ3MTE" not in "".join(places.values())  # "canaryuser4711", base64
    assert "REDACTED" in seen.raw


def test_user_info_in_host(host: Host, world: World) -> None:
    """`Host: user:password@name` is no Host (RFC 9110 section 7.2); neither part may become a name."""
    agent = host.start(EBFW_OUTPUT="json").ready()
    for user in ("canaryuser4711:canarypw", "canaryuser4711:4canarypw", "canaryuser4711"):
        world.curl(host.shop, "-H", f"Host: {user}@inside.lab.example", f"http://{SERVERS4[0]}/host")
    eventually(lambda: Counter(event["kind"] for event in agent.events)["close"] == 3)
    page = agent.settled().text
    assert "canary" not in agent.output
    assert "canary" not in page


def test_headers_stay_out_of_otlp(seen: Seen) -> None:
    for receiver in (seen.grpc, seen.http):
        assert "harmless" not in repr([received.message for received in receiver.requests])


def test_footprint(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n    agent with OTLP over HTTP: {seen.memory / 1e6:.1f} MB, {seen.idle:.1%} of a CPU at rest")
    assert seen.memory < 120e6
