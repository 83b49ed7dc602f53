"""Every name that ebfw emits, as data: metric names, units, descriptions, attributes, and how they map.

Comes in: nothing. Goes out: the tables that metrics.py fills, that both faces (prometheus.py, otlp.py) print
and that the docs and dashboards are checked against. Not its job: values. A name appears here or nowhere.

Names follow the OpenTelemetry semantic conventions 1.44; what they do not define is under `ebfw.`. Prometheus
names are derived, never written down, so that a scrape and an OTLP push into the same Prometheus agree.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final, NamedTuple

from exporter import events

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
SCOPE: Final = "ebfw"

# Attributes
SERVICE_NAME: Final = "service.name"
SERVICE_NAMESPACE: Final = "service.namespace"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
SERVICE_VERSION: Final = "service.version"
K8S_NAMESPACE_NAME: Final = "k8s.namespace.name"
K8S_POD_NAME: Final = "k8s.pod.name"
K8S_POD_UID: Final = "k8s.pod.uid"
K8S_CONTAINER_NAME: Final = "k8s.container.name"
K8S_NODE_NAME: Final = "k8s.node.name"
CONTAINER_NAME: Final = "container.name"
CONTAINER_ID: Final = "container.id"
CONTAINER_IMAGE_NAME: Final = "container.image.name"
CONTAINER_RUNTIME: Final = "container.runtime.name"
HOST_NAME: Final = "host.name"
DISTRO_NAME: Final = "telemetry.distro.name"
DISTRO_VERSION: Final = "telemetry.distro.version"
WORKLOAD_ID: Final = "ebfw.workload.id"
WORKLOAD_KIND: Final = "ebfw.workload.kind"
WORKLOAD_QOS: Final = "ebfw.workload.qos"
SYSTEMD_UNIT: Final = "ebfw.systemd.unit"
USER_ID: Final = "user.id"

SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
PEER_ADDRESS: Final = "network.peer.address"
PEER_PORT: Final = "network.peer.port"
LOCAL_ADDRESS: Final = "network.local.address"
LOCAL_PORT: Final = "network.local.port"
TRANSPORT: Final = "network.transport"
NETWORK_TYPE: Final = "network.type"
IO_DIRECTION: Final = "network.io.direction"
ERROR_TYPE: Final = "error.type"
DNS_QUESTION_NAME: Final = "dns.question.name"
DNS_ANSWERS: Final = "dns.answers"
DNS_QUESTION_TYPE: Final = "ebfw.dns.question.type"
DNS_SEARCH_EXPANSION: Final = "ebfw.dns.search_expansion"
DNS_RCODE: Final = "ebfw.dns.rcode"
HTTP_METHOD: Final = "http.request.method"
HTTP_METHOD_ORIGINAL: Final = "http.request.method_original"
HTTP_REQUEST_HEADER: Final = "http.request.header."
HTTP_STATUS: Final = "http.response.status_code"
HTTP_CONNECTION_STATE: Final = "http.connection.state"
URL_PATH: Final = "url.path"
URL_QUERY: Final = "url.query"
URL_SCHEME: Final = "url.scheme"
URL_TEMPLATE: Final = "url.template"
PROTOCOL_VERSION: Final = "network.protocol.version"
RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS: Final = "rpc.response.status_code"
TLS_VERSION: Final = "tls.protocol.version"
TLS_GROUP: Final = "ebfw.tls.group"
TLS_POST_QUANTUM: Final = "ebfw.tls.post_quantum"
TLS_JA4: Final = "ebfw.tls.ja4"
# Of spans and log records only
URL_FULL: Final = "url.full"
USER_AGENT: Final = "user_agent.original"
HTTP_REQUEST_BODY: Final = "http.request.body.size"
HTTP_RESPONSE_BODY: Final = "http.response.body.size"
FIRST_BYTE_TIME: Final = "ebfw.http.first_byte"
HTTP_DURATION: Final = "ebfw.http.duration"
HTTP_SEQUENCE: Final = "ebfw.http.request.sequence"
HTTP_PARTIAL: Final = "ebfw.http.partial"
RPC_METHOD_ORIGINAL: Final = "rpc.method_original"
RPC_REQUEST_METADATA: Final = "rpc.request.metadata."
TLS_RESUMED: Final = "tls.resumed"
TLS_OFFERED: Final = "ebfw.tls.version.offered"
TLS_ALPN: Final = "ebfw.tls.alpn.offered"
TLS_ECH: Final = "ebfw.tls.ech"
TLS_ALERT: Final = "ebfw.tls.alert"
TLS_DURATION: Final = "ebfw.tls.duration"
QUIC_VERSION: Final = "ebfw.quic.version"
PROCESS_PID: Final = "process.pid"
# The kernel's comm is the executable's name cut to 15 bytes: the nearest that the conventions have.
PROCESS_EXECUTABLE: Final = "process.executable.name"
PEER_SCOPE: Final = "ebfw.peer.scope"
PEER_NAME_SOURCE: Final = "ebfw.peer.name.source"
PEER_GROUP: Final = "ebfw.peer.group"
PROXIED: Final = "ebfw.proxied"
ROLE: Final = "ebfw.role"
CONNECTION_STATE: Final = "ebfw.connection.state"
CONNECTION_ID: Final = "ebfw.connection.id"
CONNECTION_DURATION: Final = "ebfw.connection.duration"
CONNECTION_SENT: Final = "ebfw.connection.sent"
CONNECTION_RECEIVED: Final = "ebfw.connection.received"
CONNECTION_RETRANSMITS: Final = "ebfw.connection.retransmits"
CONNECTION_RTT: Final = "ebfw.connection.rtt"
CONNECT_DURATION: Final = "ebfw.connect.duration"
DNS_DURATION: Final = "ebfw.dns.duration"
CLEARTEXT_CREDENTIALS: Final = "ebfw.http.cleartext_credentials"
FINDING: Final = "ebfw.hygiene.finding"
PHASE: Final = "ebfw.hygiene.phase"
PROXY: Final = "ebfw.proxy.address"
TLS_COVERAGE: Final = "ebfw.tls.coverage"  # classes: exporter/kernel/tls_libraries.py
REPEATS: Final = "ebfw.repeats"
FIRST_SEEN: Final = "ebfw.destination.first_seen"
OVERFLOW: Final = "otel.metric.overflow"

# What takes the place of a peer's name where there is no single one. No host name can begin with a tilde.
INBOUND, EXCLUDED, OTHER = "~inbound", "~excluded", "~other"

# Who a series belongs to: resource attributes on the OTLP face (Prometheus: `promote_resource_attributes`),
# labels on the scrape face. WORKLOAD_ID is a point attribute on both, present only where no name tells
# workloads apart.
IDENTITY: Final = (SERVICE_NAME, SERVICE_NAMESPACE, K8S_NAMESPACE_NAME, K8S_POD_NAME, CONTAINER_NAME)

# Log record event names
EVENT_CONNECTION: Final = "ebfw.egress.connection"
EVENT_DNS: Final = "ebfw.egress.dns"
EVENT_DESTINATION_NEW: Final = "ebfw.egress.destination.new"
EVENT_TLS: Final = "ebfw.egress.tls"
EVENT_HTTP: Final = "ebfw.egress.http.request"

# error.type of a connection that failed, by the word that counting.md uses
CONNECT_ERRORS: Final = {
    events.REFUSED: "connection_refused",
    events.TIMED_OUT: "timed_out",
    events.CANCELLED: "cancelled",
    events.UNREACHABLE: "host_unreachable",
    events.DENIED: "access_denied",
}

# error.type of a lookup, by rcode: the words of getaddrinfo that the conventions suggest.
_DNS_ERRORS: Final = {
    "": "",
    "ok": "",
    "noerror": "",
    "nxdomain": "host_not_found",
    "servfail": "try_again",
    "refused": "no_recovery",
    "formerr": "no_recovery",
    "notimp": "no_recovery",
    "timeout": "timeout",
}


@cache
def dns_error(status: str) -> str:
    """error.type of a lookup that ended with `status` (an rcode's name in any case, or "timeout"); "" is
    success."""
    lowered = status.lower()
    return _DNS_ERRORS.get(lowered, lowered)


# rpc.response.status_code of gRPC, by number (grpc/doc/statuscodes.md).
GRPC_CODES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# Of these, what is the server's fault: as 5xx is in HTTP (conventions for gRPC, server span).
GRPC_SERVER_ERRORS: Final = frozenset((2, 4, 12, 13, 14, 15))

# The methods that the conventions know; anything else is `_OTHER`, with the original beside it.
HTTP_METHODS: Final = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY")
)

# How sure a name is: the conventions' words. All of `ebfw.` is development until a release says otherwise.
STABLE, CANDIDATE, DEVELOPMENT = "stable", "release candidate", "development"


class Attribute(NamedTuple):
    """One attribute as the docs tell it. `type` is the conventions' word: string, int, boolean, double, string[]."""

    name: str
    type: str
    stability: str
    description: str


COUNTER, GAUGE, UPDOWN, HISTOGRAM = "counter", "gauge", "updown", "histogram"


class Metric(NamedTuple):
    """One instrument. `unit` is UCUM; `attributes` are the point's own, without the workload's identity.

    `more`: attributes that it has where EBFW_METRICS_ATTRIBUTES names them. `opt_in`: nothing is recorded unless
    EBFW_METRICS_OPT_IN names it. `observed`: the total is kept elsewhere (the kernel, health), which makes it an
    asynchronous instrument: the temporality preference `lowmemory` keeps those cumulative.
    """

    name: str
    unit: str
    kind: str  # COUNTER | GAUGE | UPDOWN | HISTOGRAM
    description: str
    attributes: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    stability: str = DEVELOPMENT
    more: tuple[str, ...] = ()
    opt_in: bool = False
    observed: bool = False


# The conventions' bounds for HTTP and DNS durations; a TCP handshake has the same range.
_DURATION_BOUNDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
# Bodies: none at all, then in steps of four from a quarter of a KiB to 64 MiB.
_SIZE_BOUNDS: Final = (0.0, *(float(1 << exponent) for exponent in range(8, 28, 2)))
# The conventions' bounds for http.client.connection.duration.
_LIFETIME_BOUNDS: Final = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
# A round trip inside a zone takes 0.1-0.5 ms, across the world 300 ms: HTTP's bounds would not tell them
# apart.
_RTT_BOUNDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_FLOW: Final = (SERVER_ADDRESS, TRANSPORT, PEER_SCOPE, PEER_NAME_SOURCE, ROLE, PEER_GROUP, PROXIED)

_HTTP: Final = (
    HTTP_METHOD, SERVER_ADDRESS, SERVER_PORT, HTTP_STATUS, ERROR_TYPE, PROTOCOL_VERSION, PEER_SCOPE, PROXIED,
)  # fmt: skip
_HTTP_MORE: Final = (URL_SCHEME, URL_TEMPLATE)

# What workloads do: counted by the kernel
NETWORK_IO = Metric(
    "ebfw.network.io", "By", COUNTER, "IP bytes that a workload sent and received.", (*_FLOW, IO_DIRECTION),
    more=(PEER_PORT,), observed=True,
)  # fmt: skip
NETWORK_PACKETS = Metric(
    "ebfw.network.packets", "{packet}", COUNTER, "IP packets that a workload sent and received.",
    (*_FLOW, IO_DIRECTION), more=(PEER_PORT,), observed=True,
)  # fmt: skip
TCP_CONNECTIONS = Metric(
    "ebfw.tcp.connections", "{connection}", COUNTER,
    "TCP connections opened and closed, each under the name known then.",
    (*_FLOW, CONNECTION_STATE), more=(PEER_PORT,), observed=True,
)  # fmt: skip
TCP_FAILURES = Metric(
    "ebfw.tcp.connection.failures", "{connection}", COUNTER,
    "TCP connections never opened, by reason; `cancelled`: the client gave up first.",
    (*_FLOW, ERROR_TYPE), more=(PEER_PORT,), observed=True,
)  # fmt: skip
TCP_RETRANSMITS = Metric(
    "ebfw.tcp.retransmits", "{segment}", COUNTER, "TCP segments sent again.", _FLOW, more=(PEER_PORT,), observed=True,
)  # fmt: skip
OPEN_CONNECTIONS = Metric(
    "ebfw.tcp.open_connections", "{connection}", UPDOWN,
    "TCP connections that a workload opened and that are not closed; older than ebfw's programs: not counted.",
)  # fmt: skip

# What workloads do: from events
CONNECT_TIME = Metric(
    "ebfw.tcp.connect.duration", "s", HISTOGRAM, "Time from connect to handshake or failure.",
    (*_FLOW, ERROR_TYPE), _DURATION_BOUNDS, more=(PEER_PORT,),
)  # fmt: skip
RTT = Metric(
    "ebfw.tcp.rtt", "s", HISTOGRAM, "Smoothed TCP round-trip time when a connection closed.",
    (PEER_SCOPE,), _RTT_BOUNDS,
)  # fmt: skip
DNS_TIME = Metric(
    "dns.lookup.duration", "s", HISTOGRAM, "Time from a DNS query to its answer.",
    (DNS_QUESTION_NAME, ERROR_TYPE, DNS_SEARCH_EXPANSION), _DURATION_BOUNDS, more=(DNS_QUESTION_TYPE,),
)  # fmt: skip
TLS_TIME = Metric(
    "ebfw.tls.handshake.duration", "s", HISTOGRAM, "Time from a ClientHello to the end of the handshake.",
    (SERVER_ADDRESS, TLS_VERSION, ERROR_TYPE, PEER_SCOPE), _DURATION_BOUNDS,
)  # fmt: skip
TLS_HANDSHAKES = Metric(
    "ebfw.tls.handshakes", "{handshake}", COUNTER, "TLS and QUIC handshakes begun, by what was agreed on.",
    (TRANSPORT, TLS_VERSION, TLS_GROUP, TLS_POST_QUANTUM, ERROR_TYPE), more=(TLS_JA4,),
)  # fmt: skip
HTTP_TIME = Metric(
    "http.client.request.duration", "s", HISTOGRAM, "Duration of HTTP client requests.",
    _HTTP, _DURATION_BOUNDS, STABLE, _HTTP_MORE,
)  # fmt: skip
HTTP_FIRST_BYTE = Metric(
    "ebfw.http.client.first_byte.duration", "s", HISTOGRAM,
    "Time from a request's first byte to its response's first byte, interim responses aside.",
    _HTTP, _DURATION_BOUNDS, more=_HTTP_MORE, opt_in=True,
)  # fmt: skip
HTTP_REQUEST_SIZE = Metric(
    "http.client.request.body.size", "By", HISTOGRAM, "Size of HTTP client request bodies.",
    _HTTP, _SIZE_BOUNDS, more=_HTTP_MORE, opt_in=True,
)  # fmt: skip
HTTP_RESPONSE_SIZE = Metric(
    "http.client.response.body.size", "By", HISTOGRAM, "Size of HTTP client response bodies.",
    _HTTP, _SIZE_BOUNDS, more=_HTTP_MORE, opt_in=True,
)  # fmt: skip
HTTP_ACTIVE = Metric(
    "http.client.active_requests", "{request}", UPDOWN, "Number of active HTTP requests.",
    (HTTP_METHOD, SERVER_ADDRESS, SERVER_PORT, PEER_SCOPE, URL_SCHEME),
)  # fmt: skip
HTTP_OPEN_CONNECTIONS = Metric(
    "http.client.open_connections", "{connection}", UPDOWN,
    "Plaintext connections that carried HTTP requests and are not closed: active while a request waits, else idle.",
    (HTTP_CONNECTION_STATE, SERVER_ADDRESS, SERVER_PORT, PEER_SCOPE), opt_in=True,
)  # fmt: skip
HTTP_CONNECTION_TIME = Metric(
    "http.client.connection.duration", "s", HISTOGRAM,
    "How long plaintext connections that carried HTTP requests lasted.",
    (SERVER_ADDRESS, SERVER_PORT, PROTOCOL_VERSION, PEER_SCOPE), _LIFETIME_BOUNDS, opt_in=True,
)  # fmt: skip
RPC_TIME = Metric(
    "rpc.client.call.duration", "s", HISTOGRAM, "Duration of outbound remote procedure calls (gRPC).",
    (RPC_SYSTEM, RPC_METHOD, RPC_STATUS, SERVER_ADDRESS, SERVER_PORT, ERROR_TYPE, PEER_SCOPE, PROXIED),
    _DURATION_BOUNDS, CANDIDATE,
)  # fmt: skip
WORKLOAD_INFO = Metric(
    "ebfw.workload.info", "", GAUGE, "Who a workload is; always 1.",
    (K8S_POD_NAME, K8S_POD_UID, CONTAINER_ID, WORKLOAD_KIND, SYSTEMD_UNIT),
)  # fmt: skip

# What is worth a look: hygiene.py
FINDINGS = Metric(
    "ebfw.hygiene.findings", "{finding}", COUNTER,
    "How often it was found: cleartext_credentials, obsolete_tls, no_post_quantum, dns_search.", (FINDING,),
)  # fmt: skip
CHECKED = Metric(
    "ebfw.hygiene.checked", "{event}", COUNTER,
    "How often it could have been found: plaintext requests, handshakes that told, lookups.", (FINDING,),
)  # fmt: skip
HYGIENE_CONNECTIONS = Metric(
    "ebfw.hygiene.http.connections", "{connection}", COUNTER, "Closed connections that carried HTTP requests."
)
HYGIENE_REQUESTS = Metric(
    "ebfw.hygiene.http.requests", "{request}", COUNTER, "HTTP requests that these connections carried."
)
HYGIENE_TIME = Metric("ebfw.hygiene.time", "s", COUNTER, "Time spent by phase: dns, connect, tls, request.", (PHASE,))
PORTS_USED = Metric(
    "ebfw.hygiene.ports.used", "{port}", GAUGE,
    "Ephemeral ports that open connections hold towards one destination, from 100 up.", (PEER_ADDRESS, PEER_PORT),
)  # fmt: skip

# What the agent does. The first four keep the names of ebfw's first version, hence their short attribute names.
EVENTS = Metric("ebfw.events", "{event}", COUNTER, "Events told, by kind.", ("kind",))
FILTERED = Metric(
    "ebfw.filtered", "{event}", COUNTER,
    "Events not told because `exclude` matched, by kind; behind excluded addresses requests are not even read.",
    ("kind",),
)  # fmt: skip
ATTRIBUTION = Metric(
    "ebfw.attribution",
    "{event}",
    COUNTER,
    "Events whose workload was found (hit) or not (miss).",
    ("result",),
)
UPROBE_ATTACHED = Metric(
    "ebfw.uprobe.attached", "{library}", GAUGE, "Files with TLS functions that have uprobes, by class.", (TLS_COVERAGE,)
)  # fmt: skip
TLS_CONNECTIONS = Metric(
    "ebfw.tls.connections", "{connection}", COUNTER,
    "TLS connections by what ebfw sees of the requests in them.", (TLS_COVERAGE,),
)  # fmt: skip
RECORDS_LOST = Metric(
    "ebfw.records.lost", "{record}", COUNTER, "Records that could not be kept, by stage and cause.",
    ("ebfw.stage", "ebfw.cause"), observed=True,
)  # fmt: skip
EXPORTED = Metric(
    "ebfw.export.items", "{item}", COUNTER, "Spans, log records and data points that an OTLP receiver took.",
    ("ebfw.signal",),
)  # fmt: skip
EXPORT_REQUESTS = Metric(
    "ebfw.export.requests", "{request}", COUNTER, "Pushes to an OTLP receiver, with their retries, by how they ended.",
    ("ebfw.signal", "ebfw.outcome"),
)  # fmt: skip
EXPORT_TIME = Metric(
    "ebfw.export.duration", "s", COUNTER, "Time that these pushes took, all together.", ("ebfw.signal", "ebfw.outcome")
)
QUEUE = Metric("ebfw.export.queue", "{item}", GAUGE, "Items that wait for OTLP export.", ("ebfw.signal",))
TABLE_USED = Metric("ebfw.table.used", "{entry}", GAUGE, "Entries in use.", ("ebfw.table",))
TABLE_SIZE = Metric("ebfw.table.size", "{entry}", GAUGE, "Entries that fit.", ("ebfw.table",))
FEATURE = Metric("ebfw.feature", "", GAUGE, "1 where a feature works on this kernel, else 0.", ("ebfw.feature",))
SERIES = Metric("ebfw.series", "{series}", GAUGE, "Series kept, by metric.", ("ebfw.metric",))
SERIES_OVERFLOW = Metric(
    "ebfw.series.overflow", "{measurement}", COUNTER, "Measurements folded into `~other` for want of room.",
    ("ebfw.metric",),
)  # fmt: skip
SERIES_EXPIRED = Metric("ebfw.series.expired", "{series}", COUNTER, "Series dropped because nothing moved them.")
CLAMPED = Metric(
    "ebfw.totals.clamped", "{measurement}", COUNTER, "Totals that would have fallen and were held.",
    ("ebfw.metric",),
)  # fmt: skip
PORTS_AVAILABLE = Metric(
    "ebfw.hygiene.ports.available", "{port}", GAUGE, "Ephemeral ports that this host allows towards one destination."
)
BUILD_INFO = Metric("ebfw.build.info", "", GAUGE, "The running version; always 1.", ("ebfw.version", "ebfw.kernel"))
START_TIME = Metric("ebfw.start.time", "s", GAUGE, "When the agent started, seconds since the epoch.")
CPU_TIME = Metric("process.cpu.time", "s", COUNTER, "CPU time of the agent.", ("cpu.mode",), observed=True)
MEMORY = Metric("process.memory.usage", "By", UPDOWN, "Resident memory of the agent.")

WORKLOAD_METRICS: Final = (
    NETWORK_IO, NETWORK_PACKETS, TCP_CONNECTIONS, TCP_FAILURES, TCP_RETRANSMITS, OPEN_CONNECTIONS, CONNECT_TIME, RTT,
    DNS_TIME, TLS_TIME, TLS_HANDSHAKES, HTTP_TIME, HTTP_FIRST_BYTE, HTTP_REQUEST_SIZE, HTTP_RESPONSE_SIZE, HTTP_ACTIVE,
    HTTP_OPEN_CONNECTIONS, HTTP_CONNECTION_TIME, RPC_TIME, FINDINGS, CHECKED,
    HYGIENE_CONNECTIONS, HYGIENE_REQUESTS, HYGIENE_TIME, PORTS_USED, WORKLOAD_INFO,
)  # fmt: skip
AGENT_METRICS: Final = (
    EVENTS, FILTERED, ATTRIBUTION, UPROBE_ATTACHED, TLS_CONNECTIONS, RECORDS_LOST, EXPORTED, EXPORT_REQUESTS,
    EXPORT_TIME, QUEUE, TABLE_USED, TABLE_SIZE, FEATURE, SERIES, SERIES_OVERFLOW, SERIES_EXPIRED, CLAMPED, BUILD_INFO,
    START_TIME, CPU_TIME, MEMORY, PORTS_AVAILABLE,
)  # fmt: skip
METRICS: Final = WORKLOAD_METRICS + AGENT_METRICS
BY_NAME: Final = {metric.name: metric for metric in METRICS}

# events.Counts, field by field: which series each one feeds.
CELLS: Final[tuple[tuple[Metric, tuple[tuple[str, str], ...]], ...]] = tuple(
    {
        "tx_bytes": (NETWORK_IO, ((IO_DIRECTION, "transmit"),)),
        "tx_packets": (NETWORK_PACKETS, ((IO_DIRECTION, "transmit"),)),
        "rx_bytes": (NETWORK_IO, ((IO_DIRECTION, "receive"),)),
        "rx_packets": (NETWORK_PACKETS, ((IO_DIRECTION, "receive"),)),
        "opened": (TCP_CONNECTIONS, ((CONNECTION_STATE, "opened"),)),
        "closed": (TCP_CONNECTIONS, ((CONNECTION_STATE, "closed"),)),
        "retransmits": (TCP_RETRANSMITS, ()),
        **{why: (TCP_FAILURES, ((ERROR_TYPE, word),)) for why, word in CONNECT_ERRORS.items()},
    }[field]
    for field in events.Counts._fields
)


def _attributes(stability: str, *rows: tuple[str, str, str]) -> tuple[Attribute, ...]:
    return tuple(Attribute(name, kind, stability, description) for name, kind, description in rows)


# Every attribute of every signal, for the docs. A header's name follows HTTP_REQUEST_HEADER.
ATTRIBUTES: Final = (
    *_attributes(
        STABLE,
        (SERVICE_NAME, "string", "the workload's name, without any id; `unknown_service` where there is none"),
        (SERVICE_VERSION, "string", "the agent's version"),
        (K8S_NAMESPACE_NAME, "string", "the pod's namespace"),
        (K8S_POD_NAME, "string", "the pod's name"),
        (K8S_POD_UID, "string", "the pod's UID"),
        (K8S_CONTAINER_NAME, "string", "the container's name in its pod"),
        (K8S_NODE_NAME, "string", "the node's name"),
        (CONTAINER_ID, "string", "the container's id"),
        (DISTRO_NAME, "string", "`ebfw`"),
        (DISTRO_VERSION, "string", "the agent's version"),
        (SERVER_ADDRESS, "string", "the best name, else the address; `~inbound`, `~excluded`, `~other` for many"),
        (SERVER_PORT, "int", "the peer's port"),
        (PEER_ADDRESS, "string", "the address that the application asked for"),
        (PEER_PORT, "int", "the port that the application asked for"),
        (LOCAL_ADDRESS, "string", "the socket's own address"),
        (LOCAL_PORT, "int", "the socket's own port"),
        (TRANSPORT, "string", "tcp, udp, quic, or a protocol number"),
        (NETWORK_TYPE, "string", "ipv4 or ipv6"),
        (PROTOCOL_VERSION, "string", "HTTP's version: 1.0, 1.1, 2"),
        (ERROR_TYPE, "string", "why it failed; absent where it did not"),
        (HTTP_METHOD, "string", "the method; `_OTHER` where it is not one of RFC 9110's or PATCH"),
        (HTTP_METHOD_ORIGINAL, "string", "the method as it was sent, where it is `_OTHER`"),
        (HTTP_STATUS, "int", "the response's status code; absent where there was no response"),
        (URL_SCHEME, "string", "http or https"),
        (URL_PATH, "string", "the path, redacted"),
        (URL_QUERY, "string", "the query; values are REDACTED unless EBFW_QUERY_VALUES names their keys"),
    ),
    *_attributes(
        CANDIDATE,
        (RPC_SYSTEM, "string", "`grpc`"),
        (RPC_METHOD, "string", "service and method: `package.Service/Method`; `_OTHER` where the path is none"),
        (RPC_STATUS, "string", "gRPC's status as a word: OK, DEADLINE_EXCEEDED, ..."),
    ),
    *_attributes(
        DEVELOPMENT,
        (SERVICE_NAMESPACE, "string", "the pod's namespace"),
        (SERVICE_INSTANCE_ID, "string", "tells instances of a service apart"),
        (CONTAINER_NAME, "string", "the container's name"),
        (CONTAINER_RUNTIME, "string", "containerd, cri-o, docker, podman, lxc, systemd-nspawn"),
        (HOST_NAME, "string", "the host's name"),
        (USER_ID, "string", "who owns the user session or the rootless container"),
        (IO_DIRECTION, "string", "transmit or receive"),
        (DNS_QUESTION_NAME, "string", "the name asked for; `~other` beyond the limit of the workload"),
        (DNS_ANSWERS, "string[]", "the addresses and names of the answer"),
        (URL_TEMPLATE, "string", "the path with `{id}` and the like for what varies"),
        (TLS_VERSION, "string", "TLS's version, agreed on: 1.3, 1.2, ..."),
        (PROCESS_PID, "int", "the process id"),
        (PROCESS_EXECUTABLE, "string", "the executable's name, cut to 15 bytes"),
        ("cpu.mode", "string", "user or system"),
        (WORKLOAD_ID, "string", "tells workloads without a name apart; absent elsewhere"),
        (WORKLOAD_KIND, "string", "pod, container, unit, session, cgroup, host, unknown"),
        (WORKLOAD_QOS, "string", "guaranteed, burstable or besteffort"),
        (SYSTEMD_UNIT, "string", "the systemd unit"),
        (
            PEER_SCOPE,
            "string",
            "internet, loopback, private or link_local; in metrics of HTTP, RPC and TLS only beside `~excluded`",
        ),
        (PEER_NAME_SOURCE, "string", "where the peer's name comes from: host, sni, dns, address"),
        (ROLE, "string", "client, server or unknown"),
        (
            PROXIED,
            "boolean",
            "true: a NAT rule of the host took it to a proxy there, a mesh's sidecar; leave it out of totals",
        ),
        (PEER_GROUP, "string", "the user's own word for this peer and others like it: EBFW_PEER_GROUPS"),
        (CLEARTEXT_CREDENTIALS, "boolean", "a plaintext request carried Authorization, Cookie or user info"),
        (FINDING, "string", "cleartext_credentials, obsolete_tls, no_post_quantum or dns_search"),
        (PHASE, "string", "dns, connect, tls or request"),
        (CONTAINER_IMAGE_NAME, "string", "the container's image, as its engine names it"),
        (HTTP_CONNECTION_STATE, "string", "active: a request waits for its response; idle: none does"),
        (CONNECTION_STATE, "string", "opened or closed"),
        (CONNECTION_ID, "string", "joins what one connection did"),
        (CONNECTION_DURATION, "double", "how long the connection lasted, in seconds"),
        (CONNECTION_SENT, "int", "bytes sent"),
        (CONNECTION_RECEIVED, "int", "bytes received"),
        (CONNECTION_RETRANSMITS, "int", "segments sent again"),
        (CONNECTION_RTT, "double", "the last smoothed round-trip time, in seconds"),
        (CONNECT_DURATION, "double", "how long the handshake took, in seconds"),
        (DNS_DURATION, "double", "how long the lookup took, in seconds"),
        (DNS_QUESTION_TYPE, "string", "A, AAAA, HTTPS, ..."),
        (DNS_RCODE, "string", "the answer's response code"),
        (DNS_SEARCH_EXPANSION, "boolean", "a name of the resolver's search list that led nowhere: no failure"),
        (TLS_GROUP, "string", "the group of the key exchange that the server took; TLS 1.3"),
        (TLS_POST_QUANTUM, "boolean", "the client offers a key share that holds against a quantum computer"),
        (TLS_COVERAGE, "string", "who encrypts: a class of TLS library, or what ebfw cannot look into"),
        (TLS_JA4, "string", "JA4 fingerprint of the client"),
        (PROXY, "string", "the HTTP proxy through which the server was asked for"),
        (REPEATS, "int", "how many records this one stands for"),
        (FIRST_SEEN, "boolean", "this workload had not talked to this destination before"),
        (OVERFLOW, "boolean", "what found no room among the series of its workload"),
        ("kind", "string", "what was told: connect, close, dns, tls, http, https"),
        ("result", "string", "hit or miss"),
        ("ebfw.stage", "string", "where in the agent: ring, table, decode, queue, export"),
        ("ebfw.cause", "string", "why"),
        ("ebfw.signal", "string", "traces, logs or metrics"),
        ("ebfw.outcome", "string", "success or failure"),
        ("ebfw.table", "string", "which table"),
        ("ebfw.feature", "string", "what the kernel must allow"),
        ("ebfw.metric", "string", "which metric"),
        ("ebfw.version", "string", "the agent's version"),
        ("ebfw.kernel", "string", "the kernel's release"),
    ),
    # Of spans and log records only
    *_attributes(
        STABLE,
        (URL_FULL, "string", "the URL, redacted"),
        (USER_AGENT, "string", "the User-Agent, where EBFW_HTTP_HEADERS names it"),
        (HTTP_REQUEST_HEADER, "string[]", "a request header that EBFW_HTTP_HEADERS names, redacted"),
    ),
    *_attributes(
        DEVELOPMENT,
        (HTTP_REQUEST_BODY, "int", "the request's body as sent, compressed or not"),
        (HTTP_RESPONSE_BODY, "int", "the response's body as received"),
        (FIRST_BYTE_TIME, "double", "from the request's first byte to the response's first"),
        (HTTP_DURATION, "double", "from the request's first byte to the response's last"),
        (HTTP_SEQUENCE, "int", "which request of its connection this is, from 1"),
        (HTTP_PARTIAL, "string", "midway or lost: a part of the connection was not seen"),
        (RPC_REQUEST_METADATA, "string[]", "gRPC metadata that EBFW_HTTP_HEADERS names, redacted"),
        (TLS_RESUMED, "boolean", "whether a session was resumed"),
        (TLS_OFFERED, "string", "the highest version that the client offers"),
        (TLS_ALPN, "string[]", "the protocols that the client offers, in its order"),
        (TLS_ECH, "boolean", "the client offers Encrypted Client Hello: the name is the outer one"),
        (TLS_ALERT, "string", "the fatal alert that ended it"),
        (TLS_DURATION, "double", "how long the handshake took"),
        (QUIC_VERSION, "string", "1 or 2"),
    ),
    *_attributes(
        CANDIDATE,
        (RPC_METHOD_ORIGINAL, "string", "the method as called, where it is `_OTHER`"),
    ),
)

_UNITS: Final = {"By": "bytes", "s": "seconds"}


@cache
def prometheus_label(attribute: str) -> str:
    """The label name of an attribute: everything but letters, digits and underscores becomes an
    underscore."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", attribute)


def prometheus_unit(metric: Metric) -> str:
    """The unit's word in Prometheus ("" where the unit is an annotation in braces or absent)."""
    return "" if metric.unit.startswith("{") else _UNITS.get(metric.unit, metric.unit)


@cache
def prometheus_name(metric: Metric) -> str:
    """The metric's name after translation, without `_total`, `_bucket`, `_sum` and `_count`.

    Source: OpenTelemetry specification, "Prometheus and OpenMetrics compatibility", metric metadata: illegal
    characters become underscores, the unit is appended unless the name already has it as a word.
    """
    name = re.sub(r"_+", "_", re.sub(r"[^a-zA-Z0-9:_]", "_", metric.name)).strip("_")
    unit = prometheus_unit(metric)
    return name if not unit or unit in name.split("_") else f"{name}_{unit}"


def prometheus_series(metric: Metric) -> str:
    """What one types in a query: the name of a counter's series has `_total`, a histogram's is its base
    name."""
    return prometheus_name(metric) + ("_total" if metric.kind == COUNTER else "")
