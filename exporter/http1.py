"""HTTP/1: the head of a request and of its answer.

In: captured bytes, possibly cut off, possibly hostile. Out: a small named tuple, or None for "this is not
one". Pure functions; work is bounded by the length of the input; they never raise. Not their job: redaction
(emit.redact), which answer belongs to which request (exchanges), HTTP/2 (http2).

Sources: RFC 9112 sections 2-5 (HTTP/1.1 messages), RFC 9110 section 4.2 (URIs)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

ORIGIN: Final = "origin"
ABSOLUTE: Final = "absolute"
AUTHORITY: Final = "authority"
ASTERISK: Final = "asterisk"

MAX_HEADERS: Final = 64
_new: Final = tuple.__new__
_MAX_LINE_BREAKS: Final = 4

# While the version is cut off, only a method that we know tells a request from any other text.
_METHODS: Final = re.compile(
    "GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PROPFIND|PROPPATCH|MKCOL|COPY|MOVE|LOCK|UNLOCK|SEARCH"
    "|REPORT|PURGE|LINK|UNLINK|MKCALENDAR|MKACTIVITY|CHECKOUT|MERGE|NOTIFY|SUBSCRIBE|UNSUBSCRIBE"
)
_COMMON: Final = frozenset(("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS"))
_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_VERSION: Final = re.compile(r" HTTP/1\.([0-9]) *\Z")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*\Z", re.DOTALL)
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ABSOLUTE: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?")
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_CREDENTIALS: Final = frozenset(("authorization", "proxy-authorization", "cookie"))
_AUTHORITY: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~!$&'()*+,;=%-]+))(?::([0-9]{0,5}))?")


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
_blocks: Final[dict[bytes, _Fields]] = {}
_BLOCKS: Final = 2048
_LONG_BLOCK: Final = 1024
# Lines that were read lately and are one field each, and hosts.
_lines: Final[dict[bytes, tuple[str, str]]] = {}
_LINES: Final = 4096
_LONG_LINE: Final = 128
_authorities: Final[dict[str, tuple[str, int | None]]] = {}
_AUTHORITIES: Final = 1024


def _fields(data: bytes, start: int) -> _Fields:
    """The field lines from `start` to the empty line."""
    end = data.find(b"\r\n\r\n", start)
    if end <= start:
        return _meaning(*_fields_line_by_line(data, start))
    block = data[start:end]
    known = _blocks.get(block)
    if known is not None:
        return known
    # An empty line before that one would end the head earlier: it begins with CR or LF, or needs a bare LF.
    if block[0] in b"\r\n" or block.count(b"\n") != block.count(b"\r\n"):
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


_NO_FIELDS: Final = _meaning((), True)


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


_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?=[ \r\n]|\Z)")
_CONTENT_LENGTH: Final = b"\ncontent-length:"
_LENGTH: Final = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r|\n|\Z)")


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
