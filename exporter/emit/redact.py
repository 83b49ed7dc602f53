"""Redaction: the one place where secrets leave an event, before text, JSON, logs, spans, exemplars and the
terminal.

In: an `Event` and what the settings allow. Out: the same event where it holds nothing to hide, else a copy.
The agent calls `redact_all` once, in front of all emitters; no emitter keeps anything of an event that did not pass
here (OTLP is asked before whether it wants one at all). Not its job: deciding which headers reach OTLP (an allow list
there), or cardinality.

What goes (telemetry.md D8): user info; every query value; path segments that look like secrets; the headers
that carry credentials, always. What stays: query keys, words, slugs, numbers, UUIDs (they are ids, and routes
need them). A heuristic decides "looks like a secret", so it is wrong at times; it is tuned to be wrong on the
safe side for 20 and more random characters, and to leave shorter ones alone unless their form gives them
away."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple
from urllib.parse import unquote

from exporter.events import Event
from exporter.settings import Settings

REDACTED: Final = "REDACTED"


class Options(NamedTuple):
    """What the user lets through. The default shows redacted paths and no headers, as the settings do."""

    paths: bool = True
    headers: bool = False
    query_values: frozenset[str] = frozenset()  # parameter names, lower case, whose values stay
    allowed: frozenset[str] = frozenset()  # header names, lower case, that stay where `headers` is off

    @classmethod
    def of(cls, settings: Settings) -> Options:
        return cls(settings.inspect_paths, settings.inspect_headers, settings.query_values, settings.allowed_headers)


def redact(event: Event, options: Options) -> Event:
    """`event` without secrets; the same object if there are none. About 0.5 us for events without path and
    headers, under 1 us for plain paths."""
    path, headers, domain, exchange = event.path, event.headers, event.domain, event.exchange
    if (
        exchange is not None
        and exchange.tracestate
        and (state := _tracestate(exchange.tracestate)) != exchange.tracestate
    ):
        event = event._replace(exchange=exchange._replace(tracestate=state))
    if not path and not headers and "@" not in domain:
        return event
    new_path = target(path, options) if options.paths else ""
    new_headers = _headers(headers, options) if headers and (options.headers or options.allowed) else ()
    if new_path == path and new_headers == headers and "@" not in domain:
        return event
    # As _replace does it, at a third of its cost.
    fields = list(event)
    fields[_PATH], fields[_HEADERS], fields[_DOMAIN] = new_path, new_headers, domain.rpartition("@")[2]
    return _new(Event, fields)


def redact_all(events: Iterable[Event], options: Options) -> list[Event]:
    """`redact` for each."""
    return [redact(event, options) for event in events]


_PATH: Final = Event._fields.index("path")
_HEADERS: Final = Event._fields.index("headers")
_DOMAIN: Final = Event._fields.index("domain")
_new: Final = tuple.__new__


def _tracestate(text: str) -> str:
    """The members that hold nothing that looks like a secret (W3C Trace Context section 3.3: vendors put there what
    they like)."""
    return ",".join(
        member
        for member in text.split(",")
        if not secret(member) and not any(secret(word) for word in re.split(r"[=:;~]", member))
    )


# --- request targets and URLs -------------------------------------------------------------------------------

# The fast path: segments of lower-case characters that are too short or too plain to be a secret. Everything
# that is told by its form (JWT, AKIA, bot123:, a digit in a longer word) has a character or a length that is
# not in here.
_PLAIN: Final = re.compile(r"(?:/(?>[a-z0-9_.~-]{0,11}(?![^/])|[a-z_.~-]{0,19}(?![^/])|[0-9]{0,19}(?![^/])))+")

_USER_INFO: Final = re.compile(r"//[^/?#]*@")
_AUTHORITY_USER_INFO: Final = re.compile(r"\A[^/?#]*@")


def target(text: str, options: Options) -> str:
    """A request target or URL (`/p?q`, `http://h/p`, `h:port`, `*`) without user info, query values and
    secrets."""
    path, question, query = text.partition("?")
    if _PLAIN.fullmatch(path) and "hook" not in path and "#" not in query:
        return f"{path}?{_query(query, options.query_values)}" if question else text
    text, mark, _ = text.partition("#")
    path, question, query = text.partition("?")
    scheme = ""
    # User info can stand in front (`user:pw@host:443`), behind a scheme, or in a URL that is part of the
    # path.
    if not path.startswith("/"):
        head, colon_slashes, rest = path.partition("://")
        if colon_slashes:
            authority, slash, rest = rest.partition("/")
            scheme = f"{head}://{_without_user(authority)}"
            path = slash + rest
        else:
            path = _AUTHORITY_USER_INFO.sub(f"{REDACTED}@", path, count=1)
    if "@" in path:
        path = _USER_INFO.sub(f"//{REDACTED}@", path)
    path = scheme + _path(path, "hooks." in scheme)
    if question:
        path += "?" + _query(query, options.query_values)
    return f"{path}#{REDACTED}" if mark else path


def _without_user(authority: str) -> str:
    _, at, host = authority.rpartition("@")
    return f"{REDACTED}@{host}" if at else authority


def _query(query: str, allowed: frozenset[str]) -> str:
    """Every value REDACTED but those of `allowed`. Only `&` separates: taking `;` as well would show what
    follows it in a value. A bare word is a key if it looks like one."""
    if "&" not in query:
        return _parameter(query, allowed) if query else ""
    return "&".join([_parameter(piece, allowed) if piece else "" for piece in query.split("&")])


_KEY: Final = re.compile(r"[A-Za-z0-9_.$~%\[\]-]{1,64}")
_BARE: Final = re.compile(r"[a-z_-]{1,19}")


def _parameter(piece: str, allowed: frozenset[str]) -> str:
    key, equals, value = piece.partition("=")
    if not equals:
        return key if _BARE.fullmatch(key) else REDACTED
    shown = _keys.get(key) or _shown_key(key)
    if shown is not REDACTED and (not value or (allowed and key.lower() in allowed)):
        return piece
    return f"{shown}={REDACTED}"


# The keys that applications use are few.
_keys: Final[dict[str, str]] = {}
_KEYS: Final = 2048


def _shown_key(key: str) -> str:
    if len(_keys) >= _KEYS:
        _keys.clear()
    shown = _keys[key] = REDACTED if not _KEY.fullmatch(key) or secret(key) else key
    return shown


_HOOK: Final = re.compile(r"(?:[a-z]+[-_])?(?:web)?hooks?(?:b2|[-_].*)?", re.IGNORECASE)
_SLACK_TEAM: Final = re.compile(r"[TE][A-Z0-9]{6,}")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def _path(path: str, hook: bool) -> str:
    """The path's segments, secrets replaced. `hook`: the host already says that what follows is a hook's
    token."""
    segments = path.split("/")
    for index, segment in enumerate(segments):
        if not segment:
            continue
        if hook and _hook_token(segment):
            segments[index] = REDACTED
        else:
            segments[index] = _segment(segment)
        before = segments[index - 1] if index else ""
        # Chat services: /services/T…/B…/token. Elsewhere a segment called hook or webhook announces the
        # token.
        hook = hook or _HOOK.fullmatch(segment) is not None
        hook = hook or (before in ("services", "workflows", "triggers") and _SLACK_TEAM.fullmatch(segment) is not None)
    return "/".join(segments)


def _hook_token(segment: str) -> bool:
    """Behind a hook's name anything that is neither a word nor a plain number is its secret, UUIDs
    included."""
    if segment.isdigit() or len(segment) < 6:
        return False
    return not re.fullmatch(r"[A-Z]?[a-z]+(?:[-_]?[A-Z]?[a-z]+)*", segment) or (len(segment) >= 20 and _random(segment))


_SENSITIVE: Final = re.compile(r"pass|pwd|secret|token|key|auth|cred|sess|sig|jwt|sid\b", re.IGNORECASE)
_BOT: Final = re.compile(r"(bot)[0-9]+(?::|%3A).*", re.IGNORECASE | re.DOTALL)
_DIGEST: Final = re.compile(r"sha(?:256:[0-9a-f]{64}|512:[0-9a-f]{128})")


def _segment(segment: str) -> str:
    if _BOT.fullmatch(segment):
        return "bot" + REDACTED
    if ";" in segment or "=" in segment:
        # Matrix parameters (;jsessionid=…) and key=value segments.
        first, *rest = segment.split(";")
        pieces = [_pair(first, False), *(_pair(piece, True) for piece in rest)]
        return ";".join(pieces)
    return REDACTED if secret(segment) else segment


def _pair(piece: str, always: bool) -> str:
    key, equals, value = piece.partition("=")
    if not equals:
        return REDACTED if secret(piece) else piece
    if value and (always or _SENSITIVE.search(key) or secret(value) or not value.strip("=")):
        value = REDACTED
    return f"{REDACTED if secret(key) else key}={value}"


# --- what looks like a secret -------------------------------------------------------------------------------

_JWT: Final = re.compile(r"eyJ[A-Za-z0-9_-]{5,}")
# Tokens that say what they are. At least eight characters follow, so that a package called npm_x stays.
_PREFIXED: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:gh[pousr]_|github_pat_|glpat-|xox[a-z]-|xapp-|[sprw][kh]_(?:live|test)_|whsec_|AKIA|ASIA|AIza"
    r"|ya29\.|SG\.|hv[sb]\.|dop_v1_|npm_|pypi-AgEI)[A-Za-z0-9_.=-]{8,}"
)
_PARTS: Final = re.compile(r"[A-Za-z0-9]+")
_TOKENS: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_WORD: Final = re.compile(r"[A-Za-z]?[a-z]+[0-9]?|[A-Z]+|[0-9]+")
_HEX: Final = re.compile(r"(?=.*[0-9])(?:[0-9a-f]{20,}|[0-9A-F]{20,})")
_VOWELS: Final = re.compile(r"[aeiouyAEIOUY]")
_CONSONANTS: Final = re.compile(r"(?i:[b-df-hj-np-tv-xz]{8})")
# Pairs that words in Latin letters hardly have: j, q, v, x, z beside a consonant, less the usual exceptions.
_ODD_PAIR: Final = re.compile(
    r"(?i:(?!qc|x[cpts]|z[ztwhl]|jp|js|vs|vm)[jqvxz](?=[bcdfghjklmnpqrstvwxz])"
    r"|(?!sq|cq|nj|nz|tz|nx|rz|dj|bj|dv|bv|lz|cz|sz|rx|gz|nq|lv|rv|nv)[bcdfghklmnprstw](?=[jqxzv])|q(?=[eioaw]))"
)


def secret(text: str) -> bool:
    """Whether one path segment or header word looks like a secret. Percent-escapes are looked through."""
    if "%" in text:
        # Twice: proxies and redirects escape what is escaped already.
        text = unquote(unquote(text))
        if _USER_INFO.search(text) or _BOT.fullmatch(text):
            return True
    if len(text) < 8:
        return False
    return bool(_JWT.search(text) or _PREFIXED.search(text) or (len(text) >= 20 and _random(text)))


def _random(text: str) -> bool:
    """Whether `text` holds 20 or more characters in a row that look random.

    Split at punctuation. A stretch goes on over crumbs and the punctuation between (base64url holds - and _);
    a word or a number ends it."""
    if len(text) < 20 or _DIGEST.fullmatch(text):
        return False
    start = end = marked = -1
    for match in _PARTS.finditer(_UUID.sub("/", text) if "-" in text else text):
        part = match[0]
        random = _random_part(part)
        if not random and (len(part) > 7 or (len(part) > 3 and _WORD.fullmatch(part))):
            start = -1
            continue
        if start < 0 or match.start() > end + 1:
            if part.islower() and not random:
                continue
            start, marked = match.start(), 0
        end = match.end()
        marked += len(part) if random else 0
        # Some of the stretch must really look random: `a-b-c-d-e-f-g-h-i-j` does not.
        if end - start >= 20 and marked * 2 >= end - start:
            return True
    return False


def _random_part(part: str) -> bool:
    length = len(part)
    if length < 4:
        return False
    if part.isdigit():
        return length >= 24  # longer than any timestamp with nanoseconds
    if _HEX.fullmatch(part):
        return True
    tokens = _TOKENS.findall(part)
    digits = sum(map(str.isdigit, tokens))
    if digits >= 2 and (digits >= 4 or length < (5 if length >= 20 else 3.4) * len(tokens)) and len(tokens) >= 4:
        return True  # letters and digits by turns; versions, sizes and dates have fewer turns
    if len(tokens) > 1 and length >= 6 and length < (3.2 if length >= 16 else 2.7) * len(tokens):
        return True  # cases by turns, as in base64; CamelCase has longer words
    if length < 16:
        return False
    odd = sum(len(_ODD_PAIR.findall(token)) for token in tokens)
    if odd >= max(2, length / 12) or _CONSONANTS.search(part):
        return True  # cannot be pronounced
    return len(_VOWELS.findall(part)) < 0.2 * (length - sum(map(len, filter(str.isdigit, tokens))))


# --- headers ------------------------------------------------------------------------------------------------

_SECRET_HEADER: Final = re.compile(
    r"auth|cookie|key|token|secret|passw|credential|session|signature|jwt|assertion|otp|csrf|xsrf",
    re.IGNORECASE,
)
# Random by design and not secret: ids that tie a request to a trace.
_KNOWN_HEADERS: Final = re.compile(
    r"host|traceparent|x-(?:request|correlation)-id|x-b3-(?:trace|span|parentspan)id|x-cloud-trace-context"
    r"|content-(?:length|encoding)|accept-(?:encoding|language)|connection|date|if-modified-since",
    re.IGNORECASE,
)
# Their value is one URL, in which `;` and `,` separate nothing.
_URL_HEADER: Final = re.compile(r"referer|location|origin|ur[il]$|destination", re.IGNORECASE)
_WORDS: Final = re.compile(r"[^\s,;\"'<>()]+")


def _headers(headers: tuple[tuple[str, str], ...], options: Options) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, _value(name, value, options))
        for name, value in headers
        if options.headers or name.lower() in options.allowed
    )


def _value(name: str, value: str, options: Options) -> str:
    if _SECRET_HEADER.search(name):
        return REDACTED
    if _KNOWN_HEADERS.fullmatch(name):
        return _without_user(value)
    if _URL_HEADER.search(name):
        return target(value, options)
    return _WORDS.sub(lambda match: _word(match[0], options), value)


def _word(word: str, options: Options) -> str:
    """A blank-free piece of a header's value: a URL is treated as one, the rest as a path
    segment."""
    if "?" in word or "@" in word or "://" in word or word.startswith("/"):
        return target(word, options)
    return _segment(word)
