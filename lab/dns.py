"""DNS messages (RFC 1035, 3596, 6891), as far as the lab needs them: queries, answers, a zone that
misbehaves.

In: names and a table of records. Out: bytes for the wire, and parsed messages for tests to compare with.
Not its job: sockets (`servers`), recursion, DNSSEC.
"""

from __future__ import annotations

import ipaddress
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TYPES = {"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "PTR": 12, "TXT": 16, "AAAA": 28, "OPT": 41, "HTTPS": 65}
_TYPE_NAMES = {number: name for name, number in TYPES.items()}
RCODES = {"NOERROR": 0, "FORMERR": 1, "SERVFAIL": 2, "NXDOMAIN": 3, "NOTIMP": 4, "REFUSED": 5}
_RCODE_NAMES = {number: name for name, number in RCODES.items()}

_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080


class Record(NamedTuple):
    """A resource record; `data` is an address, a name, or hex for types that are not read."""

    name: str
    type: str
    ttl: int
    data: str


@dataclass
class Message:
    """A parsed message. Names are lower case without the final dot."""

    id: int
    response: bool
    truncated: bool
    rcode: str
    name: str
    type: str
    answers: list[Record] = field(default_factory=list)
    udp_size: int = 512  # what the sender takes over UDP (EDNS)
    edns: bool = False


def encode_name(name: str) -> bytes:
    labels = [label.encode("idna") for label in name.strip(".").split(".") if label]
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def _read_name(message: bytes, at: int) -> tuple[str, int]:
    """The name at offset `at`, and the offset behind it. Raises ValueError on loops and overruns."""
    labels: list[str] = []
    after = -1
    for _ in range(128):
        if at >= len(message):
            raise ValueError("name runs out of the message")
        length = message[at]
        if length >= 0xC0:
            if at + 1 >= len(message):
                raise ValueError("pointer runs out of the message")
            after = at + 2 if after < 0 else after
            at = (length & 0x3F) << 8 | message[at + 1]
        elif length:
            labels.append(message[at + 1 : at + 1 + length].decode("ascii", "replace").lower())
            at += 1 + length
        else:
            return ".".join(labels), (at + 1 if after < 0 else after)
    raise ValueError("name loops")


def _type_name(number: int) -> str:
    return _TYPE_NAMES.get(number, f"TYPE{number}")


def query(name: str, kind: str = "A", *, id: int | None = None, edns: int = 0) -> bytes:
    """A recursive query for one name. `edns`: the UDP size to announce; 0 leaves the OPT record out."""
    number = secrets.randbelow(65536) if id is None else id
    header = struct.pack("!6H", number, _RD, 1, 0, 0, 1 if edns else 0)
    question = encode_name(name) + struct.pack("!2H", TYPES[kind], 1)
    return header + question + (struct.pack("!BHHIH", 0, TYPES["OPT"], edns, 0, 0) if edns else b"")


def parse(message: bytes) -> Message:
    """Raises ValueError for anything that is not a DNS message with one question."""
    if len(message) < 12:
        raise ValueError("shorter than a DNS header")
    number, flags, questions, answers, authority, additional = struct.unpack_from("!6H", message)
    if questions != 1:
        raise ValueError(f"{questions} questions")
    name, at = _read_name(message, 12)
    try:
        (kind, _class) = struct.unpack_from("!2H", message, at)
        rcode = _RCODE_NAMES.get(flags & 15, str(flags & 15))
        parsed = Message(number, bool(flags & _QR), bool(flags & _TC), rcode, name, _type_name(kind))
        at += 4
        for index in range(answers + authority + additional):
            owner, at = _read_name(message, at)
            kind, klass, ttl, length = struct.unpack_from("!2HIH", message, at)
            at += 10
            data = message[at : at + length]
            if len(data) < length:
                raise ValueError("record runs out of the message")
            if kind == TYPES["OPT"]:
                parsed.edns, parsed.udp_size = True, max(512, klass)
            elif index < answers:
                if kind in (TYPES["A"], TYPES["AAAA"]):
                    text = str(ipaddress.ip_address(data))
                elif kind == TYPES["CNAME"]:
                    text = _read_name(message, at)[0]
                else:
                    text = data.hex()
                parsed.answers.append(Record(owner, _type_name(kind), ttl, text))
            at += length
    except struct.error as error:
        raise ValueError(str(error)) from error
    return parsed


class Entry(NamedTuple):
    """What a zone knows about a name. `silent`: never answered; `delay`: seconds before the answer."""

    addresses: tuple[str, ...] = ()
    cname: str = ""
    rcode: str = "NOERROR"
    silent: bool = False
    delay: float = 0.0
    ttl: int = 60


class Reply(NamedTuple):
    """What the server does with a query: `message` (None: nothing) after `delay` seconds."""

    message: bytes | None
    delay: float
    rcode: str
    answers: int


class Zone:
    """Answers queries from a table; a name that is not in it does not exist (NXDOMAIN)."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = {name.lower().strip("."): entry for name, entry in entries.items()}

    def addresses(self, name: str) -> list[str]:
        """Addresses of a name, CNAMEs followed; empty when there are none."""
        found = [record for kind in ("A", "AAAA") for record in self._records(name, kind)[1]]
        return [record.data for record in found if record.type != "CNAME"]

    def _records(self, name: str, kind: str) -> tuple[str, list[Record]]:
        """rcode and records, the CNAME chain first."""
        found: list[Record] = []
        name = name.lower().strip(".")
        for _ in range(8):
            entry = self._entries.get(name)
            if entry is None:
                return "NXDOMAIN", found
            if not entry.cname:
                wanted = {"A": 4, "AAAA": 6}.get(kind)
                found += [
                    Record(name, kind, entry.ttl, address)
                    for address in entry.addresses
                    if ipaddress.ip_address(address).version == wanted
                ]
                return entry.rcode, found
            found.append(Record(name, "CNAME", entry.ttl, entry.cname))
            name = entry.cname
        return "SERVFAIL", found

    def answer(self, message: bytes, *, udp: bool) -> Reply:
        """Over UDP what is larger than the client takes goes out empty with TC set. Raises ValueError."""
        asked = parse(message)
        entry = self._entries.get(asked.name, Entry())
        if entry.silent:
            return Reply(None, 0, "", 0)
        rcode, records = self._records(asked.name, asked.type)
        # The question goes back byte for byte: resolvers that vary its case (0x20) compare it.
        question = message[12 : _read_name(message, 12)[1] + 4]
        body = b"".join(map(_encode_record, records))
        opt = struct.pack("!BHHIH", 0, TYPES["OPT"], 1232, 0, 0) if asked.edns else b""
        flags = _QR | _AA | _RD | _RA | RCODES[rcode]
        if udp and 12 + len(question) + len(body) + len(opt) > asked.udp_size:
            flags, body, records = flags | _TC, b"", []
        header = struct.pack("!6H", asked.id, flags, 1, len(records), 0, 1 if opt else 0)
        return Reply(header + question + body + opt, entry.delay, rcode, len(records))


def _encode_record(record: Record) -> bytes:
    text = record.data
    data = encode_name(text) if record.type == "CNAME" else ipaddress.ip_address(text).packed
    # A pointer to the question where the owner is the name asked would save bytes; a full name is always
    # right.
    return encode_name(record.name) + struct.pack("!2HIH", TYPES[record.type], 1, record.ttl, len(data)) + data
