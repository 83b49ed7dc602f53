"""Bytes -> sighting: one record of the ring, read. One table of numbers to words; nothing is joined or attributed.

In: bytes as bpf/wire.h lays them out. Out: a `Sighting`, a plain tuple, or None for what is no record.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

from exporter.health import losses
from exporter.kernel import wire

OPENED, FAILED, CLOSED, QUERY, ANSWER, HELLO, HEAD, TLS_WRITE = (
    wire.RECORD_OPENED,
    wire.RECORD_FAILED,
    wire.RECORD_CLOSED,
    wire.RECORD_DNS_QUERY,
    wire.RECORD_DNS_ANSWER,
    wire.RECORD_HELLO,
    wire.RECORD_HEAD,
    wire.RECORD_TLS_WRITE,
)
TRUNCATED, PROXIED, HEAD_END = wire.RECORD_TRUNCATED, wire.RECORD_PROXIED, wire.RECORD_HEAD_END

_CACHED = 2048


class Sighting(NamedTuple):
    """What the kernel saw. Times are CLOCK_MONOTONIC nanoseconds, durations nanoseconds."""

    kind: int
    time: int
    cgroup: int
    cookie: int
    name: int  # id of the name that the flow carries; 0 = none
    pid: int
    comm: str
    transport: str
    role: str
    scope: str
    local: str
    local_port: int
    peer: str
    port: int
    outcome: str
    flags: int
    duration: int
    tx_bytes: int
    rx_bytes: int
    retransmits: int
    rtt_us: int
    offset: int
    payload: bytes


_addresses: dict[bytes, str] = {}
_comms: dict[bytes, str] = {}
_TRANSPORTS = {6: "tcp", 17: "udp"}
_MAPPED = bytes(10) + b"\xff\xff"
_unpack, _size = wire.RECORD.unpack_from, wire.RECORD.size
_new = tuple.__new__


def address(packed: bytes) -> str:
    """16 bytes -> text; IPv4-mapped is IPv4, all zeros is nobody: ""."""
    text = _addresses.get(packed)
    if text is None:
        if len(_addresses) >= _CACHED:
            _addresses.clear()
        if packed.startswith(_MAPPED):
            text = socket.inet_ntop(socket.AF_INET, packed[12:])
        else:
            text = socket.inet_ntop(socket.AF_INET6, packed) if any(packed) else ""
        _addresses[packed] = text
    return text


def transport(number: int) -> str:
    return _TRANSPORTS.get(number) or str(number)


def _comm(raw: bytes) -> str:
    if len(_comms) >= _CACHED:
        _comms.clear()
    text = _comms[raw] = raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
    return text


def decode(data: bytes) -> Sighting | None:
    """Read one record. What is too short or of no known kind is counted and None."""
    if len(data) < _size:
        losses.add("decode", "short")
        return None
    (
        time,
        cgroup,
        cookie,
        name,
        local,
        peer,
        comm,
        pid,
        local_port,
        peer_port,
        kind,
        protocol,
        role,
        scope,
        outcome,
        flags,
        length,
        duration,
        tx_bytes,
        rx_bytes,
        retransmits,
        rtt_us,
        offset,
        _,
    ) = _unpack(data)
    try:
        return _new(
            Sighting,
            (
                kind,
                time,
                cgroup,
                cookie,
                name,
                pid,
                _comms.get(comm) or _comm(comm),
                _TRANSPORTS.get(protocol) or str(protocol),
                wire.ROLES[role],
                wire.SCOPES[scope],
                _addresses.get(local) or address(local),
                local_port,
                _addresses.get(peer) or address(peer),
                peer_port,
                wire.OUTCOMES[outcome],
                flags,
                duration,
                tx_bytes,
                rx_bytes,
                retransmits,
                rtt_us,
                offset,
                data[_size : _size + length] if length else b"",
            ),
        )
    except IndexError:
        losses.add("decode", "unknown_value")
        return None
