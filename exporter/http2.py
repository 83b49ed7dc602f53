"""Frames of an HTTP/2 connection -> requests with their outcome (RFC 9113), gRPC's status among them.

In: the digests that the kernel makes of each direction (bpf/lib/frames.h): header-bearing frames whole, of DATA the
lengths alone, with their place, so that what is missing shows. Out: one `Finished` for each request of the client.
Header blocks go through hpack. A connection that was met midway, or lost a part, is marked on each of its requests,
and what cannot be known of them is left empty. Bad input is counted and never raises. Not its job: who and to whom.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, NamedTuple, TypeVar

from exporter.events import SECOND
from exporter.health import losses
from exporter.hpack import BLOCK_BYTES, UNKNOWN, Inflater

CONNECTIONS = 1024  # the one that was silent for longest gives way
STREAMS = 1024  # open at once on one connection
STREAM_SECONDS: Final = 900  # without a frame; then it is told as far as it came

MIDWAY: Final = "midway"
LOST: Final = "lost"
CLOSED: Final = "connection_closed"
GOAWAY: Final = "goaway"
UNFINISHED: Final = "timeout"

# RFC 9113 section 7
ERRORS: Final = (
    "no_error",
    "protocol_error",
    "internal_error",
    "flow_control_error",
    "settings_timeout",
    "stream_closed",
    "frame_size_error",
    "refused_stream",
    "cancel",
    "compression_error",
    "connect_error",
    "enhance_your_calm",
    "inadequate_security",
    "http_1_1_required",
)

_DATA: Final = 0
_HEADERS: Final = 1
_RST_STREAM: Final = 3
_PUSH_PROMISE: Final = 5
_GOAWAY: Final = 7
_CONTINUATION: Final = 9
_END_STREAM: Final = 1
_END_HEADERS: Final = 4
_PADDED: Final = 8
_PRIORITY: Final = 0x20
_header: Final = struct.Struct(">HBBBI").unpack_from  # length in two parts, type, flags, stream
_number: Final = struct.Struct(">I").unpack_from

Context = TypeVar("Context")


class Finished(NamedTuple, Generic[Context]):
    """A request and what became of it. Times are those of the pieces; sizes are bodies, None where they cannot be
    told. Text is "" and a status 0 or None where it was not sent or cannot be known."""

    context: Context  # of the piece with which the request began, or what `begun` made of it
    method: str
    scheme: str
    authority: str
    path: str
    headers: tuple[tuple[str, str], ...]  # of the request, without those that begin with a colon
    status: int  # 0 = no response was seen, or it cannot be known
    began: int
    first_byte: int | None  # of the response; interim responses (1xx) do not count
    ended: int
    request_size: int | None
    response_size: int | None
    grpc_status: int | None
    traceparent: str  # as sent
    error: str  # "", one of ERRORS, CLOSED, GOAWAY, UNFINISHED
    sequence: int  # the how-manieth request of the connection, from 1; 0 = not known
    partial: str  # "", MIDWAY, LOST


class _Stream(Generic[Context]):
    __slots__ = (
        "answered",
        "authority",
        "began",
        "context",
        "first",
        "grpc_status",
        "headers",
        "method",
        "path",
        "received",
        "request_done",
        "response_done",
        "response_ended",
        "scheme",
        "seen",
        "sent",
        "sequence",
        "shaky_received",
        "shaky_sent",
        "status",
        "traceparent",
    )

    def __init__(self, context: Context, began: int, sequence: int) -> None:
        self.context, self.began, self.seen, self.sequence = context, began, began, sequence
        self.method = self.scheme = self.authority = self.path = self.traceparent = ""
        self.headers: tuple[tuple[str, str], ...] = ()
        self.status = self.sent = self.received = self.response_ended = 0
        self.first: int | None = None
        self.grpc_status: int | None = None
        self.answered = self.request_done = self.response_done = False
        # something was lost in this direction while it was open: its size may be short
        self.shaky_sent = self.shaky_received = False


class _Direction:
    __slots__ = ("block", "block_flags", "block_kind", "block_stream", "exact", "inflater", "rest", "told")

    def __init__(self, exact: bool) -> None:
        self.told = 0  # where the next piece of the digest begins
        self.rest = b""  # of a frame that has come in part
        self.block: bytes | None = None  # of a header block that goes on in CONTINUATION frames
        self.block_kind = self.block_stream = self.block_flags = 0
        self.exact = exact  # all header blocks so far were seen
        self.inflater: Inflater | None = None


class _Connection(Generic[Context]):
    __slots__ = ("highest", "partial", "received", "seen", "sent", "sequence", "streams")

    def __init__(self, partial: str) -> None:
        self.partial, self.seen = partial, 0
        self.sent, self.received = _Direction(not partial), _Direction(not partial)
        self.streams: dict[int, _Stream[Context]] = {}
        self.highest = self.sequence = 0


class Http2(Generic[Context]):
    """All connections. `Context` is whatever a request is to be told with. `begun`: the context of a request that has
    begun, its authority, and its number on its connection (0 = not known) -> the context to tell it with."""

    def __init__(self, begun: Callable[[Context, str, int], Context] | None = None) -> None:
        self._begun = begun
        self.connections: OrderedDict[int, _Connection[Context]] = OrderedDict()
        self._fields: dict[tuple[bytes, bytes], tuple[str, str]] = {}
        self._streams = 0
        self._swept = 0

    def __len__(self) -> int:
        return len(self.connections)

    def add(
        self,
        connection: int,
        sent: bool,
        told: int,
        left: int,
        broken: bool,
        data: bytes,
        time: int,
        context: Context,
    ) -> list[Finished[Context]]:
        """The requests that this piece of a digest ends. `connection`: any number that tells one from another; `sent`:
        by the client; `told`: bytes of this direction's digest before this piece (modulo 2^32); `left`: bytes at its
        start that end a frame begun before; `broken`: it does not continue what was before; `time`: ns."""
        conn = self.connections.get(connection)
        if conn is None:
            conn = self._meet(connection, MIDWAY if broken or told else "")
        elif conn.seen != time:
            self.connections.move_to_end(connection)
        conn.seen = time
        way = conn.sent if sent else conn.received
        if broken or told != way.told:
            self._lose(conn, way)
        way.told = (told + len(data)) & 0xFFFFFFFF
        at = 0
        if way.rest:
            data = way.rest + data
            way.rest = b""
        elif left:
            at = left
        out: list[Finished[Context]] = []
        end = len(data)
        while at + 9 <= end:
            high, low, kind, flags, stream = _header(data, at)
            if kind == _DATA:
                at += 9
                self._data(conn, sent, high << 8 | low, flags, stream & 0x7FFFFFFF, time, out)
                continue
            next_at = at + 9 + (high << 8 | low)
            if next_at > end:
                if next_at - at > BLOCK_BYTES:
                    losses.add("join", "h2_block_too_large")
                    self._lose(conn, way)
                    return out
                way.rest = data[at:]
                return out
            self._frame(conn, way, sent, kind, flags, stream & 0x7FFFFFFF, data[at + 9 : next_at], time, context, out)
            at = next_at
        if at < end:  # headers are never cut
            losses.add("decode", "h2_digest")
            self._lose(conn, way)
        return out

    def closed(self, connection: int, time: int, error: str = CLOSED) -> list[Finished[Context]]:
        """The connection has ended: its open requests."""
        conn = self.connections.pop(connection, None)
        if conn is None:
            return []
        return [self._finish(conn, stream, time, error) for stream in conn.streams.values()]

    def open(self) -> Iterator[Finished[Context]]:
        """Requests that wait for the end of their response, or send still: as if they were given up now."""
        for conn in self.connections.values():
            for stream in conn.streams.values():
                yield self._finish(conn, stream, stream.seen, UNFINISHED)

    def expire(self, now: int) -> Iterator[Finished[Context]]:
        """Requests on which nothing has moved for STREAM_SECONDS. Looks once in ten seconds. `now` as the pieces'
        times."""
        if now - self._swept < 10 * SECOND:
            return
        self._swept = now
        oldest = now - STREAM_SECONDS * SECOND
        for conn in self.connections.values():
            if not conn.streams:
                continue
            for number in [number for number, stream in conn.streams.items() if stream.seen < oldest]:
                losses.add("join", "h2_unfinished")
                yield self._finish(conn, conn.streams.pop(number), now, UNFINISHED)

    # --- connections ----------------------------------------------------------------------------------------------

    def _meet(self, connection: int, partial: str) -> _Connection[Context]:
        conn = self.connections[connection] = _Connection(partial)
        if len(self.connections) > CONNECTIONS:
            losses.add("join", "h2_connections_full")
            self.connections.popitem(last=False)
        return conn

    def _lose(self, conn: _Connection[Context], way: _Direction) -> None:
        """Something is missing in this direction: its header fields are no longer known, nor the sizes of what is
        open."""
        way.exact, way.inflater = False, None
        way.rest = b""
        way.block = None
        conn.partial = conn.partial or LOST
        for stream in conn.streams.values():
            if way is conn.sent:
                stream.shaky_sent = True
            else:
                stream.shaky_received = True

    # --- frames ---------------------------------------------------------------------------------------------------

    def _data(
        self,
        conn: _Connection[Context],
        sent: bool,
        length: int,
        flags: int,
        number: int,
        time: int,
        out: list[Finished[Context]],
    ) -> None:
        stream = conn.streams.get(number)
        if stream is None:
            return
        stream.seen = time
        if sent:
            stream.sent += length
        else:
            stream.received += length
        if flags & _END_STREAM:
            self._ended(conn, number, stream, sent, time, out)

    def _ended(
        self,
        conn: _Connection[Context],
        number: int,
        stream: _Stream[Context],
        sent: bool,
        time: int,
        out: list[Finished[Context]],
    ) -> None:
        if sent:
            stream.request_done = True
        elif not stream.response_done:
            stream.response_done = True
            stream.response_ended = time
        if stream.request_done and stream.response_done:
            del conn.streams[number]
            out.append(self._finish(conn, stream, time, ""))

    def _frame(
        self,
        conn: _Connection[Context],
        way: _Direction,
        sent: bool,
        kind: int,
        flags: int,
        number: int,
        payload: bytes,
        time: int,
        context: Context,
        out: list[Finished[Context]],
    ) -> None:
        if way.block is not None and (kind != _CONTINUATION or number != way.block_stream):
            losses.add("decode", "h2_frames")  # nothing may come in between (section 6.10)
            self._lose(conn, way)
        if kind in (_HEADERS, _PUSH_PROMISE):
            block = _fragment(kind, flags, payload)
            if block is None:
                losses.add("decode", "h2_frames")
                self._lose(conn, way)
                return
            way.block_kind, way.block_stream, way.block_flags = kind, number, flags
        elif kind == _CONTINUATION:
            if way.block is None:  # the block's beginning was lost
                way.exact, way.inflater = False, None
                return
            block = way.block + payload
        elif kind == _RST_STREAM and len(payload) == 4:
            stream = conn.streams.pop(number, None)
            if stream is not None:
                (code,) = _number(payload)
                out.append(self._finish(conn, stream, time, ERRORS[code] if code < len(ERRORS) else f"error_{code:x}"))
            return
        elif kind == _GOAWAY and not sent and len(payload) >= 8:
            last = _number(payload)[0] & 0x7FFFFFFF
            for number in [number for number in conn.streams if number > last]:
                out.append(self._finish(conn, conn.streams.pop(number), time, GOAWAY))
            return
        else:
            return
        if not flags & _END_HEADERS:
            if len(block) > BLOCK_BYTES:
                losses.add("join", "h2_block_too_large")
                self._lose(conn, way)
                return
            way.block = block
            return
        way.block = None
        inflater = way.inflater
        if inflater is None:
            inflater = way.inflater = Inflater(midway=not way.exact)
        fields = inflater.inflate(block)
        if fields is None:
            losses.add("decode", "h2_header_block")
            self._lose(conn, way)
            fields = []
        if way.block_kind == _HEADERS and number & 1:
            self._headers(conn, sent, number, way.block_flags, fields, time, context, out)

    def _headers(
        self,
        conn: _Connection[Context],
        sent: bool,
        number: int,
        flags: int,
        fields: list[tuple[bytes, bytes]],
        time: int,
        context: Context,
        out: list[Finished[Context]],
    ) -> None:
        stream = conn.streams.get(number)
        if sent:
            if stream is None:
                stream = self._request(conn, number, fields, time, context)
        elif stream is not None:
            _response(stream, fields, time)
        if stream is None:
            return
        stream.seen = time
        if flags & _END_STREAM:
            self._ended(conn, number, stream, sent, time, out)

    def _request(
        self,
        conn: _Connection[Context],
        number: int,
        fields: list[tuple[bytes, bytes]],
        time: int,
        context: Context,
    ) -> _Stream[Context] | None:
        if number <= conn.highest:  # the trailers of a request that is over
            return None
        if conn.partial and not any(name[:1] == b":" or name == UNKNOWN for name, _ in fields):
            return None  # the trailers of one that began before our time
        conn.highest = number
        conn.sequence += 1
        stream = _Stream(context, time, 0 if conn.partial else conn.sequence)
        known = self._fields
        headers = []
        for field in fields:
            text = known.get(field) or self._text(field)
            name, value = text
            if name[:1] != ":":
                if name == "traceparent":
                    stream.traceparent = value
                if name != "?":
                    headers.append(text)
            elif name == ":path":
                stream.path = value
            elif name == ":method":
                stream.method = value
            elif name == ":authority":
                stream.authority = value
            elif name == ":scheme":
                stream.scheme = value
        if not stream.authority:
            stream.authority = next((value for name, value in headers if name == "host"), "")
        stream.headers = tuple(headers)
        if self._begun is not None:
            stream.context = self._begun(context, stream.authority, stream.sequence)
        conn.streams[number] = stream
        if len(conn.streams) > STREAMS:
            losses.add("join", "h2_streams_full")
            del conn.streams[next(iter(conn.streams))]
        return stream

    def _text(self, field: tuple[bytes, bytes]) -> tuple[str, str]:
        if len(self._fields) >= 4096:
            self._fields.clear()
        text = self._fields[field] = field[0].decode("utf-8", "replace"), field[1].decode("utf-8", "replace")
        return text

    def _finish(self, conn: _Connection[Context], stream: _Stream[Context], time: int, error: str) -> Finished[Context]:
        if stream.response_done:  # what comes after a whole response takes nothing from it
            error, time = "", stream.response_ended
        return Finished(
            stream.context,
            stream.method,
            stream.scheme,
            stream.authority,
            stream.path,
            stream.headers,
            stream.status,
            stream.began,
            stream.first,
            time,
            stream.sent if stream.request_done and not stream.shaky_sent else None,
            stream.received if stream.response_done and not stream.shaky_received else None,
            stream.grpc_status,
            stream.traceparent,
            error,
            stream.sequence,
            conn.partial,
        )


def _fragment(kind: int, flags: int, payload: bytes) -> bytes | None:
    """The header block in a HEADERS or PUSH_PROMISE frame (sections 6.2, 6.6); None where the frame is wrong."""
    start, end = 0, len(payload)
    if flags & _PADDED:
        if not payload:
            return None
        start, end = 1, end - payload[0]
    if kind == _PUSH_PROMISE:
        start += 4
    elif flags & _PRIORITY:
        start += 5
    return payload[start:end] if start <= end else None


def _response(stream: _Stream[Any], fields: list[tuple[bytes, bytes]], time: int) -> None:
    """A header block of the server: an interim response, the response, or its trailers."""
    status = 0
    unknown = False
    for name, value in fields:
        if name == b":status":
            status = int(value) if len(value) == 3 and value.isdigit() else 0
        elif name == b"grpc-status":
            stream.grpc_status = int(value) if 0 < len(value) < 4 and value.isdigit() else None
        elif name == UNKNOWN:
            unknown = True
    if 100 <= status < 200:
        return
    if (status and not stream.status) or (unknown and not stream.answered):
        stream.answered, stream.first, stream.status = True, time, status
