"""Packets that no ordinary sender makes, through BPF_PROG_TEST_RUN: headers of every shape, cut at every length.

Each run has a fresh socket (protocol 0, state CLOSE, cgroup id 1 or none). What is asked: never anything but "go on",
exact counts, and the payload found where it is.
"""

from __future__ import annotations

import ipaddress
import os
import struct

import pytest

from exporter import decode
from exporter.events import TLS, Counts
from exporter.kernel import bpf, probes, wire
from lab import Cgroup, dns

from .conftest import N, Watch, attach, client
from .test_names import hello, request

PEER4, PEER6 = "198.51.100.77", "2001:db8:2::77"
US4, US6 = "203.0.113.9", "2001:db8:1::9"


def packed(address):
    return ipaddress.ip_address(address).packed


def v4(protocol, payload, options=b"", fragment=0, out=True):
    size = 20 + len(options)
    ends = (packed(US4) + packed(PEER4)) if out else (packed(PEER4) + packed(US4))
    head = struct.pack("!BBHHHBBH", 0x40 | size // 4, 0, size + len(payload), 1, fragment, 64, protocol, 0)
    return bytes(12) + b"\x08\x00" + head + ends + options + payload


def v6(protocol, payload, extensions=(), out=True):
    """`extensions`: (number, bytes without the next-header byte)."""
    ends = (packed(US6) + packed(PEER6)) if out else (packed(PEER6) + packed(US6))
    body, following = payload, protocol
    for number, rest in reversed(extensions):
        body = bytes([following]) + rest + body
        following = number
    return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), following, 64) + ends + body


def udp(payload, port=53, out=True):
    ports = (40000, port) if out else (port, 40000)
    return struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload


def tcp(payload, port=80, options=b"", flags=0x18):
    return struct.pack("!HHIIBBHHH", 40000, port, 1000, 1, (20 + len(options)) // 4 << 4, flags, 500, 0, 0) + (
        options + payload
    )


@pytest.fixture(scope="module")
def bench(programs, tmp_path_factory):
    """(tap, egress, ingress): a kernel side on an empty cgroup, and its packet programs once more, to be run."""
    with Cgroup("vectors") as nobody, attach(nobody.path, tmp_path_factory.mktemp("pins") / "p") as tap:
        loaded = [
            probes.load(next(p for p in probes.PROBES if p.name == name), programs, tap.kernel.maps)
            for name in ("egress", "ingress")
        ]
        yield (tap, *loaded)
        for fd in loaded:
            os.close(fd)


QUERY = dns.query("vector.lab.example", id=7)
HOP, ROUTING, FRAGMENT, AUTH, DEST, MOBILITY = 0, 43, 44, 51, 60, 135
PAD8, PAD24 = b"\0\1\4" + bytes(4), b"\2\1\x14" + bytes(20)
SHAPES = {
    "v4": lambda n, p: v4(n, p),
    "v4 with 4 bytes of options": lambda n, p: v4(n, p, options=b"\1\1\1\1"),
    "v4 with 40 bytes of options": lambda n, p: v4(n, p, options=b"\1" * 40),
    "v4, do not fragment": lambda n, p: v4(n, p, fragment=0x4000),
    "v4, first fragment": lambda n, p: v4(n, p, fragment=0x2000),
    "v6": lambda n, p: v6(n, p),
    "v6, hop-by-hop": lambda n, p: v6(n, p, [(HOP, PAD8)]),
    "v6, destination options of 24 bytes": lambda n, p: v6(n, p, [(DEST, PAD24)]),
    "v6, routing": lambda n, p: v6(n, p, [(ROUTING, b"\2\0\0" + bytes(20))]),
    "v6, first fragment": lambda n, p: v6(n, p, [(FRAGMENT, b"\0\0\1" + bytes(4))]),
    "v6, authentication": lambda n, p: v6(n, p, [(AUTH, b"\4" + bytes(22))]),
    "v6, all of them": lambda n, p: v6(
        n, p, [(HOP, PAD8), (DEST, PAD24), (ROUTING, PAD8), (FRAGMENT, b"\0\0\1" + bytes(4)), (AUTH, b"\4" + bytes(22))]
    ),
    "v6, eight": lambda n, p: v6(n, p, [(HOP, PAD8)] + [(DEST, PAD8)] * 7),
}


def send(program, packet, times=1):
    for _ in range(times):
        assert bpf.test_run(program, packet)[0] == 1


def only_row(watch):
    """The one row that moved (whose cgroup is the kernel's own affair here)."""
    ((place, counts),) = watch.rows.items()
    return place, counts


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dns_query(shape, bench):
    tap, egress, _ = bench
    watch = Watch(tap, None)
    packet = shape(17, udp(QUERY))
    send(egress, packet, N)
    place, counts = only_row(watch.settle())
    peer = PEER4 if packet[12] == 8 else PEER6
    assert (place, counts) == (client(peer, 53, transport="udp"), Counts((len(packet) - 14) * N, N))
    assert [s.kind for s in watch.sightings] == [wire.RECORD_DNS_QUERY] * N
    assert {s.payload for s in watch.sightings} == {QUERY}


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_first_payload_of_tcp(shape, bench):
    """A request, and a hello of 1,400 bytes with its name last, behind any header."""
    tap, egress, _ = bench
    watch = Watch(tap, None)
    timestamps = b"\1\1\x08\x0a" + bytes(8)
    send(egress, shape(6, tcp(request("vector.lab.example"), options=timestamps)))
    send(egress, shape(6, tcp(hello(1400, "vector.lab.example"), options=timestamps + bytes(28))))
    watch.settle()
    assert [(s.kind, tap.kernel.names.get(s.name)) for s in watch.sightings] == [
        (decode.HEAD, "vector.lab.example"),
        (decode.HELLO, "vector.lab.example"),
    ]
    assert watch.total.tx_packets == 2


@pytest.mark.core
@pytest.mark.parametrize(
    "packet",
    [
        v4(17, udp(QUERY)[8:], fragment=0x00B9),
        v6(17, udp(QUERY)[8:], [(FRAGMENT, b"\0\5\xc8" + bytes(4))]),
    ],
    ids=["v4", "v6"],
)
def test_later_fragments(packet, bench):
    """No ports, no payload that we could read: counted, and nothing is told but the datagram."""
    tap, egress, _ = bench
    watch = Watch(tap, None)
    send(egress, packet)
    watch.settle()
    assert watch.total.tx_bytes == len(packet) - 14
    assert not [s for s in watch.sightings if s.payload]


@pytest.mark.core
def test_cut_at_every_length(bench):
    """Whatever is missing, both programs let the packet pass, and no count is wrong by more than what was cut."""
    tap, egress, ingress = bench
    watch = Watch(tap, None)
    whole = [
        SHAPES["v4 with 40 bytes of options"](17, udp(QUERY)),
        SHAPES["v6, all of them"](17, udp(QUERY)),
        SHAPES["v4"](6, tcp(request("cut.lab.example"))),
        SHAPES["v6, hop-by-hop"](6, tcp(hello(300, "cut.lab.example"))),
    ]
    for packet in whole:
        headers = 14 + (20 if packet[12] == 8 else 40)  # the kernel takes no less from TEST_RUN
        for size in range(headers, len(packet)):
            send(egress, packet[:size])
            send(ingress, packet[:size])
    watch.settle()
    assert watch.total.tx_packets > 100 < watch.total.rx_packets


@pytest.mark.core
def test_headers_that_lie(bench):
    """Lengths that point outside, header chains without an end, protocols that nobody knows."""
    tap, egress, ingress = bench
    watch = Watch(tap, None)
    liars = [
        v4(17, udp(QUERY)).replace(b"\x45\x00", b"\x4f\x00", 1),
        v4(17, udp(QUERY)).replace(b"\x45\x00", b"\x44\x00", 1),
        v4(17, udp(QUERY)).replace(b"\x45\x00", b"\x75\x00", 1),
        v6(17, udp(QUERY), [(HOP, b"\xff\1\4" + bytes(4))]),
        v6(17, udp(QUERY), [(DEST, PAD8)] * 30),
        v6(59, b""),
        v6(200, bytes(64)),
        v4(200, bytes(64)),
        v4(6, tcp(b"")[:12] + b"\xf0" + tcp(b"")[13:] + b"GET / HTTP/1.1\r\n\r\n"),
        v4(6, tcp(b"")[:12] + b"\x00" + tcp(b"")[13:] + b"GET / HTTP/1.1\r\n\r\n"),
    ]
    for packet in liars:
        send(egress, packet)
        send(ingress, packet)
    watch.settle()
    assert not watch.of(TLS)
