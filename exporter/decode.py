"""Bytes -> sighting: one record of the ring, read. One table of numbers to words; nothing is joined or attributed.

In: bytes as bpf/wire.h lays them out. Out: a `Sighting`, a plain tuple, or None for what is no record.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

from exporter.health import losses
from exporter.kernel import wire

OPENED: Final = wire.RECORD_OPENED
FAILED: Final = wire.RECORD_FAILED
CLOSED: Final = wire.RECORD_CLOSED
QUERY: Final = wire.RECORD_DNS_QUERY
ANSWER: Final = wire.RECORD_DNS_ANSWER
HELLO: Final = wire.RECORD_HELLO
HEAD: Final = wire.RECORD_HEAD
TLS_WRITE: Final = wire.RECORD_TLS_WRITE
SERVER_HELLO: Final = wire.RECORD_SERVER_HELLO
HANDSHAKE_END: Final = wire.RECORD_HANDSHAKE_END
QUIC_INITIAL: Final = wire.RECORD_QUIC_INITIAL
# Kinds of our own: QUERY and ANSWER over TCP.
QUERY_PIECE: Final = QUERY | 0x100
ANSWER_PIECE: Final = ANSWER | 0x100
TRUNCATED: Final = wire.RECORD_TRUNCATED
PROXIED: Final = wire.RECORD_PROXIED
HEAD_END: Final = wire.RECORD_HEAD_END
ABANDONED: Final = wire.RECORD_ABANDONED
BROKEN: Final = wire.RECORD_BROKEN
EXCLUDED: Final = wire.RECORD_EXCLUDED
REDIRECTED: Final = wire.RECORD_REDIRECTED
# A flag of our own: seen inside a TLS library, though the cookie is that of a socket.
INSIDE: Final = 0x100
RESPONSE: Final = wire.RECORD_RESPONSE
RECEIVED: Final = wire.RECORD_RECEIVED
TLS_CLOSED: Final = wire.RECORD_TLS_CLOSED
FRAMES_OUT: Final = wire.RECORD_FRAMES_OUT
FRAMES_IN: Final = wire.RECORD_FRAMES_IN
LAST_CHUNK: Final = wire.RECORD_LAST_CHUNK
CUT: Final = wire.RECORD_CUT
KEY_SHARE_KEPT: Final = wire.KEY_SHARE_KEPT

_CACHED: Final = 2048


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


_addresses: Final[dict[bytes, str]] = {}
_comms: Final[dict[bytes, str]] = {}
_TRANSPORTS: Final = {6: "tcp", 17: "udp"}
_MAPPED: Final = bytes(10) + b"\xff\xff"
_unpack: Final = wire.RECORD.unpack_from
_size: Final = wire.RECORD.size
_KIND: Final = wire.Record.kind.offset
_LENGTH: Final = wire.Record.length.offset
_QNAME: Final = _size + 12
_TRANSPORT: Final = wire.Record.transport.offset
_FLAGS: Final = wire.Record.flags.offset
_OFFSET: Final = wire.Record.offset.offset
_TCP: Final = 6
_ARRIVAL: Final = struct.Struct(
    f"<Q8xQ{_FLAGS - 24}xB{wire.Record.tx_bytes.offset - _FLAGS - 1}xQQ"
).unpack_from  # time, cookie, flags, tx_bytes, rx_bytes
_TIME_AND_COOKIE: Final = struct.Struct("<Q8xQ").unpack_from
_U16: Final = struct.Struct("<H").unpack_from
_new: Final = tuple.__new__


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
        time, cookie, flags, tx_bytes, rx_bytes = _ARRIVAL(data)
        return _new(Arrival, (kind, time, cookie, flags, tx_bytes, rx_bytes, payload(data)))
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
