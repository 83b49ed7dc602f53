"""Spans: an event as a plain value that says what a span will say.

Comes in: events.Event, redacted. Goes out: Span. Not its job: ids, what belongs together (setup.py), which spans
are kept (sampling.py), encoding (otlp_records.py).

Names, kinds, status and attributes follow the conventions 1.44: HTTP and gRPC calls are CLIENT, what a connection
took to come about is INTERNAL. error.type is the same on span and metric; status stays unset on success, and has
no description where error.type says it all.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from exporter.emit import semconv as c
from exporter.events import ADDRESS, CANCELLED, DNS, HTTP, HTTPS, OK, SERVER, TLS, Event, Exchange

Value = str | bool | int | float | tuple[str, ...]
Attributes = tuple[tuple[str, Value], ...]
Pairs = list[tuple[str, Value]]

INTERNAL: Final = 1  # SpanKind
CLIENT: Final = 3
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Span(NamedTuple):
    """`failed`: the status is Error. `error.type` may be set without it: a lost Happy-Eyeballs race is cancelled,
    and not a failure."""

    name: str
    kind: int
    start_ns: int
    end_ns: int
    failed: bool
    attributes: Attributes


def error_type(event: Event) -> str:
    """error.type of the event, "" where nothing went wrong."""
    if event.kind == DNS:
        return "" if event.search_expansion else c.dns_error(event.status)
    exchange = event.exchange
    if exchange is not None:
        return exchange_error(exchange)
    if event.tls is not None and event.tls.alert:
        return event.tls.alert
    if not event.status or event.status == OK:
        return ""
    return c.CONNECT_ERRORS.get(event.status, event.status)


def exchange_error(exchange: Exchange) -> str:
    """error.type of a request: why it has no answer, else the gRPC status, else a status of 400 and more."""
    if exchange.error:
        return exchange.error
    if exchange.grpc_status:
        return grpc_code(exchange.grpc_status)
    return str(exchange.status) if exchange.status >= 400 else ""


def grpc_code(number: int) -> str:
    return c.GRPC_CODES[number] if 0 <= number < len(c.GRPC_CODES) else str(number)


def failed(event: Event) -> bool:
    """True where the event is a failure in rates: neither cancelled nor a step of a search list is (D3)."""
    return event.status != CANCELLED and not event.search_expansion and error_type(event) != ""


def grave(event: Event) -> bool:
    """Whether the event is kept first within the budget and is worth a warning (D10): no answer, 5xx, denial. A 4xx
    is the client's own fault, and most of them are meant."""
    exchange = event.exchange
    if exchange is None:
        return failed(event)
    if exchange.grpc_status:
        return bool(exchange.error) or exchange.grpc_status in c.GRPC_SERVER_ERRORS
    return bool(exchange.error) or exchange.status >= 500


def told(event: Event) -> bool:
    """Whether the event may become a span or log record at all: what a workload started and `exclude` did not
    hide (D2, D5)."""
    return event.role != SERVER and not event.filtered


# --- HTTP and gRPC ------------------------------------------------------------------------------------------------

# The four parts of a request's attributes, in this order, are what the encoder keeps encoded: each holds what
# changes together. What the parts depend on stands with them.


def request(event: Event, template: str = "") -> Span | None:
    """A request with its outcome as a span; None for an event without one."""
    exchange = event.exchange
    if exchange is None:
        return None
    pairs = [*peer(event), *process(event), *outcome(event, template)]
    pairs += [(c.LOCAL_PORT, event.src_port), (c.URL_FULL, base_url(event) + event.path), *measures(exchange)]
    return Span(
        request_name(event, template),
        CLIENT,
        event.time,
        event.time + (event.duration or 0),
        exchange_error(exchange) != "",
        tuple(pairs),
    )


def request_name(event: Event, template: str) -> str:
    exchange = event.exchange
    if exchange is not None and exchange.grpc_status is not None:
        return "grpc" if exchange.grpc_status == 12 else event.path.lstrip("/") or "grpc"
    method = event.method if event.method in c.HTTP_METHODS else "HTTP"
    return f"{method} {template}" if template else method


def server_port(event: Event) -> int:
    """The peer's. Behind a proxy (D6), and where only a TLS library was seen, the one that the request names."""
    exchange = event.exchange
    if exchange is None or (event.port and not event.proxy):
        return event.port
    return exchange.server_port or _DEFAULT_PORTS.get(exchange.scheme, event.port)


def base_url(event: Event) -> str:
    """scheme://host[:port] of a request."""
    scheme = event.exchange.scheme if event.exchange is not None else event.kind
    host = event.domain or event.dst
    port = server_port(event)
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}" if port in (0, _DEFAULT_PORTS.get(scheme)) else f"{scheme}://{host}:{port}"


def peer(event: Event) -> Pairs:
    """Depends on domain, name_source, dst, port, scope, role, transport, proxy, group, redirected and the exchange's
    scheme, version and server_port."""
    exchange = event.exchange
    return _present(
        (c.SERVER_ADDRESS, event.domain or event.dst),
        (c.SERVER_PORT, server_port(event)),
        (c.PEER_ADDRESS, event.dst),
        (c.PEER_PORT, event.port if event.dst else 0),
        (c.TRANSPORT, event.transport),
        (c.NETWORK_TYPE, _family(event.dst)),
        (c.PEER_NAME_SOURCE, event.name_source or ADDRESS),
        (c.PEER_SCOPE, event.scope),
        (c.ROLE, event.role),
        (c.PEER_GROUP, event.group),
        (c.PROXIED, event.redirected),
        (c.PROXY, event.proxy),
        (c.URL_SCHEME, exchange.scheme if exchange is not None else event.kind),
        (c.PROTOCOL_VERSION, exchange.version if exchange is not None else ""),
    )


def process(event: Event) -> Pairs:
    """Depends on src, pid and comm."""
    return _present(
        (c.LOCAL_ADDRESS, event.src), (c.PROCESS_PID, event.pid), (c.PROCESS_EXECUTABLE, event.comm)
    )  # fmt: skip


def outcome(event: Event, template: str) -> Pairs:
    """Depends on method and template, the exchange's status, error, partial and grpc_status; for gRPC on the
    path."""
    exchange = event.exchange
    known = event.method in c.HTTP_METHODS
    pairs: Pairs = _present(
        (c.HTTP_METHOD, event.method if known or not event.method else "_OTHER"),
        (c.HTTP_METHOD_ORIGINAL, "" if known else event.method),
    )
    if exchange is None:
        return pairs
    if exchange.grpc_status is not None:
        pairs += rpc(event.path, exchange.grpc_status)
    elif template:
        pairs.append((c.URL_TEMPLATE, template))
    pairs += _present(
        (c.HTTP_STATUS, exchange.status),
        (c.ERROR_TYPE, exchange_error(exchange)),
        (c.HTTP_PARTIAL, exchange.partial),
    )
    return pairs


def rpc(path: str, status: int) -> Pairs:
    """A method that the server does not know may be anything: it is `_OTHER` (conventions, rpc.method)."""
    method = path.lstrip("/")
    return _present(
        (c.RPC_SYSTEM, "grpc"),
        (c.RPC_METHOD, "_OTHER" if status == 12 else method),
        (c.RPC_METHOD_ORIGINAL, method if status == 12 else ""),
        (c.RPC_STATUS, grpc_code(status)),
    )


def measures(exchange: Exchange) -> Pairs:
    """What differs from one request to the next."""
    pairs: Pairs = []
    if exchange.request_size is not None:
        pairs.append((c.HTTP_REQUEST_BODY, exchange.request_size))
    if exchange.response_size is not None:
        pairs.append((c.HTTP_RESPONSE_BODY, exchange.response_size))
    if exchange.sequence:
        pairs.append((c.HTTP_SEQUENCE, exchange.sequence))
    if exchange.first_byte is not None:
        pairs.append((c.FIRST_BYTE_TIME, exchange.first_byte / 1e9))
    return pairs


def headers(event: Event, allowed: frozenset[str]) -> Pairs:
    """Request headers by allow list (D8); `allowed` in lower case. One that came twice has two values."""
    found: dict[str, list[str]] = {}
    for name, value in event.headers:
        if (name := name.lower()) in allowed:
            found.setdefault(name, []).append(value)
    grpc = event.exchange is not None and event.exchange.grpc_status is not None
    prefix = c.RPC_REQUEST_METADATA if grpc else c.HTTP_REQUEST_HEADER
    pairs: Pairs = [(prefix + name, tuple(values)) for name, values in found.items() if name != "user-agent"]
    if agent := found.get("user-agent"):
        pairs.append((c.USER_AGENT, agent[0]))
    return pairs


# --- how a connection came about ----------------------------------------------------------------------------------


def step(event: Event) -> Span:
    """A lookup, a TCP handshake or a TLS handshake as a span."""
    pairs = where(event)
    if event.kind == DNS:
        name = f"DNS lookup {event.domain}"
        pairs += dns(event)
    elif event.kind == TLS:
        name = f"TLS client handshake {event.domain or event.dst}"
        pairs += tls(event)
    else:
        host = f"[{event.dst}]" if ":" in event.dst else event.dst
        name = f"socket connect {host}:{event.port}"
    if error := error_type(event):
        pairs.append((c.ERROR_TYPE, error))
    return Span(name, INTERNAL, event.time, event.time + (event.duration or 0), failed(event), tuple(pairs))


def where(event: Event) -> Pairs:
    """Who talks to whom: the attributes that spans and log records share. Unknown ones are left out."""
    lookup = event.kind == DNS
    return _present(
        (c.SERVER_ADDRESS, event.dst if lookup else event.domain or event.dst),
        (c.SERVER_PORT, server_port(event)),
        (c.PEER_ADDRESS, event.dst),
        (c.PEER_PORT, event.port if event.dst else 0),
        (c.LOCAL_ADDRESS, event.src),
        (c.LOCAL_PORT, event.src_port),
        (c.TRANSPORT, event.transport),
        (c.NETWORK_TYPE, _family(event.dst)),
        (c.PEER_NAME_SOURCE, "" if lookup else event.name_source or ADDRESS),
        (c.PEER_SCOPE, event.scope),
        (c.ROLE, event.role),
        (c.PEER_GROUP, event.group),
        (c.PROXIED, event.redirected),
        (c.PROCESS_PID, event.pid),
        (c.PROCESS_EXECUTABLE, event.comm),
        (c.PROXY, event.proxy if event.kind in (HTTP, HTTPS, TLS) else ""),
    )


def dns(event: Event) -> Pairs:
    return _present(
        (c.DNS_QUESTION_NAME, event.domain),
        (c.DNS_QUESTION_TYPE, event.dns_type),
        (c.DNS_RCODE, event.status if event.status.lower() != "timeout" else ""),
        (c.DNS_ANSWERS, event.answers),
        (c.DNS_SEARCH_EXPANSION, event.search_expansion),
    )


def tls(event: Event) -> Pairs:
    seen = event.tls
    if seen is None:
        return []
    pairs = _present(
        (c.TLS_VERSION, seen.version),
        (c.TLS_OFFERED, seen.offered),
        (c.TLS_ALPN, seen.alpn),
        (c.TLS_GROUP, seen.group),
        (c.TLS_JA4, seen.ja4),
        (c.TLS_ALERT, seen.alert),
        (c.QUIC_VERSION, seen.quic),
    )
    pairs += [(c.TLS_POST_QUANTUM, seen.post_quantum), (c.TLS_ECH, seen.ech)]
    if seen.resumed is not None:
        pairs.append((c.TLS_RESUMED, seen.resumed))
    return pairs


def _present(*pairs: tuple[str, Value]) -> Pairs:
    return [pair for pair in pairs if pair[1]]


def _family(address: str) -> str:
    return ("ipv6" if ":" in address else "ipv4") if address else ""
