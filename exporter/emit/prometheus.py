"""The scrape face: /metrics, /healthz and /readyz over HTTP.

Comes in: Metrics. Goes out: text or OpenMetrics, whichever the scraper asks for, names translated as an OTLP
push into Prometheus would translate them. Not its job: counting (metrics.py), deciding what readiness means
(the agent).

The page says who talks to whom: it listens where it is told to, and TLS and basic auth are there for those
who open it to the network. The only module that imports prometheus_client.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hmac
import http.client
import logging
import os
import re
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import exposition
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as Shown
from prometheus_client.utils import floatToGoString

from exporter.emit import semconv as c
from exporter.emit.histograms import Exemplar, Histogram
from exporter.emit.metrics import Metrics, Point
from exporter.emit.resource import Resource
from exporter.errors import SettingsError

_log = logging.getLogger(__name__)

# Prometheus scrapes once at a time; more than a few at once is a mistake or an attack, and each may cost 20
# MB.
_CONCURRENT = 4
_PIECE = 1000  # samples
_SECONDS = 10.0  # for a client to send its request or take the answer

_TARGET = frozenset((c.SERVICE_NAME, c.SERVICE_NAMESPACE, c.SERVICE_INSTANCE_ID))
_TYPES = {c.COUNTER: "counter", c.GAUGE: "gauge", c.UPDOWN: "gauge", c.HISTOGRAM: "histogram"}


class Piece(NamedTuple):
    """A metric family or, where it has many samples, a part of one. `continues`: its header has been said."""

    family: Family
    continues: bool


class Collect(Collector):
    """A prometheus_client collector over Metrics: no `_created` series, metrics without points left out."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Family]:
        """Whole families, as prometheus_client wants them."""
        whole: Family | None = None
        for family, continues in self.pieces():
            if whole is not None and continues:
                whole.samples += family.samples
                continue
            if whole is not None:
                yield whole
            whole = family
        if whole is not None:
            yield whole

    def pieces(self) -> Iterator[Piece]:
        """The same in parts of about a thousand samples: 50,000 at once would cost 40 MB while they are
        written."""
        snapshot = self._metrics.snapshot()
        target = Family("target", "Where these metrics come from.", "info")
        # As Prometheus itself makes it of a Resource: without what became `job` and `instance`.
        labels = {k: str(v) for k, v in snapshot.agent.attributes if k not in _TARGET}
        target.add_sample("target_info", {c.prometheus_label(k): v for k, v in labels.items()}, 1)
        yield Piece(target, False)
        for metric, points in snapshot.by_metric():
            name, continues = c.prometheus_name(metric), False
            family = _family(metric, name)
            last: Resource | None = None
            identity: dict[str, str] = {}
            for resource, point in points:
                if resource is not last:  # a workload's points come one after the other
                    last, identity = resource, _identity(resource)
                labels = identity | {c.prometheus_label(k): _text(v) for k, v in point.attributes}
                _add(family, metric, name, labels, point)
                if len(family.samples) >= _PIECE:
                    yield Piece(family, continues)
                    family, continues = _family(metric, name), True
            if family.samples:
                yield Piece(family, continues)


def _family(metric: c.Metric, name: str) -> Family:
    return Family(name, metric.description, _TYPES[metric.kind], c.prometheus_unit(metric))


class _One(Collector):
    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Family]:
        yield self._family


_EOF = b"# EOF\n"


def _encoded(collector: Collect, encode: Callable[[Collector], bytes]) -> Iterator[bytes]:
    """The page in parts: each piece encoded by prometheus_client, headers and end marks where they belong."""
    marked = False
    for family, continues in collector.pieces():
        text = encode(_One(family))
        if text.endswith(_EOF):
            text, marked = text[: -len(_EOF)], True
        while continues and text.startswith(b"# "):
            text = text[text.index(b"\n") + 1 :]
        yield text
    if marked:
        yield _EOF


def _identity(resource: Resource) -> dict[str, str]:
    return {c.prometheus_label(key): value for key, value in resource.identity}


def _text(value: str | bool | int) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _add(family: Family, metric: c.Metric, name: str, labels: dict[str, str], point: Point) -> None:
    if metric.kind == c.HISTOGRAM:
        *counts, total = point.value
        shown = point.source.exemplars if isinstance(point.source, Histogram) else None
        running = 0
        for bucket, (bound, count) in enumerate(zip((*metric.bounds, float("inf")), counts, strict=True)):
            running += count
            le = floatToGoString(bound)  # type: ignore[no-untyped-call]
            exemplar = shown[bucket] if shown is not None else None
            family.add_sample(
                f"{name}_bucket",
                labels | {"le": le},
                running,
                exemplar=None if exemplar is None else _exemplar(exemplar),
            )
        family.add_sample(f"{name}_count", labels, running)
        family.add_sample(f"{name}_sum", labels, total)
    else:
        family.add_sample(f"{name}_total" if metric.kind == c.COUNTER else name, labels, point.value)


def _exemplar(found: Exemplar) -> Shown:
    ids = {"trace_id": found.trace_id.hex(), "span_id": found.span_id.hex()} if found.trace_id else {}
    return Shown(ids, found.value, found.time_ns / 1e9)


class Security(NamedTuple):
    """Optional protection of the page. `cert` and `key` are PEM files; `users` a file of `name:password`
    lines."""

    cert: Path | None = None
    key: Path | None = None
    users: Path | None = None


class Server:
    """The running server; `port` is the real one where 0 was asked for. `close` stops it."""

    def __init__(self, httpd: ThreadingHTTPServer) -> None:
        self._httpd = httpd
        self.host, self.port = str(httpd.server_address[0]), int(httpd.server_address[1])
        self._thread = threading.Thread(target=httpd.serve_forever, args=(0.2,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join(timeout=2)


def serve(
    host: str,
    port: int,
    metrics: Metrics,
    ready: Callable[[], str] = lambda: "",
    security: Security | None = None,
    setting: str = "EBFW_METRICS_ADDR",
) -> Server:
    """Serve /metrics, /healthz and /readyz in a thread. `host` "" is every interface; `port` 0 is any free
    one.

    `ready` returns "" when the agent is ready, else what it waits for. Raises SettingsError, naming
    `setting`, where the address cannot be had, and where a file of `security` cannot be used.
    """
    security = security or Security()
    context = _context(security)
    users = _users(security.users) if security.users else None
    collector, slots = Collect(metrics), threading.BoundedSemaphore(_CONCURRENT)

    class Handler(_Handler):
        pages = _Pages(collector, ready, users, slots)

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 16

        def finish_request(self, request: Any, client_address: Any) -> None:
            # In the request's own thread: a client that does not finish its handshake must not stop the
            # others.
            request.settimeout(_SECONDS)
            try:
                if context is not None:
                    request = context.wrap_socket(request, server_side=True)
                super().finish_request(request, client_address)
            except OSError as error:
                _log.debug("scrape from %s: %s", client_address[0], error)

    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        # "" is the dual-stack wildcard where IPv6 exists.
        dual = not host and socket.has_dualstack_ipv6()
        family, *_, address = socket.getaddrinfo("::" if dual else host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        Listener.address_family = family
        httpd = Listener(address[:2], Handler, bind_and_activate=False)  # type: ignore[arg-type]
        try:
            if dual:
                httpd.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            httpd.server_bind()
            httpd.server_activate()
        except OSError:
            httpd.server_close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = f"{shown.rpartition(':')[0]}:{port + 1 if port < 65535 else port - 1}"
            raise SettingsError(
                f"{setting}={shown}: the port is taken by another program (another ebfw?); "
                f"set {setting}={free}, or leave it empty to serve no metrics"
            ) from None
        raise SettingsError(f"{setting}={shown}: cannot listen there: {error.strerror or error}") from None
    return Server(httpd)


def series_of(host: str, port: int, seconds: float = 2.0) -> dict[str, int] | None:
    """{metric: series} of an agent that serves there, by its own account; None where none answers, or not to us."""
    wanted = c.prometheus_series(c.SERIES) + "{"
    label = re.compile(rf'\b{c.prometheus_label("ebfw.metric")}="([^"]*)"')
    connection = http.client.HTTPConnection(host or "127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        if answer.status != 200:
            return None
        found: dict[str, int] = {}
        for line in answer:
            text = line.decode("utf-8", "replace")
            if text.startswith(wanted) and (name := label.search(text)):
                found[name[1]] = int(float(text.rpartition(" ")[2]))
        return found or None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class _Pages(NamedTuple):
    collector: Collect
    ready: Callable[[], str]
    users: dict[str, str] | None
    slots: threading.BoundedSemaphore


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "ebfw", ""
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    pages: _Pages

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(200, b"ok\n")
        elif path == "/readyz":
            waits_for = self.pages.ready()
            self._answer(503 if waits_for else 200, f"{waits_for or 'ready'}\n".encode())
        elif not self._allowed():
            self._answer(401, b"user and password, please\n", {"WWW-Authenticate": 'Basic realm="ebfw"'})
        elif path == "/metrics":
            self._metrics()
        elif path == "/":
            self._answer(200, b"ebfw: /metrics /healthz /readyz\n")
        else:
            self._answer(404, b"there is /metrics, /healthz and /readyz\n")

    do_HEAD = do_GET

    def _metrics(self) -> None:
        if not self.pages.slots.acquire(blocking=False):
            self._answer(503, b"too many scrapes at once\n", {"Retry-After": "1"})
            return
        try:
            encode, content_type = exposition.choose_encoder(self.headers.get("Accept", ""))
            parts = _encoded(self.pages.collector, encode)
            headers = {"Content-Type": content_type}
            if "gzip" in self.headers.get("Accept-Encoding", ""):
                headers["Content-Encoding"] = "gzip"
                parts = _gzipped(parts)
            self._stream(parts, headers)
        finally:
            self.pages.slots.release()

    def _stream(self, parts: Iterator[bytes], headers: dict[str, str]) -> None:
        chunked = self.request_version != "HTTP/1.0"
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        for part in filter(None, parts):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _allowed(self) -> bool:
        if self.pages.users is None:
            return True
        scheme, _, encoded = self.headers.get("Authorization", "").partition(" ")
        try:
            name, _, password = base64.b64decode(encoded).decode().partition(":")
        except ValueError:
            return False
        expected = self.pages.users.get(name)
        # Compared also for a name that does not exist, so that the time says nothing about names.
        same = hmac.compare_digest(password.encode(), (expected if expected is not None else "").encode())
        return scheme.lower() == "basic" and expected is not None and same

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "text/plain; charset=utf-8"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _gzipped(parts: Iterator[bytes]) -> Iterator[bytes]:
    stream = zlib.compressobj(1, wbits=31)
    for part in parts:
        yield stream.compress(part)
    yield stream.flush()


def _context(security: Security) -> ssl.SSLContext | None:
    if security.cert is None:
        return None
    held = _contents("EBFW_METRICS_TLS_CERT", security.cert)
    if security.key is not None:
        _contents("EBFW_METRICS_TLS_KEY", security.key)
    elif b"PRIVATE KEY-----" not in held:
        raise SettingsError(f"EBFW_METRICS_TLS_CERT={security.cert} has no key; set EBFW_METRICS_TLS_KEY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(security.cert, security.key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"EBFW_METRICS_TLS_CERT={security.cert}: cannot be used: {error}") from None
    return context


def _contents(name: str, path: Path) -> bytes:
    """Raises SettingsError, which names the variable."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}={path}: cannot be read: {error.strerror}") from None


def _users(path: Path) -> dict[str, str]:
    name = "EBFW_METRICS_USERS"
    try:
        text = _contents(name, path).decode()
    except UnicodeDecodeError:
        raise SettingsError(f"{name}={path}: cannot be read: it is not UTF-8") from None
    with contextlib.suppress(OSError):
        if os.stat(path).st_mode & 0o007:
            _log.warning("%s holds the passwords for /metrics and everybody on this host can read it", path)
    users = dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
    if not users:
        raise SettingsError(f"{name}={path}: has no line of the form name:password")
    return users
