"""DNS: what one message asks and answers.

In: captured bytes, possibly cut off, possibly hostile. Out: a small named tuple, or None for "this is not
one". Pure functions; work is bounded by the length of the input; they never raise. Not their job: which answer belongs
to which query (lookups), what a workload calls an address (enrich.names).

Sources: RFC 1035 section 4 (messages), RFC 3596 (AAAA), RFC 9460 (SVCB, HTTPS), RFC 2782 (SRV), RFC 6895 (codes)."""

from __future__ import annotations

import re
import struct
from socket import AF_INET6, inet_ntoa, inet_ntop
from typing import Final, NamedTuple

QTYPES: Final = {
    1: "A",
    2: "NS",
    5: "CNAME",
    6: "SOA",
    12: "PTR",
    13: "HINFO",
    15: "MX",
    16: "TXT",
    28: "AAAA",
    29: "LOC",
    33: "SRV",
    35: "NAPTR",
    39: "DNAME",
    41: "OPT",
    43: "DS",
    46: "RRSIG",
    47: "NSEC",
    48: "DNSKEY",
    50: "NSEC3",
    52: "TLSA",
    64: "SVCB",
    65: "HTTPS",
    99: "SPF",
    251: "IXFR",
    252: "AXFR",
    255: "ANY",
    256: "URI",
    257: "CAA",
}
RCODES: Final = (
    "NOERROR",
    "FORMERR",
    "SERVFAIL",
    "NXDOMAIN",
    "NOTIMP",
    "REFUSED",
    "YXDOMAIN",
    "YXRRSET",
    "NXRRSET",
    "NOTAUTH",
    "NOTZONE",
    "DSOTYPENI",
    "RCODE12",
    "RCODE13",
    "RCODE14",
    "RCODE15",
    "BADVERS",
    "BADKEY",
    "BADTIME",
    "BADMODE",
    "BADNAME",
    "BADALG",
    "BADTRUNC",
    "BADCOOKIE",
)

# A message of 64 KiB has room for 5,000 answers; nobody needs to see more than this many.
_new: Final = tuple.__new__
MAX_ANSWERS: Final = 64
# Compression pointers followed for one name. Real servers use one or two; each must point further back.
_MAX_JUMPS: Final = 16
_HEADER_FORMAT: Final = struct.Struct("!HHHHHH")
_QUESTION_FORMAT: Final = struct.Struct("!HH")
_RECORD_FORMAT: Final = struct.Struct("!HHHIH")  # the owner as a pointer, type, class, TTL, length
_PLAIN_LABEL: Final = re.compile(rb"[!-\-/-\[\]-~]+")


class DnsMessage(NamedTuple):
    """A DNS query or answer. `rcode` is "" on queries. `qname` is lower case, without the final dot, unusual
    bytes escaped as \\DDD (RFC 4343); "." for the root. `answers`: what the answer section says, in its order: an
    address (canonical), a name, "10 mx.name", "0 5 443 srv.name", "1 svc.name alpn=h3,h2 port=8443 ipv4hint=192.0.2.1
    ech"; types that are not read (TXT and other) say nothing. `addresses`: (address, TTL in seconds) of A and AAAA
    records and of the hints in HTTPS and SVCB. `truncated`: TC is set, or the capture ends
    before the answers do."""

    is_response: bool
    rcode: str
    qname: str
    qtype: str
    answers: tuple[str, ...]
    addresses: tuple[tuple[str, int], ...]
    truncated: bool


class _Bad(Exception):
    """The bytes contradict the format, or end too early."""


_CACHED: Final = 2048
_MESSAGES: Final = 2048
_LONG: Final = 512  # bytes of a message that is not kept
# By all their bytes but the id: hosts ask for the same names over and over.
_messages: Final[dict[bytes, DnsMessage]] = {}
_addresses: Final[dict[bytes, str]] = {}


def parse_dns(data: bytes) -> DnsMessage | None:
    """Read one DNS message (without the length prefix of TCP); None where it is none, or asks nothing.

    Only opcode QUERY with one question, as every resolver sends. Answers that cannot be read end the list and
    set `truncated`; a question that cannot be read makes it None."""
    written = data[2:]
    known = _messages.get(written)
    if known is None:
        known = _read_dns(data)
        if known is not None and len(data) <= _LONG:
            if len(_messages) >= _MESSAGES:
                _messages.clear()
            _messages[written] = known
    return known


def _read_dns(data: bytes) -> DnsMessage | None:
    if len(data) < 17:
        return None
    _, flags, questions, count, authorities, additional = _HEADER_FORMAT.unpack_from(data)
    if questions != 1 or flags & 0x7800:
        return None
    try:
        qname, at = _name(data, 12)
        qtype, qclass = _QUESTION_FORMAT.unpack_from(data, at)
    except (_Bad, IndexError, struct.error):
        return None
    # IN, CH, HS, NONE, ANY; the top bit is mDNS's. Anything else is some other protocol on the port.
    if qclass & 0x7FFF not in (1, 3, 4, 254, 255):
        return None
    response = flags & 0x8000 != 0
    answers: list[str] = []
    addresses: list[tuple[str, int]] = []
    truncated = flags & 0x0200 != 0
    if response and count and not _answers(data, at + 4, count, answers, addresses):
        truncated = True
    code = flags & 15
    if additional and response and not count:  # a code that needs more than four bits has no answers
        code |= _extended(data, at + 4, authorities, additional) << 4
    return _new(
        DnsMessage,
        (
            response,
            ("" if not response else RCODES[code] if code < len(RCODES) else f"RCODE{code}"),
            qname,
            QTYPES.get(qtype) or f"TYPE{qtype}",
            tuple(answers),
            tuple(addresses),
            truncated,
        ),
    )


def _answers(data: bytes, at: int, count: int, answers: list[str], addresses: list[tuple[str, int]]) -> bool:
    """Read up to MAX_ANSWERS answers from `at` on; were those all?"""
    unpack, size, known = _RECORD_FORMAT.unpack_from, len(data), _addresses
    try:
        for _ in range(min(count, MAX_ANSWERS)):
            # Nearly every owner is a pointer to the question (offset 12): no need to walk it again.
            owner, kind, _class, ttl, length = unpack(data, at)
            if owner != 0xC00C:
                _, at = _name(data, at)
                _, kind, _class, ttl, length = unpack(data, at - 2)
                at -= 2
            at += 12
            end = at + length
            if end > size:
                raise _Bad
            if (kind == 1 and length == 4) or (kind == 28 and length == 16):
                packed = data[at:end]
                text = known.get(packed) or _address(packed)
                # RFC 2181 section 8: a TTL with the top bit set is zero.
                addresses.append((text, ttl if ttl < 1 << 31 else 0))
            elif kind in (64, 65):
                text = _service(data, at, end, ttl if ttl < 1 << 31 else 0, addresses)
            else:
                text = _other(data, at, end, kind)
            if text:
                answers.append(text)
            at = end
    except (_Bad, IndexError, struct.error):
        return False
    return count <= MAX_ANSWERS


def _extended(data: bytes, at: int, authorities: int, additional: int) -> int:
    """The upper eight bits of the response code, in the OPT record (RFC 6891 section 6.1.3); 0 where there is none."""
    if data[-11:-8] == b"\0\0\x29" and data[-2:] == b"\0\0":  # it stands last, and without options
        return data[-6]
    try:
        for index in range(min(authorities + additional, MAX_ANSWERS)):
            _, at = _name(data, at)
            _, kind, _class, ttl, length = _RECORD_FORMAT.unpack_from(data, at - 2)
            if kind == 41 and index >= authorities:
                return int(ttl >> 24)
            at += 10 + length
    except (_Bad, IndexError, struct.error):
        pass
    return 0


def _address(packed: bytes) -> str:
    """4 or 16 bytes as text; IPv4-mapped is IPv4."""
    if len(_addresses) >= _CACHED:
        _addresses.clear()
    if len(packed) == 4:
        text = inet_ntoa(packed)
    elif packed.startswith(b"\0\0\0\0\0\0\0\0\0\0\xff\xff"):
        text = inet_ntoa(packed[12:])
    else:
        text = inet_ntop(AF_INET6, packed)
    _addresses[packed] = text
    return text


def _service(data: bytes, at: int, end: int, ttl: int, addresses: list[tuple[str, int]]) -> str:
    """An SVCB or HTTPS record (RFC 9460 sections 2.2, 7 and 14.3): priority, target, and the parameters that say where
    and how to connect. Of ECH only that it is there."""
    name, after = _name(data, at + 2)
    words = [f"{int.from_bytes(data[at : at + 2], 'big')} {name}"]
    while after < end:
        key, length = _QUESTION_FORMAT.unpack_from(data, after)
        value = data[after + 4 : after + 4 + length]
        after += 4 + length
        if after > end:
            raise _Bad
        if key == 1:
            words.append(f"alpn={','.join(_protocols(value))}")
        elif key == 3 and length == 2:
            words.append(f"port={int.from_bytes(value, 'big')}")
        elif key in (4, 6):
            size = 4 if key == 4 else 16
            hints = [_addresses.get(one) or _address(one) for one in _cut(value, size)]
            addresses += [(hint, ttl) for hint in hints]
            words.append(f"ipv{key}hint={','.join(hints)}")
        elif key == 5:
            words.append("ech")
    return " ".join(words)


def _cut(value: bytes, size: int) -> list[bytes]:
    if len(value) % size or len(value) > MAX_ANSWERS * size:
        raise _Bad
    return [value[at : at + size] for at in range(0, len(value), size)]


def _protocols(value: bytes) -> list[str]:
    found, at = [], 0
    while at < len(value):
        after = at + 1 + value[at]
        if after > len(value):
            raise _Bad
        found.append(_escaped(value[at + 1 : after]))
        at = after
    return found


def _other(data: bytes, at: int, end: int, kind: int) -> str:
    if kind in (2, 5, 12, 39):  # NS, CNAME, PTR, DNAME
        prefix, start = "", at
    elif kind == 15:  # MX: preference
        prefix, start = f"{int.from_bytes(data[at : at + 2], 'big')} ", at + 2
    elif kind == 33:  # SRV: priority, weight, port
        prefix, start = "{} {} {} ".format(*struct.unpack_from("!HHH", data, at)), at + 6
    else:
        return ""
    name, after = _name(data, start)
    if after > end:
        raise _Bad
    return prefix + name


def _name(data: bytes, at: int) -> tuple[str, int]:
    """The name at `at` and the offset behind it. Raises _Bad or IndexError where it is malformed or cut off.

    A pointer must point before the place where the current run of labels began. That alone makes loops
    impossible; the limit on jumps bounds the work as well."""
    labels: list[bytes] = []
    after = -1
    floor = at
    size = jumps = 0
    while True:
        length = data[at]
        if length == 0:
            break
        if length < 64:
            at += 1
            label = data[at : at + length]
            size += length + 1
            if len(label) < length or size > 254:
                raise _Bad
            labels.append(label)
            at += length
        elif length >= 0xC0:
            target = (length & 0x3F) << 8 | data[at + 1]
            if after < 0:
                after = at + 2
            jumps += 1
            if target >= floor or target < 12 or jumps > _MAX_JUMPS:
                raise _Bad
            at = floor = target
        else:
            raise _Bad
    if after < 0:
        after = at + 1
    if not labels:
        return ".", after
    if all(map(_PLAIN_LABEL.fullmatch, labels)):
        return b".".join(labels).decode("ascii").lower(), after
    return ".".join(map(_escaped, labels)).lower(), after


def _escaped(label: bytes) -> str:
    """A label in presentation form: dots and backslashes inside it escaped, other unusual bytes as \\DDD."""
    return "".join(
        f"\\{chr(byte)}" if byte in b".\\" else chr(byte) if 0x21 <= byte <= 0x7E else f"\\{byte:03d}" for byte in label
    )
