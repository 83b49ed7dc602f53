"""The processes behind the events: each is looked at once in a while, for what it says of its workload and for the TLS
library that it uses.

In: events that are told. Out: nothing; workloads get their names, TLS libraries their probes. Not its job: how either
is done (enrich.cgroup, kernel.tls_processes).
"""

from __future__ import annotations

from collections.abc import Iterable

from exporter.enrich import Workloads
from exporter.events import TLS, Event
from exporter.kernel.tls_processes import TlsProcesses

AT_ONCE = 64  # processes whose environment is looked at in one tick


class Processes:
    """`tls`: None where no TLS library is to be probed."""

    def __init__(self, workloads: Workloads, tls: TlsProcesses | None) -> None:
        self._workloads, self._tls = workloads, tls
        self._met: set[int] = set()
        self._hellos: list[int] = []
        self._looked_at: set[int] = set()

    def meet(self, told: Iterable[Event]) -> None:
        """Remember whose events these are, and whose TLS connections began."""
        self._met.update([event.pid for event in told])
        self._hellos += [event.pid for event in told if event.kind == TLS and event.transport == "tcp"]

    def look(self) -> None:
        """At those of the last tick, a few at a time: a storm of short ones must not hold up the ring."""
        met, hellos = self._met, self._hellos
        self._met, self._hellos = set(), []
        met.discard(0)
        for pid in list(met - self._looked_at)[:AT_ONCE]:
            self._looked_at.add(pid)
            self._workloads.look_at(pid)
        if self._tls is not None:
            self._tls.tell(met, hellos)

    def forget(self) -> None:
        """Whom was looked at: whoever is met from here on may have become another program."""
        self._looked_at.clear()
