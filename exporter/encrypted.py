"""Which socket a TLS library's connection is, where that is certain: a library's calls name no socket.

In: ClientHellos of sockets with the name in them, ends of sockets, requests inside TLS. Out: the sighting of such a
request with the socket's cookie and both addresses; with the peer alone, where several of a process's connections to
that name go to one place and any may be it; else as it was. Not its job: what a request says (exchanges, http2).

A library's connection is matched once, with its first request, and keeps what was found: a socket of the same process
whose ClientHello had the name that the request is for, and that no other of the library's connections is known to be.
One whose first request was not seen may be older than the agent, and is not matched.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Final

from exporter import decode
from exporter.decode import Sighting
from exporter.health import losses

SOCKETS = 8192  # open, with TLS
MATCHED = 8192  # connections of TLS libraries of which something is known
_CROWDED = 4096

Key = tuple[int, int, str]  # cgroup, pid, name
# What is kept of a sighting: from its cgroup to its flags. The whole of it would keep its payload.
Seen = tuple[int, int, int, int, str, str, str, str, str, int, str, int, str, int]
assert (Sighting._fields.index("cgroup"), Sighting._fields.index("flags")) == (2, 15)

_new: Final = tuple.__new__


class _Free(dict[int, Seen]):
    """Sockets of one key, by cookie, of which it is not known which of the library's connections they are."""

    __slots__ = ("key",)

    def __init__(self, key: Key) -> None:
        self.key = key


class Encrypted:
    """Bounded by SOCKETS and MATCHED, the oldest go. That is counted where a request needs, or may need, what went."""

    def __init__(self) -> None:
        # By the socket's cookie, oldest first: which of the library's connections it is; a _Free that it is in; or what
        # was seen, since most are over before anybody asks.
        self.sockets: dict[int, int | _Free | tuple[str, Seen]] = {}
        self._free: dict[Key, _Free] = {}
        # By the library's cookie: the socket's (0: one of several), and what was seen of it.
        self.matched: OrderedDict[int, tuple[int, Key, Seen]] = OrderedDict()
        # Of these a socket has gone that may be asked for: what is left must not be taken for it.
        self._crowded: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.sockets) + len(self.matched)

    def opened(self, s: Sighting, name: str) -> None:
        """A socket has sent a ClientHello. `name`: in lower case; "" where there is none in it."""
        cookie = s.cookie
        if cookie in self.sockets:  # connected anew, and its close was lost
            self.closed(cookie)
        self.sockets[cookie] = name, s[2:16]
        if len(self.sockets) > SOCKETS:
            self._crowd()

    def closed(self, cookie: int) -> int:
        """The socket, one of `sockets`, is over. Returns the cookie of the library's connection that it was; 0 = not
        known."""
        held = self.sockets.pop(cookie)
        if isinstance(held, int):
            self.matched.pop(held, None)
            return held
        if isinstance(held, _Free):
            self._take(held, cookie)
        return 0

    def place(self, s: Sighting, host: str, sequence: int) -> Sighting:
        """A request inside TLS, with what is certain of its connection. `sequence`: the how-manieth of its connection
        it is, as far as the library's calls were seen; 0 = not known."""
        found = self.matched.get(s.cookie)
        if found is None and sequence == 1 and host:
            found = self._match(s, host)
        if found is None:
            return s
        cookie, _, seen = found
        flags = s.flags | seen[13] & decode.PROXIED | decode.INSIDE
        return _new(Sighting, (*s[:3], cookie or s.cookie, *s[4:9], *seen[7:12], s.outcome, flags, *s[16:]))

    def _match(self, s: Sighting, host: str) -> tuple[int, Key, Seen] | None:
        self._sort()
        key = s.cgroup, s.pid, host.lower()
        if key in self._crowded:
            losses.add("join", "tls_sockets_full")
            return None
        free = self._free.get(key)
        if free is None:
            return None
        cookie, seen = next(iter(free.items()))
        if len(free) == 1:
            self._take(free, cookie)
            self.sockets[cookie] = s.cookie
        elif len({_peer(other) for other in free.values()}) == 1:
            cookie, seen = 0, (*seen[:8], "", 0, *seen[10:])
        else:
            return None
        found = self.matched[s.cookie] = cookie, key, seen
        if len(self.matched) > MATCHED:
            _, (old, old_key, _) = self.matched.popitem(last=False)
            if old in self.sockets or (not old and old_key in self._free):
                losses.add("join", "tls_sockets_full")
        return found

    def _sort(self) -> None:
        """Put sockets that were seen since the last time with those of their key."""
        fresh = []
        for cookie, held in reversed(self.sockets.items()):
            if not isinstance(held, tuple):
                break
            fresh.append((cookie, held))
        for cookie, (name, seen) in reversed(fresh):
            # Without a name in its hello a server was asked for by its address; behind a proxy by which is not known.
            name = name or ("" if seen[13] & decode.PROXIED else seen[10])
            key = seen[0], seen[3], name
            free = self._free.get(key)
            if free is None:
                free = self._free[key] = _Free(key)
            free[cookie] = seen
            self.sockets[cookie] = free

    def _crowd(self) -> None:
        """Make room: an eighth at once, since each time all are looked at."""
        self._sort()
        for cookie in list(islice(self.sockets, SOCKETS // 8)):
            held = self.sockets.pop(cookie)
            if isinstance(held, _Free):
                self._take(held, cookie)
                self._crowded[held.key] = None
                self._crowded.move_to_end(held.key)
        while len(self._crowded) > _CROWDED:
            self._crowded.popitem(last=False)

    def _take(self, free: _Free, cookie: int) -> None:
        del free[cookie]
        if not free:
            del self._free[free.key]


def _peer(seen: Seen) -> tuple[str, str, int, int]:
    """Scope, address, port, and whether a proxy."""
    return seen[7], seen[10], seen[11], seen[13] & decode.PROXIED
