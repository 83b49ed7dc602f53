"""A real OpenTelemetry Collector: examples/collector.yaml as it stands, what it took read back from its file exporter.

Comes in: the built Collector (scripts/tools), a directory. Goes out: addresses to push to, and spans, log records and
data points as the Collector wrote them, told apart by `run`: the deployment.environment.name that a test's agent was
given, and puts on everything. Not its job: judging them.

A second configuration file, made here, adds what only tests want: the file exporter, receivers with one kind of
protection each, short waits, and no listener for the Collector's own metrics.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lab.tools import tool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKEN = "CanaryToken5d8c1f7e2b9a"
START_SECONDS = 60.0

_OVERLAY = """
receivers:
  otlp/tls:
    protocols:
      grpc: {{endpoint: "127.0.0.1:{tls_grpc}", tls: {tls}}}
      http: {{endpoint: "127.0.0.1:{tls_http}", tls: {tls}}}
  otlp/token:
    protocols:
      grpc: {{endpoint: "127.0.0.1:{token_grpc}", auth: {{authenticator: bearertokenauth}}}}
      http: {{endpoint: "127.0.0.1:{token_http}", auth: {{authenticator: bearertokenauth}}}}
processors:
  batch: {{timeout: 100ms}}
exporters:
  file/traces: {{path: "{directory}/traces.jsonl", flush_interval: 100ms, append: true}}
  file/metrics: {{path: "{directory}/metrics.jsonl", flush_interval: 100ms, append: true}}
  file/logs: {{path: "{directory}/logs.jsonl", flush_interval: 100ms, append: true}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines:
    traces: {{receivers: {receivers}, exporters: [debug, file/traces]}}
    metrics: {{receivers: {receivers}, exporters: [otlphttp/prometheus, file/metrics]}}
    logs: {{receivers: {receivers}, exporters: [debug, file/logs]}}
"""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on. All are held at the same time, lest two be the same."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Certificates:
    """An authority, a server's certificate for 127.0.0.1 and a client's, as PEM files made by openssl."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.ca, self.ca_key = directory / "ca.pem", directory / "ca.key"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=authority of the test", "-keyout", self.ca_key, "-out", self.ca,
        )  # fmt: skip
        self.server, self.server_key = self._signed(directory / "server", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        self.client, self.client_key = self._signed(directory / "client", "extendedKeyUsage=clientAuth")

    def _signed(self, stem: Path, extension: str) -> tuple[Path, Path]:
        certificate, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN={stem.name}", "-addext", extension, "-addext", "basicConstraints=critical,CA:FALSE",
            "-CA", self.ca, "-CAkey", self.ca_key, "-keyout", key, "-out", certificate,
        )  # fmt: skip
        return certificate, key

    @staticmethod
    def _openssl(*arguments: object) -> None:
        subprocess.run(("openssl", *map(str, arguments)), check=True, capture_output=True)


class Span(NamedTuple):
    resource: dict[str, Any]
    name: str
    kind: int
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]  # (trace id, span id)


class Log(NamedTuple):
    resource: dict[str, Any]
    name: str
    time: int
    severity: int
    body: str
    attributes: dict[str, Any]


class DataPoint(NamedTuple):
    """`value`: a number; of a histogram its count. `start`, `time`: nanoseconds."""

    resource: dict[str, Any]
    name: str
    unit: str
    kind: str  # sum | gauge | histogram | exponentialHistogram
    value: float
    start: int
    time: int
    attributes: dict[str, Any]


class Collector:
    """A context manager. `grpc` and `http` are the plain receiver's URLs, `ports` those of all receivers."""

    def __init__(self, directory: Path, prometheus: str = "http://127.0.0.1:1/api/v1/otlp") -> None:
        self.directory = directory
        self.certificates = Certificates(directory / "certificates")
        kinds = ("grpc", "http", "tls_grpc", "tls_http", "token_grpc", "token_http", "remote_grpc", "remote_http")
        self.ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
        self.grpc, self.http = (f"http://127.0.0.1:{self.ports[kind]}" for kind in ("grpc", "http"))
        c = self.certificates
        self._overlay = directory / "overlay.yaml"
        tls = f"{{cert_file: {c.server}, key_file: {c.server_key}}}"
        receivers = "[otlp, otlp/remote, otlp/tls, otlp/token]"
        self._overlay.write_text(_OVERLAY.format(directory=directory, tls=tls, receivers=receivers, **self.ports))
        self._environment = {
            **os.environ,
            "OTLP_TOKEN": TOKEN,
            "OTLP_GRPC": f"127.0.0.1:{self.ports['grpc']}",
            "OTLP_HTTP": f"127.0.0.1:{self.ports['http']}",
            "OTLP_REMOTE_GRPC": f"127.0.0.1:{self.ports['remote_grpc']}",
            "OTLP_REMOTE_HTTP": f"127.0.0.1:{self.ports['remote_http']}",
            "OTLP_CERT": str(c.server),
            "OTLP_KEY": str(c.server_key),
            "OTLP_CLIENT_CA": str(c.ca),
            "PROMETHEUS_OTLP": prometheus,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Collector:
        """Until it is ready. What it took before it was stopped stays readable."""
        log = self.directory / "collector.log"
        with log.open("ab") as out:
            out.truncate(0)
            self.process = subprocess.Popen(
                [
                    tool("otelcol"), "--config", EXAMPLES / "collector.yaml", "--config", self._overlay,
                    # A list in a later file takes the place of the earlier one; that is what the overlay counts on.
                ],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while "Everything is ready" not in log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                raise AssertionError(f"the Collector did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, and nobody answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Collector:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what it took -------------------------------------------------------------------------------------------

    def _lines(self, signal_: str) -> Iterator[Any]:
        path = self.directory / f"{signal_}.jsonl"
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last may be half written
                    yield json.loads(line)

    def _records(self, signal_: str, outer: str, scoped: str, inner: str, run: str) -> Iterator[tuple[Any, Any]]:
        for line in self._lines(signal_):
            for group in line[outer]:
                resource = attributes(group["resource"])
                if resource.get("deployment.environment.name") == run:
                    for scope in group[scoped]:
                        for record in scope[inner]:
                            yield resource, record

    def spans(self, run: str) -> list[Span]:
        return [
            Span(
                resource, span["name"], span.get("kind", 0), int(span["startTimeUnixNano"]),
                int(span["endTimeUnixNano"]), span.get("status", {}).get("code", 0) == 2, attributes(span),
                span["traceId"], span["spanId"], span.get("parentSpanId", ""),
                tuple((link["traceId"], link["spanId"]) for link in span.get("links", ())),
            )
            for resource, span in self._records("traces", "resourceSpans", "scopeSpans", "spans", run)
        ]  # fmt: skip

    def logs(self, run: str) -> list[Log]:
        return [
            Log(
                resource, log["eventName"], int(log["timeUnixNano"]), log["severityNumber"], value(log["body"]),
                attributes(log),
            )
            for resource, log in self._records("logs", "resourceLogs", "scopeLogs", "logRecords", run)
        ]  # fmt: skip

    def points(self, run: str, name: str = "") -> list[DataPoint]:
        """Oldest push first. Points without a recorded value (the end of a series) are left out."""
        found = []
        for resource, metric in self._records("metrics", "resourceMetrics", "scopeMetrics", "metrics", run):
            if name and metric["name"] != name:
                continue
            kind = next(key for key in ("sum", "gauge", "histogram", "exponentialHistogram") if key in metric)
            for point in metric[kind]["dataPoints"]:
                if int(point.get("flags", 0)) & 1:
                    continue
                number = point.get("count", point.get("asInt", point.get("asDouble", 0)))
                found.append(
                    DataPoint(
                        resource, metric["name"], metric.get("unit", ""), kind, float(number),
                        int(point.get("startTimeUnixNano", 0)), int(point["timeUnixNano"]), attributes(point),
                    )
                )  # fmt: skip
        return found

    def last(self, run: str, name: str, **labels: str) -> float:
        """The sum, over series that have these attributes (dots written as __), of each one's newest value."""
        newest: dict[Any, float] = {}
        wanted = {key.replace("__", "."): text for key, text in labels.items()}
        for point in self.points(run, name):
            everything = point.resource | point.attributes
            if all(everything.get(key) == text for key, text in wanted.items()):
                newest[repr((sorted(point.resource.items()), sorted(point.attributes.items())))] = point.value
        return sum(newest.values())


def attributes(holder: Any) -> dict[str, Any]:
    return {pair["key"]: value(pair["value"]) for pair in holder.get("attributes", ())}


def value(any_value: Any) -> Any:
    """An AnyValue of OTLP/JSON, where 64-bit integers are strings."""
    for key, make in (("stringValue", str), ("boolValue", bool), ("intValue", int), ("doubleValue", float)):
        if key in any_value:
            return make(any_value[key])
    return tuple(value(item) for item in any_value.get("arrayValue", {}).get("values", ()))
