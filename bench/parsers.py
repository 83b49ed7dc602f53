"""What the parsers in Python cost, alone: they run once a DNS message and once a request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from bench import packets
from bench.report import Row, single
from bench.world import cpus, pinned_to
from exporter.parse import parse_dns, parse_request
from exporter.tls import parse_client_hello

_NAME = "a-service.of-some.length.example"


def rows(quick: bool) -> Iterator[Row]:
    query, answer = packets.dns_query(_NAME), packets.dns_answer(_NAME, ["198.51.100.1", "198.51.100.2"])
    with pinned_to(cpus()[1]):
        yield _row("parse_dns, query", lambda: parse_dns(query), quick)
        yield _row("parse_dns, answer with 2 addresses", lambda: parse_dns(answer), quick)
        hello = packets.client_hello(_NAME)
        yield _row("parse_client_hello, JA4 of a client seen before", lambda: parse_client_hello(hello), quick)
        yield _row("parse_request, 4 fields", lambda: parse_request(packets.HTTP), quick)


def _row(name: str, call: Callable[[], object], quick: bool) -> Row:
    number, rounds = 2000, 5 if quick else 15
    samples = []
    for _ in range(rounds):
        began = time.thread_time_ns()
        for _ in range(number):
            call()
        samples.append((time.thread_time_ns() - began) / number)
    return single(name, samples, "ns")
