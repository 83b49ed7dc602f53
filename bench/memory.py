"""What memory the agent's process uses: after a million records, and with many active series, scraped and pushed.

Records and counters come as in process.py. A figure is what the kernel says of the process while it is scraped and
pushes: what a page or a request needs has to be in it.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator

from bench.process import Loaded, receiver
from bench.report import Row, progress
from bench.world import Agent
from lab import LabError

_PUSH_SECONDS = 5


def rows(quick: bool) -> Iterator[Row]:
    yield from _records(quick)
    yield from _series(quick)


def _records(quick: bool) -> Iterator[Row]:
    total, flows = (100_000 if quick else 1_000_000), 10_000
    # Metrics are pushed every minute by default; what a push needs has to be in the figure.
    with (
        receiver() as url,
        Loaded(flows, {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_METRIC_EXPORT_INTERVAL": "5000"}) as loaded,
    ):
        start = loaded.agent.rss()["VmRSS"]
        at_half = at_end = 0.0
        for part in range(20):
            loaded.feed(total // 20)
            progress.step(f"agent memory: {(part + 1) * total // 20:,} of {total:,} records")
            if part == 9:
                time.sleep(3)
                at_half = loaded.agent.rss()["VmRSS"]
        time.sleep(3)
        loaded.check()
        kinds = loaded.agent.rss()
        at_end = kinds["VmRSS"]
    parts = ", ".join(f"{kind[3:].lower()} {kinds[kind]:.0f}" for kind in ("RssAnon", "RssFile", "RssShmem"))
    what = f"{total:,} records over {flows:,} flows"
    yield Row(
        "agent RSS, OTLP on",
        at_end,
        "MB",
        "at start",
        start,
        at_end / start,
        90,
        "value",
        note=f"{what}; {parts}",
    )
    yield Row(
        "agent RSS, flat",
        at_end,
        "MB",
        "after half of them",
        at_half,
        at_end / at_half,
        1.03,
        note="after all of them",
    )


def _series(quick: bool) -> Iterator[Row]:
    # A flow makes four series of bytes and packets, and 51 of lookup and handshakes while there is room for those.
    for series, workloads, flows, bound in ((2_000, 10, 33, 110), (50_000, 100, 12_500, 130)):
        environment = {"OTEL_METRIC_EXPORT_INTERVAL": f"{_PUSH_SECONDS * 1000}", "OTEL_BSP_MAX_QUEUE_SIZE": "2048"}
        with receiver() as url, Loaded(flows, environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": url}, workloads) as loaded:
            start = loaded.agent.rss()["VmRSS"]
            values = []
            for _ in range(3 if quick else 12):
                loaded.feed(max(1000, flows * 5 // 1000 * 1000 + 1000))
                page, size = _scrape(loaded.agent)
                time.sleep(_PUSH_SECONDS + 1)
                values.append(loaded.agent.rss()["VmRSS"])
                progress.step(f"agent memory: {page:,} series, {size / 1e6:.1f} MB a page, {values[-1]:.0f} MB")
            loaded.check()
        if not 0.9 * series < page < 1.1 * series:
            raise LabError(f"{page} series in place of {series}")
        yield Row(
            f"agent RSS, {series:,} series",
            max(values),
            "MB",
            "at start",
            start,
            max(values) / start,
            bound,
            "value",
            note=f"{workloads} workloads; scraped and pushed every {_PUSH_SECONDS} s; the largest of {len(values)}",
        )


def _scrape(agent: Agent) -> tuple[int, int]:
    """The page as Prometheus asks for it: series of workloads on it, by its own account, and its bytes."""
    found = re.search(r"http://\S+/metrics", "\n".join(agent.words))
    if found is None:
        raise LabError("the agent does not say where its metrics are")
    asked = urllib.request.Request(found[0], headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    series = size = 0
    with urllib.request.urlopen(asked, timeout=60) as page:
        for line in page:
            size += len(line)
            series += line.startswith(
                (b"ebfw_network_", b"ebfw_tcp_", b"dns_", b"ebfw_tls_", b"http_", b"ebfw_workload_")
            )
    return series, size
