"""D22: hygiene signals: what is found, what it is compared with, and that no credential leaves.

Excluded: the agent end to end (tests/pipeline/test_beyond.py), redaction itself (test_redact.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter import health
from exporter.emit import connections
from exporter.emit import hygiene as module
from exporter.emit import semconv as c
from exporter.emit.connections import HttpConnections
from exporter.emit.console import JsonFormat, TextFormat
from exporter.emit.hygiene import Hygiene
from exporter.emit.logs import Notable, record
from exporter.emit.metrics import Metrics
from exporter.emit.redact import Options, redact
from exporter.emit.resource import Resources
from exporter.events import Counts, Event, Exchange, Flow, Tls, Workload
from exporter.http1 import parse_request

SHOP = Workload(7, "/system.slice/shop.service", "unit", "shop.service", unit="shop.service")


class World:
    def __init__(self, port_range: Path) -> None:
        self.metrics = Metrics(Resources("n1"), losses=health.Losses(), features=health.Features())
        port_range.write_text("32768\t60999\n")
        self.connections = HttpConnections(self.metrics)
        self.hygiene = Hygiene(self.metrics, self.connections, port_range)

    def see(self, kind: str, **changes: Any) -> Event:
        made = Event(
            kind, 10**18, SHOP, 42, "curl", "tcp", "client", "192.0.2.9", 40000, "192.0.2.1", 80,
            "internet", "example.com", "host", "", cookie=5,
        )  # fmt: skip
        seen = made._replace(**changes)
        self.hygiene.observe([seen])
        return seen

    def close(self, cookie: int) -> None:
        self.see("close", cookie=cookie)
        self.hygiene.settle()

    def read(self, metric: c.Metric) -> dict[tuple[str, ...], float]:
        """{(workload, attribute values ...): total}, what is 0 left out."""
        self.hygiene.publish()
        found: dict[tuple[str, ...], float] = {}
        for known, points in self.metrics.snapshot().by_metric():
            if known is metric:
                for resource, point in points:
                    name = dict(resource.attributes)[c.SERVICE_NAME]
                    if point.value:
                        found[str(name), *(str(value) for _, value in point.attributes)] = point.value
        return found

    def finding(self, name: str) -> tuple[float, float]:
        """(found, checked)."""
        key = ("shop.service", name)
        return self.read(c.FINDINGS).get(key, 0), self.read(c.CHECKED).get(key, 0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "range")


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("GET / HTTP/1.1\nAuthorization: Bearer CANARY", True),
        ("GET / HTTP/1.1\naccept: */*\ncookie: id=CANARY", True),
        ("GET / HTTP/1.1\nPROXY-AUTHORIZATION: Basic CANARY", True),
        ("GET http://user:CANARY@example.com/a HTTP/1.1", True),
        ("CONNECT CANARY@example.com:443 HTTP/1.1", True),
        ("GET / HTTP/1.1\nHost: CANARY@example.com", True),
        ("GET /a@b?c=d@e HTTP/1.1\nX-Api: a", False),
        ("GET http://example.com/a@b HTTP/1.1", False),
        ("GET http://example.com?next=a@b HTTP/1.1", False),
        ("GET / HTTP/1.1\nHost: example.com", False),
    ],
)
@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_d22_credentials_in_the_clear(world: World, head: str, found: bool, ending: str) -> None:
    request = parse_request((head.replace("\n", ending) + 2 * ending).encode())
    assert request is not None
    assert request.credentials is found
    event = world.see("http", method="GET", path=request.path, headers=request.headers, credentials=found)
    assert world.finding("cleartext_credentials") == (int(found), 1)
    told = redact(event, Options())
    note = Notable("all").of(told)
    assert note is not None
    attributes = dict(record(note).attributes)
    text, line = TextFormat().line(told), JsonFormat().line(told)
    assert attributes.get("ebfw.http.cleartext_credentials", False) is found
    assert json.loads(line).get("cleartext_credentials", False) is found
    assert ("cleartext-credentials=true" in text) is found
    assert "CANARY" not in text + line + repr(attributes)


def test_d22_what_is_inside_tls_is_no_cleartext(world: World) -> None:
    world.see("https")
    assert world.finding("cleartext_credentials") == (0, 0)


def test_d22_an_accepted_connection_is_not_looked_at(world: World) -> None:
    world.see("http", role="server", credentials=True)
    assert world.read(c.CHECKED) == {}


@pytest.mark.parametrize(
    ("tls", "obsolete", "no_post_quantum"),
    [
        (Tls("1.3", "1.3", group="X25519MLKEM768"), (0, 1), (0, 1)),
        (Tls("1.3", "1.3", group="x25519"), (0, 1), (1, 1)),
        (Tls("1.3", "1.3"), (0, 1), (0, 0)),  # resumed, say: it is not told
        (Tls("1.2", "1.3"), (0, 1), (1, 1)),
        (Tls("1.1", "1.1"), (1, 1), (1, 1)),
        (Tls("1.0", "1.2"), (1, 1), (1, 1)),
        (Tls("", "1.3", post_quantum=True), (0, 0), (0, 0)),  # no answer yet
        (None, (0, 0), (0, 0)),
    ],
)
def test_d22_handshakes(
    world: World, tls: Tls | None, obsolete: tuple[int, int], no_post_quantum: tuple[int, int]
) -> None:
    world.see("tls", tls=tls)
    assert world.finding("obsolete_tls") == obsolete
    assert world.finding("no_post_quantum") == no_post_quantum


def test_d22_requests_for_each_connection(world: World) -> None:
    for cookie, requests in ((1, 1), (2, 23), (3, 0)):
        for n in range(requests):
            world.see("http", cookie=cookie, exchange=Exchange("1.1", "http", 200, sequence=n + 1))
        world.close(cookie)
    world.see("http", cookie=4)  # still open
    assert world.read(c.HYGIENE_CONNECTIONS) == {("shop.service",): 2}
    assert world.read(c.HYGIENE_REQUESTS) == {("shop.service",): 24}


def test_d22_the_connections_own_count_wins(world: World) -> None:
    """Requests that were lost on the way are in the sequence of the last."""
    world.see("https", cookie=1, exchange=Exchange("2", "https", 200, sequence=7))
    world.close(1)
    assert world.read(c.HYGIENE_REQUESTS) == {("shop.service",): 7}


def test_d22_a_request_may_be_told_after_its_connections_end(world: World) -> None:
    world.see("close", cookie=1)
    world.see("http", cookie=1)
    world.hygiene.settle()
    assert world.read(c.HYGIENE_REQUESTS) == {("shop.service",): 1}


def test_d22_a_request_without_a_socket_is_of_no_connection(world: World) -> None:
    """Its cookie is its TLS library's, and no close has that."""
    world.see("https", cookie=1 << 63, port=0)
    world.see("https", cookie=1 << 63)  # one of several to this peer
    world.see("https", port=0)
    assert len(world.connections) == 0


def test_d22_time_by_phase(world: World) -> None:
    world.see("dns", duration=20_000_000)
    world.see("dns", duration=30_000_000, status="NXDOMAIN")
    world.see("connect", status="ok", duration=100_000_000)
    world.see("connect", status="refused", duration=900_000_000)
    world.see("tls", duration=250_000_000)
    world.see("http", duration=500_000_000)
    world.see("https", duration=500_000_000)
    spent = {phase: seconds for (_, phase), seconds in world.read(c.HYGIENE_TIME).items()}
    assert spent == pytest.approx({"dns": 0.05, "connect": 0.1, "tls": 0.25, "request": 1.0})


def test_d22_dns_search_waste(world: World) -> None:
    for n in range(23):
        world.see("dns", status="NXDOMAIN", search_expansion=n % 5 != 0)
    assert world.finding("dns_search") == (18, 23)


def flow(**changes: Any) -> Flow:
    made = Flow(SHOP, "client", "tcp", "192.0.2.1", 443, "internet", "example.com", "sni")
    return made._replace(**changes)


def test_d22_ports_in_use_towards_one_destination(world: World, caplog: pytest.LogCaptureFixture) -> None:
    assert world.read(c.PORTS_AVAILABLE) == {("ebfw",): 28_232}
    # They open in the row of the address, and close in that of the name.
    world.hygiene.add(flow(name="192.0.2.1"), Counts(opened=150))
    world.hygiene.add(flow(), Counts(closed=40))
    world.hygiene.add(flow(peer="192.0.2.2"), Counts(opened=99))
    world.hygiene.add(flow(role="server", peer=""), Counts(opened=5000))
    key = ("shop.service", "192.0.2.1", "443")
    assert world.read(c.PORTS_USED) == {key: 110}
    world.hygiene.add(flow(), Counts(closed=100))
    assert world.read(c.PORTS_USED) == {}
    assert caplog.text == ""
    world.hygiene.add(flow(), Counts(opened=23_000))
    assert world.read(c.PORTS_USED) == {key: 23_010}
    assert "shop.service has 23010 of 28232 ephemeral ports in use towards 192.0.2.1:443" in caplog.text
    world.hygiene.publish()
    assert caplog.text.count("ephemeral ports") == 1
    world.hygiene.add(flow(), Counts(closed=23_010))
    assert world.read(c.PORTS_USED) == {}
    assert (SHOP.cgroup_id, "192.0.2.1", 443) not in world.hygiene._open


def test_d22_everything_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 100)
    monkeypatch.setattr(module, "_OPEN", 100)
    for n in range(300):
        workload = SHOP._replace(cgroup_id=n, name=f"w{n}.service", unit=f"w{n}.service")
        world.see("http", workload=workload, cookie=n + 1, credentials=True)
        world.hygiene.add(flow(workload=workload), Counts(opened=200))
    found = world.read(c.FINDINGS)
    assert len(found) == 300
    assert sum(found.values()) == 300
    assert len(world.connections) <= 100
    assert len(world.hygiene._open) <= 100
    assert world.hygiene._counts == {}


def test_d22_a_host_that_does_not_tell_its_range(tmp_path: Path) -> None:
    metrics = Metrics(Resources("n1"))
    made = Hygiene(metrics, HttpConnections(metrics), tmp_path / "none")
    made.add(flow(), Counts(opened=50_000))
    made.publish()
