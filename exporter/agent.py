"""The composition root: the pipeline, in order.

In: settings. Out: an exit status. Every stage is made here and handed what it needs; none reaches for another.
"""

from __future__ import annotations

import logging
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from exporter import __version__, heap
from exporter.clock import Clock
from exporter.decode import address, decode, transport
from exporter.emit import prometheus
from exporter.emit.connections import CONNECTIONS, HttpConnections
from exporter.emit.console import Console
from exporter.emit.hygiene import Hygiene
from exporter.emit.instrumented import Instrumented, own_cgroup
from exporter.emit.metrics import Metrics
from exporter.emit.otlp import Otlp
from exporter.emit.redact import Options, redact_all
from exporter.emit.resource import Resources
from exporter.emit.routes import Routes
from exporter.emit.setup import Setups
from exporter.enrich import ContainerNames, HiddenNames, HiddenPlaces, Names, PeerGroups, Workloads, find_root
from exporter.errors import SettingsError
from exporter.events import Counts, Event, Flow
from exporter.health import losses
from exporter.inventory import Inventory
from exporter.inventory import check as check_inventory
from exporter.join import Join
from exporter.kernel import maps, wire
from exporter.kernel.probes import Kernel
from exporter.kernel.tls_processes import TlsProcesses
from exporter.processes import Processes
from exporter.scope import Watched, scope_of
from exporter.settings import Settings

log = logging.getLogger("ebfw")

TICK = 0.2  # the ring is drained so often; nobody wakes us but a ring that fills and cgroups that come and go
FOLD_SECONDS = 5.0  # counters are read at least so often, and whenever somebody asks for metrics
REFRESH_SECONDS = 1.0  # who asks waits no longer than this
HOUSEKEEPING_SECONDS = 5.0
CLOCK_SECONDS = 1.0  # the wall clock is set while we run
BATCH = 256  # records in one step of the pipeline,
RECORDS = 8192  # and until what waits for their end is settled; then it goes on at once if there are more
IDLE_FLOW_SECONDS = 900.0  # a flow that has not moved for so long gives its slot back


def run(settings: Settings) -> int:
    """Watch until SIGINT or SIGTERM."""
    heap.take_charge()
    say_what_is_not_enforced(settings)
    root = find_root()
    cgroup = scope_of(settings, root)
    kernel = Kernel(settings.pin_path, cgroup, settings.flows, settings.ring_bytes, settings.cache_path)
    groups = PeerGroups(settings.peer_groups) if settings.peer_groups else None  # a mistake costs nothing yet
    if settings.inventory is not None:
        check_inventory(settings.inventory)
    resources = Resources(platform.node(), settings.node_name, __version__, settings.otel)
    routes = Routes(settings.routes)
    metrics = Metrics(
        resources,
        level=settings.metrics_level,
        attributes=settings.metrics_attributes,
        opt_in=settings.metrics_opt_in,
        routes=routes if settings.inspect_paths else None,
    )
    unready = ["the programs are not attached yet"]  # why /readyz says no, in its one place; "" = ready
    server = serve_metrics(settings, metrics, lambda: unready[0])
    try:
        # A stop while we compile and attach: what is half made is removed, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        started = time.monotonic()
        kernel.attach(settings.exclude_cidrs, settings.exclude_suffixes)
        log.info(
            "attached to %s in %.2f s (%s)",
            f"{cgroup}, the whole host," if cgroup == root else cgroup,
            time.monotonic() - started,
            "adopted" if kernel.adopted_programs else "counters adopted" if kernel.adopted_maps else "new",
        )
        pipeline = Pipeline(settings, root, kernel, resources, metrics, unready, groups)
        unready[0] = ""
        try:
            pipeline.run()
        finally:
            pipeline.close()
    finally:
        kernel.close(unpin=not settings.persist)
        if server is not None:
            server.close()
    return 0


class Pipeline:
    """Ring -> decode -> join (who, name) -> hygiene, instrumented, peer groups -> metrics -> redact -> inventory,
    console, OTLP. Counters -> peer groups -> instrumented, hygiene, inventory, metrics."""

    def __init__(
        self,
        settings: Settings,
        root: Path,
        kernel: Kernel,
        resources: Resources,
        metrics: Metrics,
        unready: list[str] | None = None,
        groups: PeerGroups | None = None,
    ) -> None:
        self.kernel, self.metrics, self.groups = kernel, metrics, groups
        self.unready = unready or [""]
        self.clock = Clock()
        self.containers = ContainerNames()
        self.workloads = Workloads(root, self.containers)
        self.workloads.scan()
        self.names = Names()
        self.join = Join(
            self.workloads.lookup,
            kernel.names.get,
            self.names.name_for,
            self.names.learn_for,
            HiddenNames(settings.exclude_suffixes),
            self.clock.wall,
            kernel.received,
            HiddenPlaces(settings.exclude_cidrs, self.names),
        )
        self.inventory: Inventory | None = None
        if settings.inventory is not None:
            self.inventory = Inventory(settings.inventory, settings.node_name, self.workloads.lookup)
        self.connections = HttpConnections(metrics, self._counted)
        self.hygiene = Hygiene(metrics, self.connections)
        self.redaction = Options.of(settings)
        self.console = Console(sys.stdout, settings.output, settings.colour, settings.node_name)
        self.instrumented = Instrumented(settings.instrumented)
        self.own_cgroup = own_cgroup(root)
        metrics.instrumented = self.instrumented.metrics
        self.otlp = Otlp(
            settings.otel,
            resources,
            metrics,
            version=__version__,
            spans_per_second=settings.spans_per_second,
            logs=settings.logs,
            inventory=self.inventory is not None,
            setups=Setups(settings.connection_spans, settings.slow_connection_ms * 1_000_000),
            instrumented=self.instrumented,
            headers=settings.allowed_headers,
            template=None if metrics.routes is None else metrics.routes.of,
        )
        ways_out = ((self.console.active, self.console.write), (self.otlp.active, self.otlp.emit))
        self.outs = [take for active, take in ways_out if active]
        self.tls = None
        if settings.uprobes and "ssl_write" in kernel.programs:
            self.tls = TlsProcesses(kernel.programs, kernel.executions, kernel.cgroup, everywhere=kernel.cgroup == root)
        self.processes = Processes(self.workloads, self.tls)
        self.alive = {workload.cgroup_id: workload for workload in self.workloads.live()}
        self.stopping = False
        self.refresh_wanted, self.refreshed = threading.Event(), threading.Event()
        self.watched = Watched(kernel.cgroup)
        self.filtered: dict[str, int] = {}  # what the kernel did not tell, by kind
        self.next_fold = self.next_housekeeping = self.next_clock = 0.0
        metrics.gauge("ebfw.build.info", 1, version=__version__, kernel=platform.release())

    # --- the pipeline ---------------------------------------------------------------------------------------------

    def drain(self) -> int:
        """Take what the ring holds through the pipeline; how many records."""
        taken = 0
        # Stage by stage over a few hundred records: the code and tables of one stage stay in the CPU's caches.
        while taken < RECORDS and (records := self.kernel.ring.drain(BATCH)):
            taken += len(records)
            sightings = [sighting for data in records if (sighting := decode(data)) is not None]
            self.tell(self.join.add_all(sightings))
        self.tell(list(self.join.expire(time.monotonic_ns())))
        self.hygiene.settle()
        if self.inventory is not None:
            self.tell(self.inventory.due())
        heap.collect()
        return taken

    def tell(self, events: list[Event]) -> None:
        """Events to every way out, their secrets hidden."""
        options = self.redaction
        self.hygiene.observe(events)
        events = self.instrumented.take(events)
        groups = self.groups
        if groups is None:
            self.metrics.observe_all(events)
        else:
            events = [event if event.filtered else groups.tag(event) for event in events]
            self.metrics.observe_all([groups.counted(event) for event in events])
        told = [event for event in events if not event.filtered]
        self.processes.meet(told)
        if not self.outs and self.inventory is None:
            return
        if self.inventory is None and not self.console.active:
            told = [event for event in told if self.otlp.wants(event)]
        told = redact_all(told, options)
        if self.inventory is not None:
            self.inventory.observe(told)
            if len(told) < len(events):
                self.inventory.hide(event for event in events if event.filtered)
        for out in self.outs:
            for event in told:
                out(event)

    def run(self) -> None:
        """Until a signal."""
        self.otlp.start()
        wake = select.epoll()
        # Edge-triggered: with unread data a level-triggered wait would return at once, and spin.
        wake.register(self.kernel.ring.fd, select.EPOLLIN | select.EPOLLET)
        if self.workloads.fileno() >= 0:
            wake.register(self.workloads.fileno(), select.EPOLLIN)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        self.fold()
        self.metrics.refresh = self.refresh
        taken = 0
        while not self.stopping:
            wake.poll(TICK if taken < RECORDS else 0)
            self.workloads.poll()
            taken = self.drain()
            self.processes.look()
            now = time.monotonic()
            if now >= self.next_clock:
                self.next_clock = now + CLOCK_SECONDS
                self.clock.set()
            if now >= self.next_fold or self.refresh_wanted.is_set():
                self.refresh_wanted.clear()
                self.next_fold = now + FOLD_SECONDS
                self.fold()
                self.refreshed.set()
            if now >= self.next_housekeeping:
                self.next_housekeeping = now + HOUSEKEEPING_SECONDS
                self.keep_house(now)
        wake.close()
        for _ in range(16):  # what came up to now; more may come for ever
            if self.drain() < RECORDS:
                break
        self.tell(list(self.join.close()))
        self.fold()
        self.refreshed.set()

    def refresh(self) -> None:
        """Called by whoever is about to read the metrics, in a thread of its own: have the counters read first."""
        if not self.stopping:
            self.refreshed.clear()
            self.refresh_wanted.set()
            self.refreshed.wait(REFRESH_SECONDS)

    def fold(self) -> None:
        """Move by how much the kernel's counters moved into the metrics."""
        now, groups, inventory = time.monotonic(), self.groups, self.inventory
        first = self.kernel.flow_table.first_read
        for row in self.kernel.flow_table.read(now, self.clock.started):
            if row.key.cgroup == self.own_cgroup:
                continue
            flow, delta, since = self.flow(row.key), Counts._make(row.delta), self.clock.wall(row.since_ns)
            self.instrumented.flow(flow)
            self.hygiene.add(flow, delta)
            if inventory is not None:
                inventory.add(flow, delta, since, first)
            self.metrics.add(flow if groups is None else groups.counted_flow(flow), delta, since)
        if self.tls is not None:
            for coverage, connections in self.tls.take_connections().items():
                self.metrics.count("ebfw.tls.connections", connections, coverage=coverage)
        for (stage, cause), total in self.kernel.tallies().items():
            if stage == "filtered":
                # Some are filtered here, by name, and counted as they are: these come on top.
                self.metrics.count("ebfw.filtered", total - self.filtered.get(cause, 0), kind=cause)
                self.filtered[cause] = total
            else:
                losses.raise_to(stage, cause, total)  # type: ignore[arg-type]  # stages of wire.TALLIES
        self.hygiene.publish()
        self.connections.publish(self.join.busy)
        self.metrics.active_requests(
            (counted, count)
            for event, count in self.join.open_requests()
            if (counted := self._counted(event)) is not None
        )

    def _counted(self, event: Event) -> Event | None:
        """One that does not come through `tell`, as metrics are to see it; None for our own doing."""
        if self.instrumented.own(event):
            return None
        return event if self.groups is None or event.filtered else self.groups.counted(self.groups.tag(event))

    def flow(self, key: maps.FlowKey) -> Flow:
        """A kernel row in words."""
        who = self.workloads.lookup(key.cgroup)
        peer = address(key.peer)
        name, source = ("", "")
        if key.kind == wire.FLOW_PEER and peer:
            name, source = self.join.name(who, key.name, peer, time.monotonic_ns())
        flow = Flow(
            who,
            wire.ROLES[key.role],
            transport(key.transport),
            peer,
            key.port,
            wire.SCOPES[key.scope],
            name,
            source,
            key.kind == wire.FLOW_EXCLUDED,
            key.kind == wire.FLOW_OTHER,
            redirected=key.redirected != 0,
        )
        return flow if self.groups is None or key.kind != wire.FLOW_PEER else self.groups.tag_flow(flow)

    # --- beside it ------------------------------------------------------------------------------------------------

    def keep_house(self, now: float) -> None:
        """What is over is forgotten; what is new is found; the agent's own numbers."""
        if gone := self.watched.gone():
            self.unready[0] = gone
            log.warning("%s", gone)
        self.names.expire(time.monotonic_ns())
        table = self.kernel.flow_table
        if table.free_idle(now, IDLE_FLOW_SECONDS):
            self.kernel.names.prune(table.names_in_use())
        alive = {workload.cgroup_id: workload for workload in self.workloads.live()}
        for cgroup_id in self.alive.keys() - alive.keys():
            self.metrics.end(self.alive[cgroup_id])
        self.alive = alive
        self.metrics.expire()
        self.processes.forget()
        if self.groups is not None:
            self.groups.poll()
        if self.inventory is not None:
            self.inventory.save()
        heap.give_back()
        if self.tls is not None:
            for coverage, files in self.tls.libraries.by_coverage().items():
                self.metrics.gauge("ebfw.uprobe.attached", files, coverage=coverage)
        for name, used, size in (
            ("flows", len(table), table.flows),
            ("names", len(self.names), 65_536),
            ("joins", len(self.join), self.join.room),
            ("http_connections", len(self.connections), CONNECTIONS),
            ("cgroups", len(self.workloads), 16_384),
            ("inventory", len(self.inventory or ()), 10_000),
            ("ring", int(self.kernel.ring.fill() * self.kernel.ring_bytes), self.kernel.ring_bytes),
        ):
            self.metrics.gauge("ebfw.table.used", used, table=name)
            self.metrics.gauge("ebfw.table.size", size, table=name)

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def close(self) -> None:
        """Stop the ways out, the last data first."""
        if self.tls is not None:
            self.tls.close()
        if self.inventory is not None:
            self.inventory.close()
            self.tell(self.inventory.due())
        self.otlp.shutdown()
        self.console.close()
        self.workloads.close()
        self.containers.close()


def serve_metrics(settings: Settings, metrics: Metrics, ready: Callable[[], str]) -> prometheus.Server | None:
    """The /metrics server, before anything is attached: a taken port should cost nothing."""
    if settings.metrics_addr is None:
        return None
    host, port = settings.metrics_addr
    security = prometheus.Security(settings.metrics_cert, settings.metrics_key, settings.metrics_users)
    server = prometheus.serve(host, port, metrics, ready, security)
    scheme = "https" if settings.metrics_cert else "http"
    log.info("metrics at %s://%s:%d/metrics", scheme, host or "0.0.0.0", server.port)
    if settings.metrics_users and not settings.metrics_cert and host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("passwords for /metrics cross the network in the clear; set EBFW_METRICS_TLS_CERT")
    return server


def say_what_is_not_enforced(settings: Settings) -> None:
    """A policy that is named and not obeyed must not go unnoticed."""
    if settings.policy is not None:
        if not settings.policy.exists():
            raise SettingsError(f"EBFW_POLICY={settings.policy}: there is no such file")
        log.warning("EBFW_POLICY=%s: this version enforces no policy; everything is observed only", settings.policy)
    elif settings.policy_source != "file":
        log.warning("EBFW_POLICY_SOURCE=%s: this version enforces no policy", settings.policy_source)
