"""Spans and log records as OTLP requests, in bytes.

Comes in: requests, set-ups and notes. Goes out: Payloads below `LIMIT` bytes. Not its job: what a span says
(spans.py, logs.py), sending (otlp_transport.py), metrics (otlp_encode.py).

A request's span is put together from pieces that are kept encoded: the peer, the process, the outcome; only its ids,
times, URL and sizes are new. That takes a tenth of what the SDK's encoder does for the same span. What a piece
depends on is its key; the test that compares the pieces with the plain values (spans.request) fails when one is
forgotten. Source: opentelemetry-proto 1.x, trace.proto and logs.proto; fields stand in the order of their numbers.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from exporter.emit import semconv as c
from exporter.emit.logs import SEVERITY, Note, record
from exporter.emit.otlp_settings import Limits
from exporter.emit.otlp_wire import Number, Text, attribute, sized, text, varint
from exporter.emit.resource import Resource
from exporter.emit.sampling import Request
from exporter.emit.setup import Setup
from exporter.emit.spans import (
    CLIENT,
    Span,
    Value,
    base_url,
    headers,
    outcome,
    peer,
    process,
    request,
    request_name,
)
from exporter.emit.trace_context import Context
from exporter.events import Event, Workload

# Receivers take 4 MiB by default; a part of it keeps the agent's memory flat while it sends. A batch of 512 spans, the
# default, fits: a request costs 0.6 ms in the HTTP library, as much as encoding 170 spans.
LIMIT: Final = 1 << 19
# Pieces that are kept, 50 to 600 bytes each. Then all are made anew.
_KEPT: Final = 8192
_HEADS: Final = 512  # resources, 600 bytes each
# A request's span has at most so many attributes, 64 of them headers.
_ATTRIBUTES: Final = 96

_TIMES: Final = struct.Struct("<BQBQ").pack
_TIME: Final = struct.Struct("<Q").pack
_DOUBLE: Final = struct.Struct("<d").pack

_HAS_REMOTE: Final = 0x100  # SpanFlags
_IS_REMOTE: Final = 0x200
_ATTRIBUTE: Final = b"\x4a"
_LOG_ATTRIBUTE: Final = b"\x32"


class Payload(NamedTuple):
    """One request: bytes, or a message. How many items it holds, and what to do once a receiver has taken it."""

    message: Any
    items: int
    sent: Callable[[], None] = lambda: None


class Records:
    """One for each worker thread: it keeps pieces. `resource_of` gives a workload's Resource, `template` an event's
    url.template or ""; `allowed` are the request headers that may be told, in lower case; `made` is told of each span:
    its event, trace id and span id."""

    def __init__(
        self,
        resource_of: Callable[[Workload], Resource],
        version: str,
        limits: Limits | None = None,
        template: Callable[[Event], str] | None = None,
        allowed: frozenset[str] = frozenset(),
        made: Callable[[Event, tuple[bytes, bytes]], None] | None = None,
    ) -> None:
        self._resource_of, self._allowed, self._made = resource_of, allowed, made
        self._template = template or _no_template
        self._limits = limits or Limits()
        length = self._limits.value_length
        scope = sized(b"\x0a", c.SCOPE.encode()) + (sized(b"\x12", version.encode()) if version else b"")
        self._scope = sized(b"\x0a", scope)
        self._pieces: dict[tuple[object, ...], bytes] = {}
        self._urls: dict[tuple[object, ...], str] = {}
        self._names: dict[tuple[object, ...], bytes] = {}
        self._heads: dict[int, tuple[Resource, bytes]] = {}
        self._local_port = Number(_ATTRIBUTE, c.LOCAL_PORT)
        self._url = Text(_ATTRIBUTE, c.URL_FULL, length)
        self._request_size = Number(_ATTRIBUTE, c.HTTP_REQUEST_BODY)
        self._response_size = Number(_ATTRIBUTE, c.HTTP_RESPONSE_BODY)
        self._sequence = Number(_ATTRIBUTE, c.HTTP_SEQUENCE)
        self._first_byte = attribute(_ATTRIBUTE, c.FIRST_BYTE_TIME, 0.0)[:-8]

    # --- spans ----------------------------------------------------------------------------------------------------

    def spans(self, items: Iterable[Request | Setup]) -> Iterator[Payload]:
        """One ResourceSpans for each workload in a request."""
        batch = _Batch(self._resource_of, self._head_of)
        request_span = self._request if self._limits.attributes >= _ATTRIBUTES else self._limited_request
        made = self._made
        for item in items:
            if isinstance(item, Setup):
                workload, found = item.main.workload, self._setup(item)
                steps = list(zip(item.events, found[1:], strict=True))
            else:
                workload, found = item.event.workload, [request_span(item)]
                steps = [(item.event, found[0])]
            if made is not None:
                for event, span in steps:
                    made(event, (span[2:18], span[20:28]))  # where _place() has put the ids
            for span in found:
                if batch.add(workload, b"\x12", span):
                    yield from batch.rest()
        yield from batch.rest()

    def _request(self, item: Request) -> bytes:
        event, setup, place = item
        exchange = event.exchange
        assert exchange is not None
        version, scheme, status, error, first_byte, sent, received, grpc, parent, sequence, partial, state, port = (
            exchange[:13]
        )
        pieces = self._pieces
        if len(pieces) > _KEPT:
            pieces.clear()
            self._urls.clear()
            self._names.clear()
        template = self._template(event)

        key: tuple[object, ...] = (
            event.domain, event.name_source, event.dst, event.port, event.scope, event.role, event.transport,
            event.proxy, event.group, event.redirected, scheme, version, port,
        )  # fmt: skip
        peer_piece = pieces.get(key)
        if peer_piece is None:
            peer_piece = pieces[key] = self._piece(peer(event))
            self._urls[key] = base_url(event)
        url = self._urls[key] + event.path
        key = (event.src, event.pid, event.comm)
        process_piece = pieces.get(key)
        if process_piece is None:
            process_piece = pieces[key] = self._piece(process(event))
        key = (event.method, template, status, error, partial, grpc, "" if grpc is None else event.path)
        outcome_piece = pieces.get(key)
        name = self._names.get(key)
        if outcome_piece is None or name is None:
            outcome_piece = pieces[key] = self._piece(outcome(event, template))
            name = self._names[key] = _name(request_name(event, template), CLIENT)

        start = event.time
        parts = [
            _place(parent, state, place),
            name,
            _TIMES(0x39, start, 0x41, start + (event.duration or 0)),
            peer_piece,
            process_piece,
            outcome_piece,
            self._local_port(event.src_port),
            self._url(url),
        ]
        if sent is not None:
            parts.append(self._request_size(sent))
        if received is not None:
            parts.append(self._response_size(received))
        if sequence:
            parts.append(self._sequence(sequence))
        if first_byte is not None:
            parts.append(self._first_byte + _DOUBLE(first_byte / 1e9))
        if self._allowed and event.headers:
            parts.append(self._piece(headers(event, self._allowed)))
        if setup is not None and setup.kept:
            parts.append(_link(setup))
        if error or status >= 400 or grpc:
            parts.append(_ERROR)
        parts.append(_ROOT_FLAGS if not parent else _flags(parent))
        return b"".join(parts)

    def _limited_request(self, item: Request) -> bytes:
        """The same without pieces, where attributes may have to be left out."""
        event, setup, place = item
        made, exchange = request(event, self._template(event)), event.exchange
        assert made is not None
        assert exchange is not None
        pairs = [*made.attributes, *headers(event, self._allowed)]
        link = _link(setup) if setup is not None and setup.kept else b""
        place_piece = _place(exchange.traceparent, exchange.tracestate, place)
        flags = _flags(exchange.traceparent) if exchange.traceparent else _ROOT_FLAGS
        return self._span(place_piece, made, pairs, link, flags)

    def _setup(self, setup: Setup) -> list[bytes]:
        root = setup.root()
        place = b"\x0a\x10%b\x12\x08%b" % (setup.trace_id, setup.span_id)
        found = [self._span(place, root, root.attributes)]
        for made in setup.steps():
            place = b"\x0a\x10%b\x12\x08%b\x22\x08%b" % (setup.trace_id, random.randbytes(8), setup.span_id)
            found.append(self._span(place, made, made.attributes))
        return found

    def _span(
        self, place: bytes, made: Span, pairs: Sequence[tuple[str, Value]], link: bytes = b"", flags: bytes = b""
    ) -> bytes:
        kept, dropped = pairs[: self._limits.attributes], max(0, len(pairs) - self._limits.attributes)
        return b"".join(
            (
                place,
                _name(made.name, made.kind),
                _TIMES(0x39, made.start_ns, 0x41, made.end_ns),
                self._piece(kept),
                b"\x50" + varint(dropped) if dropped else b"",
                link,
                _ERROR if made.failed else b"",
                flags or _ROOT_FLAGS,
            )
        )

    def _piece(self, pairs: Iterable[tuple[str, Value]], tag: bytes = _ATTRIBUTE) -> bytes:
        length = self._limits.value_length
        return b"".join([attribute(tag, key, value, length) for key, value in pairs])

    # --- log records ----------------------------------------------------------------------------------------------

    def logs(self, notes: Iterable[Note]) -> Iterator[Payload]:
        """One ResourceLogs for each workload in a request."""
        batch = _Batch(self._resource_of, self._head_of)
        now = time.time_ns()
        for note in notes:
            if batch.add(note.event.workload, b"\x12", self._log(note, now)):
                yield from batch.rest()
        yield from batch.rest()

    def _log(self, note: Note, now: int) -> bytes:
        made, place = record(note), note.context
        kept = made.attributes[: self._limits.attributes]
        dropped = len(made.attributes) - len(kept)
        parts = [
            b"\x09" + _TIME(made.time_ns) if made.time_ns else b"",
            b"\x10" + varint(made.severity) + sized(b"\x1a", SEVERITY[made.severity].encode()),
            sized(b"\x2a", sized(b"\x0a", text(made.body, self._limits.value_length))),
            self._piece(kept, _LOG_ATTRIBUTE),
            b"\x38" + varint(dropped) if dropped else b"",
        ]
        if place is not None:
            flags = b"\x45" + struct.pack("<I", place.flags) if place.flags else b""
            parts.append(b"%b\x4a\x10%b\x52\x08%b" % (flags, place.trace_id, place.span_id))
        parts.append(b"\x59" + _TIME(now) + sized(b"\x62", made.name.encode()))
        return b"".join(parts)

    # --- what stands around them ----------------------------------------------------------------------------------

    def _head_of(self, resource: Resource) -> tuple[bytes, bytes]:
        """(resource field, scope field) of what holds a workload's items."""
        # By identity, as in _Batch; the Resource is kept beside what was made of it.
        known = self._heads.get(id(resource))
        if known is None or known[0] is not resource:
            if len(self._heads) >= _HEADS:
                self._heads.clear()
            attributes = self._piece(resource.attributes[: self._limits.attributes], b"\x0a")
            known = self._heads[id(resource)] = (resource, sized(b"\x0a", attributes))
        return known[1], self._scope


def _no_template(event: Event) -> str:
    return ""


class _Batch:
    """Groups encoded items by Resource. Spans and log records stand in the same places: ResourceSpans and
    ResourceLogs are field 1 of their request, with resource 1, scope 2, schema_url 3; so are their scopes."""

    def __init__(
        self, resource_of: Callable[[Workload], Resource], head_of: Callable[[Resource], tuple[bytes, bytes]]
    ) -> None:
        self._resource_of, self._head_of = resource_of, head_of
        self._start()

    def _start(self) -> None:
        self._groups: dict[int, tuple[Resource, list[bytes]]] = {}
        self._of: dict[int, tuple[Workload, list[bytes]]] = {}
        self._bytes = self._items = 0

    def add(self, workload: Workload, tag: bytes, item: bytes) -> bool:
        """Take one item; True when what waits is as large as a request should be."""
        # By identity: hashing a Workload or a Resource takes longer than encoding a span. Keeping the objects keeps
        # their ids from being given to others.
        known = self._of.get(id(workload))
        if known is None:
            resource = self._resource_of(workload)
            group = self._groups.get(id(resource))
            if group is None:
                group = self._groups[id(resource)] = (resource, [])
                self._bytes += 2048
            known = self._of[id(workload)] = (workload, group[1])
        size = len(item)
        # Most items take two bytes of length.
        if 0x80 <= size < 0x4000:
            known[1].append(b"%b%c%c%b" % (tag, size & 0x7F | 0x80, size >> 7, item))
        else:
            known[1].append(sized(tag, item))
        self._items += 1
        self._bytes += size + 4
        return self._bytes >= LIMIT

    def rest(self) -> Iterator[Payload]:
        if not self._items:
            return
        found = []
        for resource, items in self._groups.values():
            head, scope = self._head_of(resource)
            inner = sized(b"\x12", b"".join((scope, *items, _SCHEMA)))
            found.append(sized(b"\x0a", b"".join((head, inner, _SCHEMA))))
        payload = Payload(b"".join(found), self._items)
        self._start()
        yield payload


_bits: Final = random.getrandbits
_SCHEMA: Final = sized(b"\x1a", c.SCHEMA_URL.encode())
_ERROR: Final = b"\x7a\x02\x18\x02"
_FLAGS: Final = struct.Struct("<2sI").pack
_ROOT_FLAGS: Final = _FLAGS(b"\x85\x01", 0x1 | _HAS_REMOTE)


def _flags(traceparent: str) -> bytes:
    """Of a child of the application's span: its trace flags, and that the parent is remote."""
    return _FLAGS(b"\x85\x01", int(traceparent[53:55], 16) | _HAS_REMOTE | _IS_REMOTE)


def _place(traceparent: str, state: str, own: Context | None) -> bytes:
    """Trace id, span id, trace state and parent. `own` holds ids that were given before."""
    if own is None and not traceparent:
        ids = _bits(192).to_bytes(24, "big")
        return b"\x0a\x10%b\x12\x08%b" % (ids[:16], ids[16:])
    span_id = own.span_id if own is not None else random.randbytes(8)
    if not traceparent:
        return b"\x0a\x10%b\x12\x08%b" % (own.trace_id if own is not None else random.randbytes(16), span_id)
    trace_id, parent = bytes.fromhex(traceparent[3:35]), bytes.fromhex(traceparent[36:52])
    tracestate = sized(b"\x1a", text(state)) if state else b""
    return b"\x0a\x10%b\x12\x08%b%b\x22\x08%b" % (trace_id, span_id, tracestate, parent)


def _name(name: str, kind: int) -> bytes:
    return b"%b\x30%c" % (sized(b"\x2a", text(name)), kind)


def _link(setup: Setup) -> bytes:
    link = b"\x0a\x10%b\x12\x08%b\x35%b" % (setup.trace_id, setup.span_id, struct.pack("<I", 0x1 | _HAS_REMOTE))
    return sized(b"\x6a", link)
