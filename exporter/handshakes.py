"""TLS handshakes: the pieces of a ClientHello, the server's answer and the client's word to that become one thing.

In: sightings of the kinds HELLO, SERVER_HELLO, HANDSHAKE_END, CLOSED and QUIC_INITIAL, in the order of the ring. Out:
what is made of a `Handshake` when one is over: with its end, an alert, the close of its connection, or
HANDSHAKE_SECONDS. Not its job: who it was and what the peer is called (join), reading bytes (tls, quic).

A handshake is told once, however it ended: a server that is not seen to answer still has a name. Its duration is that
of the client: from the ClientHello to its Finished, both as they leave. In TLS 1.2 the server's own Finished comes
after that, and so does an alert with which it refuses a client's certificate; neither is waited for.

Of QUIC only the ClientHello can be read, so that is the handshake: told as soon as it is whole, without an end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

from exporter import decode, quic, tls
from exporter.decode import Sighting, Step
from exporter.events import SECOND, Tls
from exporter.health import losses

HANDSHAKES: Final = 4096  # open at once
HANDSHAKE_SECONDS: Final = 10
QUIC_HANDSHAKES: Final = 1024  # open, or told not long ago
HELLO_BYTES: Final = 16384  # a hello of more is read as far as that

OK: Final = "ok"  # or the word of an alert
CLOSED: Final = "closed"
TIMEOUT: Final = "timeout"
_UNREADABLE: Final = tls.ClientHello("", "", (), "", False, False, False, b"", False)

_new: Final = tuple.__new__
_Made = TypeVar("_Made")


class Handshake(NamedTuple):
    """`first` is the hello's first sighting, `identity` the id of the name that the kernel read in it (0 where it did
    not). `server_name` is "" where the hello has none, or none that could be read: `whole` says which. `status` is
    OK, CLOSED, TIMEOUT, or the alert's description; "" where it was given up for want of room, and with QUIC."""

    first: Sighting
    identity: int
    server_name: str
    whole: bool
    status: str
    duration: int | None
    tls: Tls


class _Open:
    """A handshake that is not over."""

    __slots__ = ("answer", "data", "first", "hello", "identity")

    def __init__(self, first: Sighting) -> None:
        self.first, self.identity = first, first.name
        self.data = b""
        self.hello: tls.ClientHello | None = None
        self.answer: tls.ServerHello | None = None


class _Quic:
    """A QUIC connection's first packets. It stays for HANDSHAKE_SECONDS: what a client sends again, or with a token
    after a Retry, is no second handshake."""

    __slots__ = ("crypto", "first", "told", "version")

    def __init__(self, first: Sighting, version: str) -> None:
        self.first, self.version = first, version
        self.crypto = quic.Crypto()
        self.told = False


class Handshakes(Generic[_Made]):
    """Bounded by HANDSHAKES and QUIC_HANDSHAKES: the oldest goes and is counted as lost; one over TCP is told as far
    as it came. `made`: what a handshake becomes that is over. `begun`: told of each over TCP
    once its hello is read, with the server's name."""

    def __init__(
        self, made: Callable[[Handshake], _Made], begun: Callable[[Sighting, str], None] = lambda s, name: None
    ) -> None:
        self._made, self._begun = made, begun
        self.open: OrderedDict[int, _Open] = OrderedDict()  # by the socket's cookie, oldest first
        self._quic: OrderedDict[tuple[int, str, int], _Quic] = OrderedDict()  # by cookie, address and port

    def __len__(self) -> int:
        return len(self.open) + len(self._quic)

    def hello(self, s: Sighting) -> _Made | None:
        """A piece of a ClientHello. The handshake that it ends is another, older one."""
        cookie, offset, payload, flags = s.cookie, s.offset, s.payload, s.flags
        if flags & decode.ABANDONED:
            self.open.pop(cookie, None)
            return None
        over = None
        one = self.open.get(cookie)
        if one is None or (one.hello is not None and not offset):
            if offset:  # its first piece was lost
                return None
            if one is not None:  # the same socket, connected anew, and its close was lost
                over = self._over(self.open.pop(cookie), "", None)
            one = self.open[cookie] = _Open(s)
            if len(self.open) > HANDSHAKES:
                losses.add("join", "handshakes_full")
                over = self._over(self.open.popitem(last=False)[1], "", None)
        elif one.hello is not None:
            return over
        one.identity = s.name
        if not offset and flags & decode.HEAD_END:  # in one piece, as most are
            one.hello = (
                tls.parse_client_hello(payload, kept=decode.KEY_SHARE_KEPT if flags & decode.CUT else 0xFFFF)
                or _UNREADABLE
            )
            self._begun(s, one.hello.server_name)
            return over
        have = len(one.data)
        if offset <= have:  # less: sent again, and cut differently
            one.data += payload[have - offset :]
        if offset > have or flags & (decode.HEAD_END | decode.TRUNCATED) or len(one.data) >= HELLO_BYTES:
            one.hello = tls.parse_client_hello(one.data) or _UNREADABLE
            one.data = b""
            self._begun(one.first, one.hello.server_name)
        return over

    def answer(self, s: Step | Sighting) -> _Made | None:
        """The server's first flight."""
        one = self.open.get(s.cookie)
        if one is None:
            return None
        payload = s.payload
        answer = tls.parse_server_hello(payload)
        if answer is not None:
            one.answer = answer
        elif alert := tls.fatal_alert(payload):
            del self.open[s.cookie]
            return self._over(one, alert, s.time, alert)
        return None

    def end(self, s: Step | Sighting) -> _Made | None:
        """What the client says to it."""
        one = self.open.pop(s.cookie, None)
        if one is None:
            return None
        alert = tls.client_alert(s.payload)
        return self._over(one, alert or OK, s.time, alert)

    def closed(self, s: Sighting) -> _Made | None:
        """The connection is over, and so is a handshake that was not."""
        one = self.open.pop(s.cookie, None)
        return None if one is None else self._over(one, CLOSED, s.time)

    def initial(self, s: Sighting) -> _Made | None:
        """One of the first datagrams of a QUIC client. A ClientHello may need two, and its parts come in any order."""
        place = s.cookie, s.peer, s.port
        one = self._quic.get(place)
        if one is not None and one.told:
            return None
        initials = quic.read_initials(s.payload)
        if initials is None:
            if one is None:  # else it may be one that answers the server, under keys of the server's choice
                losses.add("decode", "quic_initial")
            return None
        if one is None:
            one = self._quic[place] = _Quic(s, initials.version)
            if len(self._quic) > QUIC_HANDSHAKES and not self._quic.popitem(last=False)[1].told:
                losses.add("join", "handshakes_full")
        for offset, piece in initials.pieces:
            one.crypto.add(offset, piece)
        return self._quic_over(one) if one.crypto.whole else None

    def expire(self, now: int) -> Iterator[_Made]:
        """Those that are HANDSHAKE_SECONDS old. `now`: CLOCK_MONOTONIC ns."""
        while self.open:
            cookie, one = next(iter(self.open.items()))
            if now - one.first.time < HANDSHAKE_SECONDS * SECOND:
                break
            del self.open[cookie]
            if (over := self._over(one, TIMEOUT, None)) is not None:
                yield over
        while self._quic:
            place, connection = next(iter(self._quic.items()))
            if now - connection.first.time < HANDSHAKE_SECONDS * SECOND:
                break
            del self._quic[place]
            if not connection.told and (over := self._quic_over(connection)) is not None:
                yield over

    def _quic_over(self, one: _Quic) -> _Made | None:
        one.told = True
        hello = tls.parse_client_hello(one.crypto.data, quic=True)
        one.crypto = quic.Crypto()
        if hello is None:
            losses.add("decode", "quic_initial")
            return None
        told = Tls(
            offered=hello.offered,
            alpn=hello.alpn,
            post_quantum=hello.post_quantum,
            ech=hello.ech,
            ja4=hello.ja4,
            quic=one.version,
        )
        return self._made(_new(Handshake, (one.first, 0, hello.server_name, hello.whole, "", None, told)))

    def _over(self, one: _Open, status: str, ended: int | None, alert: str = "") -> _Made | None:
        """None where no ClientHello came of it: some bytes, and then the connection's end."""
        hello, answer = one.hello or tls.parse_client_hello(one.data), one.answer
        if hello is None:
            return None
        version, group, resumed = "", "", None
        if answer is not None:
            version, group = answer.version, answer.group
            if version == "1.3":
                resumed = answer.psk
            elif version and hello.whole:
                resumed = answer.session == hello.session != b""
        told = _new(
            Tls,
            (
                version,
                hello.offered,
                hello.alpn,
                group,
                hello.post_quantum,
                hello.ech,
                hello.ja4,
                resumed,
                alert,
                "",
            ),
        )
        first = one.first
        lasted = None if ended is None else ended - first.time
        return self._made(_new(Handshake, (first, one.identity, hello.server_name, hello.whole, status, lasted, told)))
