"""Who tells its own telemetry: workloads that speak OpenTelemetry already, Collectors, and ebfw itself (D12).

Comes in: events before redaction, and server flows. Goes out: answers to "shall we tell this workload's requests?".
Not its job: telling them.

A workload counts as instrumented for `SECONDS` after it was last seen to send OTLP: over HTTP by the path, over gRPC
by the service, and by the two ports that are OTLP's, for which it cannot be told what signal goes there. What it did
before it was first seen is told twice; that is the first batch of an SDK.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from exporter.events import CONNECT, HTTP, HTTPS, SERVER, Event, Flow, Workload

SKIP: Final = "skip"
ADD: Final = "add"
SECONDS: Final = 3600.0
_WORKLOADS: Final = 4096
_PORTS: Final = (4317, 4318)
_REQUESTS: Final = frozenset((HTTP, HTTPS))
_SERVICE: Final = "/opentelemetry.proto.collector."
# The kernel's names of Collectors, cut to 15 bytes as they are: they send what others made.
_COLLECTORS: Final = ("otelcol", "otelcontribcol", "otelcorecol")


class _Seen(NamedTuple):
    """Until when, in seconds of the clock."""

    traces: float = 0.0
    metrics: float = 0.0
    collector: float = 0.0


class Instrumented:
    """`mode`: skip (such workloads get no HTTP spans and no http.client.* metrics) or add. `pid`: our own. One thread
    calls `observe` and `flow`; the rest may be called from any."""

    def __init__(self, mode: str = SKIP, clock: Callable[[], float] = time.monotonic, pid: int = os.getpid()) -> None:
        self._skip, self._clock, self._pid = mode == SKIP, clock, pid
        self._seen: dict[int, _Seen] = {}
        self._own: dict[int, None] = {}  # cookies of our own sockets

    def __len__(self) -> int:
        return len(self._seen)

    def take(self, events: list[Event]) -> list[Event]:
        """Learn from the events; those that are not our own."""
        pid, own = self._pid, self._own
        kept = []
        for event in events:
            if (event.pid == pid or (own and event.cookie in own)) and self.own(event):
                continue
            kind = event.kind
            if kind == CONNECT:
                if event.port in _PORTS or event.role == SERVER or event.comm.startswith("otel"):
                    self.observe(event)
                    if event.filtered and event.port in _PORTS:
                        continue  # it came for us alone: the kernel has counted it among what is not told
            elif kind in _REQUESTS and event.method == "POST":
                self.observe(event)
            kept.append(event)
        return kept

    def own(self, event: Event) -> bool:
        """Whether it is the agent's own doing, which is never told. Also learns which sockets are ours."""
        if event.pid == self._pid:
            if event.cookie and event.cookie not in self._own:
                if len(self._own) >= _WORKLOADS:
                    del self._own[next(iter(self._own))]
                self._own[event.cookie] = None
            return True
        return bool(self._own) and event.cookie in self._own

    def observe(self, event: Event) -> None:
        """Take one event. Filtered ones count: a Collector is often on a private address."""
        kind = event.kind
        if kind == CONNECT:
            if event.port in _PORTS and event.role != SERVER:
                self._mark(event.workload, True, True)
            elif event.role == SERVER and event.src_port in _PORTS:
                self._collector(event.workload)
        elif kind in (HTTP, HTTPS) and event.method == "POST":
            path = event.path
            if path.startswith(_SERVICE):
                service = path[len(_SERVICE) :]
                self._mark(event.workload, service.startswith("trace."), service.startswith("metrics."))
            elif path.startswith("/v1/"):
                self._mark(event.workload, path == "/v1/traces", path == "/v1/metrics")
        if event.comm.startswith(_COLLECTORS):
            self._collector(event.workload)

    def flow(self, flow: Flow) -> None:
        """Take one row of the kernel's counters: whoever is sent OTLP is a Collector."""
        if flow.role == SERVER and flow.port in _PORTS:
            self._collector(flow.workload)

    def collector(self, workload: Workload) -> bool:
        """Whether it passes on what others made: it makes no spans."""
        seen = self._seen.get(workload.cgroup_id)
        return seen is not None and seen.collector > self._clock()

    def traces(self, workload: Workload) -> bool:
        """Whether its requests become no spans of ours."""
        seen = self._seen.get(workload.cgroup_id)
        if seen is None:
            return False
        now = self._clock()
        return seen.collector > now or (self._skip and seen.traces > now)

    def metrics(self, workload: Workload) -> bool:
        """Whether its requests count in no http.client.* and rpc.client.* metrics of ours."""
        seen = self._seen.get(workload.cgroup_id)
        return seen is not None and self._skip and seen.metrics > self._clock()

    def _mark(self, workload: Workload, traces: bool, metrics: bool) -> None:
        if not (traces or metrics) or not workload.cgroup_id:
            return
        seen, until = self._take(workload), self._clock() + SECONDS
        self._seen[workload.cgroup_id] = seen._replace(
            traces=until if traces else seen.traces, metrics=until if metrics else seen.metrics
        )

    def _collector(self, workload: Workload) -> None:
        if workload.cgroup_id:
            self._seen[workload.cgroup_id] = self._take(workload)._replace(collector=self._clock() + SECONDS)

    def _take(self, workload: Workload) -> _Seen:
        """What is known of it, taken out: what is put back is the youngest, and the oldest goes first."""
        seen = self._seen.pop(workload.cgroup_id, None)
        if seen is None and len(self._seen) >= _WORKLOADS:
            del self._seen[next(iter(self._seen))]
        return seen or _Seen()


def own_cgroup(root: Path, proc: Path = Path("/proc/self"), pid: int = os.getpid()) -> int:
    """The id of our own cgroup, if nobody else is in it: then all its traffic is ours. 0 where others are, and where
    it cannot be told."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
        path = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        folder = root / path
        if not path or (folder / "cgroup.procs").read_text().split() != [str(pid)]:
            return 0
        return os.stat(folder).st_ino
    except (OSError, StopIteration):
        return 0
