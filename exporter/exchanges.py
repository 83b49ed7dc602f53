"""Requests and responses of HTTP/1 -> exchanges: what was asked, how it was answered, how long it took.

In: sightings of request heads (in pieces, from packets; whole, from TLS libraries) and of the first bytes of responses,
how much of a response has come, ends of connections. Out: `Ended`, once the last byte of a response is known to have
come, or that it never will. Not its job: names, workloads, events (join); HTTP/2.

The kernel tells the first bytes of a response at once, and of the rest only how much there was: where a response ends
is worked out here (RFC 9112 section 6.3). One that comes in one piece, as most do, is over with its first record.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from exporter import decode, events
from exporter.decode import Arrival, Sighting
from exporter.events import SECOND, Exchange
from exporter.health import losses
from exporter.http1 import Request, Response, parse_request, parse_response

HEADS: Final = 1024  # request heads that have come in part
HEAD_BYTES: Final = 8192
OPEN: Final = 8192  # connections with a request that waits for the end of its response
HEAD_SECONDS: Final = 10
OPEN_SECONDS: Final = 3600  # a response may take its time; a connection whose end was lost has none
QUIET_SECONDS: Final = 5  # a response whose end nothing tells is over when nothing has come for so long
PIPELINED: Final = 64  # requests on one connection that wait

# What a failed connection is called in error.type.
ERRORS: Final = {"reset": "connection_reset", "timed_out": "timed_out", "ok": "connection_closed"}
_new: Final = tuple.__new__


class Ended(NamedTuple):
    """`first`: the sighting with which the request began. `duration` in ns, None where the end is not known."""

    kind: str
    first: Sighting
    request: Request
    exchange: Exchange
    duration: int | None


class _Head:
    __slots__ = ("data", "first", "time")

    def __init__(self, first: Sighting) -> None:
        self.first, self.time = first, first.time
        self.data = b""


class _Open:
    """A request whose response has not come to its end. `size`: of its head, where its body is chunked. `whole`: bytes
    of the response, head included, where that is known; `come`: how many there are, the last of them at `last`."""

    __slots__ = (
        "chunked",
        "come",
        "first",
        "first_byte",
        "kind",
        "last",
        "request",
        "response",
        "sent",
        "size",
        "whole",
    )

    def __init__(self, kind: str, first: Sighting, request: Request, size: int) -> None:
        self.kind, self.first, self.request, self.size = kind, first, request, size
        self.response: Response | None = None
        self.first_byte: int | None = None
        self.come = self.sent = 0
        self.last = first.time
        self.whole: int | None = None
        self.chunked = False


class Exchanges:
    """`received`: cookie -> (bytes of the response that have come, when the last did), as the kernel counts them for
    responses of more than one piece; None where it has none. `place`: a request inside TLS, its host and
    its number on its connection -> the same with what is known of its connection."""

    def __init__(
        self,
        received: Callable[[int], tuple[int, int] | None],
        place: Callable[[Sighting, str, int], Sighting],
    ) -> None:
        self._received, self._place = received, place
        # Both by the connection's cookie; who asks whether there is one saves a call.
        self.heads: OrderedDict[int, _Head] = OrderedDict()
        self.waiting: dict[int, list[_Open]] = {}
        self._coming: dict[int, _Open] = {}  # responses of more than one piece
        self.ended: list[Ended] = []  # whoever takes them clears it

    def __len__(self) -> int:
        return len(self.heads) + len(self.waiting)

    def open(self) -> Iterator[Ended]:
        """Requests that wait for the end of their response: as if they ended now, without an outcome."""
        for waiting in self.waiting.values():
            for one in waiting:
                request = one.request
                scheme = "https" if one.kind == events.HTTPS else "http"
                exchange = Exchange(request.version or "1.1", scheme, server_port=request.port or 0)
                yield Ended(one.kind, one.first, request, exchange, None)

    # --- requests -------------------------------------------------------------------------------------------------

    def head(self, s: Sighting) -> None:
        """A piece of a request head."""
        head = self.heads.get(s.cookie)
        if head is None and not s.offset and s.flags & decode.HEAD_END:  # in one piece, as most are
            request = parse_request(s.payload)
            if request is not None:
                self._begin(events.HTTP, s.cookie, s, request, s.payload)
            return
        if head is not None and s.offset != len(head.data):
            del self.heads[s.cookie]
            if s.offset:
                losses.add("join", "head_piece_missing")
                return
            losses.add("join", "head_unfinished")
            head = None
        if head is None:
            if s.offset:  # the rest of a head whose event is out, or whose start was lost
                return
            head = _Head(s)
        head.data += s.payload
        request = parse_request(head.data)
        ended = s.flags & (decode.TRUNCATED | decode.HEAD_END) or len(head.data) >= HEAD_BYTES
        if request is None and (ended or b"\n" in head.data):
            self.heads.pop(s.cookie, None)  # it has a whole first line, and that is no request line
            return
        if not ended and (request is None or request.truncated):
            self.heads[s.cookie] = head
            if len(self.heads) > HEADS:
                losses.add("join", "heads_full")
                self.heads.popitem(last=False)
            return
        self.heads.pop(s.cookie, None)
        if request is not None:
            self._begin(events.HTTP, s.cookie, head.first, request, head.data)

    def tls_head(self, s: Sighting) -> None:
        """What an application handed to its TLS library, and looks like a request."""
        request = parse_request(s.payload)
        if request is None:
            losses.add("decode", "http_head")
        else:
            placed = self._place(s, request.host, s.sequence)
            self._begin(events.HTTPS, s.cookie, placed, request, s.payload)

    def _begin(self, kind: str, cookie: int, first: Sighting, request: Request, data: bytes) -> None:
        one = _Open(kind, first, request, head_size(data) if request.chunked else 0)
        waiting = self.waiting.get(cookie)
        if waiting is None:
            self.waiting[cookie] = [one]
            if len(self.waiting) > OPEN:
                losses.add("join", "exchanges_full")
                self._give_up(next(iter(self.waiting)), "", "lost")
            return
        # A response whose end nothing told is over when the next request begins.
        if waiting[0].response is not None:
            self._end(cookie, waiting[0])
            waiting = self.waiting.setdefault(cookie, [])
        if len(waiting) >= PIPELINED:
            losses.add("join", "exchanges_full")
            self._give_up(cookie, "", "lost")
            waiting = self.waiting.setdefault(cookie, [])
        waiting.append(one)

    # --- responses ------------------------------------------------------------------------------------------------

    def response(self, s: Arrival) -> None:
        """The first bytes of a response, or what comes where one was expected."""
        waiting = self.waiting.get(s.cookie)
        if not waiting:
            losses.add("join", "response_without_request")
            return
        data, size = s.payload, s.rx_bytes
        one = waiting[0]
        if one.response is not None:  # the rest of it; the kernel expected the next, of a pipelined request
            missing = (one.whole if one.whole is not None else one.come + size) - one.come
            self._more(s.cookie, one, one.come + min(size, missing), s.time, False)
            data, size = data[missing:], size - missing
        while size > 0 and (waiting := self.waiting.get(s.cookie)):
            one = waiting[0]
            if one.response is not None:
                return
            response = parse_response(data)
            if response is None:
                if one.first_byte is None:
                    losses.add("decode", "http_response")
                return
            if response.status < 200 and response.status != 101:  # the final one follows
                if response.size is None:
                    return
                data, size = data[response.size :], size - response.size
                continue
            one.response, one.first_byte, one.sent = response, s.time - one.first.time, s.tx_bytes
            one.whole = _whole(one.request.method, response)
            one.chunked = one.whole is None and response.chunked
            if one.whole is not None and one.whole <= size:
                one.come, one.last = one.whole, s.time
                self._end(s.cookie, one)
                data, size = data[one.whole :], size - one.whole
                continue
            last = one.chunked and len(data) == size and data.endswith(b"0\r\n\r\n")
            self._more(s.cookie, one, size, s.time, last)
            return

    def received(self, s: Arrival) -> None:
        """How far a response has come."""
        waiting = self.waiting.get(s.cookie)
        if waiting and waiting[0].response is not None:
            self._more(s.cookie, waiting[0], s.rx_bytes, s.time, bool(s.flags & decode.LAST_CHUNK))

    def _more(self, cookie: int, one: _Open, come: int, now: int, last_chunk: bool) -> None:
        one.come, one.last = max(one.come, come), now
        if (one.whole is not None and one.come >= one.whole) or (last_chunk and one.chunked):
            self._end(cookie, one)
        else:
            self._coming[cookie] = one

    # --- ends -----------------------------------------------------------------------------------------------------

    def closed(self, s: Sighting) -> None:
        """The connection is over, and with it what was under way."""
        if (head := self.heads.pop(s.cookie, None)) is not None and parse_request(head.data):
            losses.add("join", "head_unfinished")  # it waited for its end, and has none
        if s.cookie in self.waiting:
            self._give_up(s.cookie, ERRORS.get(s.outcome, "connection_closed"), "", s.time)

    def _give_up(self, cookie: int, error: str, partial: str, now: int = 0) -> None:
        for one in list(self.waiting.get(cookie, ())):
            if one.response is None:
                one.last = now
            complete = one.response is not None and one.whole is None and not one.chunked
            self._end(cookie, one, "" if complete else error, partial)

    def _end(self, cookie: int, one: _Open, error: str = "", partial: str = "") -> None:
        waiting = self.waiting[cookie]
        waiting.remove(one)
        if not waiting:
            del self.waiting[cookie]
        if self._coming.get(cookie) is one:
            del self._coming[cookie]
        first, request, response = one.first, one.request, one.response
        sent = request.body
        if request.chunked and response is not None:  # with its framing
            sent = max(0, one.sent - one.size)
        if response is None:
            version, status, first_byte, body, grpc = request.version or "1.1", 0, None, None, None
            duration = None if partial else one.last - first.time
        else:
            version, status, first_byte, grpc = response.version, response.status, one.first_byte, response.grpc_status
            body = one.come - response.size if response.size is not None and one.come >= response.size else None
            duration = one.last - first.time
        exchange = _new(
            Exchange,
            (
                version,
                "https" if one.kind == events.HTTPS else "http",
                status,
                error,
                first_byte,
                sent,
                body,
                grpc,
                request.traceparent,
                first.sequence,
                partial,
                request.tracestate,
                request.port or 0,
            ),
        )
        self.ended.append(_new(Ended, (one.kind, first, request, exchange, duration)))

    def expire(self, now: int) -> None:
        """Look after responses that come in pieces; give up what waits for too long. `now`: CLOCK_MONOTONIC ns."""
        for cookie, one in list(self._coming.items()):
            found = self._received(cookie)
            if found is not None and found[1] >= one.last:
                self._more(cookie, one, *found, False)
            if (
                cookie in self._coming
                and now - one.last > QUIET_SECONDS * SECOND
                and not one.chunked
                and one.whole is None
            ):
                self._end(cookie, one)
        while self.heads:
            cookie, head = next(iter(self.heads.items()))
            if now - head.time < HEAD_SECONDS * SECOND:
                break
            del self.heads[cookie]
            request = parse_request(head.data)
            if request:  # else letters that became no request line
                losses.add("join", "head_unfinished")
                self._begin(events.HTTP, cookie, head.first, request, head.data)
        while self.waiting:
            cookie = next(iter(self.waiting))
            if now - self.waiting[cookie][0].first.time < OPEN_SECONDS * SECOND:
                break
            losses.add("join", "exchange_without_end")
            self._give_up(cookie, "", "lost")


def head_size(data: bytes) -> int:
    """Bytes up to the end of the empty line; all of them where there is none."""
    end = data.find(b"\r\n\r\n")
    if end >= 0:
        return end + 4
    end = data.find(b"\n\n")
    return end + 2 if end >= 0 else len(data)


def _whole(method: str, response: Response) -> int | None:
    """Bytes of head and body, RFC 9112 section 6.3; None where the head does not tell."""
    if response.size is None:
        return None
    bodiless = method == "HEAD" or response.status in (101, 204, 304) or (method == "CONNECT" and response.status < 300)
    if bodiless:
        return response.size
    if response.chunked or response.length is None:
        return None
    return response.size + response.length
