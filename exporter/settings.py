"""Settings: what the user asked for, checked, before anything touches the kernel.

In: the environment, and one YAML file (`cgroup`, `exclude`). Out: one frozen `Settings`. This is
the only module that reads either; everything else gets a `Settings`, so tests pass one. Not its job: finding
the cgroup2 root, resolving names, or checking that a path is usable (the kernel layer does, when it uses it).

Every mistake in an EBFW_* variable or in the file is a `SettingsError` that names the key and the nearest right one.
A variable that is set but empty counts as not set, except those of `_EMPTY_MEANS_SOMETHING`, and except EBFW_CGROUP,
where it is a mistake: an unset shell variable must not mean the whole host. Mistakes in OTEL_* are not this module's:
the OpenTelemetry specification wants a warning and a fallback there."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from exporter import document
from exporter.errors import SettingsError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_EXCLUDE_CIDRS: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "127.0.0.0/8",
        "::1/128",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "fe80::/10",
        "fc00::/7",
    )
)
DEFAULT_EXCLUDE_SUFFIXES = ("cluster.local", "svc", "local", "in-addr.arpa", "ip6.arpa")

# Kubernetes gives every pod variables for each Service of its namespace: a Service called `ebfw` or
# `ebfw-metrics` makes EBFW_SERVICE_HOST, EBFW_METRICS_PORT_9090_TCP_ADDR and so on. They are not mistakes.
_SERVICE_LINK = re.compile(
    r"EBFW_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)


@dataclass(frozen=True)
class Settings:
    """Every setting, with its default. Built by `load`; tests build it directly."""

    cgroup: Path | None = None
    """Only this cgroup2 directory and what is below it is watched. Not set, or /sys/fs/cgroup: the whole host,
    wherever cgroup2 is mounted. Set but empty is a mistake."""

    cgroup_named: str = "EBFW_CGROUP="
    """What a complaint about the cgroup begins with: the variable, or file and key, that named it."""

    exclude_cidrs: tuple[Network, ...] = DEFAULT_EXCLUDE_CIDRS
    """Peers in these networks are counted but not narrated. Default: loopback, private, link-local."""

    exclude_suffixes: tuple[str, ...] = DEFAULT_EXCLUDE_SUFFIXES
    """Names equal to or below these are counted but not narrated: lower case, no leading or trailing dot."""

    inspect_paths: bool = True
    """Keep the (redacted) path of HTTP requests. Without it a request has a method and a host only."""

    inspect_headers: bool = False
    """Keep (redacted) request headers in text and JSON. Off: headers carry personal data."""

    inspect_body: bool = False
    """No effect: bodies are never captured. Accepted, so that a deployment that sets it still starts."""

    output: str = "text"
    """What goes to standard output, one line an event: text, json, or none."""

    colour: bool | None = None
    """Colour on standard output. None: if it is a terminal. False where NO_COLOR is set or TERM is dumb."""

    metrics_addr: tuple[str, int] | None = ("127.0.0.1", 9090)
    """Where /metrics listens: :9090 is all interfaces, port 0 any free one; empty: nowhere. Only this host by
    default, since the page says who talks to whom."""

    metrics_cert: Path | None = None
    """PEM file with the certificate for /metrics, which is then served over TLS alone."""

    metrics_key: Path | None = None
    """PEM file with the certificate's key. Not set: it is in the certificate's file."""

    metrics_users: Path | None = None
    """File of `name:password` lines; who asks for /metrics has to be one of them. /healthz and /readyz stay open."""

    node_name: str = field(default_factory=socket.gethostname)
    """The node's name on every record. In Kubernetes, set it to the name of the node."""

    enforce_mode: str = "off"
    """Only off works in this version; log and enforce are refused."""

    policy_source: str = "file"
    """Where a policy would come from. Read and checked; this version uses none."""

    policy: Path | None = None
    """The policy file. It has to be there; this version does not use it."""

    enforce_dry_run: bool = False
    """Say what a policy would drop, and drop nothing. Read and checked; this version uses none."""

    pin_path: Path = Path("/sys/fs/bpf/ebfw")
    """Directory on a bpffs where maps and links are pinned, so that totals survive the agent."""

    cache_path: Path | None = Path("/var/cache/ebfw")
    """Folder in which the compiled programs are kept for the next start; empty: they are compiled at every start. A
    wheel brings them along and needs no folder. What others than the agent's user could write is not read."""

    spans_per_second: int = 100
    """Spans a second and node that are exported while no sampler is set, shared fairly between workloads; 0:
    none. The rest is counted. Enough to look at, little enough for any backend."""

    logs: str = "notable"
    """OTLP log records: notable (denials, failures, destinations not seen before) or all."""

    peer_groups: Path | None = None
    """File that maps networks and domains to groups, the attribute ebfw.peer.group. Read again when it changes."""

    inventory: Path | None = None
    """File, in a folder that is there, in which the inventory of destinations is kept over restarts. Not set: no
    inventory, but under systemd with StateDirectory= inventory.json in that directory; empty: none there either."""

    http_headers: frozenset[str] = frozenset()
    """Names of request headers that are told, redacted, in lines and in spans: lower case. Credentials read REDACTED
    all the same. OTEL_INSTRUMENTATION_HTTP_CLIENT_CAPTURE_REQUEST_HEADERS adds to them."""

    instrumented: str = "skip"
    """Workloads that send OTLP themselves: skip (no HTTP spans and no http.client.* metrics of ours) or add."""

    connection_spans: str = "notable"
    """Connections whose way up (DNS, TCP, TLS) becomes a trace: notable (slow or failed), all or none."""

    slow_connection_ms: int = 500
    """From how many milliseconds on a connection's way up is slow: half a second is what a person notices."""

    flows: int = 65536
    """Rows of the kernel's counter table: a power of two from 1024 to 1048576. What finds no room is counted
    in one row called ~other. The default holds the flows of a busy node in a few MiB, on any number of
    CPUs."""

    ring_bytes: int = 2 << 20
    """Size of the kernel's event ring in bytes: a power of two from 64 KiB to 256 MiB. 2 MiB rides out a
    second in which the agent does not run at 10,000 events a second; the agent maps it, so it counts as its memory."""

    uprobes: bool = True
    """Attach to TLS libraries to see requests inside TLS. Without it, HTTPS is connections, names,
    handshakes and bytes."""

    persist: bool = False
    """Leave programs, links and maps pinned at a clean exit: counting goes on without the agent."""

    query_values: frozenset[str] = frozenset()
    """Names of URL query parameters whose values are shown, lower case. All other values read REDACTED."""

    metrics_level: str = "workload"
    """Whose series: workload (the pods of one workload on this node together) or pod (each its own)."""

    metrics_attributes: frozenset[str] = frozenset()
    """Attributes that metrics have only when asked for: DNS question type, peer port, URL scheme and template, JA4;
    each multiplies the series of its metrics. docs/metrics.md says which."""

    metrics_opt_in: frozenset[str] = frozenset()
    """Metrics that there are only when asked for: body sizes, time to the first byte, HTTP connections. docs/metrics.md
    names them."""

    routes: tuple[str, ...] = ()
    """Templates of request paths, for span names and url.template, such as /users/{id}/*: `{name}` and `*` stand for
    one segment, `*` at the end for all that follow. The first that fits wins; other paths get a template by their
    looks."""

    log_level: str = "info"
    """The agent's own log, on standard error: debug, info, warning or error."""

    otel: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The OTEL_* variables as they are, unchecked. Not in the repr: OTEL_EXPORTER_OTLP_HEADERS holds
    credentials."""

    @property
    def allowed_headers(self) -> frozenset[str]:
        """Of request headers, what both variables name."""
        text = self.otel.get("OTEL_INSTRUMENTATION_HTTP_CLIENT_CAPTURE_REQUEST_HEADERS", "")
        return self.http_headers | frozenset(word.strip().lower() for word in text.split(",") if word.strip())


# --- values: each turns text into a value, or raises ValueError with what would be right --------------------


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("use true or false (also 1/0, yes/no, on/off)")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.strip().lower()
        if word in choices:
            return word
        raise ValueError("use " + ", ".join(choices[:-1]) + " or " + choices[-1])

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        word = text.strip()
        if word.isascii() and word.isdigit() and len(word) < 20 and low <= int(word) <= high:
            return int(word)
        raise ValueError(f"use a whole number from {low} to {high}")

    return parse


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def _power_of_two(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,18})\s*(?:([km])(?:i?b)?)?", text.strip(), re.IGNORECASE)
        if not match:
            raise ValueError(f"use a power of two from {low} to {high}; 4MiB and 64k are understood")
        number = int(match[1]) * _UNITS[(match[2] or "").lower()]
        if low <= number <= high and number & (number - 1) == 0:
            return number
        near = min(max(1 << max(number - 1, 0).bit_length(), low), high)
        raise ValueError(f"use a power of two from {low} to {high}, for instance {near}")

    return parse


def _absolute(text: str) -> Path:
    path = Path(text.strip())
    if not path.is_absolute() or ".." in path.parts or "\0" in text:
        raise ValueError("use an absolute path, without ..")
    return path


def _file(text: str) -> Path:
    if "\0" in text:
        raise ValueError("use a path")
    return Path(text.strip())


def _optional(text: str) -> Path | None:
    return _absolute(text) if text.strip() else None


def _cgroup(text: str) -> Path | None:
    if not text.strip():
        raise ValueError("names no cgroup; leave it out to watch the whole host")
    path = _absolute(text)
    return None if path == Path("/sys/fs/cgroup") else path


def _address(text: str) -> tuple[str, int] | None:
    """`host:port`, `[v6]:port`, `:port` (all interfaces); empty is None. Raises ValueError."""
    word = text.strip()
    if not word:
        return None
    host, colon, port = word.rpartition(":")
    if not colon and word.isdigit():
        raise ValueError(
            f"use host:port; for port {word} on all interfaces :{word}, on this host only 127.0.0.1:{word}"
        )
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError("use host:port, with a port from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif re.search(r"[\s/\[\]]", host):
        raise ValueError("use host:port, without a scheme or a path")
    elif ":" in host:
        raise ValueError(f"put an IPv6 address in brackets: [{host}]:{port}")
    return host, int(port)


def _text(text: str) -> str:
    word = text.strip()
    if len(word) > 253 or not word.isprintable():
        raise ValueError("use at most 253 printable characters")
    return word


def _names(text: str) -> frozenset[str]:
    names = frozenset(word.strip().lower() for word in text.split(",") if word.strip())
    if any(re.search(r"\s", name) for name in names):
        raise ValueError("a name has no blanks; use names, separated by commas")
    if any(re.search(r"[&=?#]", name) for name in names):
        raise ValueError("use names, separated by commas, without any of & = ? #")
    return names


_ROUTE = re.compile(r"/(?:[^\s,?#/]+(?:/[^\s,?#/]+)*/?)?")


def _routes(text: str) -> tuple[str, ...]:
    found = tuple(pattern for part in text.split(",") if (pattern := part.strip()))
    for pattern in found:
        if not _ROUTE.fullmatch(pattern):
            raise ValueError(f"{pattern} is no pattern; one looks like /users/{{id}}/*")
    return found


def network(text: str) -> Network:
    """A CIDR as Go's net.ParseCIDR reads it: host bits are masked away. A bare address is that one host.

    Written as IPv4-mapped IPv6 it becomes the IPv4 network that it is, since addresses are compared that way.
    """
    word = text.strip()
    _, slash, length = word.partition("/")
    try:
        if "%" in word or (slash and not (length.isascii() and length.isdigit())):
            raise ValueError
        found = ipaddress.ip_network(word, strict=False)
    except ValueError:
        raise ValueError("use a network such as 10.0.0.0/8 or fd00::/8") from None
    if isinstance(found, ipaddress.IPv6Network) and found.prefixlen >= 96:
        mapped = found.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, found.prefixlen - 96))
    return found


def domain(text: str) -> str:
    """A domain, lower case, without dots around it; `*.` in front changes nothing. Raises ValueError."""
    word = text.strip().lower().removeprefix("*.").strip(".")
    if not word or len(word) > 253 or re.search(r"[\s*/:]", word) or ".." in word:
        raise ValueError("use a domain such as example.com; it stands for itself and everything below")
    return word


# --- the table: one row a variable; enough to make the documentation from -----------------------------------


class Variable(NamedTuple):
    """One EBFW_* variable: `field` of Settings, how its text is read. Help for it is the field's
    docstring."""

    name: str
    field: str
    parse: Callable[[str], Any]
    values: str


VARIABLES: tuple[Variable, ...] = (
    Variable("EBFW_CGROUP", "cgroup", _cgroup, "path"),
    Variable("EBFW_INSPECT_PATHS", "inspect_paths", _boolean, "boolean"),
    Variable("EBFW_INSPECT_HEADERS", "inspect_headers", _boolean, "boolean"),
    Variable("EBFW_INSPECT_BODY", "inspect_body", _boolean, "boolean"),
    Variable("EBFW_OUTPUT", "output", _one_of("text", "json", "none"), "text, json or none"),
    Variable("EBFW_METRICS_ADDR", "metrics_addr", _address, "host:port; empty disables"),
    Variable("EBFW_METRICS_TLS_CERT", "metrics_cert", _file, "path"),
    Variable("EBFW_METRICS_TLS_KEY", "metrics_key", _file, "path"),
    Variable("EBFW_METRICS_USERS", "metrics_users", _file, "path"),
    Variable("EBFW_NODE_NAME", "node_name", _text, "text"),
    Variable("EBFW_ENFORCE_MODE", "enforce_mode", _one_of("off", "log", "enforce"), "off"),
    Variable("EBFW_POLICY_SOURCE", "policy_source", _one_of("file", "crd"), "file or crd"),
    Variable("EBFW_POLICY", "policy", _file, "path"),
    Variable("EBFW_ENFORCE_DRY_RUN", "enforce_dry_run", _boolean, "boolean"),
    Variable("EBFW_BPF_PIN_PATH", "pin_path", _absolute, "path"),
    Variable("EBFW_CACHE_PATH", "cache_path", _optional, "path; empty keeps nothing"),
    Variable("EBFW_SPANS_PER_SECOND", "spans_per_second", _whole(0, 1_000_000), "whole number"),
    Variable("EBFW_LOGS", "logs", _one_of("notable", "all"), "notable or all"),
    Variable("EBFW_INVENTORY", "inventory", _optional, "path; empty keeps none"),
    Variable("EBFW_PEER_GROUPS", "peer_groups", _file, "path"),
    Variable("EBFW_HTTP_HEADERS", "http_headers", _names, "names, separated by commas"),
    Variable("EBFW_INSTRUMENTED", "instrumented", _one_of("skip", "add"), "skip or add"),
    Variable("EBFW_CONNECTION_SPANS", "connection_spans", _one_of("notable", "all", "none"), "notable, all or none"),
    Variable("EBFW_SLOW_CONNECTION_MS", "slow_connection_ms", _whole(1, 600_000), "whole number"),
    Variable("EBFW_FLOWS", "flows", _power_of_two(1024, 1 << 20), "power of two, 1024 to 1048576"),
    Variable("EBFW_RING_BYTES", "ring_bytes", _power_of_two(64 << 10, 256 << 20), "power of two, 64 KiB to 256 MiB"),
    Variable("EBFW_TLS_UPROBES", "uprobes", _boolean, "boolean"),
    Variable("EBFW_PERSIST", "persist", _boolean, "boolean"),
    Variable("EBFW_QUERY_VALUES", "query_values", _names, "names, separated by commas"),
    Variable("EBFW_METRICS_LEVEL", "metrics_level", _one_of("workload", "pod"), "workload or pod"),
    Variable("EBFW_METRICS_ATTRIBUTES", "metrics_attributes", _names, "attribute names, separated by commas"),
    Variable("EBFW_METRICS_OPT_IN", "metrics_opt_in", _names, "metric names, separated by commas"),
    Variable("EBFW_ROUTES", "routes", _routes, "patterns, separated by commas"),
    Variable("EBFW_LOG_LEVEL", "log_level", _one_of("debug", "info", "warning", "error"), "debug to error"),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}
_EMPTY_MEANS_SOMETHING = frozenset({"EBFW_CGROUP", "EBFW_METRICS_ADDR", "EBFW_INVENTORY", "EBFW_CACHE_PATH"})


def load(config_path: str | None, environ: Mapping[str, str]) -> Settings:
    """Read the file (`config_path`, else EBFW_CONFIG, else none) and the environment; the environment wins.

    Raises SettingsError for everything that is wrong with an EBFW_* variable or the file.
    """
    values: dict[str, Any] = {}
    path = config_path if config_path is not None else environ.get("EBFW_CONFIG", "").strip()
    if path:
        values.update(_read_file(path, "EBFW_CONFIG" if config_path is None else ""))
    elif config_path is not None:
        raise SettingsError("--config needs the name of a file")

    # systemd.exec(5), StateDirectory=: absolute paths between colons.
    if state := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        values["inventory"] = Path(state) / "inventory.json"

    for name in sorted(environ):
        if not name.startswith("EBFW_") or name == "EBFW_CONFIG":
            continue
        variable = _BY_NAME.get(name)
        if variable is None:
            if _SERVICE_LINK.fullmatch(name):
                continue
            raise SettingsError(f"{name}: there is no such setting{document.nearest(name, (*_BY_NAME, 'EBFW_CONFIG'))}")
        text = environ[name]
        if not text.strip() and name not in _EMPTY_MEANS_SOMETHING:
            continue
        try:
            values[variable.field] = variable.parse(text)
        except ValueError as error:
            raise SettingsError(f"{name}={text!r}: {error}") from None
        if name == "EBFW_CGROUP":
            values.pop("cgroup_named", None)

    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        values["colour"] = False
    values["otel"] = {name: text for name, text in environ.items() if name.startswith("OTEL_")}

    settings = Settings(**values)
    if settings.metrics_key is not None and settings.metrics_cert is None:
        raise SettingsError("EBFW_METRICS_TLS_KEY is set without EBFW_METRICS_TLS_CERT: set both")
    if settings.enforce_mode != "off":
        raise SettingsError(
            f"EBFW_ENFORCE_MODE={settings.enforce_mode}: enforcement is not in this version; leave it off to observe"
        )
    return settings


# --- the file -----------------------------------------------------------------------------------------------


def _read_file(path: str, variable: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    root = document.read(path, "the configuration", variable)
    if root is None:
        return values
    for node, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        name = str(node.value)
        if name in _BY_NAME and name != "EBFW_CGROUP":  # which is `cgroup` here
            raise document.fail(path, node, name, "is no key of this file; set it as an environment variable")
    top = document.mapping(path, root, "", ("cgroup", "exclude"))
    if (node := top.get("cgroup")) is not None:
        values["cgroup"] = document.scalar(path, node, "cgroup", _cgroup)
        values["cgroup_named"] = f"{path}: cgroup: "
    if (node := top.get("exclude")) is not None:
        exclude = document.mapping(path, node, "exclude", ("cidrs", "domainSuffixes"))
        if (node := exclude.get("cidrs")) is not None:
            values["exclude_cidrs"] = document.items(path, node, "exclude.cidrs", network)
        if (node := exclude.get("domainSuffixes")) is not None:
            values["exclude_suffixes"] = document.items(path, node, "exclude.domainSuffixes", domain)
    return values
