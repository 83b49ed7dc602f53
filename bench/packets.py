"""Bytes to measure with: Ethernet frames for BPF_PROG_TEST_RUN, and records as the kernel side writes them.

In: names and numbers. Out: bytes. Not its job: being hard to parse; tests/unit has the odd ones.
"""

from __future__ import annotations

import hashlib
import ipaddress
import struct
from collections.abc import Sequence

from exporter.kernel import wire

CLIENT = "203.0.113.1"
HTTP = b"GET /v1/items/42?page=2 HTTP/1.1\r\nHost: api.example\r\nUser-Agent: bench/1\r\nAccept: */*\r\n\r\n"


def _ip4(protocol: int, destination: str, payload: bytes, source: str = CLIENT) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0)
    addresses = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(destination).packed
    return bytes(12) + b"\x08\x00" + head + addresses + payload


def tcp(payload: bytes, destination: str = "198.51.100.7", port: int = 443) -> bytes:
    return _ip4(
        6,
        destination,
        struct.pack(">HHIIBBHHH", 40000, port, 1000, 1, 0x80, 0x18, 512, 0, 0) + bytes(12) + payload,
    )


def udp(payload: bytes, destination: str = "198.51.100.53", port: int = 53) -> bytes:
    return _ip4(17, destination, struct.pack(">HHHH", 40000, port, 8 + len(payload), 0) + payload)


def _labels(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def dns_query(name: str, ident: int = 1) -> bytes:
    return struct.pack(">HHHHHH", ident, 0x0100, 1, 0, 0, 0) + _labels(name) + struct.pack(">HH", 1, 1)


def dns_answer(name: str, addresses: Sequence[str], ident: int = 1) -> bytes:
    body = struct.pack(">HHHHHH", ident, 0x8180, 1, len(addresses), 0, 0) + _labels(name) + struct.pack(">HH", 1, 1)
    for address in addresses:
        body += struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4) + ipaddress.IPv4Address(address).packed
    return body


def client_hello(name: str, size: int = 1700) -> bytes:
    """A TLS 1.3 ClientHello (RFC 8446 section 4.1.2) of `size` bytes, record header included: a post-quantum key
    share of 1,216 bytes, padding (RFC 7685), the name last."""

    def extension(kind: int, body: bytes) -> bytes:
        return struct.pack(">HH", kind, len(body)) + body

    noise = hashlib.sha256(name.encode()).digest() * 60
    share = struct.pack(">HH", 0x11EC, 1216) + noise[:1216] + struct.pack(">HH", 0x001D, 32) + noise[:32]
    server_name = extension(0, struct.pack(">HBH", len(name) + 3, 0, len(name)) + name.encode())
    before = (
        extension(43, b"\2\x03\x04")
        + extension(13, struct.pack(">HH", 2, 0x0403))
        + extension(10, struct.pack(">HHH", 4, 0x11EC, 0x1D))
        + extension(51, struct.pack(">H", len(share)) + share)
    )
    fixed = b"\x03\x03" + noise[:32] + b"\x20" + noise[:32] + struct.pack(">HHHH", 6, 0x1301, 0x1302, 0x1303) + b"\1\0"
    missing = size - 9 - len(fixed) - 2 - len(before) - len(server_name) - 4
    if missing < 0:
        raise ValueError(f"a hello of {size} bytes has no room for this")
    extensions = before + extension(21, bytes(missing)) + server_name
    body = fixed + struct.pack(">H", len(extensions)) + extensions
    handshake = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack(">H", len(handshake)) + handshake


# What a TLS 1.3 server and the client answer: a ServerHello with supported_versions and a key share; a Finished.
_SHARE = struct.pack(">HHHHH", 43, 2, 0x0304, 51, 36) + struct.pack(">HH", 0x001D, 32) + bytes(32)
_BODY = b"\x03\x03" + bytes(32) + b"\x20" + bytes(32) + b"\x13\x01\0" + struct.pack(">H", len(_SHARE)) + _SHARE
_SERVER_HELLO = b"\x16\x03\x03" + struct.pack(">HB", len(_BODY) + 4, 2) + len(_BODY).to_bytes(3, "big") + _BODY
_SERVER_HELLO = _SERVER_HELLO.ljust(256, b"\x17")
_FINISHED = (b"\x14\x03\x03\0\x01\x01" + b"\x17\x03\x03\0\x35").ljust(64, b"\x55")

# --- records ------------------------------------------------------------------------------------------------------

TALK = 7  # records of a talk


class Talk:
    """One flow of a synthetic node: a workload asks for a name, connects to what it got, says it in TLS, closes."""

    def __init__(self, number: int, cgroup: int) -> None:
        self.number, self.cgroup = number, cgroup
        self.name = f"service-{number}.bench{number % 97}.example"
        self.address = str(ipaddress.IPv4Address("198.18.0.0") + number)  # RFC 2544, benchmarking
        self.second = str(ipaddress.IPv4Address("198.19.0.0") + number)
        self.name_id = (number + 1) * 0x9E3779B97F4A7C15 % (1 << 62) << 2 | wire.NAME_FROM_SNI
        self.peer = bytes(10) + b"\xff\xff" + ipaddress.IPv4Address(self.address).packed

    def reversed_name(self) -> bytes:
        return self.name.encode()[::-1] + b"."

    def record(self, kind: int, transport: int, peer: bytes, port: int, *, payload: bytes = b"", **more: int) -> bytes:
        head = wire.RECORD.pack(
            0,
            self.cgroup,
            self.number * 2 + 1 + (transport == 17),
            more.get("name", 0),
            bytes(10) + b"\xff\xff" + ipaddress.IPv4Address(CLIENT).packed,
            peer,
            b"curl".ljust(16, b"\0"),
            1000 + self.number % 50,
            32768 + self.number % 28000,
            port,
            kind,
            transport,
            1,  # client
            0,
            more.get("outcome", 0),
            more.get("flags", 0),
            more.get("length", 0),
            more.get("duration", 0),
            more.get("tx", 0),
            more.get("rx", 0),
            0,
            more.get("rtt", 0),
            more.get("offset", 0),
            0,
        )
        return head + payload

    def records(self) -> list[bytes]:
        """Query, answer, opened, hello, the server's answer to that, the handshake's end, closed: what a connection to
        a name costs, in the sizes of bpf/records.h."""
        resolver = bytes(10) + b"\xff\xff" + ipaddress.IPv4Address("198.51.100.53").packed
        query = dns_query(self.name, self.number & 0xFFFF)
        answer = dns_answer(self.name, [self.address, self.second], self.number & 0xFFFF)
        hello = client_hello(self.name)
        share = hello.index(b"\x11\xec\x04\xc0") - 2
        hello = hello[: share + wire.KEY_SHARE_KEPT] + hello[share + 2 + 4 + 1216 + 4 + 32 :]
        return [
            self.record(wire.RECORD_DNS_QUERY, 17, resolver, 53, length=len(query)) + query.ljust(64, b"\0"),
            self.record(wire.RECORD_DNS_ANSWER, 17, resolver, 53, length=len(answer)) + answer.ljust(256, b"\0"),
            self.record(wire.RECORD_OPENED, 6, self.peer, 443, outcome=1, duration=800_000 + self.number),
            self.record(
                wire.RECORD_HELLO,
                6,
                self.peer,
                443,
                name=self.name_id,
                flags=wire.RECORD_CUT | wire.RECORD_HEAD_END,
                length=len(hello),
            )
            + hello.ljust(1024, b"\0"),
            self.record(wire.RECORD_SERVER_HELLO, 6, self.peer, 443, name=self.name_id, length=256) + _SERVER_HELLO,
            self.record(wire.RECORD_HANDSHAKE_END, 6, self.peer, 443, name=self.name_id, length=64) + _FINISHED,
            self.record(
                wire.RECORD_CLOSED,
                6,
                self.peer,
                443,
                name=self.name_id,
                outcome=1,
                duration=30_000_000,
                tx=900,
                rx=5000,
                rtt=700 + self.number % 100,
            ),
        ]


_RESPONSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 600\r\n\r\n"


def exchange(talk: Talk) -> list[bytes]:
    """An HTTP/1.1 request head of an ordinary client, and the first segment of its answer, which is all of it."""
    head = (
        f"GET /v1/items/{talk.number % 100}?page=2 HTTP/1.1\r\nHost: {talk.name}\r\nUser-Agent: curl/8.5.0\r\n"
        "Accept: application/json\r\nAccept-Encoding: gzip\r\n\r\n"
    ).encode()
    answer = _RESPONSE_HEAD + bytes(600)
    flags = wire.RECORD_HEAD_END
    return [
        talk.record(wire.RECORD_HEAD, 6, talk.peer, 80, name=talk.name_id, flags=flags, length=len(head))
        + head.ljust(256, b"\0"),
        talk.record(
            wire.RECORD_RESPONSE, 6, talk.peer, 80, name=talk.name_id, length=len(answer), tx=len(head), rx=len(answer)
        )
        + answer.ljust(1024, b"\0"),
    ]


def talks(count: int, cgroups: Sequence[int]) -> list[Talk]:
    return [Talk(number, cgroups[number % len(cgroups)]) for number in range(count)]
