"""An OTLP receiver for tests: gRPC and HTTP/protobuf on loopback, keeps what arrived as protobuf messages.

Comes in: Export*ServiceRequest. Goes out: `requests` and the flattened views below. It can be told to refuse
(an HTTP status or a gRPC code, with Retry-After), to delay, and to reject a part. Not its job: judging what
arrived.
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

_REQUESTS = {
    "traces": trace_service_pb2.ExportTraceServiceRequest,
    "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
    "logs": logs_service_pb2.ExportLogsServiceRequest,
}
_RESPONSES = {
    "traces": (trace_service_pb2.ExportTraceServiceResponse, "rejected_spans"),
    "metrics": (metrics_service_pb2.ExportMetricsServiceResponse, "rejected_data_points"),
    "logs": (logs_service_pb2.ExportLogsServiceResponse, "rejected_log_records"),
}


class Received(NamedTuple):
    signal: str
    message: Any
    headers: dict[str, str]
    size: int  # on the wire, before decompression (HTTP) or of the message (gRPC)


class Receiver:
    """`with Receiver() as receiver:` listens on `receiver.http` and `receiver.grpc` (URLs).

    refuse: how many requests to refuse from now on (-1: all), with `status` (HTTP) or its gRPC counterpart;
    retry_after: seconds said with a refusal; delay: seconds before each answer; reject: items refused by
    partial success in each request.
    """

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.refused = 0
        self.refuse, self.status, self.retry_after = 0, 503, None
        self.delay = 0.0
        self.reject = 0
        self._lock = threading.Condition()
        self._closing = threading.Event()

    refuse: int
    status: int
    retry_after: int | None

    def __enter__(self) -> Receiver:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                signal = self.path.rpartition("/")[2]
                headers = {key.lower(): value for key, value in self.headers.items()}
                if receiver._refuses():
                    self.send_response(receiver.status)
                    if receiver.retry_after is not None:
                        self.send_header("Retry-After", str(receiver.retry_after))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                size = len(body)
                if headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                elif headers.get("content-encoding") == "deflate":
                    body = zlib.decompress(body)
                answer = receiver._take(signal, _REQUESTS[signal].FromString(body), headers, size)
                out = answer.SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(out)))
                self.end_headers()
                self.wfile.write(out)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that gave up while it was made to wait is what some tests want."""

        self._httpd = Server(("127.0.0.1", 0), Handler)
        self.http = f"http://127.0.0.1:{self._httpd.server_port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

        self._grpc = grpc.server(futures.ThreadPoolExecutor(4))
        for signal, module, service in (
            ("traces", trace_service_pb2_grpc, "TraceService"),
            ("metrics", metrics_service_pb2_grpc, "MetricsService"),
            ("logs", logs_service_pb2_grpc, "LogsService"),
        ):
            getattr(module, f"add_{service}Servicer_to_server")(_Servicer(self, signal), self._grpc)
        self.grpc = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._httpd.shutdown()
        self._httpd.server_close()
        self._grpc.stop(0).wait(2)

    def _refuses(self) -> bool:
        with self._lock:
            if self.refuse == 0:
                return False
            self.refuse -= self.refuse > 0
            self.refused += 1
            self._lock.notify_all()
            return True

    def _take(self, signal: str, message: Any, headers: dict[str, str], size: int) -> Any:
        self._closing.wait(self.delay)
        with self._lock:
            self.requests.append(Received(signal, message, headers, size))
            self._lock.notify_all()
        response, rejected = _RESPONSES[signal]
        answer = response()
        if self.reject:
            setattr(answer.partial_success, rejected, self.reject)
            answer.partial_success.error_message = "refused by the test"
        return answer

    def wait(self, done: Any, seconds: float = 10.0) -> None:
        """Until `done()` is true. Raises TimeoutError."""
        with self._lock:
            if not self._lock.wait_for(done, seconds):
                raise TimeoutError(f"{len(self.requests)} requests arrived, {self.refused} were refused")

    # --- what arrived, flattened ----------------------------------------------------------------------------

    def of(self, signal: str) -> list[Any]:
        """The messages of one signal."""
        return [received.message for received in list(self.requests) if received.signal == signal]

    def spans(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """(resource attributes, span)"""
        for message in self.of("traces"):
            for outer in message.resource_spans:
                for inner in outer.scope_spans:
                    for span in inner.spans:
                        yield attributes(outer.resource), span

    def logs(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """(resource attributes, log record)"""
        for message in self.of("logs"):
            for outer in message.resource_logs:
                for inner in outer.scope_logs:
                    for log in inner.log_records:
                        yield attributes(outer.resource), log

    def points(self, name: str = "") -> Iterator[tuple[dict[str, Any], Any, Any]]:
        """(resource attributes, metric, data point), oldest push first"""
        for message in self.of("metrics"):
            for outer in message.resource_metrics:
                for inner in outer.scope_metrics:
                    for metric in inner.metrics:
                        if not name or metric.name == name:
                            for point in getattr(metric, metric.WhichOneof("data")).data_points:
                                yield attributes(outer.resource), metric, point


class _Servicer:
    def __init__(self, receiver: Receiver, signal: str) -> None:
        self._receiver, self._signal = receiver, signal

    def Export(self, request: Any, context: Any) -> Any:
        if self._receiver._refuses():
            if self._receiver.retry_after is not None:
                info = RetryInfo(retry_delay=Duration(seconds=self._receiver.retry_after))
                context.set_trailing_metadata((("google.rpc.retryinfo-bin", info.SerializeToString()),))
            retryable = self._receiver.status in (429, 502, 503, 504)
            context.abort(grpc.StatusCode.UNAVAILABLE if retryable else grpc.StatusCode.INVALID_ARGUMENT, "refused")
        headers = {item.key: str(item.value) for item in context.invocation_metadata()}
        return self._receiver._take(self._signal, request, headers, request.ByteSize())


def attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a resource, span, log record or data point, as Python values."""
    return {pair.key: value(pair.value) for pair in holder.attributes}


def value(any_value: Any) -> Any:
    """An AnyValue as a Python value."""
    which = any_value.WhichOneof("value")
    if which == "array_value":
        return tuple(value(item) for item in any_value.array_value.values)
    return getattr(any_value, which) if which else None
