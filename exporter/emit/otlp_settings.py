"""OTLP settings: the standard OTEL_* variables, read as OpenTelemetry's Python exporters read them.

Comes in: a mapping (the environment). Goes out: Settings; a signal without an endpoint is off, since nothing
is pushed until somebody says where to (D10). Not its job: connecting. Mistakes warn and fall back, as the
specification wants (D18). Header values appear in no warning and no repr.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

_log = logging.getLogger(__name__)

Signal = Literal["traces", "metrics", "logs"]
SIGNALS: tuple[Signal, ...] = ("traces", "metrics", "logs")
GRPC, HTTP = "grpc", "http/protobuf"
_EXPLICIT, _EXPONENTIAL = "explicit_bucket_histogram", "base2_exponential_bucket_histogram"


@dataclass(frozen=True)
class Endpoint:
    """Where one signal goes. `url` is complete for HTTP; `timeout` in seconds for one export with its
    retries."""

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

    @property
    def mix_up(self) -> str:
        """One sentence where protocol and port look exchanged, else ""."""
        port = urlsplit(self.url if "://" in self.url else f"//{self.url}").port
        if self.protocol == HTTP and port == 4317:
            return (
                f"OTLP {self.signal}: port 4317 usually speaks gRPC and this is {HTTP}; "
                "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc or use port 4318"
            )
        if self.protocol == GRPC and port == 4318:
            return (
                f"OTLP {self.signal}: port 4318 usually speaks HTTP and this is gRPC; "
                f"set OTEL_EXPORTER_OTLP_PROTOCOL={HTTP} or use port 4317"
            )
        return ""


@dataclass(frozen=True)
class Batch:
    """How a signal's items wait: at most `queue`, sent `size` at a time or after `delay` seconds."""

    queue: int = 2048
    size: int = 512
    delay: float = 5.0


@dataclass(frozen=True)
class Settings:
    """`sampled`: None where no sampler is set (the budget decides), else the share of spans that are kept."""

    traces: Endpoint | None = None
    metrics: Endpoint | None = None
    logs: Endpoint | None = None
    spans: Batch = Batch()
    records: Batch = Batch(delay=1.0)
    interval: float = 60.0
    delta: bool = False
    lowmemory: bool = False
    exponential: bool = False
    exemplars: str = "trace_based"
    sampled: float | None = None
    value_length: int | None = None
    attribute_count: int = 128

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(found for found in (self.traces, self.metrics, self.logs) if found)


def load(environ: Mapping[str, str]) -> Settings:
    """Reads the variables. Never raises: what cannot be used warns and counts as not set."""
    # Set but empty is not set, says the specification.
    env = {key: value.strip() for key, value in environ.items() if key.startswith("OTEL_") and value.strip()}
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Settings()
    preference = env.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "cumulative").lower()
    if preference not in ("cumulative", "delta", "lowmemory"):
        _warn("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference, "cumulative, delta or lowmemory")
    histogram = env.get("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", _EXPLICIT).lower()
    if histogram not in (_EXPLICIT, _EXPONENTIAL):
        _warn("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", histogram, f"{_EXPLICIT} or {_EXPONENTIAL}")
    exemplars = env.get("OTEL_METRICS_EXEMPLAR_FILTER", "trace_based").lower()
    if exemplars not in ("trace_based", "always_on", "always_off"):
        _warn("OTEL_METRICS_EXEMPLAR_FILTER", exemplars, "trace_based, always_on or always_off; trace_based is used")
        exemplars = "trace_based"
    length = _number(env, "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", -1, 0)
    return Settings(
        traces=_endpoint(env, "traces"),
        metrics=_endpoint(env, "metrics"),
        logs=_endpoint(env, "logs"),
        spans=_batch(env, "OTEL_BSP_", 5000),
        records=_batch(env, "OTEL_BLRP_", 1000),
        interval=_number(env, "OTEL_METRIC_EXPORT_INTERVAL", 60_000, 100) / 1000,
        delta=preference in ("delta", "lowmemory"),
        lowmemory=preference == "lowmemory",
        exponential=histogram == _EXPONENTIAL,
        exemplars=exemplars,
        sampled=_sampler(env),
        value_length=None if length < 0 else int(length),
        attribute_count=int(_number(env, "OTEL_ATTRIBUTE_COUNT_LIMIT", 128, 1)),
    )


def _endpoint(env: Mapping[str, str], signal: Signal) -> Endpoint | None:
    exporters = [word.strip() for word in env.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp").split(",")]
    for word in exporters:
        if word not in ("otlp", "none", "") and not (signal == "metrics" and word == "prometheus"):
            _warn(f"OTEL_{signal.upper()}_EXPORTER", word, "otlp or none; lines of text are EBFW_OUTPUT's")
    if "otlp" not in exporters or "none" in exporters:
        return None

    def get(name: str, default: str = "") -> str:
        own, common = f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}", f"OTEL_EXPORTER_OTLP_{name}"
        return env.get(own) or env.get(common) or default

    url = get("ENDPOINT")
    if not url:
        if f"OTEL_{signal.upper()}_EXPORTER" in env:
            _log.warning(
                "OTEL_%s_EXPORTER=otlp, but no endpoint is set: set OTEL_EXPORTER_OTLP_ENDPOINT",
                signal.upper(),
            )
        return None
    protocol = get("PROTOCOL", HTTP).lower()
    if protocol not in (GRPC, HTTP):
        _warn("OTEL_EXPORTER_OTLP_PROTOCOL", protocol, f"{GRPC} or {HTTP}; {HTTP} is used")
        protocol = HTTP
    if protocol == HTTP:
        if not url.startswith(("http://", "https://")):
            _warn("OTEL_EXPORTER_OTLP_ENDPOINT", url, f"a URL that begins with http://; http://{url} is used")
            url = f"http://{url}"
        if f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT" not in env:
            url = f"{url.rstrip('/')}/v1/{signal}"
    compression = get("COMPRESSION", "none").lower()
    if compression not in ("none", "gzip", "deflate") or (compression == "deflate" and protocol == GRPC):
        _warn("OTEL_EXPORTER_OTLP_COMPRESSION", compression, "none or gzip; none is used")
        compression = "none"
    return Endpoint(
        signal, url, protocol, _headers(get("HEADERS")), _timeout(get("TIMEOUT")), compression,
        _file(get("CERTIFICATE")), _file(get("CLIENT_KEY")), _file(get("CLIENT_CERTIFICATE")),
        {"true": True, "false": False}.get(get("INSECURE").lower()),
    )  # fmt: skip


def _timeout(text: str) -> float:
    """Python's exporters read seconds, the specification says milliseconds. Nobody waits 1,000 seconds for an
    export, nor sets one of less than a second: so 1,000 and more are milliseconds."""
    try:
        value = float(text or 10)
        if not 0 < value < 1e9:
            raise ValueError
    except ValueError:
        _warn("OTEL_EXPORTER_OTLP_TIMEOUT", text, "a number of seconds; 10 is used")
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


def _sampler(env: Mapping[str, str]) -> float | None:
    name = env.get("OTEL_TRACES_SAMPLER", "").lower().removeprefix("parentbased_")
    if not name:
        return None
    if name in ("always_on", "always_off"):
        return float(name == "always_on")
    if name != "traceidratio":
        _warn(
            "OTEL_TRACES_SAMPLER",
            name,
            "always_on, always_off or traceidratio; EBFW_SPANS_PER_SECOND is used",
        )
        return None
    try:
        ratio = float(env.get("OTEL_TRACES_SAMPLER_ARG", "1"))
        if not 0 <= ratio <= 1:
            raise ValueError
    except ValueError:
        _warn("OTEL_TRACES_SAMPLER_ARG", env["OTEL_TRACES_SAMPLER_ARG"], "a number from 0 to 1; 1 is used")
        return 1.0
    return ratio


def _number(env: Mapping[str, str], key: str, default: float, least: float) -> float:
    text = env.get(key, "")
    try:
        value = float(text) if text else default
        if text and not least <= value < 1e9:
            raise ValueError
    except ValueError:
        _warn(key, text, f"a number from {least:g}; {default:g} is used")
        return default
    return value


def _warn(key: str, value: str, right: str) -> None:
    _log.warning("%s=%s is not supported: use %s", key, value, right)
