"""Sightings -> events: query and answer, the pieces of a request head, a connection and its name become one thing.

In: decoded sightings, in the order of the ring. Out: `Event`s, attributed, named where a name is known, with a
duration where there are two ends. Who and what things are called is asked through the callables given at start; the
clock is passed in. Not its job: hiding secrets (redact), counting packets (the kernel does).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from exporter import decode, events
from exporter.decode import Sighting
from exporter.events import Event, Workload
from exporter.health import losses
from exporter.parse import parse_dns, parse_request

QUERIES = 8192  # open at once; a query is given up after QUERY_SECONDS
QUERY_SECONDS = 5
HEADS = 1024  # request heads that have come in part
HEAD_BYTES = 8192
HEAD_SECONDS = 10
SECOND = 1_000_000_000

_SOURCES = {1: events.SNI, 2: events.HOST}  # the low bits of a name's id


class _Query(NamedTuple):
    sighting: Sighting
    who: Workload
    name: str
    type: str


class _Head:
    __slots__ = ("data", "first", "time")

    def __init__(self, first: Sighting) -> None:
        self.first, self.time = first, first.time
        self.data = b""


class Join:
    """`who`: cgroup id -> workload. `name_of`: name id -> the name that was shown. `learned`: (workload, address,
    monotonic ns) -> the name under which that workload resolved the address. `learn`: (workload, name asked,
    (address, TTL in seconds) ..., monotonic ns) remembers an answer. `hidden`: does `exclude` hide this name?
    `to_wall`: CLOCK_MONOTONIC ns -> ns since the epoch."""

    def __init__(
        self,
        who: Callable[[int], Workload],
        name_of: Callable[[int], str],
        learned: Callable[[Workload, str, int], str],
        learn: Callable[[Workload, str, list[tuple[str, int]], int], None],
        hidden: Callable[[str], bool],
        to_wall: Callable[[int], int],
    ) -> None:
        self._who, self._name_of, self._learned, self._learn = who, name_of, learned, learn
        self._hidden, self._to_wall = hidden, to_wall
        self._queries: OrderedDict[tuple[int, int, str, str], _Query] = OrderedDict()
        self._heads: OrderedDict[int, _Head] = OrderedDict()
        self._read = {
            decode.OPENED: self._connection,
            decode.FAILED: self._connection,
            decode.CLOSED: self._connection,
            decode.QUERY: self._query,
            decode.ANSWER: self._answer,
            decode.HELLO: self._hello,
            decode.HEAD: self._head,
            decode.TLS_WRITE: self._tls_write,
        }

    def __len__(self) -> int:
        return len(self._queries) + len(self._heads)

    def add(self, sighting: Sighting) -> Event | None:
        """The event that this sighting completes, if it does."""
        read = self._read.get(sighting.kind)
        if read is None:
            losses.add("decode", "unknown_kind")
            return None
        return read(sighting)

    def name(self, who: Workload, identity: int, address: str, now: int) -> tuple[str, str]:
        """What a peer is called, and whence the name: shown name, learned name, address. `now`: monotonic ns."""
        if identity:
            shown = self._name_of(identity)
            if shown:
                return shown, _SOURCES.get(identity & 3, events.SNI)
        learned = self._learned(who, address, now)
        return (learned, events.DNS_ANSWER) if learned else (address, events.ADDRESS)

    # --- connections ----------------------------------------------------------------------------------------------

    def _connection(self, s: Sighting) -> Event:
        closed = s.kind == decode.CLOSED
        who = self._who(s.cgroup)
        domain, source = self.name(who, s.name, s.peer, s.time)
        duration = s.duration if s.transport == "tcp" else None
        if closed and self._heads.pop(s.cookie, None) is not None:
            losses.add("join", "head_unfinished")  # it waited for its end, and has none
        return Event(
            events.CLOSE if closed else events.CONNECT,
            self._to_wall(s.time if closed else s.time - s.duration),
            who,
            s.pid,
            s.comm,
            s.transport,
            s.role,
            s.local,
            s.local_port,
            s.peer,
            s.port,
            s.scope,
            domain,
            source,
            s.outcome,
            duration,
            s.tx_bytes,
            s.rx_bytes,
            s.retransmits,
            s.rtt_us * 1000 or None,
            cookie=s.cookie,
            filtered=source != events.ADDRESS and self._hidden(domain),
        )

    def _event(self, kind: str, s: Sighting, domain: str, source: str, status: str = "", **more: object) -> Event:
        return Event(
            kind,
            self._to_wall(s.time),
            more.pop("who", None) or self._who(s.cgroup),  # type: ignore[arg-type]  # a Workload
            s.pid,
            s.comm,
            s.transport,
            s.role,
            s.local,
            s.local_port,
            s.peer,
            s.port,
            s.scope,
            domain,
            source,
            status,
            cookie=s.cookie,
            filtered=source != events.ADDRESS and self._hidden(domain),
            **more,  # type: ignore[arg-type]  # fields of Event
        )

    # --- DNS ------------------------------------------------------------------------------------------------------

    def _query(self, s: Sighting) -> Event | None:
        message = parse_dns(s.payload)
        if message is None or message.is_response:
            losses.add("decode", "dns")
            return None
        place = (s.cookie, message.id, message.qname, message.qtype)
        if place in self._queries:  # asked again: the first question's time counts
            return None
        self._queries[place] = _Query(s, self._who(s.cgroup), message.qname, message.qtype)
        if len(self._queries) > QUERIES:
            losses.add("join", "queries_full")
            self._queries.popitem(last=False)
        return None

    def _answer(self, s: Sighting) -> Event | None:
        message = parse_dns(s.payload)
        if message is None or not message.is_response:
            losses.add("decode", "dns")
            return None
        query = self._queries.pop((s.cookie, message.id, message.qname, message.qtype), None)
        if query is None:  # a second answer, one to a question before our time, or a forged one: nothing is learned
            losses.add("join", "answer_without_query")
            return None
        addresses = [(a.data, a.ttl) for a in message.answers if a.type in ("A", "AAAA")]
        if addresses:
            self._learn(query.who, query.name, addresses, s.time)
        return self._event(
            events.DNS,
            query.sighting,
            query.name,
            events.DNS_ANSWER,
            message.rcode,
            who=query.who,
            duration=s.time - query.sighting.time,
            dns_type=query.type,
            answers=tuple(answer.data for answer in message.answers if answer.data),
        )

    # --- names and requests ---------------------------------------------------------------------------------------

    def _hello(self, s: Sighting) -> Event:
        name = s.payload[::-1].decode("ascii", "backslashreplace").rstrip(".").lower()
        if not name:
            domain, source = self.name(self._who(s.cgroup), 0, s.peer, s.time)
            return self._event(events.TLS, s, domain, source, proxy=self._proxy(s))
        return self._event(events.TLS, s, name, events.SNI, proxy=self._proxy(s))

    def _proxy(self, s: Sighting) -> str:
        return f"{s.peer}:{s.port}" if s.flags & decode.PROXIED else ""

    def _head(self, s: Sighting) -> Event | None:
        head = self._heads.get(s.cookie)
        if head is not None and s.offset != len(head.data):
            del self._heads[s.cookie]
            if s.offset:
                losses.add("join", "head_piece_missing")
                return None
            losses.add("join", "head_unfinished")
            head = None
        if head is None:
            if s.offset:  # the rest of a head whose event is out, or whose start was lost
                return None
            head = _Head(s)
        head.data += s.payload
        request = parse_request(head.data)
        if request is None:
            self._heads.pop(s.cookie, None)
            if head.first.offset == 0 and not head.data[:1].isalpha():
                losses.add("decode", "http_head")
            return None
        whole = not request.truncated or s.flags & (decode.TRUNCATED | decode.HEAD_END)
        if not whole and len(head.data) < HEAD_BYTES:
            self._heads[s.cookie] = head
            if len(self._heads) > HEADS:
                losses.add("join", "heads_full")
                self._heads.popitem(last=False)
            return None
        self._heads.pop(s.cookie, None)
        return self._request(events.HTTP, head.first, head.data)

    def _tls_write(self, s: Sighting) -> Event | None:
        return self._request(events.HTTPS, s, s.payload)

    def _request(self, kind: str, s: Sighting, data: bytes) -> Event | None:
        request = parse_request(data)
        if request is None:
            losses.add("decode", "http_head")
            return None
        who = self._who(s.cgroup)
        if request.host:
            domain, source = request.host, events.HOST
        else:
            domain, source = self.name(who, s.name, s.peer, s.time)
        path = request.path + ("?" + request.query if request.query else "")
        if request.method == "CONNECT":
            path = ""
        return self._event(
            kind,
            s,
            domain,
            source,
            who=who,
            method=request.method,
            path=path,
            headers=request.headers,
            proxy=f"{s.peer}:{s.port}" if request.proxied or s.flags & decode.PROXIED else "",
        )

    # --- what never got its other half ----------------------------------------------------------------------------

    def expire(self, now: int) -> Iterator[Event]:
        """Events of queries that were never answered; heads without an end are told as far as they came. `now`:
        CLOCK_MONOTONIC ns."""
        while self._queries:
            place, query = next(iter(self._queries.items()))
            if now - query.sighting.time < QUERY_SECONDS * SECOND:
                break
            del self._queries[place]
            yield self._event(
                events.DNS,
                query.sighting,
                query.name,
                events.DNS_ANSWER,
                "timeout",
                who=query.who,
                duration=now - query.sighting.time,
                dns_type=query.type,
            )
        while self._heads:
            cookie, head = next(iter(self._heads.items()))
            if now - head.time < HEAD_SECONDS * SECOND:
                break
            del self._heads[cookie]
            losses.add("join", "head_unfinished")
            event = self._request(events.HTTP, head.first, head.data)
            if event is not None:
                yield event
