"""Bytes -> sighting: one record of the ring, read. One table of numbers to words; nothing is joined or attributed.

In: bytes as bpf/wire.h lays them out. Out: a `Sighting`, a plain tuple, or None for what is no record.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from exporter.health import losses
from exporter.kernel import wire

OPENED, FAILED, CLOSED, QUERY, ANSWER, HELLO, HEAD, TLS_WRITE, SERVER_HELLO, HANDSHAKE_END, QUIC_INITIAL = (
    wire.RECORD_OPENED,
    wire.RECORD_FAILED,
    wire.RECORD_CLOSED,
    wire.RECORD_DNS_QUERY,
    wire.RECORD_DNS_ANSWER,
    wire.RECORD_HELLO,
    wire.RECORD_HEAD,
    wire.RECORD_TLS_WRITE,
    wire.RECORD_SERVER_HELLO,
    wire.RECORD_HANDSHAKE_END,
    wire.RECORD_QUIC_INITIAL,
)
# Kinds of our own: QUERY and ANSWER over TCP.
QUERY_PIECE, ANSWER_PIECE = QUERY | 0x100, ANSWER | 0x100
TRUNCATED, PROXIED, HEAD_END, ABANDONED, BROKEN = (
    wire.RECORD_TRUNCATED,
    wire.RECORD_PROXIED,
    wire.RECORD_HEAD_END,
    wire.RECORD_ABANDONED,
    wire.RECORD_BROKEN,
)
EXCLUDED, REDIRECTED = wire.RECORD_EXCLUDED, wire.RECORD_REDIRECTED
# A flag of our own: seen inside a TLS library, though the cookie is that of a socket.
INSIDE = 0x100
RESPONSE, RECEIVED, TLS_CLOSED = wire.RECORD_RESPONSE, wire.RECORD_RECEIVED, wire.RECORD_TLS_CLOSED
FRAMES_OUT, FRAMES_IN = wire.RECORD_FRAMES_OUT, wire.RECORD_FRAMES_IN
LAST_CHUNK = wire.RECORD_LAST_CHUNK
CUT, KEY_SHARE_KEPT = wire.RECORD_CUT, wire.KEY_SHARE_KEPT

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
    sequence: int  # HTTP/1: the how-manieth request of its connection, from 1; of a digest: see bpf/lib/frames.h
    payload: bytes


class Message(NamedTuple):
    """A DNS message that the kernel saw, read no further than to find its other half."""

    kind: int  # QUERY | ANSWER
    time: int
    place: tuple[int, bytes]  # what a query and its answer have in common: the socket, id and question
    record: bytes  # whole: `whole()` reads it


class Piece(NamedTuple):
    """A part of a TCP stream of DNS messages. `sequence`: of its first byte. `cut`: more followed in the packet."""

    kind: int  # QUERY_PIECE | ANSWER_PIECE
    time: int
    cookie: int
    sequence: int
    cut: bool
    payload: bytes
    head: bytes  # the record's fixed part


class Step(NamedTuple):
    """What goes on in a handshake whose beginning says who and where."""

    kind: int  # SERVER_HELLO | HANDSHAKE_END
    time: int
    cookie: int
    payload: bytes


class Arrival(NamedTuple):
    """More of a response, on a connection whose request says who and where."""

    kind: int  # RESPONSE | RECEIVED
    time: int
    cookie: int
    flags: int
    tx_bytes: int
    rx_bytes: int
    payload: bytes


_addresses: dict[bytes, str] = {}
_comms: dict[bytes, str] = {}
_TRANSPORTS = {6: "tcp", 17: "udp"}
_MAPPED = bytes(10) + b"\xff\xff"
_unpack, _size = wire.RECORD.unpack_from, wire.RECORD.size
_KIND, _LENGTH, _QNAME = wire.Record.kind.offset, wire.Record.length.offset, _size + 12
_TRANSPORT, _FLAGS, _OFFSET = wire.Record.transport.offset, wire.Record.flags.offset, wire.Record.offset.offset
_TCP = 6
_ARRIVAL = struct.Struct(
    f"<Q8xQ{_FLAGS - 24}xB{wire.Record.tx_bytes.offset - _FLAGS - 1}xQQ"
).unpack_from  # time, cookie, flags, tx_bytes, rx_bytes
_TIME_AND_COOKIE, _U16 = struct.Struct("<Q8xQ").unpack_from, struct.Struct("<H").unpack_from
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


def decode(data: bytes) -> Sighting | Message | Piece | Step | Arrival | None:
    """Read one record, no further than need be. What is too short or of no known kind is counted and None."""
    if len(data) < _size:
        losses.add("decode", "short")
        return None
    kind = data[_KIND]
    if kind in (QUERY, ANSWER):
        return _message(data, kind) if data[_TRANSPORT] != _TCP else _piece(data, kind)
    if kind in (RESPONSE, RECEIVED):
        return _new(Arrival, (kind, *_ARRIVAL(data), payload(data)))
    if kind in (SERVER_HELLO, HANDSHAKE_END):
        time, cookie = _TIME_AND_COOKIE(data)
        return _new(Step, (kind, time, cookie, payload(data)))
    return whole(data)


# Half of all records are DNS messages where names are asked for often, and of a query and its answer one is read.
def _message(data: bytes, kind: int) -> Message | None:
    """The question of a standard message (RFC 1035 section 4.1) with one question, the name in lower case: resolvers
    play with case, and servers may not play along."""
    # Up to the first zero: the name's end or, in a name that holds a zero, a cut that is the same in both.
    end = data.find(b"\0", _QNAME) + 5
    flags = 0x80 if kind == ANSWER else 0
    if (
        end < _QNAME + 5
        or end > _size + _U16(data, _LENGTH)[0]
        or data[_size + 2] & 0xF8 != flags
        or data[_size + 4]
        or data[_size + 5] != 1
    ):
        losses.add("decode", "dns")
        return None
    time, cookie = _TIME_AND_COOKIE(data)
    return _new(Message, (kind, time, (cookie, data[_size : _size + 2] + data[_QNAME:end].lower()), data))


def _piece(data: bytes, kind: int) -> Piece:
    time, cookie = _TIME_AND_COOKIE(data)
    sequence = int.from_bytes(data[_OFFSET : _OFFSET + 4], "little")
    return Piece(kind | 0x100, time, cookie, sequence, data[_FLAGS] & TRUNCATED != 0, payload(data), data[:_size])


def plausible(kind: int, start: bytes) -> bool:
    """Whether a message of a stream may begin with these six bytes: a standard one, with one question."""
    return start[2] & 0xF8 == (0x80 if kind == ANSWER_PIECE else 0) and start[4:6] == b"\0\1"


def message(piece: Piece, content: bytes) -> Message | None:
    """A message of a stream as if it had come in a datagram, with all else that the piece's record says."""
    length = struct.pack("<H", len(content))
    return _message(piece.head[:_LENGTH] + length + piece.head[_LENGTH + 2 :] + content, piece.kind & 0xFF)


def payload(data: bytes) -> bytes:
    """What follows the record's fixed part."""
    return data[_size : _size + _U16(data, _LENGTH)[0]]


def whole(data: bytes) -> Sighting | None:
    """Read all of one record, which is not too short."""
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
        sequence,
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
                sequence,
                data[_size : _size + length] if length else b"",
            ),
        )
    except IndexError:
        losses.add("decode", "unknown_value")
        return None
