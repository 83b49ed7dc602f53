"""OTLP transport: a request to a receiver, through OpenTelemetry's own exporters.

Comes in: an Endpoint and requests, encoded or as messages. Goes out: Result. Not its job: what is in the message,
queues, counting.

The exporters bring what is hard: retries with Retry-After and RetryInfo, compression, TLS, credentials. They
encode SDK objects first, which is the step left out here. For this two names that they do not promise are
used, both in this file only, for opentelemetry-exporter-otlp 1.45 (pyproject.toml holds the range,
test_otlp.py the proof): `_client.export(bytes)` of the HTTP exporters, and `_translate_data`, `_count_data`,
`_export`, `_channel` and `_client` of the gRPC exporters. grpc (15 MB) or requests is imported when one is chosen, and
only then.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from exporter.emit.otlp_settings import GRPC, Endpoint

# It logs header lines that it cannot parse, and those are secrets; ours are parsed before (otlp_settings.py).
logging.getLogger("opentelemetry.util.re").disabled = True
# The exporters say every attempt that failed and will be tried again; the last one, an error, is enough.
logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)


class Result(NamedTuple):
    """`taken`: the receiver answered with success. `rejected`: how many items it refused all the same. `why`: what
    went wrong, in the receiver's or the library's words. `mixed_up`: it speaks the other of gRPC and HTTP."""

    taken: bool
    rejected: int = 0
    why: str = ""
    mixed_up: bool = False


class Sender(Protocol):
    def send(self, message: Any) -> Result:
        """Sends one request, bytes or a message; waits, with retries, no longer than the endpoint's timeout. Never
        raises."""

    def close(self) -> None:
        """Ends a send that waits for its next retry."""


def connect(endpoint: Endpoint) -> Sender:
    """A sender for the endpoint. Imports what it needs; opens no connection yet."""
    sender: Sender | None = None
    if endpoint.url:
        sender = _Grpc(endpoint) if endpoint.protocol == GRPC else _Http(endpoint)
    if endpoint.console or sender is None:
        return _Console(endpoint.signal, sender)
    return sender


def _partial(signal: str, response: Any) -> tuple[int, str]:
    """(rejected, why) of an Export*ServiceResponse."""
    partial = response.partial_success
    rejected = {
        "traces": "rejected_spans",
        "metrics": "rejected_data_points",
        "logs": "rejected_log_records",
    }[signal]
    return int(getattr(partial, rejected)), str(partial.error_message)


def _import_requests() -> None:
    """Without charset_normalizer: what it guesses is the encoding of a page that names none, and its tables take 4 MB
    of each node's memory. requests can do without, and says so, once."""
    if "requests" not in sys.modules:
        sys.modules.setdefault("charset_normalizer", None)  # type: ignore[arg-type]  # how an import is made to fail
        warnings.filterwarnings("ignore", "Unable to find acceptable character detection dependency")
        import requests  # noqa: F401


class _Http:
    def __init__(self, endpoint: Endpoint) -> None:
        _import_requests()
        from opentelemetry.exporter.otlp.proto.http import Compression

        exporter, self._response = _http_class(endpoint.signal), _response(endpoint.signal)
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
            done = self._exporter._client.export(_serialized(message))
            if not done.success:
                why = str(done.error or done.reason or done.status_code or "")
                # A gRPC server answers HTTP/1 with an HTTP/2 frame, and hangs up.
                return Result(False, 0, why, "BadStatusLine" in why or "Received HTTP/0.9" in why)
            return Result(True, *_partial(self._signal, self._response.FromString(self._body)))
        except Exception as error:  # the body may be anything, and a worker thread must live on
            return Result(bool(self._body), 0, f"{type(error).__name__}: unreadable answer" if self._body else "")

    def close(self) -> None:
        self._exporter.shutdown()


class _Console:
    """Prints requests as JSON lines, as the specification's OTLP/JSON has it, before `sender` gets them."""

    def __init__(self, signal: str, sender: Sender | None) -> None:
        self._signal, self._sender = signal, sender

    def send(self, message: Any) -> Result:
        try:
            sys.stdout.write(_json(self._signal, message) + "\n")
            sys.stdout.flush()
        except (OSError, ValueError) as error:  # a reader that is gone
            if self._sender is None:
                return Result(False, 0, str(error))
        return self._sender.send(message) if self._sender is not None else Result(True)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()


def _json(signal: str, message: Any) -> str:
    from google.protobuf.json_format import MessageToDict

    if isinstance(message, bytes):
        message = _request(signal).FromString(message)
    found = MessageToDict(message, use_integers_for_enums=True)
    _hex_ids(found)
    return json.dumps(found, separators=(",", ":"))


def _hex_ids(found: Any) -> None:
    """OTLP/JSON writes ids in hex where protobuf's own mapping has base64 (specification, "JSON Protobuf
    Encoding")."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if key in ("traceId", "spanId", "parentSpanId"):
            found[key] = base64.b64decode(value).hex()
        elif isinstance(value, dict | list):
            _hex_ids(value)


def _http_class(signal: str) -> Callable[..., Any]:
    if signal == "traces":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter
    if signal == "logs":
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter

        return OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter


def _request(signal: str) -> Any:
    if signal == "traces":
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        return ExportTraceServiceRequest
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    return ExportLogsServiceRequest


def _response(signal: str) -> Any:
    if signal == "traces":
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        return ExportTraceServiceResponse
    if signal == "logs":
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

        return ExportLogsServiceResponse
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

    return ExportMetricsServiceResponse


class _Grpc:
    def __init__(self, endpoint: Endpoint) -> None:
        import grpc

        base, response, method = _grpc_class(endpoint.signal)
        self._answer: Any = None
        self._error = ""

        def keep(answer: Any, error: str = "") -> None:
            self._answer, self._error = answer, error

        class Exporter(base):  # type: ignore[misc, valid-type]
            _channel: Any
            _client: Any

            def _translate_data(self, data: Any) -> Any:
                return data

            def _count_data(self, data: Any) -> int:
                return 0

            def _initialize_channel_and_stub(self) -> None:
                # Also called when the exporter reconnects. Its own stub takes messages only, and the exporter throws
                # the answer away; D19 wants it.
                super()._initialize_channel_and_stub()
                call = self._channel.unary_unary(
                    method, request_serializer=_serialized, response_deserializer=response.FromString
                )
                self._client = _Stub(call, keep)

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
        self._answer, self._error = None, ""
        try:
            result = self._exporter._export(message)
        except Exception as error:  # grpc raises ValueError on a channel that close() has closed
            logging.getLogger(__name__).debug("OTLP %s: %s", self._signal, error)
            return Result(False, 0, str(error))
        if result.name != "SUCCESS" or self._answer is None:
            # The core's own words for an answer in HTTP/1.
            mixed_up = "http1" in self._error.lower() or "Expected SETTINGS frame" in self._error
            return Result(False, 0, self._error, mixed_up)
        return Result(True, *_partial(self._signal, self._answer))

    def close(self) -> None:
        self._exporter.shutdown()


class _Stub(NamedTuple):
    """What the exporter calls: a stub with one method, whose answer or error is kept."""

    call: Callable[..., Any]
    keep: Callable[..., None]

    def Export(self, **arguments: Any) -> Any:
        import grpc

        try:
            answer = self.call(**arguments)
        except grpc.RpcError as error:
            self.keep(None, str(getattr(error, "details", str)()))
            raise
        self.keep(answer)
        return answer


def _grpc_class(signal: str) -> tuple[Any, Any, str]:
    """(exporter, response, method)"""
    response = _response(signal)
    service = {"traces": "trace.v1.Trace", "logs": "logs.v1.Logs", "metrics": "metrics.v1.Metrics"}[signal]
    method = f"/opentelemetry.proto.collector.{service}Service/Export"
    if signal == "traces":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter, response, method
    if signal == "logs":
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter

        return OTLPLogExporter, response, method
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter, response, method


def _serialized(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


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
