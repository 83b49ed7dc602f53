"""What single steps in Python cost, alone: parsers, which run once a DNS message and once a request, and the counting
of events, in batches as the pipeline does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import packets
from bench.report import Row, single
from bench.world import cpus, pinned_to
from exporter.dns import parse_dns
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.events import Event, Exchange, Tls, Workload
from exporter.health import Features, Losses
from exporter.http1 import parse_request
from exporter.tls import parse_client_hello

_NAME = "a-service.of-some.length.example"
_BATCH = 256


def rows(quick: bool) -> Iterator[Row]:
    query, answer = packets.dns_query(_NAME), packets.dns_answer(_NAME, ["198.51.100.1", "198.51.100.2"])
    with pinned_to(cpus()[1]):
        yield _row("parse_dns, query", lambda: parse_dns(query), quick)
        yield _row("parse_dns, answer with 2 addresses", lambda: parse_dns(answer), quick)
        hello = packets.client_hello(_NAME)
        yield _row("parse_client_hello, JA4 of a client seen before", lambda: parse_client_hello(hello), quick)
        yield _row("parse_request, 4 fields", lambda: parse_request(packets.HTTP), quick)
        for title, events in _events().items():
            metrics = Metrics(Resources("bench"), losses=Losses(), features=Features())
            row = _row(f"metrics, {title}", lambda m=metrics, e=events: m.observe_all(e), quick, 20)  # type: ignore[misc]
            yield row._replace(
                value=row.value / _BATCH, low=None, high=None, note="an event, 256 in a batch, 200 peers"
            )


def _events() -> dict[str, list[Event]]:
    """Batches of 256 over ten workloads and two hundred names."""
    workloads = [Workload(n, f"/{n}", "unit", f"w{n}.service", unit=f"w{n}.service") for n in range(10)]

    def batch(kind: str, **changes: Any) -> list[Event]:
        made = Event(
            kind, 1, workloads[0], 42, "curl", "tcp", "client", packets.CLIENT, 40000, "198.51.100.1", 443, "internet",
            _NAME, "sni", "ok", 20_000_000, rtt=300_000,
        )._replace(**changes)  # fmt: skip
        return [made._replace(workload=workloads[n % 10], domain=f"h{n % 200}.example") for n in range(_BATCH)]

    exchange = Exchange("1.1", "https", 200, "", 10_000_000, 0, 5000)
    return {
        "lookup": batch("dns", status="NOERROR"),
        "connection": batch("connect"),
        "end of a connection": batch("close"),
        "handshake": batch("tls", tls=Tls("1.3", "1.3", ("h2",), "X25519", ja4="t13d")),
        "request": batch("https", method="GET", path="/a", exchange=exchange),
    }


def _row(name: str, call: Callable[[], object], quick: bool, number: int = 2000) -> Row:
    rounds = 5 if quick else 15
    samples = []
    for _ in range(rounds):
        began = time.thread_time_ns()
        for _ in range(number):
            call()
        samples.append((time.thread_time_ns() - began) / number)
    return single(name, samples, "ns")
