"""A workload whose every number is known: what runs, and what has to come out of every exporter.

Comes in: a cgroup. Goes out: the same traffic each time, prime numbers of each kind, and what telemetry it makes with
every span sampled and EBFW_LOGS=all. Not its job: where the telemetry is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lab import Cgroup
from lab.net import CLOSED_PORT, SERVERS4
from lab.servers import PORTS
from tests.pipeline.collector import DataPoint, Log, Span
from tests.pipeline.conftest import World

CONNECTIONS, REFUSED, LOOKUPS, DATAGRAMS, SIZE = 23, 5, 11, 7, 100
NAME, SERVER = "inside.lab.example", SERVERS4[2]

# One connection for each request, as a client without keep-alive; all from one process.
_CLIENT = """
import socket, sys
name, server, closed, sink = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
connections, refused, lookups, datagrams, size = map(int, sys.argv[5:])
for _ in range(connections):
    with socket.create_connection((server, 80), 10) as s:
        s.sendall(f"GET /bytes/100 HTTP/1.1\\r\\nHost: {name}\\r\\nConnection: close\\r\\n\\r\\n".encode())
        while s.recv(4096):
            pass
for _ in range(refused):
    try:
        socket.create_connection((server, closed), 10)
        sys.exit("was not refused")
    except ConnectionRefusedError:
        pass
for _ in range(lookups):
    socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect((server, sink))
    for _ in range(datagrams):
        s.send(bytes(size))
"""

# Under the default sampling all of it would fit the budget; always_on makes sure. Waits are short.
SETTINGS = {
    "EBFW_LOGS": "all",
    "EBFW_OUTPUT": "json",
    "EBFW_CONNECTION_SPANS": "all",  # by default only slow ones are told, and what is slow depends on the machine
    "OTEL_TRACES_SAMPLER": "always_on",
    "OTEL_BSP_SCHEDULE_DELAY": "200",
    "OTEL_BLRP_SCHEDULE_DELAY": "200",
    "OTEL_METRIC_EXPORT_INTERVAL": "1000",
}


def settings(run: str) -> dict[str, str]:
    """For an agent whose telemetry is to be told apart from other agents' by `run`."""
    return {
        **SETTINGS,
        "EBFW_NODE_NAME": f"node-{run}",
        "OTEL_RESOURCE_ATTRIBUTES": f"deployment.environment.name={run},service.version=9.9.9",
    }


def traffic(world: World, cgroup: Cgroup) -> None:
    """Run it once, to its end."""
    numbers = (CONNECTIONS, REFUSED, LOOKUPS, DATAGRAMS, SIZE)
    arguments = (NAME, SERVER, CLOSED_PORT, PORTS["udp_sink"], *numbers)
    world.python(cgroup, _CLIENT, *map(str, arguments))


EVENTS = 3 * CONNECTIONS + REFUSED + LOOKUPS + 1  # lines: opened, requested, closed; refused; lookups; one UDP socket
SPANS: Counter[tuple[str, bool]] = Counter(
    {
        ("GET /bytes/{id}", False): CONNECTIONS,
        # How each connection came about: a trace of its own, with a child for the handshake.
        ("connection", False): CONNECTIONS,
        (f"socket connect {SERVER}:80", False): CONNECTIONS,
        ("connection", True): REFUSED,
        (f"socket connect {SERVER}:{CLOSED_PORT}", True): REFUSED,
    }
)
LOGS: Counter[tuple[str, str, str, str]] = Counter(
    {
        ("ebfw.egress.connection", "tcp", "opened", ""): CONNECTIONS,
        ("ebfw.egress.connection", "tcp", "closed", ""): CONNECTIONS,
        ("ebfw.egress.connection", "tcp", "", "connection_refused"): REFUSED,
        ("ebfw.egress.connection", "udp", "", ""): 1,
        ("ebfw.egress.dns", "udp", "", ""): LOOKUPS,
        ("ebfw.egress.http.request", "tcp", "", ""): CONNECTIONS,
    }
)
RECORDS = SPANS.total() + LOGS.total()
BEAT = 6  # records of one request by curl to an address: opened, requested and closed, and three spans


def times(counter: Counter[Any], rounds: int) -> Counter[Any]:
    return Counter({key: rounds * count for key, count in counter.items()})


def spans(found: list[Span]) -> Counter[tuple[str, bool]]:
    """In the terms of SPANS."""
    return Counter((span.name, span.failed) for span in found)


def logs(found: list[Log]) -> Counter[tuple[str, str, str, str]]:
    """In the terms of LOGS."""
    keys = ("network.transport", "ebfw.connection.state", "error.type")
    rows = Counter((log.name, *(str(log.attributes.get(key, "")) for key in keys)) for log in found)
    return Counter({(name, transport, state, error): n for (name, transport, state, error), n in rows.items()})


def metrics(found: list[DataPoint]) -> dict[str, float]:
    """In the terms of METRICS: the newest value of each series, added up."""
    return {word: sum(_newest(found, name, labels)) for word, (name, labels) in _SERIES.items()}


def _newest(found: list[DataPoint], name: str, labels: dict[str, str]) -> Iterable[float]:
    """Of the series that have these attributes; "" is for one that is absent."""
    newest: dict[str, float] = {}
    for point in found:
        if point.name == name and all(point.attributes.get(key, "") == text for key, text in labels.items()):
            newest[repr(sorted(point.attributes.items()))] = point.value
    return newest.values()


_SENT = {"server.address": SERVER, "network.transport": "udp", "network.io.direction": "transmit"}
_SERIES: dict[str, tuple[str, dict[str, str]]] = {
    "opened": ("ebfw.tcp.connections", {"ebfw.connection.state": "opened"}),
    "closed": ("ebfw.tcp.connections", {"ebfw.connection.state": "closed"}),
    "refused": ("ebfw.tcp.connection.failures", {"error.type": "connection_refused"}),
    "handshakes": ("ebfw.tcp.connect.duration", {"error.type": ""}),
    "refusals": ("ebfw.tcp.connect.duration", {"error.type": "connection_refused"}),
    "lookups": ("dns.lookup.duration", {"dns.question.name": NAME}),
    "datagrams": ("ebfw.network.packets", _SENT),
    "datagram bytes": ("ebfw.network.io", _SENT),
}
METRICS = {
    "opened": CONNECTIONS,
    "closed": CONNECTIONS,
    "refused": REFUSED,
    "handshakes": CONNECTIONS,
    "refusals": REFUSED,
    "lookups": LOOKUPS,
    "datagrams": DATAGRAMS,
    "datagram bytes": DATAGRAMS * (SIZE + 28),  # IP and UDP headers
}
