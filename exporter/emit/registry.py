"""What every span, log record and attribute is, as data: the tables of docs/telemetry.md are made from it.

Comes in: nothing. Goes out: SPANS, EVENTS, UNITS. Not its job: the names themselves, attributes and
metrics, which semconv.py has. Tests hold these tables and what the code really emits together.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from exporter.emit import semconv as c


class SpanType(NamedTuple):
    """`name`: how it is made up; braces hold attributes. `kind`: CLIENT or INTERNAL."""

    name: str
    kind: str
    stability: str
    brief: str
    attributes: tuple[str, ...]


class EventType(NamedTuple):
    """A log record by its event name."""

    name: str
    severity: str
    stability: str
    brief: str
    attributes: tuple[str, ...]


_PLACE: Final = (
    c.SERVER_ADDRESS, c.SERVER_PORT, c.PEER_ADDRESS, c.PEER_PORT, c.LOCAL_ADDRESS, c.LOCAL_PORT, c.TRANSPORT,
    c.NETWORK_TYPE, c.PEER_NAME_SOURCE, c.PEER_SCOPE, c.ROLE, c.PEER_GROUP, c.PROXIED, c.PROCESS_PID,
    c.PROCESS_EXECUTABLE,
)  # fmt: skip
_RESOLVER: Final = tuple(name for name in _PLACE if name != c.PEER_NAME_SOURCE)
_DNS: Final = (c.DNS_QUESTION_NAME, c.DNS_QUESTION_TYPE, c.DNS_RCODE, c.DNS_ANSWERS, c.DNS_SEARCH_EXPANSION)
_TLS: Final = (
    c.TLS_VERSION, c.TLS_OFFERED, c.TLS_ALPN, c.TLS_GROUP, c.TLS_POST_QUANTUM, c.TLS_ECH, c.TLS_JA4, c.TLS_RESUMED,
    c.TLS_ALERT, c.QUIC_VERSION,
)  # fmt: skip
_REQUEST: Final = (
    c.HTTP_METHOD, c.HTTP_METHOD_ORIGINAL, c.HTTP_STATUS, c.PROTOCOL_VERSION, c.HTTP_REQUEST_BODY,
    c.HTTP_RESPONSE_BODY, c.FIRST_BYTE_TIME, c.HTTP_SEQUENCE, c.HTTP_PARTIAL, c.URL_SCHEME, c.PROXY,
)  # fmt: skip
_RPC: Final = (c.RPC_SYSTEM, c.RPC_METHOD, c.RPC_METHOD_ORIGINAL, c.RPC_STATUS)

SPANS: Final = (
    SpanType(
        "{http.request.method} {url.template}", "CLIENT", c.STABLE,
        "An HTTP request, from its first byte to the last of the response. Only the method where no template fits; "
        "`HTTP` for a method that is not a standard one.",
        (*_PLACE, *_REQUEST, c.URL_FULL, c.URL_TEMPLATE, c.USER_AGENT, c.HTTP_REQUEST_HEADER, c.ERROR_TYPE),
    ),
    SpanType(
        "{rpc.method}", "CLIENT", c.CANDIDATE,
        "A gRPC call: the HTTP/2 stream that carries it. `grpc` where the server does not know the method.",
        (*_PLACE, *_REQUEST, *_RPC, c.URL_FULL, c.USER_AGENT, c.RPC_REQUEST_METADATA, c.ERROR_TYPE),
    ),
    SpanType(
        "connection", "INTERNAL", c.DEVELOPMENT,
        "How a connection came about: a trace of its own, only where that was slow, failed, or was asked for. "
        "Each request of the connection has a link to it.",
        (*_PLACE, c.CONNECTION_ID, c.ERROR_TYPE),
    ),
    SpanType(
        "DNS lookup {dns.question.name}", "INTERNAL", c.DEVELOPMENT,
        "A child of `connection`: from the query to its answer, or until it was given up.",
        (*_RESOLVER, *_DNS, c.ERROR_TYPE),
    ),
    SpanType(
        "socket connect {network.peer.address}:{network.peer.port}", "INTERNAL", c.DEVELOPMENT,
        "A child of `connection`: the TCP handshake.",
        (*_PLACE, c.ERROR_TYPE),
    ),
    SpanType(
        "TLS client handshake {server.address}", "INTERNAL", c.DEVELOPMENT,
        "A child of `connection`: the TLS handshake.",
        (*_PLACE, *_TLS, c.PROXY, c.ERROR_TYPE),
    ),
)  # fmt: skip

_RECORD: Final = (*_PLACE, c.CONNECTION_ID, c.FIRST_SEEN, c.REPEATS, c.ERROR_TYPE)

EVENTS: Final = (
    EventType(
        c.EVENT_CONNECTION, "INFO; WARN where it failed", c.DEVELOPMENT,
        "A connection was opened, failed or was closed.",
        (
            *_RECORD, c.CONNECTION_STATE, c.CONNECT_DURATION, c.CONNECTION_DURATION, c.CONNECTION_SENT,
            c.CONNECTION_RECEIVED, c.CONNECTION_RETRANSMITS, c.CONNECTION_RTT,
        ),
    ),
    EventType(
        c.EVENT_DNS, "INFO; WARN where it failed, but for a name that does not exist", c.DEVELOPMENT,
        "A name was looked up.", (*_RESOLVER, *_RECORD[len(_PLACE) :], *_DNS, c.DNS_DURATION),
    ),
    EventType(
        c.EVENT_TLS, "INFO; WARN where it failed", c.DEVELOPMENT, "A TLS or QUIC handshake.",
        (*_RECORD, *_TLS, c.TLS_DURATION, c.PROXY),
    ),
    EventType(
        c.EVENT_HTTP, "INFO; WARN for 5xx, and where there was no answer", c.DEVELOPMENT,
        "An HTTP request or gRPC call. Carries the trace context that the application sent.",
        (*_RECORD, *_REQUEST, *_RPC, c.URL_PATH, c.URL_QUERY, c.HTTP_DURATION, c.CLEARTEXT_CREDENTIALS),
    ),
    EventType(
        c.EVENT_DESTINATION_NEW, "INFO", c.DEVELOPMENT,
        "A workload talked to a destination for the first time in the inventory's life; only with EBFW_INVENTORY.",
        (*_PLACE, c.CONNECTION_ID),
    ),
)  # fmt: skip

BY_NAME: Final = {attribute.name: attribute for attribute in c.ATTRIBUTES}
UNITS: Final = {
    c.HTTP_REQUEST_BODY: "By",
    c.HTTP_RESPONSE_BODY: "By",
    c.CONNECTION_SENT: "By",
    c.CONNECTION_RECEIVED: "By",
    c.CONNECTION_RETRANSMITS: "{segment}",
    **dict.fromkeys(
        (
            c.FIRST_BYTE_TIME, c.HTTP_DURATION, c.TLS_DURATION, c.DNS_DURATION, c.CONNECT_DURATION,
            c.CONNECTION_DURATION, c.CONNECTION_RTT,
        ),
        "s",
    ),
}  # fmt: skip
