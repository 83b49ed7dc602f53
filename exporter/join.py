"""Sightings -> events: what belongs together becomes one thing, with a workload and a name. Each protocol has a module
of its own, which this one asks: lookups (DNS), handshakes (TLS, QUIC), exchanges (HTTP/1), http2; encrypted knows the
sockets of requests inside TLS.

In: decoded sightings, in the order of the ring. Out: `Event`s, attributed, named where a name is known, with a
duration where there are two ends. Who and what things are called is asked through the callables given at start; the
clock is passed in. Not its job: hiding secrets (redact), counting packets (the kernel does).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, Final

from exporter import decode, events
from exporter.decode import Arrival, Message, Piece, Sighting, Step
from exporter.encrypted import MATCHED, SOCKETS, Encrypted
from exporter.events import Event, Exchange, Tls, Workload
from exporter.exchanges import ERRORS, HEADS, OPEN, Ended, Exchanges
from exporter.handshakes import HANDSHAKES, QUIC_HANDSHAKES, Handshake, Handshakes
from exporter.health import losses
from exporter.http1 import has_credentials, split_authority, valid_traceparent
from exporter.http2 import UNFINISHED, Finished, Http2
from exporter.lookups import HELD, QUERIES, STREAMS, Lookups

_SOURCES: Final = {1: events.SNI, 2: events.HOST}  # the low bits of a name's id
LEFT_SECONDS: Final = 2  # what came before a socket's end may be read after it


# Event(...) sorts 34 arguments by name, at three times the cost; hence tuples in the order of its fields.
_new: Final = tuple.__new__
assert len(Event._fields) == 34


Seen = Sighting | Message | Piece | Step | Arrival


class _Readers(dict[int, Callable[[Any], Event | None]]):
    """By kind of sighting."""

    def __missing__(self, kind: int) -> Callable[[Any], Event | None]:
        return self._unknown

    @staticmethod
    def _unknown(sighting: Any) -> None:
        losses.add("decode", "unknown_kind")


class Join:
    """`who`: cgroup id -> workload. `name_of`: name id -> the name that was shown. `learned`: (workload, address,
    monotonic ns) -> the name under which that workload resolved the address. `learn`: (workload, name asked,
    (address, TTL in seconds) ..., monotonic ns) remembers an answer. `hidden`: does `exclude` hide this name?
    `to_wall`: CLOCK_MONOTONIC ns -> ns since the epoch. `received`: see Exchanges. `hidden_place`: does
    it hide whom a request is for (workload, host, monotonic ns) whose connection is not known?"""

    def __init__(
        self,
        who: Callable[[int], Workload],
        name_of: Callable[[int], str],
        learned: Callable[[Workload, str, int], str],
        learn: Callable[[Workload, str, tuple[tuple[str, int], ...], int], None],
        hidden: Callable[[str], bool],
        to_wall: Callable[[int], int],
        received: Callable[[int], tuple[int, int] | None],
        hidden_place: Callable[[Workload, str, int], bool] = lambda who, host, now: False,
    ) -> None:
        self._who, self._name_of, self._learned = who, name_of, learned
        self._hidden, self._hidden_place, self._to_wall = hidden, hidden_place, to_wall
        self._lookups = Lookups(who, learn, hidden, to_wall)
        self._encrypted = Encrypted()
        self._exchanges = Exchanges(received, self._encrypted.place)
        self._handshakes = Handshakes(self._tls, self._encrypted.opened)
        self._ended: deque[Event] = deque()  # by what ended something else
        self._left: deque[Sighting] = deque()  # ends of sockets, with the cookie of the TLS library's connection
        self._http2: Http2[Sighting] = Http2(self._begun)
        self._finished: list[Finished[Sighting]] = []
        self._read = _Readers(
            {
                decode.OPENED: self._connection,
                decode.FAILED: self._connection,
                decode.CLOSED: self._connection,
                decode.QUERY: self._lookups.query,
                decode.ANSWER: self._lookups.answer,
                decode.QUERY_PIECE: self._lookups.query_piece,
                decode.ANSWER_PIECE: self._lookups.answer_piece,
                decode.HELLO: self._handshakes.hello,
                decode.HEAD: self._exchanges.head,
                decode.TLS_WRITE: self._exchanges.tls_head,
                decode.RESPONSE: self._exchanges.response,
                decode.RECEIVED: self._exchanges.received,
                decode.TLS_CLOSED: self._tls_closed,
                decode.SERVER_HELLO: self._handshakes.answer,
                decode.HANDSHAKE_END: self._handshakes.end,
                decode.QUIC_INITIAL: self._handshakes.initial,
                decode.FRAMES_OUT: self._frames,
                decode.FRAMES_IN: self._frames,
            }
        )

    room = QUERIES + HELD + STREAMS + HEADS + OPEN + HANDSHAKES + QUIC_HANDSHAKES + SOCKETS + MATCHED

    def __len__(self) -> int:
        tables = self._lookups, self._exchanges, self._handshakes, self._http2, self._encrypted
        return sum(len(table) for table in tables)

    def add(self, sighting: Seen) -> Event | None:
        """The event that this sighting completes, if it does."""
        return self._read[sighting.kind](sighting)

    def add_all(self, sightings: Iterable[Seen]) -> list[Event]:
        """`add` for some hundred, without a call for each."""
        read = self._read
        return [event for sighting in sightings if (event := read[sighting.kind](sighting)) is not None]

    def name(self, who: Workload, identity: int, address: str, now: int) -> tuple[str, str]:
        """What a peer is called, and whence the name: shown name, learned name, address. `now`: monotonic ns."""
        if identity:
            # Counters pass no redaction. The kernel takes no name with an @ from a Host; a ClientHello may have one.
            shown = self._name_of(identity)
            if "@" in shown:
                shown = shown.rpartition("@")[2]
            if shown:
                return shown, _SOURCES.get(identity & 3, events.SNI)
        learned = self._learned(who, address, now)
        return (learned, events.DNS_ANSWER) if learned else (address, events.ADDRESS)

    # --- connections ----------------------------------------------------------------------------------------------

    def _connection(self, s: Sighting) -> Event:
        (
            kind,
            time,
            cgroup,
            cookie,
            identity,
            pid,
            comm,
            transport,
            role,
            scope,
            local,
            local_port,
            peer,
            port,
            outcome,
            flags,
            lasted,
            tx_bytes,
            rx_bytes,
            retransmits,
            rtt_us,
            *_,
        ) = s
        closed = kind == decode.CLOSED
        who = self._who(cgroup)
        domain, source = self.name(who, identity, peer, time)
        if closed:
            self._closed(s)
        return _new(
            Event,
            (
                events.CLOSE if closed else events.CONNECT,
                self._to_wall(time if closed else time - lasted),
                who,
                pid,
                comm,
                transport,
                role,
                local,
                local_port,
                peer,
                port,
                scope,
                domain,
                source,
                outcome,
                lasted if transport == "tcp" else None,
                tx_bytes,
                rx_bytes,
                retransmits,
                rtt_us * 1000 or None,
                "",
                (),
                "",
                "",
                (),
                "",
                cookie,
                flags & decode.EXCLUDED != 0 or (source != events.ADDRESS and self._hidden(domain)),
                None,
                None,
                False,
                "",
                False,
                flags & decode.REDIRECTED != 0,
            ),
        )

    def _event(
        self,
        kind: str,
        s: Sighting,
        who: Workload,
        domain: str,
        source: str,
        status: str = "",
        duration: int | None = None,
        dns_type: str = "",
        answers: tuple[str, ...] = (),
        method: str = "",
        path: str = "",
        headers: tuple[tuple[str, str], ...] = (),
        proxy: str = "",
        exchange: Exchange | None = None,
        tls: Tls | None = None,
        credentials: bool = False,
    ) -> Event:
        # One step for all, where each s.name is a look into a dictionary.
        (
            _kind,
            time,
            _cgroup,
            cookie,
            _name,
            pid,
            comm,
            transport,
            role,
            scope,
            local,
            local_port,
            peer,
            port,
            _outcome,
            flags,
            *_,
        ) = s
        return _new(
            Event,
            (
                kind,
                self._to_wall(time),
                who,
                pid,
                comm,
                transport,
                role,
                local,
                local_port,
                peer,
                port,
                scope if peer else "",
                domain,
                source,
                status,
                duration,
                0,
                0,
                0,
                None,
                dns_type,
                answers,
                method,
                path,
                headers,
                proxy,
                cookie,
                (source != events.ADDRESS and self._hidden(domain))
                or (not peer and self._hidden_place(who, domain, time)),
                exchange,
                tls,
                False,
                "",
                credentials,
                flags & decode.REDIRECTED != 0,
            ),
        )

    # --- names and requests ---------------------------------------------------------------------------------------

    def _tls(self, handshake: Handshake) -> Event:
        s, identity, name, whole, status, duration, told = handshake
        who = self._who(s.cgroup)
        if name:
            source = events.SNI
        else:  # a hello without a name; or one of which a part is missing, and the kernel has read the name in it
            name, source = self.name(who, 0 if whole else identity, s.peer, s.time)
        return self._event(events.TLS, s, who, name, source, status, duration, proxy=self._proxy(s), tls=told)

    @staticmethod
    def _proxy(s: Sighting, proxied: bool = False) -> str:
        return f"{s.peer}:{s.port}" if proxied or s.flags & decode.PROXIED else ""

    def _exchange(self, ended: Ended) -> Event:
        kind, s, request, exchange, duration = ended
        who = self._who(s.cgroup)
        if request.host:
            domain, source = request.host, events.HOST
        else:
            domain, source = self.name(who, s.name, s.peer, s.time)
        return self._event(
            kind,
            s,
            who,
            domain,
            source,
            duration=duration,
            method=request.method,
            path="" if request.method == "CONNECT" else request.path + ("?" + request.query if request.query else ""),
            headers=request.headers,
            proxy=self._proxy(s, request.proxied),
            exchange=exchange,
            credentials=kind == events.HTTP and request.credentials,
        )

    def open_requests(self) -> Iterator[tuple[Event, int]]:
        """Requests without the end of their response: one of those that are alike, as an event without an outcome, and
        how many these are."""
        alike: dict[tuple[Any, ...], tuple[Ended | Finished[Sighting], list[int]]] = {}
        for one in self._under_way():
            if isinstance(one, Ended):
                s, request = one.first, one.request
                asked: tuple[Any, ...] = (one.kind, request.method, request.host, request.port, request.proxied)
            else:
                s, asked = one.context, (one.context.cookie >> 63, one.method, one.authority)
            count = alike.setdefault((s.cgroup, s.pid, s.name, s.peer, s.port, *asked), (one, [0]))[1]
            count[0] += 1
        for one, count in alike.values():
            yield self._exchange(one) if isinstance(one, Ended) else self._http2_exchange(one), count[0]

    def busy(self, known: Container[int]) -> Iterator[tuple[int, Event | None]]:
        """Sockets on which a request waits for the end of its response: the cookie and, unless `known` has it, the
        request as an event without an outcome."""
        seen = set()
        for one in self._under_way():
            cookie = one.first.cookie if isinstance(one, Ended) else one.context.cookie
            if cookie in seen or cookie >> 63:  # what TLS libraries were handed
                continue
            seen.add(cookie)
            if cookie in known:
                yield cookie, None
            else:
                yield cookie, self._exchange(one) if isinstance(one, Ended) else self._http2_exchange(one)

    def _under_way(self) -> Iterator[Ended | Finished[Sighting]]:
        for ended in self._exchanges.open():
            if ended.first.role != events.SERVER:
                yield ended
        for finished in self._http2.open():
            if finished.context.role != events.SERVER:
                yield finished

    def _closed(self, s: Sighting) -> None:
        """What was under way on a connection that is over: of most connections nothing."""
        cookie = s.cookie
        self._lookups.closed(cookie)
        if cookie in self._handshakes.open and (event := self._handshakes.closed(s)) is not None:
            self._ended.append(event)
        if cookie in self._exchanges.waiting or cookie in self._exchanges.heads:
            self._exchanges.closed(s)
        if cookie in self._encrypted.sockets:
            library = self._encrypted.closed(cookie)
            if library in self._exchanges.waiting or library in self._http2.connections:
                self._left.append(s._replace(cookie=library))
        if cookie in self._http2.connections:
            self._finished += self._http2.closed(cookie, s.time, ERRORS.get(s.outcome, "connection_closed"))

    def _tls_closed(self, s: Sighting) -> None:
        self._closed(s)
        self._encrypted.matched.pop(s.cookie, None)

    def _abandoned(self, s: Sighting) -> None:
        """A while ago a socket closed, and its TLS library has not said goodbye: its process was killed, or ended as
        many do. What was asked before that has no answer."""
        waiting = self._exchanges.waiting.get(s.cookie)
        if waiting and waiting[0].first.time < s.time:
            self._exchanges.closed(s)
        if s.cookie in self._http2.connections:
            self._finished += self._http2.closed(s.cookie, s.time, ERRORS.get(s.outcome, "connection_closed"))

    def _begun(self, s: Sighting, authority: str, sequence: int) -> Sighting:
        """A request of HTTP/2. Inside TLS the first says what its connection is."""
        if not s.cookie >> 63:
            return s
        return self._encrypted.place(s, split_authority(authority)[0] if sequence == 1 else "", sequence)

    def _frames(self, s: Sighting) -> None:
        self._finished += self._http2.add(
            s.cookie,
            s.kind == decode.FRAMES_OUT,
            s.offset,
            s.sequence,
            bool(s.flags & decode.BROKEN),
            s.payload,
            s.time,
            s,
        )

    def _http2_exchange(self, done: Finished[Sighting]) -> Event:
        s = done.context
        who = self._who(s.cgroup)
        # What TLS libraries were handed: no socket has such a number.
        inside = s.cookie >> 63 or s.flags & decode.INSIDE
        domain, port = split_authority(done.authority)
        source = events.HOST
        if not domain:
            domain, source = self.name(who, s.name, s.peer, s.time)
        return self._event(
            events.HTTPS if inside else events.HTTP,
            s,
            who,
            domain,
            source,
            duration=None if done.error == UNFINISHED else done.ended - done.began,
            method=done.method,
            path=done.path,
            headers=done.headers,
            proxy=self._proxy(s),
            exchange=Exchange(
                "2",
                "https" if inside else "http",
                done.status,
                done.error,
                done.first_byte - done.began if done.first_byte is not None else None,
                done.request_size,
                done.response_size,
                done.grpc_status,
                valid_traceparent(done.traceparent),
                done.sequence,
                done.partial,
                server_port=port or 0,
            ),
            credentials=not inside and ("@" in done.authority or has_credentials(done.headers)),
        )

    # --- what never got its other half ----------------------------------------------------------------------------

    def close(self) -> Iterator[Event]:
        """What is held back for a moment, at the end."""
        return self._lookups.close()

    def expire(self, now: int) -> Iterator[Event]:
        """What is over since the last call without being anybody's event: requests, handshakes, and lookups that were
        held or never answered. `now`: CLOCK_MONOTONIC ns."""
        while self._ended:
            yield self._ended.popleft()
        yield from self._handshakes.expire(now)
        yield from self._lookups.expire(now)
        while self._left and now - self._left[0].time > LEFT_SECONDS * events.SECOND:
            self._abandoned(self._left.popleft())
        self._exchanges.expire(now)
        ended, self._exchanges.ended = self._exchanges.ended, []
        for one in ended:
            yield self._exchange(one)
        self._finished += self._http2.expire(now)
        finished, self._finished = self._finished, []
        for done in finished:
            yield self._http2_exchange(done)
