"""OTLP transport: a filled message to a receiver, through OpenTelemetry's own exporters.

Comes in: an Endpoint and messages. Goes out: Result. Not its job: what is in the message, queues, counting.

The exporters bring what is hard: retries with Retry-After and RetryInfo, compression, TLS, credentials. They
encode SDK objects first, which is the step left out here. For this two names that they do not promise are
used, both in this file only, for opentelemetry-exporter-otlp 1.45 (pyproject.toml holds the range,
test_otlp.py the proof): `_client.export(bytes)` of the HTTP exporters, and `_translate_data`, `_count_data`,
`_export` and `_client` of the gRPC exporters. grpc (15 MB) or requests is imported when one is chosen, and
only then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from exporter.emit.otlp_settings import GRPC, Endpoint

# It logs header lines that it cannot parse, and those are secrets; ours are parsed before (otlp_settings.py).
logging.getLogger("opentelemetry.util.re").disabled = True
# The exporters say every attempt that failed and will be tried again; the last one, an error, is enough.
logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)


class Result(NamedTuple):
    """`taken`: the receiver answered with success. `rejected`: how many items it refused all the same, and
    why."""

    taken: bool
    rejected: int = 0
    why: str = ""


class Sender(Protocol):
    def send(self, message: Any) -> Result:
        """Sends one request; waits, with retries, no longer than the endpoint's timeout. Never raises."""

    def close(self) -> None:
        """Ends a send that waits for its next retry."""


def connect(endpoint: Endpoint) -> Sender:
    """A sender for the endpoint. Imports what it needs; opens no connection yet."""
    return _Grpc(endpoint) if endpoint.protocol == GRPC else _Http(endpoint)


def _partial(signal: str, response: Any) -> tuple[int, str]:
    """(rejected, why) of an Export*ServiceResponse."""
    partial = response.partial_success
    rejected = {
        "traces": "rejected_spans",
        "metrics": "rejected_data_points",
        "logs": "rejected_log_records",
    }[signal]
    return int(getattr(partial, rejected)), str(partial.error_message)


class _Http:
    def __init__(self, endpoint: Endpoint) -> None:
        from opentelemetry.exporter.otlp.proto.http import Compression

        exporter, self._response = _http_classes(endpoint.signal)
        self._signal = endpoint.signal
        session = _session(endpoint.certificate)
        session.hooks["response"].append(self._answered)
        self._body = b""
        self._exporter = exporter(
            endpoint=endpoint.url,
            certificate_file=endpoint.certificate or None,
            client_key_file=endpoint.client_key or None,
            client_certificate_file=endpoint.client_certificate or None,
            headers=endpoint.headers,
            timeout=endpoint.timeout,
            compression=Compression(endpoint.compression),
            session=session,
        )

    def _answered(self, response: Any, *_: Any, **__: Any) -> None:
        self._body = response.content if response.ok else b""

    def send(self, message: Any) -> Result:
        self._body = b""
        try:
            if not self._exporter._client.export(message.SerializeToString()).success:
                return Result(False)
            return Result(True, *_partial(self._signal, self._response.FromString(self._body)))
        except Exception as error:  # the body may be anything, and a worker thread must live on
            return Result(bool(self._body), 0, f"{type(error).__name__}: unreadable answer" if self._body else "")

    def close(self) -> None:
        self._exporter.shutdown()


def _http_classes(signal: str) -> tuple[Callable[..., Any], Any]:
    if signal == "traces":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        return OTLPSpanExporter, ExportTraceServiceResponse
    if signal == "logs":
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

        return OTLPLogExporter, ExportLogsServiceResponse
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

    return OTLPMetricExporter, ExportMetricsServiceResponse


class _Grpc:
    def __init__(self, endpoint: Endpoint) -> None:
        import grpc

        base = _grpc_class(endpoint.signal)
        self._answer: Any = None

        def keep(answer: Any) -> Any:
            self._answer = answer
            return answer

        class Exporter(base):  # type: ignore[misc, valid-type]
            _client: Any

            def _translate_data(self, data: Any) -> Any:
                return data

            def _count_data(self, data: Any) -> int:
                return 0

            def _initialize_channel_and_stub(self) -> None:
                # Also called when the exporter reconnects. The exporter throws the answer away; D19 wants it.
                super()._initialize_channel_and_stub()
                self._client = _Stub(self._client.Export, keep)

        url = endpoint.url
        # The scheme decides; without one OTEL_EXPORTER_OTLP_INSECURE does, and TLS is its default.
        insecure = url.startswith("http://") or (endpoint.insecure is True and not url.startswith("https://"))
        credentials = None
        if not insecure:
            credentials = grpc.ssl_channel_credentials(
                _read(endpoint.certificate), _read(endpoint.client_key), _read(endpoint.client_certificate)
            )
        self._signal = endpoint.signal
        gzip = endpoint.compression == "gzip"
        self._exporter = Exporter(
            endpoint=url,
            insecure=insecure,
            credentials=credentials,
            headers=tuple(endpoint.headers.items()),
            timeout=endpoint.timeout,
            compression=grpc.Compression.Gzip if gzip else grpc.Compression.NoCompression,
        )

    def send(self, message: Any) -> Result:
        self._answer = None
        try:
            result = self._exporter._export(message)
        except Exception as error:  # grpc raises ValueError on a channel that close() has closed
            logging.getLogger(__name__).debug("OTLP %s: %s", self._signal, error)
            return Result(False)
        if result.name != "SUCCESS" or self._answer is None:
            return Result(False)
        return Result(True, *_partial(self._signal, self._answer))

    def close(self) -> None:
        self._exporter.shutdown()


class _Stub(NamedTuple):
    """What the exporter calls: a stub with one method, whose answer is kept."""

    call: Callable[..., Any]
    keep: Callable[[Any], Any]

    def Export(self, **arguments: Any) -> Any:
        return self.keep(self.call(**arguments))


def _grpc_class(signal: str) -> Any:
    if signal == "traces":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter
    if signal == "logs":
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter

        return OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


def _session(certificate: str) -> Any:
    """requests takes REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE before what a session is told; here the certificate that is
    set for this endpoint comes first. Proxies are the environment's, as everywhere."""
    import requests

    class Session(requests.Session):
        def merge_environment_settings(self, *arguments: Any) -> Any:
            found = super().merge_environment_settings(*arguments)
            return {**found, "verify": certificate} if certificate else found

    return Session()
