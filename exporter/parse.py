"""Parsers for what applications put on the wire: an HTTP/1 request head, a DNS message.

In: captured bytes, possibly cut off, possibly hostile. Out: a small named tuple, or None for "this is not
one". Pure functions; work is bounded by the length of the input; they never raise. Not their job: redaction
(emit.redact), matching a query with its answer (lookups) or a request with its response (exchanges), TLS and QUIC
(tls, quic), HTTP/2 (http2).

Sources: RFC 9112 sections 2-5 (HTTP/1.1 messages), RFC 9110 section 4.2 (URIs), RFC 1035 section 4 (DNS
messages), RFC 3596 (AAAA), RFC 9460 (SVCB, HTTPS), RFC 2782 (SRV), RFC 6895 (codes)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from socket import AF_INET6, inet_ntoa, inet_ntop
from typing import NamedTuple

# --- HTTP ---------------------------------------------------------------------------------------------------

ORIGIN, ABSOLUTE, AUTHORITY, ASTERISK = "origin", "absolute", "authority", "asterisk"

MAX_HEADERS = 64
_new = tuple.__new__
_MAX_LINE_BREAKS = 4

# While the version is cut off, only a method that we know tells a request from any other text.
_METHODS = re.compile(
    "GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PROPFIND|PROPPATCH|MKCOL|COPY|MOVE|LOCK|UNLOCK|SEARCH"
    "|REPORT|PURGE|LINK|UNLINK|MKCALENDAR|MKACTIVITY|CHECKOUT|MERGE|NOTIFY|SUBSCRIBE|UNSUBSCRIBE"
)
_COMMON = frozenset(("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS"))
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_VERSION = re.compile(r" HTTP/1\.([0-9]) *\Z")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*\Z", re.DOTALL)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_CREDENTIALS = frozenset(("authorization", "proxy-authorization", "cookie"))
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~!$&'()*+,;=%-]+))(?::([0-9]{0,5}))?")


class Request(NamedTuple):
    """The head of an HTTP/1 request.

    `host` is whom the request is for: from the target where that names one (absolute, authority), else from
    Host; lower case, no port, no brackets, no user info, no trailing dot; "" where missing, invalid or
    contradictory. `port` is None where it was not written (or absurd). `proxied` means that whoever gets the
    bytes is a proxy for `host`. `path` and `query` are as sent, `query` without the "?"; "*" is a path.
    `truncated`: bytes are missing before the head ends, so headers may be; `complete_line`: the request line
    is not cut off. `body`: bytes of it, 0 where the head announces none, None where it does not say how many.
    `traceparent`, `tracestate` as sent, "" unless the first is valid. `credentials`: it carries some, in a header or
    in the target."""

    method: str
    form: str
    path: str
    query: str
    host: str
    port: int | None
    headers: tuple[tuple[str, str], ...]
    version: str
    proxied: bool
    truncated: bool
    complete_line: bool
    body: int | None
    chunked: bool
    traceparent: str
    tracestate: str
    credentials: bool


def parse_request(data: bytes) -> Request | None:
    """Read an HTTP/1 request head from the start of `data`; None where it is not one (HTTP/2 prefaces are
    not).

    Lenient where servers are: empty lines first, bare LF, blanks inside the target, unknown methods when the
    version is there. Field lines that break RFC 9112 section 5 are skipped, folded ones joined."""
    start = 0
    while start < len(data) and start < _MAX_LINE_BREAKS and data[start] in b"\r\n":
        start += 1
    end = data.find(b"\n", start)
    cut = end < 0
    line = (data[start:] if cut else data[start:end]).decode("utf-8", "replace").rstrip("\r")

    method, blank, target = line.partition(" ")
    if not blank or not (method in _COMMON or _METHOD.fullmatch(method)):
        return None
    version = ""
    if target.endswith(" HTTP/1.1") and target[-10:-9] != " ":  # as nearly all end
        version, target = "1.1", target[:-9]
    elif match := _VERSION.search(target):
        version, target = "1." + match[1], target[: match.start()]
    elif not cut or not _METHODS.fullmatch(method):
        return None
    if not target or (method == "PRI" and target == "*"):
        return None

    if target[0] == "/" and method != "CONNECT":
        form, host, port = ORIGIN, "", None
        path, _, query = target.partition("?")
    else:
        form, host, port, path, query = _target(method, target)
        if not form:
            return None
    fields = _NO_FIELDS if cut else _fields(data, end + 1)
    if form in (ORIGIN, ASTERISK):
        host, port = fields.host, fields.port
    elif not version:
        # The authority may go on where the capture ends: half a name is worse than none.
        authority_ends = form == ABSOLUTE and (path or query)
        host, port = (host, port) if authority_ends else ("", None)
    return _new(
        Request,
        (
            method,
            form,
            path,
            query,
            host,
            port,
            fields.headers,
            version,
            form in (ABSOLUTE, AUTHORITY),
            fields.truncated,
            version != "",
            fields.body,
            fields.chunked,
            fields.traceparent,
            fields.tracestate,
            fields.credentials or (form != ORIGIN and _user_info(form, target)),
        ),
    )


def _target(method: str, target: str) -> tuple[str, str, int | None, str, str]:
    """(form, host, port, path, query) of a request target that is no path, RFC 9112 section 3.2; form "" where it is
    none."""
    if method == "CONNECT":
        host, port = split_authority(target)
        return (AUTHORITY, host, port, "", "") if host else ("", "", None, "", "")
    if target == "*":
        return ASTERISK, "", None, "*", ""
    match = _ABSOLUTE.match(target)
    if not match:
        return "", "", None, "", ""
    host, port = split_authority(match[2])
    return ABSOLUTE, host, port, match[3], match[4] or ""


def _user_info(form: str, target: str) -> bool:
    authority = target.partition("://")[2] if form == ABSOLUTE else target
    return "@" in re.split("[/?#]", authority, maxsplit=1)[0]


def split_authority(text: str) -> tuple[str, int | None]:
    """`host`, `host:port`, `[v6]:port`, with or without user info, to (host, port); ("", None) where
    invalid."""
    match = _AUTHORITY.fullmatch(text.rpartition("@")[2].strip())
    if not match:
        return "", None
    host = (match[1] or match[2]).lower()
    if host.endswith("."):
        host = host[:-1]
    port = int(match[3]) if match[3] else None
    if len(host) > 253 or (port is not None and not 0 < port < 65536):
        return "", None
    return host, port


class _Fields(NamedTuple):
    """The field lines of a head, and what they say, in the words of Request. `truncated`: the empty line behind them
    is missing, so fields may be."""

    headers: tuple[tuple[str, str], ...]
    truncated: bool
    host: str
    port: int | None
    body: int | None
    chunked: bool
    traceparent: str
    tracestate: str
    credentials: bool


# By their bytes: a client sends the same fields with each request, but for those that trace it.
_blocks: dict[bytes, _Fields] = {}
_BLOCKS, _LONG_BLOCK = 2048, 1024
# Lines that were read lately and are one field each, and hosts.
_lines: dict[bytes, tuple[str, str]] = {}
_LINES, _LONG_LINE = 4096, 128
_authorities: dict[str, tuple[str, int | None]] = {}
_AUTHORITIES = 1024


def _fields(data: bytes, start: int) -> _Fields:
    """The field lines from `start` to the empty line."""
    end = data.find(b"\r\n\r\n", start)
    block = data[start:end]
    known = _blocks.get(block) if end > start else None
    if known is not None:
        return known
    # An empty line before that one would end the head earlier: it begins with CR or LF, or needs a bare LF.
    if end <= start or block[0] in b"\r\n" or block.count(b"\n") != block.count(b"\r\n"):
        return _meaning(*_fields_line_by_line(data, start))
    fields = []
    for line in block.split(b"\r\n"):
        field = _lines.get(line) or _new_line(line)
        if field is None:
            return _meaning(*_fields_line_by_line(data, start))
        fields.append(field)
    if len(fields) > MAX_HEADERS:
        return _meaning(*_fields_line_by_line(data, start))
    found = _meaning(tuple(fields), False)
    if len(block) <= _LONG_BLOCK:
        if len(_blocks) >= _BLOCKS:
            _blocks.clear()
        _blocks[block] = found
    return found


def _new_line(line: bytes) -> tuple[str, str] | None:
    name, colon, value = line.decode("utf-8", "replace").partition(":")
    if not colon or not _TOKEN.fullmatch(name):
        return None
    field = name, value.strip(" \t")
    if len(line) <= _LONG_LINE:
        if len(_lines) >= _LINES:
            _lines.clear()
        _lines[line] = field
    return field


def _meaning(headers: tuple[tuple[str, str], ...], truncated: bool) -> _Fields:
    hosts: set[str] = set()
    body: int | None = None if truncated else 0
    states: list[str] = []
    parent: str | None = None
    sized = chunked = credentials = False
    for name, value in headers:
        name = name.lower()
        if name == "host":
            hosts.add(value)
        elif name == "content-length" and not sized:
            sized, body = True, int(value) if value.isdecimal() and len(value) < 16 else None
        elif name == "transfer-encoding" and not sized:
            sized, body, chunked = True, None, not truncated
        elif name == "traceparent" and parent is None:
            parent = valid_traceparent(value)
        elif name == "tracestate":
            states.append(value)
        elif name in _CREDENTIALS:
            credentials = True
    credentials = credentials or any("@" in host for host in hosts)
    # Two that differ are a smuggling attempt (RFC 9112 section 3.2): evidence for neither.
    host, port = _authority(hosts.pop()) if len(hosts) == 1 else ("", None)
    state = ",".join(states) if parent else ""  # a list header (RFC 9110 section 5.3)
    return _Fields(headers, truncated, host, port, body, chunked, parent or "", state, credentials)


def _authority(text: str) -> tuple[str, int | None]:
    found = _authorities.get(text)
    if found is None:
        found = split_authority(text)
        if len(text) <= 255:
            if len(_authorities) >= _AUTHORITIES:
                _authorities.clear()
            _authorities[text] = found
    return found


def valid_traceparent(value: str) -> str:
    """The part that version 00 knows (W3C Trace Context section 3.2); "" where it is not valid."""
    return value[:55] if _TRACEPARENT.match(value) and (len(value) == 55 or value[:2] != "00") else ""


def has_credentials(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether one of these fields carries credentials, by its name."""
    return any(name.lower() in _CREDENTIALS for name, _ in headers)


def _fields_line_by_line(data: bytes, start: int) -> tuple[tuple[tuple[str, str], ...], bool]:
    """The same for whatever is unusual: bare LF, folded lines, lines that are no field, no end."""
    fields: list[tuple[str, str]] = []
    while True:
        end = data.find(b"\n", start)
        if end < 0:
            # The rest is a line without an end: half a value is worse than none.
            return tuple(fields), True
        line = data[start:end].decode("utf-8", "replace")
        if line.endswith("\r"):
            line = line[:-1]
        start = end + 1
        if not line:
            return tuple(fields), False
        if line[0] in " \t":
            if fields:
                name, value = fields[-1]
                fields[-1] = name, f"{value} {line.strip()}".strip()
        elif match := _HEADER.match(line):
            if len(fields) >= MAX_HEADERS:
                return tuple(fields), True
            fields.append((match[1], match[2]))


_NO_FIELDS = _meaning((), True)


class Response(NamedTuple):
    """The head of an HTTP/1 response. `size`: bytes of the head, empty line included; None where it is cut off.
    `length`: Content-Length; None where there is none, or several that differ. `grpc_status`: gRPC-Web and others that
    answer with headers alone."""

    version: str
    status: int
    size: int | None
    length: int | None
    chunked: bool
    grpc_status: int | None


_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?=[ \r\n]|\Z)")
_CONTENT_LENGTH = b"\ncontent-length:"
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r|\n|\Z)")


def parse_response(data: bytes) -> Response | None:
    """Read an HTTP/1 response head from the start of `data`; None where it is not one."""
    if data.startswith(b"HTTP/1.1 200 "):  # as most do
        version, status = "1.1", 200
    elif match := _STATUS_LINE.match(data):
        version, status = "1." + chr(match[1][0]), int(match[2])
    else:
        return None
    end = data.find(b"\r\n\r\n")
    size: int | None = end + 4
    if end < 0:
        end = data.find(b"\n\n")
        size = end + 2
        if end < 0:
            end, size = len(data), None
    head = data[:end].lower()
    at = head.find(b"\ntransfer-encoding:")
    chunked = at >= 0 and b"chunked" in head[at : (head.find(b"\n", at + 1) + 1) or end]
    at = head.find(b"\ngrpc-status:")
    code = head[at + 13 : at + 20].split(b"\n", 1)[0].strip() if at >= 0 else b""
    return _new(Response, (version, status, size, _length(head), chunked, int(code) if code.isdigit() else None))


def _length(head: bytes) -> int | None:
    """Content-Length; None where there is none, or several that differ."""
    at = head.find(_CONTENT_LENGTH)
    if at < 0:
        return None
    at += len(_CONTENT_LENGTH)
    end = head.find(b"\n", at)
    if end < 0 or head.find(_CONTENT_LENGTH, end) < 0:
        value = (head[at:] if end < 0 else head[at:end]).strip(b" \t\r")
        return int(value) if value.isdigit() and len(value) < 16 else None
    lengths = set(_LENGTH.findall(head))
    return int(lengths.pop()) if len(lengths) == 1 else None


# --- DNS ----------------------------------------------------------------------------------------------------

QTYPES = {
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
RCODES = (
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
MAX_ANSWERS = 64
# Compression pointers followed for one name. Real servers use one or two; each must point further back.
_MAX_JUMPS = 16
_HEADER_FORMAT = struct.Struct("!HHHHHH")
_QUESTION_FORMAT = struct.Struct("!HH")
_RECORD_FORMAT = struct.Struct("!HHHIH")  # the owner as a pointer, type, class, TTL, length
_PLAIN_LABEL = re.compile(rb"[!-\-/-\[\]-~]+")


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


_CACHED = 2048
_MESSAGES = 2048
_LONG = 512  # bytes of a message that is not kept
_messages: dict[bytes, DnsMessage] = {}  # by all their bytes but the id: hosts ask for the same names over and over
_addresses: dict[bytes, str] = {}


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
