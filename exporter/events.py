"""The vocabulary: what the kernel saw, who did it, to whom. Plain values; no I/O, no policy, no BPF.

All types are NamedTuples: on the hot path a named tuple costs half of a slotted dataclass and a fifth of a
frozen one. Times are nanoseconds; wall-clock times count from the Unix epoch. Addresses are text in their
canonical form (IPv4-mapped IPv6 is IPv4). Empty string or None means "not known", never "none".
"""

from __future__ import annotations

from typing import Final, NamedTuple

SECOND: Final = 1_000_000_000  # ns

# Event kinds, as ebfw's first version names them, and two more: `close`; `new`, a destination that this workload had
# never talked to.
CONNECT: Final = "connect"
CLOSE: Final = "close"
DNS: Final = "dns"
TLS: Final = "tls"
HTTP: Final = "http"
HTTPS: Final = "https"
NEW: Final = "new"
KINDS: Final = (CONNECT, CLOSE, DNS, TLS, HTTP, HTTPS, NEW)

# Where a peer's name comes from, strongest first.
HOST: Final = "host"
SNI: Final = "sni"
DNS_ANSWER: Final = "dns"
ADDRESS: Final = "address"

CLIENT: Final = "client"
SERVER: Final = "server"
UNKNOWN_ROLE: Final = "unknown"

# Why a connection failed. `cancelled` is not a failure in rates (a lost Happy-Eyeballs race).
OK: Final = "ok"
REFUSED: Final = "refused"
TIMED_OUT: Final = "timed_out"
CANCELLED: Final = "cancelled"
UNREACHABLE: Final = "unreachable"
DENIED: Final = "denied"
FAILURES: Final = (REFUSED, TIMED_OUT, CANCELLED, UNREACHABLE, DENIED)

SCOPES: Final = ("internet", "loopback", "private", "link_local")


class Workload(NamedTuple):
    """Who: the cgroup of the socket, read as a pod, a container, a unit or a session.

    `kind` is one of pod, container, unit, session, cgroup (one that somebody made by hand, called by its last
    part), host, unknown. `name` is what a person calls it and never contains an id that changes with every
    start where something better is known. Only the fields that fit the kind are set.
    """

    cgroup_id: int
    path: str  # below the cgroup2 root, "/" for the root itself, "" when unknown
    kind: str
    name: str
    pod_uid: str = ""
    container_id: str = ""
    runtime: str = ""  # containerd | cri-o | docker | podman | lxc | systemd-nspawn
    qos: str = ""  # guaranteed | burstable | besteffort
    unit: str = ""  # systemd unit
    user_id: int | None = None  # owner of a user session or a rootless container
    pod_name: str = ""
    namespace: str = ""
    container_name: str = ""
    image: str = ""  # of the container, as its engine names it
    given: tuple[tuple[str, str], ...] = ()  # resource attributes that the workload was started with (OTEL_*)


class Exchange(NamedTuple):
    """How an HTTP request went. Sizes are bodies, in bytes, None where they cannot be told; durations nanoseconds."""

    version: str  # "1.0", "1.1", "2"
    scheme: str  # http | https
    status: int = 0  # 0 = no response was seen
    error: str = ""  # why there is none, or not a whole one: a word of `error.type`
    first_byte: int | None = None  # request's first byte -> response's first byte; interim responses (1xx) do not count
    request_size: int | None = None
    response_size: int | None = None
    grpc_status: int | None = None  # None = not gRPC, or not told
    traceparent: str = ""  # as the application sent it; "" unless valid (W3C Trace Context)
    sequence: int = 0  # the how-manieth request of its connection, from 1; 0 = not known
    partial: str = ""  # midway | lost: the connection is older than the agent, or a part of it was not seen
    tracestate: str = ""  # as the application sent it beside a valid traceparent
    server_port: int = 0  # as the request names it, for where the peer is a proxy or not known; 0 = it names none


class Tls(NamedTuple):
    """What a TLS or QUIC handshake shows on the wire. Versions are "1.3", "1.2", ..."""

    version: str = ""  # negotiated; "" until the server has answered
    offered: str = ""  # the highest that the client offers
    alpn: tuple[str, ...] = ()  # offered, in the client's order
    group: str = ""  # of the key exchange that the server took ("X25519MLKEM768"); TLS 1.3 only
    post_quantum: bool = False  # the client offers a key share that holds against a quantum computer
    ech: bool = False  # the client offers Encrypted Client Hello: the name is the outer one
    ja4: str = ""  # fingerprint of the client
    resumed: bool | None = None
    alert: str = ""  # the fatal alert that ended it
    quic: str = ""  # QUIC version ("1", "2"); "" over TCP


class Event(NamedTuple):
    """One thing worth telling: it has happened, it is attributed, it has (where it can) a name and a duration."""

    kind: str
    time: int  # wall clock, when it began
    workload: Workload
    pid: int  # 0 where the process is not known
    comm: str
    transport: str  # tcp | udp | protocol number as text
    role: str  # client | server | unknown; client = egress, what a workload started
    src: str
    src_port: int
    dst: str  # what the application asked for, not what NAT made of it
    port: int
    scope: str  # one of SCOPES
    domain: str  # the peer's name or, for kind dns, the name asked
    name_source: str  # one of HOST, SNI, DNS_ANSWER, ADDRESS
    status: str  # connect/close: OK or one of FAILURES; dns: rcode name or "timeout"; else ""
    duration: int | None = None  # connect, tls: handshake; close: lifetime; dns: query to answer; http: to its end
    tx_bytes: int = 0  # close only, with the next four
    rx_bytes: int = 0
    retransmits: int = 0
    rtt: int | None = None
    dns_type: str = ""
    answers: tuple[str, ...] = ()
    method: str = ""
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    proxy: str = ""  # "address:port" of the HTTP proxy through which `domain` was asked for
    cookie: int = 0  # the socket's; joins the events of one connection. 0 = none; from 2^63 on only the TLS library's
    filtered: bool = False  # matched `exclude`: counted, never narrated
    exchange: Exchange | None = None  # http, https
    tls: Tls | None = None  # tls
    search_expansion: bool = False  # dns: no failure, a name of the resolver's search list that led nowhere
    group: str = ""  # what the user calls this peer and others like it; "" = nothing
    credentials: bool = False  # http: it carried credentials, and anybody on the way could read them
    redirected: bool = False  # to a proxy beside the workload, a mesh's sidecar: what that does is told by itself


class Flow(NamedTuple):
    """A row of the kernel's counters, read. One row per (workload, peer address, peer port, transport, name) for
    clients, per (workload, local port, transport) for servers, per (workload, scope) for what `exclude` hides."""

    workload: Workload
    role: str
    transport: str
    peer: str  # "" on server, filtered and overflow rows
    port: int  # the peer's; the local one on server rows
    scope: str
    name: str  # SNI, Host or learned DNS name; else the address
    name_source: str
    filtered: bool = False
    other: bool = False  # what found no room, or was idle and was folded: `~other`
    group: str = ""  # as of Event
    redirected: bool = False  # as of Event


class Counts(NamedTuple):
    """What a flow's counters hold, or by how much they moved. Never negative."""

    tx_bytes: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    rx_packets: int = 0
    opened: int = 0
    closed: int = 0
    refused: int = 0
    timed_out: int = 0
    cancelled: int = 0
    unreachable: int = 0
    denied: int = 0
    retransmits: int = 0
