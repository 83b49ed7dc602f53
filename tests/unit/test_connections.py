"""HTTP connections as metrics: open, active or idle, and how long they lasted. Opt-in, bounded, with an expiry.

Excluded: how many requests each carried (test_hygiene.py), the agent end to end (tests/pipeline/test_beyond.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import pytest

from exporter import decode, health
from exporter.emit import connections as module
from exporter.emit import semconv as c
from exporter.emit.connections import HttpConnections
from exporter.events import Event, Exchange
from tests.unit.test_metrics import SSHD, Clock, event, histogram, make, read
from tests.unit.test_open_requests import REQUEST, frames, headers, joined, sighting

BOTH = (c.HTTP_OPEN_CONNECTIONS.name, c.HTTP_CONNECTION_TIME.name)
STATES = ("http.connection.state", "server.address", "server.port", "ebfw.peer.scope")
REQUESTED = event("http", status="", port=80, cookie=1, exchange=Exchange("1.1", "http", 200, sequence=1))
CLOSED = event("close", port=80, cookie=1, duration=1_500_000_000)


class World:
    def __init__(self, opt_in: tuple[str, ...] = BOTH, **options: Any) -> None:
        self.metrics, self.metrics_clock = make(opt_in=opt_in, **options)
        self.clock = Clock()
        self.connections = HttpConnections(self.metrics, clock=self.clock)
        self.busy: dict[int, Event] = {}

    def publish(self) -> None:
        def busy(known: Container[int]) -> Iterator[tuple[int, Event | None]]:
            for cookie, one in self.busy.items():
                yield cookie, None if cookie in known else one

        self.connections.publish(busy)

    def open(self, *keys: str) -> dict[tuple[Any, ...], Any]:
        self.publish()
        return {k: v for k, v in read(self.metrics, c.HTTP_OPEN_CONNECTIONS, *(keys or STATES[:1])).items() if v}

    def lasted(self) -> dict[tuple[Any, ...], list[Any]]:
        return histogram(self.metrics, c.HTTP_CONNECTION_TIME)


@pytest.fixture(autouse=True)
def losses(monkeypatch: pytest.MonkeyPatch) -> health.Losses:
    found = health.Losses()
    monkeypatch.setattr(module, "losses", found)
    return found


def test_23_connections_are_open_and_then_23_durations() -> None:
    world = World()
    for cookie in range(23):
        for n in range(cookie % 3 + 1):
            world.connections.carried(
                REQUESTED._replace(cookie=cookie + 1, exchange=Exchange("1.1", "http", 200, sequence=n + 1))
            )
    world.busy = {cookie: REQUESTED for cookie in (*range(1, 8), 100)}  # of the last no request is over yet
    assert world.open(*STATES) == {("active", "example.com", 80, ""): 8, ("idle", "example.com", 80, ""): 16}
    world.busy = {}
    assert world.open() == {("idle",): 23}
    assert sum(world.connections.closed(CLOSED._replace(cookie=cookie + 1)) for cookie in range(23)) == 45
    assert world.connections.closed(CLOSED._replace(cookie=500)) == 0  # it carried something else
    assert world.open() == {}
    ((attributes, cells),) = world.lasted().items()
    assert attributes == (("server.address", "example.com"), ("server.port", 80), ("network.protocol.version", "1.1"))
    assert cells[c.HTTP_CONNECTION_TIME.bounds.index(2.0)] == sum(cells[:-1]) == 23
    assert cells[-1] == pytest.approx(23 * 1.5)
    assert len(world.connections) == len(world.connections.shown) == 0
    world.metrics_clock.seconds += 1000
    world.metrics.expire()
    assert read(world.metrics, c.HTTP_OPEN_CONNECTIONS, *STATES) == {}
    assert world.metrics._store.count == 0


@pytest.mark.parametrize("opt_in", [(), BOTH[:1], BOTH[1:]])
def test_nothing_is_kept_that_was_not_asked_for(opt_in: tuple[str, ...]) -> None:
    world = World(opt_in)
    world.busy = {2: REQUESTED}
    world.connections.carried(REQUESTED)
    assert len(world.connections.shown) == len(opt_in)
    assert world.open() == ({("idle",): 1, ("active",): 1} if BOTH[0] in opt_in else {})
    assert world.connections.closed(CLOSED) == 1
    assert len(world.lasted()) == (BOTH[1] in opt_in)


def test_whom_a_connection_leads_to() -> None:
    world = World()
    proxied = REQUESTED._replace(dst="192.0.2.3", port=3128, proxy="192.0.2.3:3128")
    hidden = REQUESTED._replace(filtered=True, scope="private")
    for cookie, one in enumerate((proxied, hidden, hidden._replace(domain="x"), REQUESTED._replace(domain=""))):
        world.connections.carried(one._replace(cookie=cookie + 1))
    assert world.open(*STATES[1:]) == {
        ("192.0.2.3", 3128, ""): 1, ("~excluded", "", "private"): 2, ("192.0.2.1", 80, ""): 1,
    }  # fmt: skip


def test_what_metrics_are_not_to_see() -> None:
    world = World()
    world.metrics.instrumented = lambda workload: workload is SSHD
    world.connections.carried(REQUESTED)
    world.connections.carried(REQUESTED._replace(cookie=2, workload=SSHD._replace(cgroup_id=8)))
    assert world.open() == {("idle",): 1}
    assert [world.connections.closed(CLOSED._replace(cookie=n)) for n in (1, 2)] == [1, 1]
    assert sum(sum(cells[:-1]) for cells in world.lasted().values()) == 1
    own = HttpConnections(world.metrics, lambda event: None)
    own.carried(REQUESTED)
    assert (len(own), len(own.shown), own.closed(CLOSED)) == (1, 0, 1)


def test_a_connection_older_than_ebfw_has_no_duration() -> None:
    world = World()
    world.connections.carried(REQUESTED)
    assert world.connections.closed(CLOSED._replace(duration=0)) == 1
    assert world.lasted() == {}


def test_connections_are_bounded_and_what_is_dropped_is_counted(
    monkeypatch: pytest.MonkeyPatch, losses: health.Losses
) -> None:
    monkeypatch.setattr(module, "CONNECTIONS", 20)
    world = World()
    for cookie in range(1, 101):
        world.connections.carried(REQUESTED._replace(cookie=cookie))
    assert len(world.connections) == len(world.connections.shown) == 20
    assert losses.snapshot() == {("table", "http_connections_full"): 80}
    assert world.open() == {("idle",): 20}
    assert [world.connections.closed(CLOSED._replace(cookie=n)) for n in (80, 81, 100)] == [0, 1, 1]


def test_a_close_that_was_lost_keeps_nothing_for_good(losses: health.Losses) -> None:
    world = World()
    for cookie in (1, 2, 3):
        world.connections.carried(REQUESTED._replace(cookie=cookie))
    world.clock.seconds += module.IDLE_SECONDS
    world.publish()
    world.connections.carried(REQUESTED._replace(cookie=2))  # used again
    world.busy = {3: REQUESTED}  # waits all the time
    world.publish()
    assert losses.snapshot() == {}
    world.clock.seconds += module.IDLE_SECONDS
    assert world.open() == {("active",): 1, ("idle",): 2}  # as of before
    assert losses.snapshot() == {("table", "http_connection_without_end"): 1}
    assert world.open() == {("active",): 1, ("idle",): 1}
    assert [world.connections.closed(CLOSED._replace(cookie=n)) for n in (1, 2, 3)] == [0, 2, 1]
    assert len(world.connections) == len(world.connections.shown) == 0


def test_join_tells_each_connection_on_which_requests_wait() -> None:
    join = joined()
    join.add(sighting(1, 1))
    join.add(sighting(2, 1))
    join.add(sighting(3, 1, role="server"))
    join.add(frames(4, *(headers(2 * n + 1, REQUEST) for n in range(23))))
    join.add(frames(1 << 63, headers(1, REQUEST))._replace(port=0, peer=""))
    found = dict(join.busy({2}))
    assert found.keys() == {1, 2, 4}
    assert found[2] is None
    told = {cookie: (one.kind, one.domain, one.port) for cookie, one in found.items() if one is not None}
    assert told == {1: ("http", "api.example.com", 80), 4: ("http", "grpc.example.com", 8080)}
    join.add(sighting(1, 1, b"")._replace(kind=decode.CLOSED))
    assert dict(join.busy({2})).keys() == {2, 4}
