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
URL_PATH: Final = "url.path"
URL_QUERY: Final = "url.query"
URL_SCHEME: Final = "url.scheme"
PROCESS_PID: Final = "process.pid"
# The kernel's comm is the executable's name cut to 15 bytes: the nearest that the conventions have.
PROCESS_EXECUTABLE: Final = "process.executable.name"
PEER_SCOPE: Final = "ebfw.peer.scope"
PEER_NAME_SOURCE: Final = "ebfw.peer.name.source"
PEER_GROUP: Final = "ebfw.peer.group"
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
WORKLOAD: Final = "ebfw.workload"
PROXY: Final = "ebfw.proxy.address"
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


COUNTER, GAUGE, UPDOWN, HISTOGRAM = "counter", "gauge", "updown", "histogram"


class Metric(NamedTuple):
    """One instrument. `unit` is UCUM; `attributes` are the point's own, without the workload's identity."""

    name: str
    unit: str
    kind: str  # COUNTER | GAUGE | UPDOWN | HISTOGRAM
    description: str
    attributes: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


# The conventions' bounds for HTTP and DNS durations; a TCP handshake has the same range.
_DURATION_BOUNDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
# A round trip inside a zone takes 0.1-0.5 ms, across the world 300 ms: HTTP's bounds would not tell them
# apart.
_RTT_BOUNDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_FLOW: Final = (SERVER_ADDRESS, TRANSPORT, PEER_SCOPE, PEER_NAME_SOURCE, ROLE, PEER_GROUP)

# What workloads do
NETWORK_IO = Metric(
    "ebfw.network.io", "By", COUNTER, "IP bytes that a workload sent and received.", (*_FLOW, IO_DIRECTION)
)
NETWORK_PACKETS = Metric(
    "ebfw.network.packets", "{packet}", COUNTER, "IP packets that a workload sent and received.",
    (*_FLOW, IO_DIRECTION),
)  # fmt: skip
TCP_CONNECTIONS = Metric(
    "ebfw.tcp.connections", "{connection}", COUNTER, "TCP connections opened and closed.",
    (*_FLOW, CONNECTION_STATE),
)  # fmt: skip
TCP_FAILURES = Metric(
    "ebfw.tcp.connection.failures", "{connection}", COUNTER, "TCP connections never opened, by reason.",
    (*_FLOW, ERROR_TYPE),
)  # fmt: skip
TCP_RETRANSMITS = Metric("ebfw.tcp.retransmits", "{segment}", COUNTER, "TCP segments sent again.", _FLOW)
CONNECT_TIME = Metric(
    "ebfw.tcp.connect.duration", "s", HISTOGRAM, "Time from connect to handshake or failure.",
    (*_FLOW, ERROR_TYPE), _DURATION_BOUNDS,
)  # fmt: skip
RTT = Metric(
    "ebfw.tcp.rtt", "s", HISTOGRAM, "Smoothed TCP round-trip time when a connection closed.",
    (PEER_SCOPE,), _RTT_BOUNDS,
)  # fmt: skip
DNS_TIME = Metric(
    "dns.lookup.duration", "s", HISTOGRAM, "Time from a DNS query to its answer.",
    (DNS_QUESTION_NAME, ERROR_TYPE), _DURATION_BOUNDS,
)  # fmt: skip
WORKLOAD_INFO = Metric(
    "ebfw.workload.info", "", GAUGE, "Who a workload is; always 1.",
    (K8S_POD_UID, CONTAINER_ID, WORKLOAD_KIND, SYSTEMD_UNIT),
)  # fmt: skip

# What is worth a look (hygiene.py); of workloads by name, `~other` once there are too many of them.
_FINDING: Final = (WORKLOAD, "ebfw.hygiene.finding")
FINDINGS = Metric(
    "ebfw.hygiene.findings", "{finding}", COUNTER,
    "How often it was found: cleartext_credentials, obsolete_tls, no_post_quantum, dns_search.", _FINDING,
)  # fmt: skip
CHECKED = Metric(
    "ebfw.hygiene.checked", "{event}", COUNTER,
    "How often it could have been found: plaintext requests, handshakes that told, lookups.", _FINDING,
)  # fmt: skip
HYGIENE_CONNECTIONS = Metric(
    "ebfw.hygiene.http.connections", "{connection}", COUNTER, "Closed connections that carried HTTP requests.",
    (WORKLOAD,),
)  # fmt: skip
HYGIENE_REQUESTS = Metric(
    "ebfw.hygiene.http.requests", "{request}", COUNTER, "HTTP requests that these connections carried.",
    (WORKLOAD,),
)  # fmt: skip
HYGIENE_TIME = Metric(
    "ebfw.hygiene.time", "s", COUNTER, "Time spent by phase: dns, connect, tls, request.",
    (WORKLOAD, "ebfw.hygiene.phase"),
)  # fmt: skip
PORTS_USED = Metric(
    "ebfw.hygiene.ports.used", "{port}", GAUGE,
    "Ephemeral ports that open connections hold towards one destination, from 100 up.",
    (WORKLOAD, PEER_ADDRESS, PEER_PORT),
)  # fmt: skip
PORTS_AVAILABLE = Metric(
    "ebfw.hygiene.ports.available", "{port}", GAUGE, "Ephemeral ports that this host allows towards one destination.",
)  # fmt: skip

# What the agent does. The first four keep the seed's names, hence their short attribute names.
EVENTS = Metric("ebfw.events", "{event}", COUNTER, "Events told, by kind.", ("kind",))
FILTERED = Metric("ebfw.filtered", "{event}", COUNTER, "Events not told because `exclude` matched, by kind.", ("kind",))
ATTRIBUTION = Metric(
    "ebfw.attribution",
    "{event}",
    COUNTER,
    "Events whose workload was found (hit) or not (miss).",
    ("result",),
)
UPROBE_ATTACHED = Metric("ebfw.uprobe.attached", "{library}", GAUGE, "TLS libraries with uprobes attached.")
RECORDS_LOST = Metric(
    "ebfw.records.lost", "{record}", COUNTER, "Records that could not be kept, by stage and cause.",
    ("ebfw.stage", "ebfw.cause"),
)  # fmt: skip
EXPORTED = Metric(
    "ebfw.export.items", "{item}", COUNTER, "Spans, log records and data points that an OTLP receiver took.",
    ("ebfw.signal",),
)  # fmt: skip
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
BUILD_INFO = Metric("ebfw.build.info", "", GAUGE, "The running version; always 1.", ("ebfw.version", "ebfw.kernel"))
START_TIME = Metric("ebfw.start.time", "s", GAUGE, "When the agent started, seconds since the epoch.")
CPU_TIME = Metric("process.cpu.time", "s", COUNTER, "CPU time of the agent.", ("cpu.mode",))
MEMORY = Metric("process.memory.usage", "By", UPDOWN, "Resident memory of the agent.")

WORKLOAD_METRICS: Final = (
    NETWORK_IO, NETWORK_PACKETS, TCP_CONNECTIONS, TCP_FAILURES, TCP_RETRANSMITS, CONNECT_TIME, RTT, DNS_TIME,
    WORKLOAD_INFO,
)  # fmt: skip
AGENT_METRICS: Final = (
    EVENTS, FILTERED, ATTRIBUTION, UPROBE_ATTACHED, RECORDS_LOST, EXPORTED, QUEUE, TABLE_USED, TABLE_SIZE,
    FEATURE, SERIES, SERIES_OVERFLOW, SERIES_EXPIRED, CLAMPED, BUILD_INFO, START_TIME, CPU_TIME, MEMORY, FINDINGS,
    CHECKED, HYGIENE_CONNECTIONS, HYGIENE_REQUESTS, HYGIENE_TIME, PORTS_USED, PORTS_AVAILABLE,
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
