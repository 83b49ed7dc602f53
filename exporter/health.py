"""Health: what the agent lost, which features work, and a log that cannot flood.

In: `losses.add(...)` from every stage that drops something, `features.set(...)` from whatever was tried at
start. Out: snapshots for /metrics, OTLP and `ebfw check`; log lines on standard error. Not its job: exporting
them.

`losses` and `features` are process-wide on purpose: a loss is counted where it happens, however deep, and
handing a counter down every call chain is how losses end up uncounted."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Literal, NamedTuple, get_args

Stage = Literal["ring", "queue", "decode", "join", "table", "export", "names", "attribution"]
STAGES: tuple[str, ...] = get_args(Stage)

# Causes are constants in the code, some tens of them. The bound only matters if one is ever made from input.
MAX_CAUSES = 256


class Losses:
    """Counts what was lost, by (stage, cause). Counts never fall. Thread-safe; `add` costs about 0.2 us."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, stage: Stage, cause: str, n: int = 1) -> None:
        """Count `n` more. `cause` is a constant such as "console_full", never text from outside."""
        key = (stage, cause)
        with self._lock:
            if key in self._counts:
                self._counts[key] += n
            else:
                self._first(key, n)

    def raise_to(self, stage: Stage, cause: str, total: int) -> None:
        """Take over a total kept elsewhere (a kernel counter): never below what was reported before."""
        key = (stage, cause)
        with self._lock:
            if key in self._counts:
                self._counts[key] = max(self._counts[key], total)
            else:
                self._first(key, total)

    def snapshot(self) -> dict[tuple[str, str], int]:
        """A copy: {(stage, cause): count}."""
        with self._lock:
            return dict(self._counts)

    def total(self) -> int:
        with self._lock:
            return sum(self._counts.values())

    def _first(self, key: tuple[str, str], n: int) -> None:
        if len(self._counts) >= MAX_CAUSES:
            key = (key[0], "other")
        self._counts[key] = self._counts.get(key, 0) + n


class Feature(NamedTuple):
    """Whether a feature works on this host, and what is missing without it (a phrase; "" when active)."""

    active: bool
    lost: str


class Features:
    """What was tried at start and how it went. Filled by the loader, read by `ebfw check` and /metrics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._features: dict[str, Feature] = {}

    def set(self, name: str, active: bool, lost: str = "") -> None:
        with self._lock:
            self._features[name] = Feature(active, "" if active else lost)

    def active(self, name: str) -> bool:
        """False also for a feature that nobody tried."""
        with self._lock:
            feature = self._features.get(name)
        return feature is not None and feature.active

    def snapshot(self) -> Mapping[str, Feature]:
        with self._lock:
            return dict(self._features)


losses = Losses()
features = Features()


_UNPRINTABLE = re.compile(r"[^!-\[\]-~]")
_UNPRINTABLE_BUT_SPACE = re.compile(r"[^ -\[\]-~]")


def printable(text: str, space: bool = False) -> str:
    """`text` with everything escaped that could move the cursor, forge a line or hide: \\xNN, \\uNNNN.

    Names, paths and comms come from whoever is being watched. Without `space`, blanks are escaped as well, so
    that `key=value` lines cannot be forged by a process called "x pod=a/b". Backslashes are doubled."""
    pattern = _UNPRINTABLE_BUT_SPACE if space else _UNPRINTABLE
    return pattern.sub(_escape, text) if pattern.search(text) else text


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    # isprintable() is False for controls, surrogates (undecodable bytes), bidi overrides and zero-width
    # characters.
    if char == "\\":
        return "\\\\"
    if char != " " and char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class RateLimit(logging.Filter):
    """Lets the same text through once a `period` (seconds), and `burst` different texts of one template.

    What was held back is told with the next one that passes: "(12 more like this)". Put it on a handler, so
    that it sees every logger's records. `limit` templates and texts are remembered; then the oldest period is
    forgotten."""

    def __init__(
        self,
        period: float = 60.0,
        burst: int = 10,
        limit: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._period, self._burst, self._limit, self._clock = period, burst, limit, clock
        self._lock = threading.Lock()
        # template -> [start of its period, texts passed in it, held back since the last that passed]
        self._templates: dict[str, list[float]] = {}
        self._texts: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        template, text, now = f"{record.name}:{record.msg}", record.getMessage(), self._clock()
        with self._lock:
            if len(self._texts) >= self._limit or len(self._templates) >= self._limit:
                self._expire(now)
            state = self._templates.setdefault(template, [now, 0, 0])
            if now - state[0] >= self._period:
                state[0], state[1] = now, 0
            last = self._texts.get(text)
            if (last is not None and now - last < self._period) or state[1] >= self._burst:
                state[2] += 1
                return False
            self._texts[text] = now
            state[1] += 1
            held, state[2] = int(state[2]), 0
        if held:
            # With args None, getMessage() does not format: a % in the text is safe.
            record.msg, record.args = f"{text} ({held} more like this)", None
        return True

    def _expire(self, now: float) -> None:
        self._texts = {text: at for text, at in self._texts.items() if now - at < self._period}
        self._templates = {key: state for key, state in self._templates.items() if now - state[0] < self._period}
        if len(self._texts) >= self._limit or len(self._templates) >= self._limit:
            self._texts.clear()
            self._templates.clear()


class _Formatter(logging.Formatter):
    """`ebfw: text` for a pipe or a journal (which have their own time), with the level where it is a
    warning."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage(), space=True)
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"ebfw: {level}{text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def start_log(level: str, stream: IO[str]) -> None:
    """Send the whole process's log to `stream`, rate-limited. `level`: debug, info, warning, error."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter())
    handler.addFilter(RateLimit())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # A stderr that is gone (closed terminal, full disk) must not turn each log call into a traceback.
    logging.raiseExceptions = False
