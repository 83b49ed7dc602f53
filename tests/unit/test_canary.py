"""Secrets in every place of a request, searched for in every output (D8).

The requests are bytes, read by the parser that the pipeline uses; the outputs are what users get: lines of text and
JSON, spans, log records and metrics over OTLP and on the console, the /metrics page, our own log. Worst settings:
headers shown, and the ones that carry credentials on the allow list.
"""

from __future__ import annotations

import io
import logging

import pytest

from exporter import health
from exporter.emit import prometheus
from exporter.emit.console import Console
from exporter.emit.instrumented import Instrumented
from exporter.emit.metrics import Metrics
from exporter.emit.otlp import Otlp
from exporter.emit.redact import Options, redact
from exporter.emit.resource import Resources
from exporter.events import Counts, Event, Exchange, Flow
from exporter.http1 import parse_request
from exporter.settings import load
from tests.pipeline.otlp_receiver import Receiver
from tests.unit.samples import PARENT, REQUEST, UNSAMPLED, WEB

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
TOKEN = "canary7Q2xV9zLk4WbT8nRpY3mHs6JdF1cG5"

# place -> (the head of a request, what must be found nowhere)
PLACES = {
    "user info of the target": (f"GET http://alice:{TOKEN}@example.com/a HTTP/1.1\r\nHost: example.com", TOKEN),
    "user info of the host": (f"GET /a HTTP/1.1\r\nHost: alice:{TOKEN}@example.com", TOKEN),
    "query": ("GET /a?q=canary-short&b=c HTTP/1.1\r\nHost: example.com", "canary-short"),
    "query of a key alone": (f"GET /a?{TOKEN} HTTP/1.1\r\nHost: example.com", TOKEN),
    "query key": (f"GET /a?{TOKEN}=1 HTTP/1.1\r\nHost: example.com", TOKEN),
    "fragment": ("GET /a#canary-short HTTP/1.1\r\nHost: example.com", "canary-short"),
    "path": (f"GET /v1/{TOKEN}/x HTTP/1.1\r\nHost: example.com", TOKEN),
    "path, JWT": (f"GET /v1/{JWT}/x HTTP/1.1\r\nHost: example.com", JWT[:30]),
    "path, bot": ("POST /bot4711:AAcanaryAA/sendMessage HTTP/1.1\r\nHost: api.example", "AAcanaryAA"),
    "path, hook": ("POST /services/T0AAAAAA/B0BBBBBB/canary1X HTTP/1.1\r\nHost: hooks.example", "canary1X"),
    "path, matrix": ("GET /a;jsessionid=canary-short/b HTTP/1.1\r\nHost: example.com", "canary-short"),
    "path, escaped": (f"GET /v1/%2563{TOKEN[1:]} HTTP/1.1\r\nHost: example.com", TOKEN[1:]),
    "authorization": ("GET /a HTTP/1.1\r\nHost: example.com\r\nAuthorization: Basic Y2FuYXJ5", "Y2FuYXJ5"),
    "proxy-authorization": ("GET /a HTTP/1.1\r\nHost: h.example\r\nProxy-Authorization: canary-short", "canary-short"),
    "cookie": ("GET /a HTTP/1.1\r\nHost: example.com\r\nCookie: a=canary-short; b=canary-short", "canary-short"),
    "set-cookie": ("GET /a HTTP/1.1\r\nHost: example.com\r\nSet-Cookie: a=canary-short", "canary-short"),
    "key": ("GET /a HTTP/1.1\r\nHost: example.com\r\nX-Api-Key: canary-short", "canary-short"),
    "token": ("GET /a HTTP/1.1\r\nHost: example.com\r\nX-Auth-Token: canary-short", "canary-short"),
    "any header": (f"GET /a HTTP/1.1\r\nHost: example.com\r\nX-Any: {TOKEN}", TOKEN),
    "user agent": (f"GET /a HTTP/1.1\r\nHost: example.com\r\nUser-Agent: x/1 ({TOKEN})", TOKEN),
    "referer": ("GET /a HTTP/1.1\r\nHost: h.example\r\nReferer: https://u:canary-1@h/?q=canary-1", "canary-1"),
    "gRPC metadata": (
        f"POST /a.B/C HTTP/1.1\r\nHost: example.com\r\nauthorization: Bearer {JWT}\r\nx-any-bin: {TOKEN}", TOKEN,
    ),
    "gRPC method": (f"POST /a.B/{TOKEN} HTTP/1.1\r\nHost: example.com", TOKEN),
    "tracestate": (f"GET /a HTTP/1.1\r\nHost: example.com\r\ntracestate: a=1,vendor={TOKEN}", TOKEN),
    "tracestate, inner": (f"GET /a HTTP/1.1\r\nHost: example.com\r\ntracestate: dd=s:1;t:{TOKEN}", TOKEN),
}  # fmt: skip
NAMES = (
    "authorization,proxy-authorization,cookie,set-cookie,x-api-key,x-auth-token,x-any,x-any-bin,user-agent,referer,"
    "tracestate"
)


def events(head: str, grpc: bool) -> list[Event]:
    """The request as the pipeline has it: answered, failed, and with a trace context that is not sampled."""
    request = parse_request(head.encode() + b"\r\n\r\n")
    assert request is not None
    state = next((value for name, value in request.headers if name == "tracestate"), "")
    exchange = Exchange("1.1", "https", 200, traceparent=PARENT, tracestate=state, grpc_status=0 if grpc else None)
    event = REQUEST._replace(
        domain=request.host or "192.0.2.1", method=request.method, headers=request.headers, exchange=exchange,
        path=request.path + ("?" + request.query if request.query else ""),
    )  # fmt: skip
    outcomes = (
        exchange,
        exchange._replace(status=503),
        exchange._replace(status=0, error="connection_reset", grpc_status=None),
        exchange._replace(status=500, traceparent=UNSAMPLED),
    )
    return [event._replace(exchange=outcome, port=port) for port, outcome in enumerate(outcomes, 1)]


@pytest.mark.parametrize("shown", ["true", "false"])
@pytest.mark.parametrize("place", PLACES)
def test_d8_no_output_holds_the_secret(
    place: str, shown: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    head, canary = PLACES[place]
    settings = load(None, {"EBFW_INSPECT_HEADERS": shown, "EBFW_HTTP_HEADERS": NAMES, "EBFW_OUTPUT": "json"})
    text, lines = io.StringIO(), io.StringIO()
    consoles = [Console(text, "text"), Console(lines, "json")]
    resources = Resources("h")
    metrics = Metrics(resources, losses=health.Losses(), features=health.Features())
    losses = health.Losses()
    seen = Instrumented()
    with Receiver() as receiver:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={TOKEN}",
            "OTEL_TRACES_EXPORTER": "otlp,console",
            "OTEL_LOGS_EXPORTER": "otlp,console",
            "OTEL_METRICS_EXPORTER": "otlp,console",
        }
        otlp = Otlp(
            environ, resources, metrics, logs="all", losses=losses, instrumented=seen,
            headers=settings.allowed_headers,
        )  # fmt: skip
        otlp.start()
        for event in seen.take(events(head, place.startswith("gRPC"))):
            metrics.observe(event)
            metrics.add(Flow(WEB, "client", "tcp", "192.0.2.1", 1, "internet", event.domain, "host"), Counts(1), 5)
            told = redact(event, Options.of(settings))
            for console in consoles:
                console.write(told)
            otlp.emit(told)
        otlp.shutdown()
        for console in consoles:
            console.close()
        assert len(list(receiver.spans())) == 3
        assert len(list(receiver.logs())) == 4
        assert losses.total() == 0
        outputs = {
            "text": text.getvalue().encode(),
            "json": lines.getvalue().encode(),
            "otlp": b"".join(got.message.SerializeToString() for got in receiver.requests),
            "console exporter": capsys.readouterr().out.encode(),
            "/metrics": _page(metrics),
            "our log": caplog.text.encode(),
        }
    for name, output in outputs.items():
        assert canary.encode() not in output, name
    assert [name for name, output in outputs.items() if not output and name != "our log"] == []
    assert b"example" in outputs["text"] or b"192.0.2.1" in outputs["text"]


def _page(metrics: Metrics) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(prometheus.Collect(metrics))
    return generate_latest(registry)
