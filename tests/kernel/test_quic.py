"""QUIC over UDP: the name in Initial packets that nobody but the client wrote, and datagrams that are none. What
Initial packets may look like is tests/unit/test_quic.py's, which also makes those that are sent here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.events import ADDRESS, CONNECT, SNI, TLS
from exporter.kernel import wire
from lab.net import SERVERS4, SERVERS6
from lab.servers import PORTS
from tests.unit.test_quic import crypto, datagrams, hello, initial

from .conftest import SLOW, N, Watch, attach, client

SINK = PORTS["udp_sink"]
ECHO = PORTS["udp_echo"]
END = Path(__file__).with_name("quic_end.py")

# One socket for each list of datagrams.
SEND = """
for sent in A["data"]:
    s = dial(A["peer"], A["port"], UDP) if A["connected"] else make(A["peer"], UDP)
    for data in sent:
        data = bytes.fromhex(data)
        s.send(data) if A["connected"] else s.sendto(data, (A["peer"], A["port"]))
    s.close()
"""


def in_hex(*sent):
    return [data.hex() for data in sent]


def initials_told(watch):
    return [s.kind for s in watch.sightings].count(wire.RECORD_QUIC_INITIAL)


@pytest.mark.core
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
@pytest.mark.parametrize(("version", "peer"), [("1", SERVERS4[0]), ("2", SERVERS6[0])], ids=["1-v4", "2-v6"])
def test_hellos_over_two_datagrams(version, peer, connected, watch, run, servers):
    """23 sockets, 23 events; every datagram is counted, named or not."""
    data = [in_hex(*datagrams(hello(f"n{i}.quic.example"), version, i), bytes(50)) for i in range(N)]
    done = run(SEND, data=data, peer=peer, port=SINK, connected=connected)
    watch.until(lambda w: len(w.of(TLS)) == N)
    assert [(e.domain, e.name_source, e.tls.quic) for e in watch.of(TLS)] == [
        (f"n{i}.quic.example", SNI, version) for i in range(N)
    ]
    for event in watch.of(TLS):
        assert (event.transport, event.dst, event.port, event.pid) == ("udp", peer, SINK, done.pid)
        assert (event.status, event.duration, event.tls.version, event.tls.offered) == ("", None, "", "1.3")
        assert (event.tls.alpn, event.tls.post_quantum) == (("h3",), True)
    assert initials_told(watch) == 2 * N
    row = watch.row(client(peer, SINK, transport="udp"))
    header = 28 if "." in peer else 48
    assert (row.tx_packets, row.tx_bytes) == (3 * N, sum(len(d) // 2 + header for sent in data for d in sent))
    assert list(watch.rows) == [client(peer, SINK, transport="udp")]  # counters have no name but DNS's


@pytest.mark.core
def test_no_more_than_three_datagrams_are_told(watch, run, servers):
    half = initial(crypto(hello("half.example")[:900], 0))
    run(SEND, data=[in_hex(*[half] * 9)] * 5, peer=SERVERS4[0], port=SINK, connected=True)
    watch.until(lambda w: w.total.tx_packets == 45)
    assert initials_told(watch) == 15
    assert not watch.of(TLS)
    (*late,) = watch.join.expire(10**30)
    assert [(e.domain, e.status, e.tls.ja4) for e in late] == [("half.example", "", "")] * 5


def test_datagrams_that_are_no_initial(watch, run, servers):
    """Too short, too late, another version, another kind of packet."""
    good = initial(crypto(hello("x.example", 32), 0))
    data = [
        [bytes(1200)],
        [good[:1199]],
        [b"hello", good],
        [good[:1] + b"\xff\0\0\x1d" + good[5:]],
        [bytes((good[0] | 0x20,)) + good[1:]],
        [b"\x40" + good[1:]],
    ]
    run(SEND, data=[in_hex(*sent) for sent in data], peer=SERVERS4[0], port=SINK, connected=True)
    watch.until(lambda w: w.total.tx_packets == len(data) + 1)
    assert initials_told(watch) == 0
    assert not watch.of(TLS)


def test_a_new_peer_is_a_new_connection(watch, run, servers):
    """One unconnected socket, as many QUIC libraries have it."""
    lines = """
s = make(A["peers"][0], UDP)
for peer, port, data in zip(A["peers"], A["ports"], A["data"]):
    s.sendto(bytes.fromhex(data), (peer, port))
"""
    data = [initial(crypto(hello(f"p{i}.example", 32), 0)).hex() for i in range(4)]
    peers = [*SERVERS4[:2], *SERVERS4[:2]] if len(SERVERS4) > 1 else [SERVERS4[0]] * 4
    ports = [SINK, SINK, ECHO, ECHO]
    run(lines, data=data, peers=peers, ports=ports)
    watch.until(lambda w: len(w.of(TLS)) == 4)
    assert [(e.domain, e.dst, e.port) for e in watch.of(TLS)] == [
        (f"p{i}.example", peer, port) for i, (peer, port) in enumerate(zip(peers, ports, strict=True))
    ]


def test_excluded_peers_are_not_told(programs, parent, tmp_path, run, cgroup, servers):
    import ipaddress

    data = in_hex(initial(crypto(hello("x.example", 32), 0)))
    with attach(parent.path, tmp_path / "p", exclude=[ipaddress.ip_network("198.51.100.0/24")]) as tap:
        watch = Watch(tap, {cgroup.id})
        run(SEND, data=[data] * N, peer=SERVERS4[0], port=SINK, connected=True)
        watch.until(lambda w: w.total.tx_packets == N)
        assert initials_told(watch) == 0
        assert not watch.of(TLS, CONNECT)


@pytest.mark.parametrize("version", ["1", "2"])
def test_aioquic(version, watch, cgroup, lab, servers):
    """A real client and server: 5 connections, 5 names, however many packets they are."""
    argv = [sys.executable, str(END), "serve", SERVERS4[0], str(servers.ca), str(servers.ca.with_name("key.pem"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    far = lab.world.popen(argv, **pipes)
    try:
        port = json.loads(far.stdout.readline())["port"]
        ask = ["ask", SERVERS4[0], str(port), "web.lab.example", str(servers.ca), version, "5"]
        waiting = {"capture_output": True, "text": True, "timeout": 60 * SLOW}
        near = cgroup.run([sys.executable, str(END), *ask], netns=lab.pods, names=False, check=True, **waiting)
    finally:
        far.communicate(timeout=20 * SLOW)
    number = {"1": 1, "2": 0x6B3343CF}[version]
    assert [json.loads(line) for line in near.stdout.splitlines()] == [{"got": "ping", "version": number}] * 5
    watch.until(lambda w: len(w.of(TLS)) == 5)
    shown = [(e.domain, e.name_source, e.dst, e.port, e.transport, e.tls.quic) for e in watch.of(TLS)]
    assert shown == [("web.lab.example", SNI, SERVERS4[0], port, "udp", version)] * 5
    assert {e.tls.alpn for e in watch.of(TLS)} == {("lab", "h3")}
    assert {e.tls.ja4[:1] for e in watch.of(TLS)} == {"q"}
    assert [(e.transport, e.name_source) for e in watch.of(CONNECT)] == [("udp", ADDRESS)] * 5
