"""Console: one line an event on standard output, as text for people or JSON for programs.

In: redacted events, through a bounded queue. Out: lines. A thread of its own formats and writes them: a pipe
that nobody reads, a full disk or a stopped terminal costs lines (counted in `losses`), never the pipeline's
time. The queue is drained in batches, so a burst costs one system call, not one a line.

Not its job: redaction (emit.redact, before), choosing what is worth telling beyond `Event.filtered`.

Text, the lines of ebfw's first version with what they lacked behind them as key=value, blanks inside values escaped:

    CONNECT  SRC -> DST:PORT  pod=ns/name status=ok took=1.2ms proc=curl[42] name=example.com via=dns
    DNS      SRC ? NAME (TYPE)        TLS      SRC -> SNI  (DST:PORT)
    HTTP     SRC -> METHOD HOSTPATH   HTTPS    [pid=N COMM] METHOD HOSTPATH
    CLOSE    SRC -> DST:PORT  tx=1.2KiB rx=3.4MiB ...
    NEW      SRC -> DST:PORT  name=example.com via=sni
    TLS      SRC -> SNI  (DST:PORT)  status=ok took=12.3ms version=1.3 alpn=h2,http/1.1 ...

`->` is egress; what is not, says dir=ingress or dir=unknown. JSON: its fields and ours, empty ones
left out."""

from __future__ import annotations

import json.encoder
import logging
import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO

from exporter import events
from exporter.events import Event, Exchange, Tls, Workload
from exporter.health import losses, printable

log = logging.getLogger(__name__)

# Events waiting to be written: 0.8 s of 10,000 a second, some 5 MB at most.
QUEUE = 8192
# Pause between two batches, seconds: at most 50 wake-ups a second, and nobody sees 20 ms.
PAUSE = 0.02
# Lines joined into one write: keeps memory for text small beside the queue's.
BATCH = 512

_quote = json.encoder.encode_basestring_ascii
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORKLOADS = 4096


class Console:
    """Writes events to `stream` as `mode` says: text, json or none.

    `colour` None: if the stream is a terminal. Time and alignment come with a terminal, colour or not. The
    stream stays the caller's; where it has a file descriptor, that is written to directly, so that no lock of
    the stream is held when a blocked write is left behind at exit. Call `close` once."""

    def __init__(
        self, stream: IO[str], mode: str, colour: bool | None = None, node: str = "", queue: int = QUEUE
    ) -> None:
        self._stream = stream
        terminal = bool(stream.isatty())
        text = TextFormat(colour=terminal if colour is None else colour, terminal=terminal)
        formats: dict[str, Callable[[Event], str] | None] = {
            "text": text.line,
            "json": JsonFormat(node).line,
            "none": None,
        }
        self._format = formats[mode]
        try:
            # Our own copy: a write that is stuck while the caller closes the stream must not end up in
            # whatever file gets the number next.
            self._fd: int | None = os.dup(stream.fileno())
        except (OSError, AttributeError, ValueError):
            self._fd = None
        self._limit = queue
        self._queue: deque[Event] = deque()
        self._writing = 0  # lines handed to a write that has not returned
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._broken = False
        self._thread: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """Whether lines are written at all."""
        return self._format is not None

    def write(self, event: Event) -> None:
        """Queue one event; never blocks, never raises. What finds no room is counted as
        queue/console_full."""
        if self._format is None or event.filtered or self._closing:
            return
        if self._broken:
            losses.add("queue", "console_closed")
        elif len(self._queue) >= self._limit:
            losses.add("queue", "console_full")
        else:
            self._queue.append(event)
            if not self._wake.is_set():
                self._wake.set()
                if self._thread is None:
                    self._start()

    def _start(self) -> None:
        # Not in the constructor: a thread must not exist yet while the loader forks.
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="console", daemon=True)
                self._thread.start()

    def close(self, timeout: float = 1.0) -> None:
        """Write what is queued, for at most `timeout` seconds; the rest is counted."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        if left := len(self._queue) + self._writing:
            losses.add("queue", "console_closed" if self._broken else "console_full", left)
            self._queue.clear()
        if self._fd is not None and (self._thread is None or not self._thread.is_alive()):
            os.close(self._fd)
            self._fd = None

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            self._drain()
            if self._closing and not self._queue:
                return
            if not self._closing:
                time.sleep(PAUSE)

    def _drain(self) -> None:
        assert self._format is not None
        while self._queue:
            lines = []
            for _ in range(min(BATCH, len(self._queue))):
                event = self._queue.popleft()
                try:
                    lines.append(self._format(event))
                except Exception:
                    # One event that cannot be told must not end the telling of all others.
                    losses.add("export", "console_format")
                    log.exception("an event could not be formatted for the console")
            if self._broken:
                losses.add("queue", "console_closed", len(lines))
                continue
            self._writing = len(lines)
            try:
                self._put("".join(lines))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed on our side
                self._broken = True
                losses.add("queue", "console_closed", len(lines))
                log.warning("standard output is gone (%s); events are no longer printed", error)
            self._writing = 0

    def _put(self, text: str) -> None:
        if self._fd is None:
            self._stream.write(text)
            self._stream.flush()
            return
        data = memoryview(text.encode("utf-8", "replace"))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                # Somebody made the shared file description non-blocking (a shell, ssh). poll, not select: the
                # descriptor may be above 1024.
                waiter = select.poll()
                waiter.register(self._fd, select.POLLOUT)
                waiter.poll(1000)


# --- text ---------------------------------------------------------------------------------------------------

_COLOURS = {
    events.CONNECT: "\x1b[36m",
    events.CLOSE: "\x1b[90m",
    events.DNS: "\x1b[35m",
    events.TLS: "\x1b[34m",
    events.HTTP: "\x1b[32m",
    events.HTTPS: "\x1b[1;32m",
    events.NEW: "\x1b[1;33m",
}
_RED, _DIM, _OFF = "\x1b[31m", "\x1b[2m", "\x1b[0m"
_BAD_STATUS = frozenset(events.FAILURES) - {events.CANCELLED}
_GOOD = {events.DNS: frozenset(("", "NOERROR", "ok")), events.TLS: frozenset(("", "ok"))}
# What stands left of the key=value part on a terminal; longer lines push it to the right.
_WIDTH = 64
_SHOWN_ANSWERS = 4


class TextFormat:
    """Events as lines for people. `terminal`: local time in front, columns aligned; `colour`: ANSI
    colours."""

    def __init__(self, colour: bool = False, terminal: bool = False) -> None:
        self._colour = colour
        self._terminal = terminal
        self._second = -1
        self._clock = ""

    def line(self, event: Event) -> str:
        what = _what(event)
        label = f"{event.kind.upper():<8} "
        details = " ".join(_details(event))
        if self._terminal:
            what = what.ljust(_WIDTH)
        if self._colour:
            good = _GOOD.get(event.kind)
            bad = (
                event.status in _BAD_STATUS if good is None else event.status not in good and not event.search_expansion
            )
            label = f"{_RED if bad else _COLOURS.get(event.kind, '')}{label}{_OFF}"
            details = f"{_DIM}{details}{_OFF}" if details else ""
        text = f"{self._time(event.time)}{label}{what}" + (f"  {details}" if details else "") + "\n"
        for name, value in event.headers:
            text += f"           {printable(name)}: {printable(value, space=True)}\n"
        return text

    def _time(self, when: int) -> str:
        if not self._terminal:
            return ""
        second, rest = divmod(when, 1_000_000_000)
        if second != self._second:
            self._second, self._clock = second, time.strftime("%H:%M:%S", time.localtime(second))
        return f"{self._clock}.{rest // 1_000_000:03d} "


def endpoint(address: str, port: int) -> str:
    """`address:port`, IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _what(event: Event) -> str:
    """The first version's part of the line, behind the kind."""
    kind = event.kind
    source = printable(event.src) or "-"
    if kind == events.DNS:
        return f"{source} ? {printable(event.domain)} ({printable(event.dns_type)})"
    if kind in (events.HTTP, events.HTTPS):
        host = printable(event.domain) or (endpoint(printable(event.dst), event.port) if event.dst else "")
        path = printable(event.path)
        # The target of a request in absolute form names the host itself; asterisk form has no slash of its
        # own.
        where = path if "://" in path else f"{host}{'' if not path or path[0] == '/' else ' '}{path}"
        request = f"{printable(event.method)} {where}".rstrip()
        if kind == events.HTTPS:
            return f"[pid={event.pid} {printable(event.comm)}] {request}"
        return f"{source} -> {request}"
    target = endpoint(printable(event.dst), event.port)
    if kind == events.TLS:
        return f"{source} -> {printable(event.domain) or '-'}  ({target})"
    return f"{source} -> {target}"


def _details(event: Event) -> list[str]:
    """What the first version's line lacks, as key=value."""
    kind = event.kind
    out = _who(event.workload)
    if event.status:
        out.append(f"status={printable(event.status)}")
    x = event.exchange
    if x is not None and x.status:
        out.append(f"status={x.status}")
    if x is not None and x.grpc_status is not None:
        out.append(f"grpc={x.grpc_status}")
    if x is not None and x.error:
        out.append(f"error={printable(x.error)}")
    if event.duration is not None:
        out.append(f"took={_duration(event.duration)}")
    if x is not None:
        if x.response_size:
            out.append(f"size={_size(x.response_size)}")
        if x.partial:
            out.append(f"partial={x.partial}")
    if event.tls is not None:
        out += _tls_details(event.tls)
    if kind == events.CLOSE:
        out.append(f"tx={_size(event.tx_bytes)}")
        out.append(f"rx={_size(event.rx_bytes)}")
        if event.retransmits:
            out.append(f"retransmits={event.retransmits}")
    if event.rtt is not None:
        out.append(f"rtt={_duration(event.rtt)}")
    if event.answers:
        shown = ",".join(printable(answer) for answer in event.answers[:_SHOWN_ANSWERS])
        more = len(event.answers) - _SHOWN_ANSWERS
        out.append(f"answers={shown}" + (f",+{more}" if more > 0 else ""))
    if event.role != events.CLIENT:
        out.append("dir=ingress" if event.role == events.SERVER else "dir=unknown")
    if event.transport not in ("tcp", "") and kind in (events.CONNECT, events.CLOSE, events.NEW):
        out.append(f"proto={printable(event.transport)}")
    if event.pid and kind != events.HTTPS:
        out.append(f"proc={printable(event.comm)}[{event.pid}]")
    if kind in (events.CONNECT, events.CLOSE, events.NEW) and event.domain and event.name_source != events.ADDRESS:
        out.append(f"name={printable(event.domain)}")
    if event.name_source and kind != events.DNS:
        out.append(f"via={event.name_source}")
    if event.redirected:
        out.append("proxied=true")
    if event.search_expansion:
        out.append("search=true")
    if event.credentials:
        out.append("cleartext-credentials=true")
    if event.group:
        out.append(f"group={event.group}")
    if event.proxy:
        out.append(f"proxy={printable(event.proxy)}")
    return out


def _tls_details(tls: Tls) -> list[str]:
    out = []
    if tls.quic:
        out.append(f"quic={tls.quic}")
    if tls.version:
        out.append(f"version={tls.version}")
    elif tls.offered:
        out.append(f"offered={tls.offered}")
    if tls.alpn:
        out.append(f"alpn={','.join([printable(name) for name in tls.alpn])}")
    return out


def _who(who: Workload) -> list[str]:
    if who.kind == "pod":
        pod = f"{who.namespace}/{who.pod_name}" if who.pod_name else f"uid:{who.pod_uid}"
        out = [f"pod={printable(pod)}"]
        if who.container_name:
            out.append(f"container={printable(who.container_name)}")
        return out
    if who.kind in ("container", "unit", "session", "cgroup"):
        return [f"{who.kind}={printable(who.name)}"]
    return []


def _duration(nanoseconds: int) -> str:
    """Three digits and a unit: 850us, 12.3ms, 4.56s, 61.2min."""
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.0f}us"
    if nanoseconds < 1_000_000_000:
        return f"{nanoseconds / 1e6:.3g}ms" if nanoseconds < 999_500_000 else "1s"
    seconds = nanoseconds / 1e9
    return f"{seconds:.3g}s" if seconds < 600 else f"{seconds / 60:.1f}min"


def _size(count: int) -> str:
    if count < 1024:
        return f"{count}B"
    value = float(count)
    units = ["TiB", "GiB", "MiB", "KiB"]
    value /= 1024
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.1f}{units[-1]}"


# --- JSON ---------------------------------------------------------------------------------------------------

_DIRECTIONS = {events.CLIENT: "egress", events.SERVER: "ingress"}


class JsonFormat:
    """Events as one JSON object a line, ASCII only: what was not UTF-8 is U+FFFD, all controls are escaped.

    Put together by hand, in 4-6 us instead of json.dumps' 15: most values need no quoting beyond one call
    into C, and what belongs to the workload is made once for each."""

    def __init__(self, node: str = "") -> None:
        self._node = node
        self._second = -1
        self._stamp = ""
        self._workloads: dict[int, tuple[Workload, str]] = {}

    def line(self, event: Event) -> str:
        # One unpacking is a third of the price of 26 attributes.
        (
            kind, when, who, pid, comm, transport, role, src, src_port, dst, port, scope, domain,
            source, status, duration, sent, received, retransmits, rtt, dns_type, answers,
            method, path, headers, proxy, _cookie, _filtered,
            exchange, tls, search, group, credentials, redirected,
        ) = event  # fmt: skip
        second, nanoseconds = divmod(when, 1_000_000_000)
        if second != self._second:
            self._second, self._stamp = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        # RFC3339Nano, as Go writes it: no zeros at the end of the fraction.
        fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
        out = [f'{{"ts":"{self._stamp}{fraction}Z","kind":"{kind}"']
        add = out.append
        if src:
            add(f'"src":{_string(src)}')
        if dst:
            add(f'"dst":{_string(dst)}')
        if port:
            add(f'"port":{port}')
        if domain:
            add(f'"domain":{_string(domain)}')
        if dns_type:
            add(f'"dns_type":{_string(dns_type)}')
        if method:
            add(f'"method":{_string(method)}')
        if path:
            add(f'"path":{_string(path)}')
        if headers:
            pairs = ",".join(f'{{"name":{_string(name)},"value":{_string(value)}}}' for name, value in headers)
            add(f'"headers":[{pairs}]')
        if pid:
            add(f'"pid":{pid}')
        if comm:
            add(f'"comm":{_string(comm)}')
        known = self._workloads.get(who.cgroup_id)
        workload = known[1] if known is not None and known[0] is who else self._workload(who)
        if workload:
            add(workload)
        if transport:
            add(f'"transport":{_string(transport)}')
        if src_port:
            add(f'"src_port":{src_port}')
        if scope:
            add(f'"scope":"{scope}"')
        if source:
            add(f'"name_source":"{source}"')
        if group:
            add(f'"group":"{group}"')
        if redirected:
            add('"proxied":true')
        if search:
            add('"search_expansion":true')
        if credentials:
            add('"cleartext_credentials":true')
        if status:
            add(f'"status":{_string(status)}')
        if duration is not None:
            add(f'"duration_ms":{_milliseconds(duration)}')
        if role in _DIRECTIONS:
            add(f'"direction":"{_DIRECTIONS[role]}"')
        if sent:
            add(f'"tx_bytes":{sent}')
        if received:
            add(f'"rx_bytes":{received}')
        if retransmits:
            add(f'"retransmits":{retransmits}')
        if rtt is not None:
            add(f'"rtt_ms":{_milliseconds(rtt)}')
        if answers:
            add(f'"answers":[{",".join(map(_string, answers))}]')
        if proxy:
            add(f'"proxy":{_string(proxy)}')
        if exchange is not None:
            add(_exchange(exchange))
        if tls is not None:
            add(_tls_members(tls))
        return ",".join(out) + "}\n"

    def _workload(self, who: Workload) -> str:
        """The members `pod` and `workload`. Cached by identity: attribution hands out one object a cgroup."""
        parts = []
        if who.kind == "pod":
            parts.append(
                _object(
                    "pod",
                    namespace=who.namespace,
                    name=who.pod_name,
                    uid=who.pod_uid,
                    container=who.container_name,
                    qos=who.qos,
                    node=self._node,
                )
            )
        parts.append(
            _object(
                "workload",
                kind=who.kind,
                name=who.name,
                cgroup=who.path,
                unit=who.unit,
                container_id=who.container_id,
                runtime=who.runtime,
            )
        )
        text = ",".join(parts)
        if len(self._workloads) >= _WORKLOADS:
            self._workloads.clear()
        self._workloads[who.cgroup_id] = who, text
        return text


def _exchange(exchange: Exchange) -> str:
    """The members that say how a request went."""
    version, scheme, status, error, first_byte, sent, received, grpc, traceparent, sequence, partial, *_ = exchange
    parts = [f'"scheme":"{scheme}","http_version":"{version}"']
    if status:
        parts.append(f'"http_status":{status}')
    if error:
        parts.append(f'"error":{_string(error)}')
    if first_byte is not None:
        parts.append(f'"first_byte_ms":{_milliseconds(first_byte)}')
    if sent is not None:
        parts.append(f'"request_bytes":{sent}')
    if received is not None:
        parts.append(f'"response_bytes":{received}')
    if grpc is not None:
        parts.append(f'"grpc_status":{grpc}')
    if traceparent:
        parts.append(f'"trace_id":"{traceparent[3:35]}"')
    if sequence:
        parts.append(f'"sequence":{sequence}')
    if partial:
        parts.append(f'"partial":"{partial}"')
    return ",".join(parts)


def _tls_members(tls: Tls) -> str:
    """The member `tls`. Words of ours need no quoting; ALPN names are the client's."""
    version, offered, alpn, group, post_quantum, ech, ja4, resumed, alert, quic = tls
    out = [
        f'"{name}":"{value}"'
        for name, value in (
            ("version", version),
            ("offered", offered),
            ("group", group),
            ("ja4", ja4),
            ("alert", alert),
            ("quic", quic),
        )
        if value
    ]
    if alpn:
        out.append(f'"alpn":[{",".join(map(_string, alpn))}]')
    if post_quantum:
        out.append('"post_quantum":true')
    if ech:
        out.append('"ech":true')
    if resumed is not None:
        out.append(f'"resumed":{"true" if resumed else "false"}')
    return f'"tls":{{{",".join(out)}}}'


def _object(key: str, **members: str) -> str:
    inner = ",".join(f'"{name}":{_string(value)}' for name, value in members.items() if value)
    return f'"{key}":{{{inner}}}'


def _string(text: str) -> str:
    """A JSON string. Half a surrogate pair (an undecodable byte) is U+FFFD: strict parsers refuse \\udc80."""
    if text.isascii():
        return _quote(text)
    return _quote(_SURROGATE.sub("\ufffd", text))


def _milliseconds(nanoseconds: int) -> str:
    """Milliseconds without exponent, and without a fraction where there is none."""
    whole, rest = divmod(nanoseconds, 1_000_000)
    return f"{whole}.{rest:06d}".rstrip("0") if rest else str(whole)
