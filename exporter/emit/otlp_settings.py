"""OTLP settings: the standard OTEL_* variables, read as the OpenTelemetry specification says.

Comes in: a mapping (the environment). Goes out: Settings; a signal without an endpoint is off, since nothing
is pushed until somebody says where to (D10). Not its job: connecting. Mistakes warn and fall back, as the
specification wants (D18); what is not supported warns, too. Header values appear in no warning and no repr.

VARIABLES is the table of docs/configuration.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from exporter.emit.sampling import Sampler

_log = logging.getLogger(__name__)

Signal = Literal["traces", "metrics", "logs"]
SIGNALS: tuple[Signal, ...] = ("traces", "metrics", "logs")
GRPC, HTTP = "grpc", "http/protobuf"
EXPLICIT, EXPONENTIAL = "explicit_bucket_histogram", "base2_exponential_bucket_histogram"


class Variable(NamedTuple):
    """One OTEL_* variable. `per_signal`: the same with TRACES_, METRICS_ or LOGS_ before its last words wins for that
    signal."""

    name: str
    default: str
    meaning: str
    per_signal: bool = False

    def names(self) -> tuple[str, ...]:
        if not self.per_signal:
            return (self.name,)
        prefix, last = "OTEL_EXPORTER_OTLP_", self.name.removeprefix("OTEL_EXPORTER_OTLP_")
        return (self.name, *(f"{prefix}{signal.upper()}_{last}" for signal in SIGNALS))


_BATCH = "at most this many wait; what finds no room is counted as lost"
VARIABLES: tuple[Variable, ...] = (
    Variable("OTEL_SDK_DISABLED", "false", "`true`: nothing is pushed"),
    Variable("OTEL_TRACES_EXPORTER", "otlp", "`otlp`, `console`, `none`, or two of them with a comma"),
    Variable("OTEL_METRICS_EXPORTER", "otlp", "as above, and `prometheus`: /metrics, which is always there"),
    Variable("OTEL_LOGS_EXPORTER", "otlp", "as for traces; `console` is JSON lines on standard output"),
    Variable("OTEL_EXPORTER_OTLP_ENDPOINT", "none", "where to push; over HTTP `/v1/traces` and so on are added", True),
    Variable("OTEL_EXPORTER_OTLP_PROTOCOL", HTTP, f"`{HTTP}` or `{GRPC}`", True),
    Variable("OTEL_EXPORTER_OTLP_HEADERS", "none", "`key=value` pairs with commas between, percent-encoded", True),
    Variable(
        "OTEL_EXPORTER_OTLP_TIMEOUT", "10000", "for one export with its retries: milliseconds, below 1000 seconds", True
    ),
    Variable("OTEL_EXPORTER_OTLP_COMPRESSION", "none", "`gzip` or `none`; over HTTP also `deflate`", True),
    Variable("OTEL_EXPORTER_OTLP_CERTIFICATE", "the system's", "file with the authorities that are trusted", True),
    Variable("OTEL_EXPORTER_OTLP_CLIENT_KEY", "none", "file with the client's key (mTLS)", True),
    Variable("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "none", "file with the client's certificate chain (mTLS)", True),
    Variable("OTEL_EXPORTER_OTLP_INSECURE", "false", "`true`: gRPC without TLS if the endpoint has no scheme", True),
    Variable(
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "cumulative", "`cumulative`, `delta` or `lowmemory`"
    ),
    Variable("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", EXPLICIT, f"or `{EXPONENTIAL}`"),
    Variable("OTEL_METRIC_EXPORT_INTERVAL", "60000", "milliseconds between two pushes of metrics"),
    Variable("OTEL_METRIC_EXPORT_TIMEOUT", "30000", "milliseconds: bounds the timeout above"),
    Variable("OTEL_METRICS_EXEMPLAR_FILTER", "trace_based", "`trace_based`, `always_on` or `always_off`"),
    Variable(
        "OTEL_TRACES_SAMPLER", "none",
        "`always_on`, `always_off`, `traceidratio`, or one of these after `parentbased_`; else "
        "`EBFW_SPANS_PER_SECOND` holds",
    ),
    Variable("OTEL_TRACES_SAMPLER_ARG", "1", "the ratio, from 0 to 1"),
    Variable("OTEL_BSP_SCHEDULE_DELAY", "5000", "milliseconds after which spans are sent at the latest"),
    Variable("OTEL_BSP_EXPORT_TIMEOUT", "30000", "milliseconds: bounds the timeout above"),
    Variable("OTEL_BSP_MAX_QUEUE_SIZE", "2048", f"spans: {_BATCH}"),
    Variable("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "512", "spans that are sent at a time"),
    Variable("OTEL_BLRP_SCHEDULE_DELAY", "1000", "milliseconds after which log records are sent at the latest"),
    Variable("OTEL_BLRP_EXPORT_TIMEOUT", "30000", "milliseconds: bounds the timeout above"),
    Variable("OTEL_BLRP_MAX_QUEUE_SIZE", "2048", f"log records: {_BATCH}"),
    Variable("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "512", "log records that are sent at a time"),
    Variable("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "none", "characters of an attribute's value"),
    Variable("OTEL_ATTRIBUTE_COUNT_LIMIT", "128", "attributes of a span or log record; the rest is counted in it"),
    Variable("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "none", "the same for spans alone"),
    Variable("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "128", "the same for spans alone"),
    Variable("OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT", "none", "the same for log records alone"),
    Variable("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "128", "the same for log records alone"),
    Variable("OTEL_SERVICE_NAME", "ebfw", "the agent's own `service.name`; workloads have theirs"),
    Variable(
        "OTEL_RESOURCE_ATTRIBUTES", "none",
        "`service.*`, `container.*`, `process.*` and the pod's `k8s.*` describe the agent, all others go on everything",
    ),
    Variable(
        "OTEL_INSTRUMENTATION_HTTP_CLIENT_CAPTURE_REQUEST_HEADERS", "none",
        "request headers that are told, redacted: the same as `EBFW_HTTP_HEADERS`",
    ),
)  # fmt: skip
_KNOWN = frozenset(name for variable in VARIABLES for name in variable.names())
# Kubernetes makes such variables for every Service of a namespace; one may well be called otel-collector.
_SERVICE_LINK = re.compile(r"\w+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)")


@dataclass(frozen=True)
class Endpoint:
    """Where one signal goes. `url` is complete for HTTP, and empty where only the `console` takes it; `timeout` in
    seconds for one export with its retries."""

    signal: Signal
    url: str
    protocol: str = HTTP
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 10.0
    compression: str = "none"
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""
    insecure: bool | None = None
    console: bool = False

    @property
    def mix_up(self) -> str:
        """One sentence where protocol and port look exchanged, else ""."""
        port = urlsplit(self.url if "://" in self.url else f"//{self.url}").port
        return self.mixed_up() if (self.protocol, port) in ((HTTP, 4317), (GRPC, 4318)) else ""

    def mixed_up(self) -> str:
        """One sentence for a receiver that speaks the other protocol."""
        other, port = (GRPC, 4318) if self.protocol == HTTP else (HTTP, 4317)
        speaks, this = ("gRPC", "HTTP") if self.protocol == HTTP else ("HTTP", "gRPC")
        return (
            f"OTLP {self.signal}: the receiver at {_host(self.url)} seems to speak {speaks} and this is {this}: "
            f"set OTEL_EXPORTER_OTLP_PROTOCOL={other}, or use its {this} port (usually {port})"
        )


@dataclass(frozen=True)
class Batch:
    """How a signal's items wait: at most `queue`, sent `size` at a time or after `delay` seconds."""

    queue: int = 2048
    size: int = 512
    delay: float = 5.0


@dataclass(frozen=True)
class Limits:
    """Of attributes: characters of a value (None: any number), and how many."""

    value_length: int | None = None
    attributes: int = 128


_UNSET = Sampler()


@dataclass(frozen=True)
class Settings:
    """`interval` in seconds. `temporality`, `histograms` and `exemplars` are the specification's words."""

    traces: Endpoint | None = None
    metrics: Endpoint | None = None
    logs: Endpoint | None = None
    spans: Batch = Batch()
    records: Batch = Batch(delay=1.0)
    interval: float = 60.0
    temporality: str = "cumulative"
    histograms: str = EXPLICIT
    exemplars: str = "trace_based"
    sampler: Sampler = _UNSET
    span_limits: Limits = Limits()
    record_limits: Limits = Limits()

    @property
    def delta(self) -> bool:
        return self.temporality != "cumulative"

    @property
    def lowmemory(self) -> bool:
        return self.temporality == "lowmemory"

    @property
    def exponential(self) -> bool:
        return self.histograms == EXPONENTIAL

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(found for found in (self.traces, self.metrics, self.logs) if found)


def load(environ: Mapping[str, str]) -> Settings:
    """Reads the variables. Never raises: what cannot be used warns and counts as not set."""
    # Set but empty is not set, says the specification.
    env = {key: value.strip() for key, value in environ.items() if key.startswith("OTEL_") and value.strip()}
    for name in sorted(env.keys() - _KNOWN):
        if not _SERVICE_LINK.fullmatch(name):
            _log.warning("%s is not supported and has no effect", name)
    if _boolean(env, "OTEL_SDK_DISABLED"):
        return Settings()
    choice = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    aggregation = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
    return Settings(
        traces=_endpoint(env, "traces", "OTEL_BSP_EXPORT_TIMEOUT"),
        metrics=_endpoint(env, "metrics", "OTEL_METRIC_EXPORT_TIMEOUT"),
        logs=_endpoint(env, "logs", "OTEL_BLRP_EXPORT_TIMEOUT"),
        spans=_batch(env, "OTEL_BSP_", 5000),
        records=_batch(env, "OTEL_BLRP_", 1000),
        interval=_number(env, "OTEL_METRIC_EXPORT_INTERVAL", 60_000, 100) / 1000,
        temporality=_word(env, choice, "cumulative", "delta", "lowmemory"),
        histograms=_word(env, aggregation, EXPLICIT, EXPONENTIAL),
        exemplars=_word(env, "OTEL_METRICS_EXEMPLAR_FILTER", "trace_based", "always_on", "always_off"),
        sampler=_sampler(env),
        span_limits=_limits(env, "OTEL_SPAN_"),
        record_limits=_limits(env, "OTEL_LOGRECORD_"),
    )


def _endpoint(env: Mapping[str, str], signal: Signal, limit: str) -> Endpoint | None:
    name = f"OTEL_{signal.upper()}_EXPORTER"
    exporters = {word.strip().lower() for word in env.get(name, "otlp").split(",")} - {""}
    known = {"otlp", "console", "none"} | ({"prometheus"} if signal == "metrics" else set())
    for word in sorted(exporters - known):
        _warn(name, word, "otlp, console or none")
    if exporters - {"none"} - known:
        exporters = (exporters & known) or {"otlp"}
    if "none" in exporters:
        return None
    console = "console" in exporters

    def get(key: str, default: str = "") -> str:
        own, common = f"OTEL_EXPORTER_OTLP_{signal.upper()}_{key}", f"OTEL_EXPORTER_OTLP_{key}"
        return env.get(own) or env.get(common) or default

    url = get("ENDPOINT") if "otlp" in exporters else ""
    if not url:
        if "otlp" in exporters and name in env:
            _log.warning("%s=otlp, but no endpoint is set: set OTEL_EXPORTER_OTLP_ENDPOINT", name)
        return Endpoint(signal, "", console=True) if console else None
    own, common = f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
    named = own if own in env else common
    protocol = get("PROTOCOL", HTTP).lower()
    if protocol not in (GRPC, HTTP):
        _warn("OTEL_EXPORTER_OTLP_PROTOCOL", protocol, f"{GRPC} or {HTTP}; {HTTP} is used")
        protocol = HTTP
    if protocol == HTTP:
        if not url.startswith(("http://", "https://")):
            _log.warning("%s=%s is no URL of HTTP; http://%s is used", named, _host(url), _host(url))
            url = f"http://{url.rpartition('://')[2]}"
        if named == common:
            url = f"{url.rstrip('/')}/v1/{signal}"
    else:  # it has no use for user info, and would log it
        scheme, slashes, rest = url.rpartition("://")
        url = f"{scheme}{slashes}{rest.rpartition('@')[2]}"
    compression = get("COMPRESSION", "none").lower()
    if compression not in ("none", "gzip", "deflate") or (compression == "deflate" and protocol == GRPC):
        _warn("OTEL_EXPORTER_OTLP_COMPRESSION", compression, "none or gzip; none is used")
        compression = "none"
    insecure = get("INSECURE").lower()
    if insecure not in ("true", "false", ""):
        _warn("OTEL_EXPORTER_OTLP_INSECURE", insecure, "true or false; it counts as not set")
    return Endpoint(
        signal, url, protocol, _headers(get("HEADERS")),
        min(_timeout(get("TIMEOUT")), _number(env, limit, 30_000, 1) / 1000), compression,
        _file(get("CERTIFICATE")), _file(get("CLIENT_KEY")), _file(get("CLIENT_CERTIFICATE")),
        {"true": True, "false": False}.get(insecure), console,
    )  # fmt: skip


def _host(url: str) -> str:
    """Without user info, which is a secret."""
    return (urlsplit(url).netloc if "://" in url else url).rpartition("@")[2]


def _timeout(text: str) -> float:
    """Python's exporters read seconds, the specification says milliseconds. Nobody waits 1,000 seconds for an
    export, nor sets one of less than a second: so 1,000 and more are milliseconds."""
    try:
        value = float(text or 10)
        if not 0 < value < 1e9:
            raise ValueError
    except ValueError:
        _warn("OTEL_EXPORTER_OTLP_TIMEOUT", text, "a number of milliseconds; 10 seconds are used")
        return 10.0
    return value / 1000 if value >= 1000 else value


def _headers(text: str) -> dict[str, str]:
    """`key=value` pairs between commas, percent-encoded. The library's parser would log what it cannot
    read."""
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = pair.partition("=")
        key, value = unquote(key).strip().lower(), unquote(value).strip()
        legal = key.isascii() and key.replace("-", "").replace("_", "").replace(".", "").isalnum()
        if not equals or not legal or not value.isprintable():
            _log.warning("OTEL_EXPORTER_OTLP_HEADERS: one pair is not key=value; left out, and not shown")
            continue
        found[key] = value
    return found


def _file(path: str) -> str:
    if path and not Path(path).is_file():
        _log.warning("OTEL_EXPORTER_OTLP certificate file %s cannot be read; not used", path)
        return ""
    return path


def _batch(env: Mapping[str, str], prefix: str, delay: int) -> Batch:
    queue = int(_number(env, f"{prefix}MAX_QUEUE_SIZE", 2048, 1))
    size = int(_number(env, f"{prefix}MAX_EXPORT_BATCH_SIZE", 512, 1))
    return Batch(queue, min(size, queue), _number(env, f"{prefix}SCHEDULE_DELAY", delay, 1) / 1000)


def _limits(env: Mapping[str, str], prefix: str) -> Limits:
    """One signal's limits, else those of all."""

    def of(name: str, default: float, least: float) -> float:
        own = f"{prefix}{name}"
        return _number(env, own if own in env else f"OTEL_{name}", default, least)

    length = of("ATTRIBUTE_VALUE_LENGTH_LIMIT", -1, 0)
    return Limits(None if length < 0 else int(length), int(of("ATTRIBUTE_COUNT_LIMIT", 128, 1)))


def _sampler(env: Mapping[str, str]) -> Sampler:
    name = env.get("OTEL_TRACES_SAMPLER", "").lower()
    parent_based, kind = name.startswith("parentbased_"), name.removeprefix("parentbased_")
    if not name:
        return Sampler()
    if kind in ("always_on", "always_off"):
        return Sampler(float(kind == "always_on"), parent_based)
    if kind != "traceidratio":
        _warn("OTEL_TRACES_SAMPLER", name, "always_on, always_off or traceidratio; EBFW_SPANS_PER_SECOND is used")
        return Sampler()
    return Sampler(_parse(env, "OTEL_TRACES_SAMPLER_ARG", 1, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
                   parent_based)  # fmt: skip


def _boolean(env: Mapping[str, str], key: str) -> bool:
    text = env.get(key, "false").lower()
    if text not in ("true", "false"):
        _warn(key, text, "true or false; false is used")
    return text == "true"


def _word(env: Mapping[str, str], key: str, default: str, *others: str) -> str:
    text = env.get(key, default).lower()
    if text in (default, *others):
        return text
    _warn(key, text, f"{', '.join((default, *others[:-1]))} or {others[-1]}; {default} is used")
    return default


def _number(env: Mapping[str, str], key: str, default: float, least: float) -> float:
    return _parse(env, key, default, lambda value: least <= value < 1e9, f"a number from {least:g}")


def _parse(env: Mapping[str, str], key: str, default: float, right: Callable[[float], bool], words: str) -> float:
    text = env.get(key, "")
    try:
        value = float(text) if text else default
        if text and not right(value):
            raise ValueError
    except ValueError:
        _warn(key, text, f"{words}; {default:g} is used")
        return default
    return value


def _warn(key: str, value: str, right: str) -> None:
    _log.warning("%s=%s is not supported: use %s", key, value, right)
