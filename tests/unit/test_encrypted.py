"""exporter/encrypted.py, through Join: a request inside TLS has its connection where that is certain, and never a
wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hpack
import pytest

from exporter import decode, encrypted, events, health
from exporter.decode import Arrival, Sighting
from exporter.emit.connections import HttpConnections
from exporter.emit.hygiene import Hygiene
from exporter.emit.instrumented import Instrumented
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.emit.setup import ALL, Setups
from exporter.emit.spans import request as span_of
from exporter.events import SECOND, Event, Workload
from exporter.health import losses
from exporter.inventory.watch import Inventory
from exporter.join import Join

from .test_tls import answer, extension, hello, record, server_name, u16s, versions

SHOP = Workload(7, "/system.slice/shop.service", "unit", "shop.service", unit="shop.service")
INSIDE = 1 << 63
HOST = "api.example.com"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BLANK = Sighting._make([0] * len(Sighting._fields))._replace(
    cgroup=7, pid=42, comm="shop", transport="tcp", role="client", scope="internet", local="", peer="", outcome="ok",
    payload=b"",
)  # fmt: skip
EVERYWHERE = ("192.0.2.9", 40001, "192.0.2.1", 443)


class Node:
    """A join, and what happens. Sockets are small numbers, and so are the connections of TLS libraries."""

    def __init__(self) -> None:
        self.join = Join(
            lambda cgroup: SHOP,
            lambda identity: "",
            lambda who, peer, now: "",
            lambda who, name, answers, now: None,
            lambda name: False,
            lambda monotonic: monotonic,
            lambda cookie: None,
            lambda who, host, now: host == "10.0.0.9",
        )
        self.time = 0
        self.events: list[Event] = []

    def see(self, kind: int, cookie: int, **changes: Any) -> None:
        self.time += 1000
        event = self.join.add(BLANK._replace(kind=kind, time=self.time, cookie=cookie, **changes))
        self.events += [event] if event is not None else []

    def socket(self, cookie: int, peer: str = "192.0.2.1", **changes: Any) -> dict[str, Any]:
        scope = "private" if peer.startswith("10.") else "internet"
        ends = {"local": "192.0.2.9", "local_port": 40000 + cookie, "peer": peer, "port": 443, "scope": scope}
        return {**ends, **changes}

    def connect(self, cookie: int, name: str = HOST, pieces: int = 1, **changes: Any) -> None:
        """A connection and its ClientHello."""
        where = self.socket(cookie, **changes)
        self.see(decode.OPENED, cookie, **where)
        whole = hello(*([server_name(name)] if name else []), versions(0x0304))
        where["flags"] = where.get("flags", 0)
        for at in range(0, len(whole), size := -(-len(whole) // pieces)):
            end = decode.HEAD_END if at + size >= len(whole) else 0
            piece = {**where, "flags": where["flags"] | end, "offset": at, "payload": whole[at : at + size]}
            self.see(decode.HELLO, cookie, **piece)

    def handshake(self, cookie: int) -> None:
        self.see(decode.SERVER_HELLO, cookie, payload=answer(extension(43, u16s(0x0304))))
        self.see(decode.HANDSHAKE_END, cookie, payload=b"\x14\3\3\0\1\1" + record(bytes(53), 23))

    def close(self, cookie: int) -> None:
        self.see(decode.CLOSED, cookie, **self.socket(cookie))

    def ask(self, library: int, sequence: int = 1, host: str = HOST, **changes: Any) -> None:
        head = f"GET /{library}/{sequence} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self.see(decode.TLS_WRITE, INSIDE | library, payload=head, sequence=sequence, **changes)

    def get(self, library: int, sequence: int = 1, host: str = HOST, **changes: Any) -> Event:
        """A request, answered."""
        self.ask(library, sequence, host, **changes)
        return self.answer(library)

    def answer(self, library: int) -> Event:
        self.join.add(Arrival(decode.RESPONSE, self.time + 500, INSIDE | library, 0, 0, len(OK), OK))
        self.events += self.join.expire(self.time)
        found = self.events[-1]
        assert found.kind == "https"
        return found


@pytest.fixture
def node() -> Node:
    return Node()


def ends(event: Event) -> tuple[str, int, str, int]:
    return event.src, event.src_port, event.dst, event.port


def lost() -> int:
    return losses.snapshot().get(("join", "tls_sockets_full"), 0)


def test_one_connection(node: Node) -> None:
    node.connect(1, peer="10.0.0.1")
    found = [node.get(5, n) for n in range(1, 24)]
    assert {ends(event) for event in found} == {("192.0.2.9", 40001, "10.0.0.1", 443)}
    assert {(event.cookie, event.scope, event.pid, event.comm) for event in found} == {(1, "private", 42, "shop")}
    assert [event.path for event in found] == [f"/5/{n}" for n in range(1, 24)]
    assert {(event.domain, event.name_source, event.role) for event in found} == {(HOST, "host", "client")}
    assert [event.exchange.sequence for event in found if event.exchange] == list(range(1, 24))


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("API.example.com", "api.EXAMPLE.com:443"),
        (HOST, HOST + "."),
        ("", "192.0.2.1"),  # no name is sent for an address
    ],
)
def test_names_that_are_the_same(node: Node, name: str, host: str) -> None:
    node.connect(1, name)
    assert (node.get(5, host=host).cookie, ends(node.events[-1])) == (1, EVERYWHERE)


@pytest.mark.parametrize(
    ("opened", "asked"),
    [
        ({}, {"host": "other.example.com"}),
        ({}, {"pid": 43}),
        ({}, {"cgroup": 8}),
        ({}, {"sequence": 2}),  # the first was not seen: the connection may be any
        ({"name": ""}, {}),
        ({"name": "", "flags": decode.PROXIED}, {"host": "192.0.2.1"}),  # that is the proxy
        ({"name": "", "flags": decode.PROXIED}, {"host": ""}),
    ],
)
def test_what_is_not_certain_is_not_told(node: Node, opened: dict[str, Any], asked: dict[str, Any]) -> None:
    node.connect(1, **opened)
    event = node.get(5, **asked)
    assert (ends(event), event.cookie) == (("", 0, "", 0), INSIDE | 5)


def test_a_hello_in_pieces_and_a_request_before_the_handshakes_end(node: Node) -> None:
    node.connect(1, pieces=3)
    assert node.get(5).cookie == 1
    node.handshake(1)
    assert [event.kind for event in node.events] == ["connect", "https", "tls"]


def test_several_to_one_place(node: Node) -> None:
    """Any of them may be it: the peer is certain, and stays so when one of them closes."""
    node.connect(1, peer="10.0.0.1")
    node.connect(2, peer="10.0.0.1")
    first = node.get(5)
    assert (ends(first), first.scope, first.cookie) == (("", 0, "10.0.0.1", 443), "private", INSIDE | 5)
    node.close(2)
    again = node.get(5, 2)
    assert (ends(again), again.cookie) == (("", 0, "10.0.0.1", 443), INSIDE | 5)


@pytest.mark.parametrize("other", [{"peer": "192.0.2.2"}, {"port": 8443}, {"flags": decode.PROXIED}])
def test_several_to_different_places(node: Node, other: dict[str, Any]) -> None:
    node.connect(1)
    node.connect(2, **other)
    for n in (1, 2):
        event = node.get(5, n)
        assert (ends(event), event.cookie) == (("", 0, "", 0), INSIDE | 5)


def test_a_pool_that_grows(node: Node) -> None:
    """A socket that is known to be one of the library's connections is not another of them."""
    for n in range(1, 24):
        node.connect(n)
        assert node.get(100 + n).cookie == n
    assert [node.get(100 + n, 2).cookie for n in range(1, 24)] == list(range(1, 24))
    assert node.get(200).cookie == INSIDE | 200  # of a connection whose hello was not seen


def test_one_after_another(node: Node) -> None:
    """What is over is no candidate, also where the library's end of it was not seen."""
    for n in range(1, 24):
        node.connect(n)
        assert node.get(100 + n).cookie == n
        node.close(n)
    assert node.get(123, 2).cookie == INSIDE | 123  # used again, for whatever came after
    assert len(node.join) == 0


def test_told_after_its_connection_closed(node: Node) -> None:
    node.connect(1)
    node.ask(5)
    node.close(1)
    event = node.answer(5)
    assert (event.cookie, ends(event)) == (1, EVERYWHERE)


def test_the_librarys_end_of_a_connection(node: Node) -> None:
    """Nothing of it is kept; a request without an answer is told with its connection."""
    node.connect(1)
    node.ask(5)
    node.see(decode.TLS_CLOSED, INSIDE | 5)
    (event,) = [event for event in node.join.expire(node.time) if event.kind == "https"]
    assert (event.cookie, event.exchange and event.exchange.error) == (1, "connection_closed")
    node.handshake(1)
    assert len(node.join) == 1  # the socket
    node.close(1)
    assert len(node.join) == 0


def test_a_process_that_ends_without_a_word_to_its_library(node: Node) -> None:
    """Killed, say: the socket closes, SSL_free is never called. The request is told with the socket's end."""
    node.connect(1)
    node.ask(5)
    asked = node.time
    node.connect(2, "other.example.com")
    talk = Talk(node, 6)
    talk.ask("other.example.com")
    node.close(1)
    node.close(2)
    assert [e for e in node.join.expire(node.time + 1 * SECOND) if e.kind == "https"] == []
    one, two = (e for e in node.join.expire(node.time + 3 * SECOND) if e.kind == "https")
    assert (one.cookie, one.duration, two.cookie) == (1, node.time - 1000 - asked, 2)
    assert [e.exchange and e.exchange.error for e in (one, two)] == ["connection_closed"] * 2
    assert len(node.join) == 0
    assert list(node.join.open_requests()) == []


def test_what_a_process_reads_after_its_socket_closed(node: Node) -> None:
    """It has a moment for that; and what its library asks afterwards is another socket's."""
    node.connect(1)
    node.ask(5)
    node.close(1)
    assert node.answer(5).exchange == node.events[-1].exchange
    node.ask(5, 2)
    assert [e for e in node.join.expire(node.time + 3 * SECOND) if e.kind == "https"] == []
    answered = node.answer(5)
    assert answered.exchange
    assert (answered.path, answered.exchange.status) == ("/5/2", 200)


def test_a_socket_that_connects_anew(node: Node) -> None:
    """Its close was lost."""
    node.connect(1, "old.example.com")
    assert node.get(5, host="old.example.com").cookie == 1
    node.connect(1, peer="192.0.2.2")
    assert node.get(6).dst == "192.0.2.2"
    assert node.get(7, host="old.example.com").dst == ""


def test_a_proxy_on_the_way(node: Node) -> None:
    """The peer is the proxy, the server's port the one that was asked for (D6)."""
    node.connect(1, peer="10.0.0.8", port=3128, flags=decode.PROXIED)
    event = node.get(5, host=f"{HOST}:8443")
    assert (event.dst, event.port, event.proxy) == ("10.0.0.8", 3128, "10.0.0.8:3128")
    span = span_of(event)
    assert span is not None
    attributes = dict(span.attributes)
    assert (attributes["server.port"], attributes["url.full"]) == (8443, f"https://{HOST}:8443/5/1")
    assert (attributes["network.peer.address"], attributes["network.peer.port"]) == ("10.0.0.8", 3128)


def test_the_span_of_a_request(node: Node) -> None:
    node.connect(1, port=8443)
    span = span_of(node.get(5))
    assert span is not None
    attributes = dict(span.attributes)
    assert (attributes["server.port"], attributes["url.full"]) == (8443, f"https://{HOST}:8443/5/1")
    assert (attributes["network.peer.address"], attributes["network.peer.port"]) == ("192.0.2.1", 8443)
    assert (attributes["network.local.address"], attributes["network.local.port"]) == ("192.0.2.9", 40001)


class Talk:
    """Requests of HTTP/2 inside TLS, without bodies, as the kernel's digest has them."""

    def __init__(self, node: Node, library: int, midway: bool = False) -> None:
        self.node, self.cookie = node, INSIDE | library
        self.midway, self.sent, self.got, self.stream = midway, 0, 0, -1
        self.mine, self.theirs = hpack.Encoder(), hpack.Encoder()

    def _frame(self, block: bytes) -> bytes:
        return len(block).to_bytes(3, "big") + b"\x01\x05" + self.stream.to_bytes(4, "big") + block

    def ask(self, host: str = HOST) -> None:
        self.stream += 2
        fields = [(":method", "GET"), (":scheme", "https"), (":path", f"/{self.stream}"), (":authority", host)]
        data = self._frame(self.mine.encode([*fields, ("authorization", "Bearer x")]))
        flags, self.midway = decode.BROKEN if self.midway else 0, False
        self.node.see(decode.FRAMES_OUT, self.cookie, offset=self.sent, flags=flags, payload=data)
        self.sent += len(data)

    def get(self, host: str = HOST, close: int = 0) -> Event:
        self.ask(host)
        if close:
            self.node.close(close)
        data = self._frame(self.theirs.encode([(":status", "200")]))
        self.node.see(decode.FRAMES_IN, self.cookie, offset=self.got, payload=data)
        self.got += len(data)
        (event,) = [event for event in self.node.join.expire(self.node.time) if event.exchange is not None]
        assert (event.kind, event.exchange and event.exchange.scheme) == ("https", "https")
        assert not event.credentials
        return event


def test_http2(node: Node) -> None:
    node.connect(1)
    talk = Talk(node, 5)
    found = [talk.get() for _ in range(23)]
    assert {(event.cookie, *ends(event)) for event in found} == {(1, *EVERYWHERE)}
    assert [event.exchange.sequence for event in found if event.exchange] == list(range(1, 24))
    # A connection may serve more names than the one in its hello (RFC 9113 section 9.1.1).
    node.connect(2, "other.example.com", peer="192.0.2.2")
    assert talk.get("other.example.com").cookie == 1
    assert talk.get(f"{HOST}:443", close=1).cookie == 1


def test_http2_met_midway_may_be_older(node: Node) -> None:
    node.connect(1)
    event = Talk(node, 5, midway=True).get()
    assert (event.cookie, event.dst) == (INSIDE | 5, "")


def test_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted, "SOCKETS", 16)
    before = lost()
    node.connect(1)
    assert node.get(1001).cookie == 1
    node.connect(2)
    for n in range(3, 18):  # the first two go
        node.connect(n, f"{n}.example.com")
        node.handshake(n)
    assert len(node.join._encrypted.sockets) == 15
    assert node.get(1001, 2).cookie == 1  # it had been found
    assert lost() == before
    node.connect(18)  # it is alone in the table, but not in the process
    assert node.get(1018).cookie == INSIDE | 1018
    assert lost() == before + 1
    assert node.get(1017, host="17.example.com").cookie == 17
    assert len(node.join) <= node.join.room
    for n in range(1, 19):
        node.close(n)
    assert not node.join._encrypted.sockets
    assert not node.join._encrypted._free


def test_what_was_found_is_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss only where there may be more requests."""
    monkeypatch.setattr(encrypted, "MATCHED", 16)
    before = lost()
    for n in range(1, 18):
        node.connect(n)
        assert node.get(1000 + n).cookie == n
    assert lost() == before + 1
    assert node.get(1001, 2).cookie == INSIDE | 1001
    assert [node.get(1000 + n, 2).cookie for n in range(2, 18)] == list(range(2, 18))
    for n in range(2, 18):
        node.close(n)
    assert not node.join._encrypted.matched


def test_crowded_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted, "SOCKETS", 16)
    monkeypatch.setattr(encrypted, "_CROWDED", 8)
    table = encrypted.Encrypted()
    for n in range(1, 230):
        table.opened(BLANK._replace(cookie=n), f"{n}.example.com")
    assert (len(table.sockets) <= 16, len(table._crowded), len(table._free) <= 16) == (True, 8, True)


def test_d11_a_request_inside_tls_leads_to_its_connections_set_up(node: Node) -> None:
    setups = Setups(ALL)
    node.connect(1)
    node.handshake(1)
    node.get(5)
    node.close(1)
    (told,) = [setup for event in node.events for setup in setups.add(event)]
    assert [event.kind for event in told.events] == ["connect", "tls"]
    request = next(event for event in node.events if event.kind == "https")
    assert request.cookie in setups
    assert setups.of(request.cookie) is told


def test_d20_a_connection_is_entered_once(node: Node, tmp_path: Path) -> None:
    """23 connections with a request each, its outcome told before the handshake's or after it."""
    inventory = Inventory(tmp_path / "inventory.json", "n1", lambda cgroup: SHOP, wall=lambda: node.time)
    for n in range(1, 24):
        node.connect(n)
        if n % 2:
            node.handshake(n)
        node.get(100 + n)
        node.handshake(n)
        node.close(n)
    assert sum(event.kind == "https" and event.port == 443 for event in node.events) == 23
    inventory.observe(node.events)
    inventory.close()
    ((place, entry),) = [pair for known in inventory._book.values() for pair in known.places.items()]
    assert (place.name, place.port, entry.connections) == (HOST, 443, 23)


def test_d22_requests_are_of_their_connection(node: Node, tmp_path: Path) -> None:
    """Two connections, 23 requests each; a request whose peer alone is known is of none."""
    metrics = Metrics(Resources("n1"), losses=health.Losses())
    hygiene = Hygiene(metrics, connections := HttpConnections(metrics), tmp_path / "none")
    for n in (1, 2):
        node.connect(n)
        for sequence in range(1, 24):
            node.get(100 + n, sequence)
    node.connect(3)
    node.connect(4)
    assert node.get(105).port == 443
    for n in (1, 2, 3, 4):
        node.close(n)
    hygiene.observe(node.events)
    assert connections._carried == {1: 23, 2: 23}
    hygiene.settle()
    assert len(connections) == 0


def test_d12_the_agents_own_requests_are_not_told(node: Node) -> None:
    own = Instrumented(pid=42)
    node.connect(1)
    node.get(5)
    assert own.take(node.events) == []
    assert list(own._own) == [1]


def test_what_never_closes_is_let_go(node: Node) -> None:
    node.connect(1)
    node.get(5)
    node.events += node.join.expire(node.time + 20 * SECOND)
    assert [event.kind for event in node.events] == [events.CONNECT, events.HTTPS, events.TLS]


def test_d5_a_request_to_an_excluded_address_is_hidden_although_its_connection_is_not_known(node: Node) -> None:
    """The kernel tells no ClientHello of an excluded socket."""
    event = node.get(1, host="10.0.0.9")
    assert (event.filtered, event.dst, event.scope) == (True, "", "")
    assert not node.get(2, host="10.0.0.8").filtered
    node.connect(1, name="10.0.0.9")  # told, hence not excluded
    assert not node.get(3, host="10.0.0.9").filtered
