"""DNS messages -> lookups: a question and its answer, over UDP or TCP, and what a search list made of one name.

In: `decode.Message`s (a datagram each) and `decode.Piece`s (of a TCP stream), in the order of the ring. Out: `Event`s
of kind dns. Not its job: reading what a message says (dns), names of addresses (they are handed on to `learn`).

A resolver with a search list asks for web.ns.svc.cluster.local, web.svc.cluster.local, ... until a name exists. The
ones before are no failures (D3): an answer NXDOMAIN is held for HOLD, to see what the same process asks next.

Over TCP each message stands behind its length (RFC 1035 section 4.2.2), cut into segments as TCP likes, and several may
be under way. Pieces are put in order by sequence number; what the ring lost is given up at the next segment that begins
with a message, which most do.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from exporter import decode, events
from exporter.decode import Message, Piece
from exporter.dns import DnsMessage, parse_dns
from exporter.events import SECOND, Event, Workload
from exporter.health import losses

QUERIES: Final = 8192  # open at once; a query is given up after QUERY_SECONDS
QUERY_SECONDS: Final = 5
HELD = 4096
HOLD: Final = 1_000_000_000  # ns
ADJACENT: Final = 100_000_000  # ns from one answer to the next question of the same search
ENDINGS: Final = 1024
STREAMS = 512
STREAM_SECONDS: Final = 60
WAITING: Final = 16  # pieces of a stream that came early

_SEARCH_AT: Final = Event._fields.index("search_expansion")
_HALF: Final = 1 << 31
_MASK: Final = (1 << 32) - 1
_new: Final = tuple.__new__


class _Held:
    """An answer NXDOMAIN that may turn out to be no failure. `asked`, `answered`: CLOCK_MONOTONIC ns."""

    __slots__ = ("answered", "asked", "event", "out")

    def __init__(self, event: Event, asked: int, answered: int) -> None:
        self.event, self.asked, self.answered = event, asked, answered
        self.out = False


class _Stream:
    """One direction of a TCP connection: bytes from `next` on, behind the start of a message."""

    __slots__ = ("buffer", "early", "first", "loose", "next", "seen", "told")

    def __init__(self, piece: Piece) -> None:
        self.seen, self.early = piece.time, dict[int, Piece]()
        self.loose = self.told = False  # what comes next may leave a gap; a message has come out
        self.begin(piece)

    def begin(self, piece: Piece) -> None:
        """A message begins with this piece."""
        self.next, self.first, self.buffer, self.loose = piece.sequence, piece, b"", False


class Lookups:
    """`who`: cgroup id -> workload. `learn`: (workload, name asked, (address, TTL in seconds) ..., monotonic ns)
    remembers an answer. `hidden`: does `exclude` hide this name? `to_wall`: CLOCK_MONOTONIC ns -> ns since the epoch.
    `expire` brings what was held and what was never answered; call it a few times a second."""

    def __init__(
        self,
        who: Callable[[int], Workload],
        learn: Callable[[Workload, str, tuple[tuple[str, int], ...], int], None],
        hidden: Callable[[str], bool],
        to_wall: Callable[[int], int],
    ) -> None:
        self._who, self._learn, self._hidden, self._to_wall = who, learn, hidden, to_wall
        self._queries: OrderedDict[tuple[int, bytes], Message] = OrderedDict()
        self._held: deque[_Held] = deque()  # in the order of their answers
        self._searches: dict[tuple[int, int, str, str], list[_Held]] = {}
        self._endings: set[str] = set()  # of search lists, as names told them
        self._streams: OrderedDict[tuple[int, int], _Stream] = OrderedDict()
        self._ready: list[Event] = []

    def __len__(self) -> int:
        return len(self._queries) + len(self._held) + len(self._streams)

    # --- question and answer --------------------------------------------------------------------------------------

    # A query is read when its answer comes, or when none does: until then only their common place matters.

    def query(self, query: Message) -> None:
        """A question left."""
        queries, place = self._queries, query.place
        if place in queries:  # asked again: the first question's time counts
            return
        queries[place] = query
        if len(queries) > QUERIES:
            losses.add("join", "queries_full")
            queries.popitem(last=False)

    def query_piece(self, piece: Piece) -> None:
        """A part of a stream of questions left."""
        for message in self._feed(piece):
            self.query(message)

    def answer_piece(self, piece: Piece) -> Event | None:
        """A part of a stream of answers came: a lookup that it ends. Of several, `expire` brings the rest."""
        for message in self._feed(piece):
            event = self.answer(message)
            if event is not None:
                self._ready.append(event)
        return self._ready.pop(0) if self._ready else None

    def answer(self, answer: Message) -> Event | None:
        """An answer came: the lookup that it ends, unless that is held."""
        query = self._queries.get(answer.place)
        if query is None:  # a second answer, one to a question before our time, or a forged one: nothing is learned
            losses.add("join", "answer_without_query")
            return None
        message = parse_dns(decode.payload(answer.record))
        if message is None:
            losses.add("decode", "dns")
            return None
        del self._queries[answer.place]
        event = self._lookup(query, answer.time, message, message.rcode)
        if event is None:
            return None
        if message.addresses:
            self._learn(event.workload, message.qname, message.addresses, answer.time)
        if message.rcode == "NXDOMAIN":
            self._hold(event, query.time, answer.time)
            return None
        if self._held and message.rcode == "NOERROR":
            self._found(event, query.time)
        return event

    def _lookup(self, query: Message, end: int, message: DnsMessage, status: str) -> Event | None:
        asked = decode.whole(query.record)
        if asked is None:
            return None
        (
            _,
            time,
            cgroup,
            cookie,
            _,
            pid,
            comm,
            transport,
            role,
            scope,
            local,
            local_port,
            peer,
            port,
            *_,
        ) = asked
        name = message.qname
        return _new(
            Event,
            (
                events.DNS,
                self._to_wall(time),
                self._who(cgroup),
                pid,
                comm,
                transport,
                role,
                local,
                local_port,
                peer,
                port,
                scope,
                name,
                events.DNS_ANSWER,
                status,
                end - time,
                0,
                0,
                0,
                None,
                message.qtype,
                message.answers,
                "",
                "",
                (),
                "",
                cookie,
                self._hidden(name),
                None,
                None,
                False,
                "",
                False,
                asked.flags & decode.REDIRECTED != 0,
            ),
        )

    # --- search lists ---------------------------------------------------------------------------------------------

    def _hold(self, event: Event, asked: int, answered: int) -> None:
        held = _Held(event, asked, answered)
        self._held.append(held)
        self._searches.setdefault(_search(event), []).append(held)
        if len(self._held) > HELD:
            self._release(self._held.popleft())

    def _found(self, event: Event, asked: int) -> None:
        """A name exists. What the same process asked before it, for the same name with another ending, was the search
        for it."""
        key = _search(event)
        group = self._searches.get(key)
        if group is None:
            return
        after, name = asked, event.domain
        for held in reversed(group):  # each question of a search follows the answer before it at once
            if held.answered > asked:
                continue
            other = held.event.domain
            if _extends(other, name):
                self._remember(other[len(name) + 1 :])
            elif not _extends(name, other) and (after - held.answered > ADJACENT or not self._alike(other, name)):
                continue
            after = held.asked
            held.out = True
            self._ready.append(_marked(held.event))
        rest = [held for held in group if not held.out]
        if rest:
            self._searches[key] = rest
        else:
            del self._searches[key]

    def _alike(self, a: str, b: str) -> bool:
        """Whether two names that begin alike may be one with two endings of a search list: an ending that was seen to
        be one, or two of which one goes on as the other does (ns.svc.cluster.local, svc.cluster.local)."""
        labels, others = a.split("."), b.split(".")
        same = 0
        while same < min(len(labels), len(others)) and labels[same] == others[same]:
            same += 1
        end, other = ".".join(labels[same:]), ".".join(others[same:])
        return end in self._endings or end.endswith(f".{other}") or other.endswith(f".{end}")

    def _remember(self, ending: str) -> None:
        if len(self._endings) >= ENDINGS:
            self._endings.clear()
        self._endings.add(ending)

    def _release(self, held: _Held) -> None:
        """Its time is over. Where the same process asked in vain for the name without the ending later, that is the
        failure, and this was the search."""
        if held.out:
            return
        key = _search(held.event)
        group = self._searches[key]
        group.remove(held)
        if not group:
            del self._searches[key]
        later = any(other.asked >= held.answered and _extends(held.event.domain, other.event.domain) for other in group)
        self._ready.append(_marked(held.event) if later else held.event)

    # --- TCP ------------------------------------------------------------------------------------------------------

    def _feed(self, piece: Piece) -> list[Message]:
        """The messages that this piece completes."""
        key = (piece.cookie, piece.kind)
        stream = self._streams.pop(key, None)
        if stream is None:
            stream = _Stream(piece)
            if len(self._streams) >= STREAMS:
                self._streams.popitem(last=False)
                losses.add("join", "dns_streams_full")
        self._streams[key] = stream
        stream.seen = piece.time
        if not stream.told and 0 < (stream.first.sequence - piece.sequence) & _MASK < _HALF:
            if len(stream.early) < WAITING:
                stream.early[stream.first.sequence] = stream.first  # what came first was not the first
            else:
                losses.add("join", "dns_stream_gap")
            stream.begin(piece)
        if 0 < (piece.sequence - stream.next) & _MASK < _HALF:
            if stream.loose:
                stream.begin(piece)
            else:
                stream.early[piece.sequence] = piece
                if len(stream.early) <= WAITING:
                    return []
                losses.add("join", "dns_stream_gap")  # go on with the first there is
                piece = stream.early.pop(min(stream.early, key=lambda at: (at - stream.next) & _MASK))
                stream.begin(piece)
        found: list[Message] = []
        next_piece: Piece | None = piece
        while next_piece is not None:
            self._append(stream, next_piece, found)
            at = next((at for at in stream.early if (stream.next - at) & _MASK < _HALF), None)
            next_piece = stream.early.pop(at) if at is not None else None
        return found

    def _append(self, stream: _Stream, piece: Piece, found: list[Message]) -> None:
        data = piece.payload[(stream.next - piece.sequence) & _MASK :]
        if not data:
            return  # sent again
        if not stream.buffer:
            stream.first = piece
        stream.next, stream.loose = (piece.sequence + len(piece.payload)) & _MASK, piece.cut
        stream.buffer += data
        while len(stream.buffer) >= 8:
            size = int.from_bytes(stream.buffer[:2], "big") + 2
            if not decode.plausible(piece.kind, stream.buffer[2:8]):
                stream.buffer = b""  # out of step
                return
            whole = len(stream.buffer) >= size
            if not whole and not piece.cut:
                return
            # A question was asked with its first byte, an answer is there with its last.
            message = decode.message(stream.first if piece.kind == decode.QUERY_PIECE else piece, stream.buffer[2:size])
            if message is not None:
                found.append(message)
                stream.told = True
            if not whole:
                # The kernel shows so much of a packet and no more: the rest of this message passes unseen.
                stream.next = (stream.next + size - len(stream.buffer)) & _MASK
            stream.buffer, stream.first = stream.buffer[size:], piece
        if piece.cut:
            stream.buffer = b""

    def closed(self, cookie: int) -> None:
        """The connection is over."""
        if self._streams:
            self._streams.pop((cookie, decode.QUERY_PIECE), None)
            self._streams.pop((cookie, decode.ANSWER_PIECE), None)

    # --- what waits -----------------------------------------------------------------------------------------------

    def expire(self, now: int) -> Iterator[Event]:
        """Lookups that were held, and those that were never answered. `now`: CLOCK_MONOTONIC ns."""
        held = self._held
        while held and (held[0].out or now - held[0].answered >= HOLD):
            self._release(held.popleft())
        while self._queries:
            place, query = next(iter(self._queries.items()))
            if now - query.time < QUERY_SECONDS * SECOND:
                break
            del self._queries[place]
            message = parse_dns(decode.payload(query.record))
            if message is None:
                losses.add("decode", "dns")
                continue
            event = self._lookup(query, now, message, "timeout")
            if event is not None:
                self._ready.append(event)
        while self._streams:
            key, stream = next(iter(self._streams.items()))
            if now - stream.seen < STREAM_SECONDS * SECOND:
                break
            del self._streams[key]
        ready, self._ready = self._ready, []
        yield from ready

    def close(self) -> Iterator[Event]:
        """What is held, at the end."""
        while self._held:
            self._release(self._held.popleft())
        ready, self._ready = self._ready, []
        yield from ready


def _search(event: Event) -> tuple[int, int, str, str]:
    """What the questions of one search have in common: who asks, the type, and the first label."""
    return event.workload.cgroup_id, event.pid, event.dns_type, event.domain.partition(".")[0]


def _extends(long: str, short: str) -> bool:
    """Whether `long` is `short` with an ending of a search list."""
    return len(long) > len(short) and long.startswith(short) and long[len(short)] == "."


def _marked(event: Event) -> Event:
    return _new(Event, (*event[:_SEARCH_AT], True, *event[_SEARCH_AT + 1 :]))
