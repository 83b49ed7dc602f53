"""Routes: the path of a request as a template of low cardinality, for span names and `url.template`.

Comes in: requests. Goes out: `/users/{id}/orders`, or "" where no template can be said. Not its job: hiding secrets in
what is shown as a path (redact.py); a template holds no segment that looks like one.

A pattern of the user's (EBFW_ROUTES) wins, the first that fits. Else a segment that is an id by its looks (a number, a
UUID, hex, a date, a token) becomes a placeholder at once, and what looks like a word stays one until there are more
than CAP words at its place below the same template of one workload and host: then that place is `{}` for good. So the
first CAP users of `/users/alice` are told apart, and no more. Bounds: DEPTH segments, TEMPLATES for each workload and
host, HOSTS of those and PLACES in all, the longest unused going first; what was not asked for in EXPIRY seconds is
forgotten.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from exporter.emit.redact import REDACTED, Options, target
from exporter.events import Event

CAP = 10  # words at one place
DEPTH = 12  # segments; what is below reads `*`
TEMPLATES = 200  # for each workload and host
HOSTS = 1024
PLACES = 30_000  # in all, at some 300 bytes
EXPIRY = 3600.0
_LOOK = 60.0
_KEPT = 4096  # answers, of paths that are not longer than
_SHORT = 256
_LONGEST = 2048  # what is behind is not looked at

_REDACTED = Options()
_UUID = re.compile(r"\{?[0-9A-Fa-f]{8}-?(?:[0-9A-Fa-f]{4}-?){3}[0-9A-Fa-f]{12}\}?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}(?:-[0-9]{2})?(?:[T_ ][0-9:.%A-Fa-f]+(?:Z|[+-][0-9:]+)?)?")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:[.,][0-9]+)*")
_HEX = re.compile(r"(?=.*[0-9])(?:0x)?[0-9a-fA-F]{6,}")
_VERSION = re.compile(r"[vV][0-9]{1,3}(?:(?:\.[0-9]{1,3}){1,2}|(?:alpha|beta|rc)[0-9]{0,2})?")
_WORD = re.compile(r"@?[A-Za-z$_.~-]{1,64}")
# Words with a number in them stay words: v1, oauth2, s3, x509, ipv4, sha256. A digit or two in a name is common, more
# of them are an id, and so are digits and letters by turns.
_NUMBERED = re.compile(r"(?:[A-Za-z$_.~-]{1,32}[0-9]{1,3}[A-Za-z$_.~-]{0,32}|[0-9]{1,2}[A-Za-z]{2,32})")


class _Place:
    """A place in the tree of templates: the words seen here, or, after too many, `any` for all of them."""

    __slots__ = ("any", "words")

    def __init__(self) -> None:
        self.words: dict[str, _Place] = {}
        self.any: _Place | None = None

    def below(self) -> int:
        """How many places there are below."""
        places = [*self.words.values(), *([self.any] if self.any else [])]
        return len(places) + sum(place.below() for place in places)


class _Host:
    """What was learned of one workload's requests to one host."""

    __slots__ = ("root", "templates", "used")

    def __init__(self) -> None:
        self.root, self.used = _Place(), 0.0
        self.templates: set[str] = set()


class Routes:
    """`patterns`: as in settings.Settings.routes. `cap`: words at one place. Any thread may call anything."""

    def __init__(
        self, patterns: Sequence[str] = (), *, cap: int = CAP, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._patterns = [(pattern, pattern.strip("/").split("/")) for pattern in patterns]
        self._cap, self._clock = cap, clock
        self._lock = threading.Lock()
        self._hosts: OrderedDict[tuple[int, str], _Host] = OrderedDict()
        self._places = 0  # in all trees, roots not counted
        self._answers: dict[tuple[int, str, str], str] = {}
        self._next = 0.0

    def __len__(self) -> int:
        return len(self._hosts)

    def of(self, event: Event) -> str:
        """The template of an HTTP event; "" for others, and where there is none. About 0.3 us for a path that was seen
        lately, 5 us for another."""
        path = event.path
        if not path.startswith("/"):
            if "://" not in path:
                return ""  # `*`, or the host:port of a CONNECT
            path = "/" + path.partition("://")[2].partition("/")[2]
        return self.template(event.workload.cgroup_id, event.domain or event.dst, path)

    def template(self, owner: int, host: str, path: str) -> str:
        """The template of `path`, which begins with a slash; query and fragment do not matter. `owner`: any number
        that tells workloads apart."""
        if "?" in path:
            path = path[: path.index("?")]
        key = (owner, host, path)
        found = self._answers.get(key)
        if found is None:
            with self._lock:
                found = self._configured(path) or self._learned(owner, host, path)
                if len(self._answers) >= _KEPT:
                    self._answers = {}
                if len(path) <= _SHORT:
                    self._answers[key] = found
        return found

    def expire(self) -> None:
        """Forget hosts that were not asked for in EXPIRY seconds. Call it as often as you like."""
        now = self._clock()
        if now < self._next:
            return
        with self._lock:
            self._next = now + _LOOK
            # Only what is not in `_answers` counts as use.
            self._answers = {}
            for key, host in list(self._hosts.items()):
                if now - host.used < EXPIRY:
                    break  # in the order of use
                del self._hosts[key]
                self._places -= host.root.below()

    def _configured(self, path: str) -> str:
        if not self._patterns:
            return ""
        segments = path.partition("#")[0].strip("/").split("/")
        return next((pattern for pattern, wanted in self._patterns if _fits(wanted, segments)), "")

    def _learned(self, owner: int, host: str, path: str) -> str:
        known = self._hosts.get((owner, host))
        if known is None:
            known = self._hosts[owner, host] = _Host()
        else:
            self._hosts.move_to_end((owner, host))
        known.used = self._clock()
        segments = target(path[:_LONGEST], _REDACTED).partition("#")[0].split("/")[1:]
        walk: list[tuple[_Place | None, str]] = []
        place: _Place | None = known.root
        for segment in segments[:DEPTH]:
            word = placeholder(segment) or segment
            if place is not None and not word.startswith("{"):
                if place.any is None and word not in place.words and _spoken(place.words) >= self._cap:
                    self._forget(known, place, "/".join(("", *(word for _, word in walk), "")))
                word = word if place.any is None else "{}"
            walk.append((place, word))
            place = None if place is None else place.any if word == "{}" else place.words.get(word)
        template = "/" + "/".join(word for _, word in walk) + ("/*" if len(segments) > DEPTH else "")
        if template not in known.templates:
            if len(known.templates) >= TEMPLATES:
                return ""
            known.templates.add(template)
            self._grow(walk)
        return template

    def _grow(self, walk: list[tuple[_Place | None, str]]) -> None:
        """Make the places of a walk that were not there."""
        at = walk[0][0]
        for _, word in walk:
            assert at is not None
            following = at.any if word == "{}" else at.words.get(word)
            if following is None:
                following = at.words[word] = _Place()
                self._places += 1
            at = following
        while (self._places > PLACES or len(self._hosts) > HOSTS) and len(self._hosts) > 1:
            _, oldest = self._hosts.popitem(last=False)
            self._places -= oldest.root.below()

    def _forget(self, host: _Host, place: _Place, prefix: str) -> None:
        """Too many words: one place for all of them. What was below them is learned again, under one roof."""
        self._places -= place.below()
        place.words = {word: below for word, below in place.words.items() if word.startswith("{")}
        place.any = _Place()
        self._places += place.below()
        host.templates = {template for template in host.templates if not template.startswith(prefix)}
        self._answers = {}


def _spoken(words: dict[str, _Place]) -> int:
    return sum(not word.startswith("{") for word in words)


def placeholder(segment: str) -> str:
    """What stands for a segment that is no word, "" for a word: {id}, {uuid}, {date}, {hex}, {token}."""
    if _WORD.fullmatch(segment) or not segment:
        return "{token}" if REDACTED in segment else ""
    if _NUMBER.fullmatch(segment):
        return "{id}"
    if _VERSION.fullmatch(segment):
        return ""
    if len(segment) >= 32 and _UUID.fullmatch(segment):
        return "{uuid}"
    if _DATE.fullmatch(segment):
        return "{date}"
    if _HEX.fullmatch(segment):
        return "{hex}"
    if _NUMBERED.fullmatch(segment):
        return "{token}" if REDACTED in segment else ""
    return "{id}" if len(segment) < 20 and segment.isascii() and "%" not in segment else "{token}"


def _fits(wanted: list[str], segments: list[str]) -> bool:
    if wanted[-1] == "*":
        if len(segments) < len(wanted) - 1:
            return False
        wanted = wanted[:-1]
    elif len(wanted) != len(segments):
        return False
    return all(word in (segment, "*") or word.startswith("{") for word, segment in zip(wanted, segments, strict=False))
