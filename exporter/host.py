"""What is asked of a host besides being watched: `ebfw check` and `ebfw detach`.

In: settings. Out: text for people on standard output, and an exit status.
"""

from __future__ import annotations

import sys

from exporter.emit import prometheus
from exporter.enrich import find_root, root_problem
from exporter.kernel import pins, preflight
from exporter.scope import scope_of
from exporter.settings import Settings


def detach(settings: Settings) -> int:
    """Remove everything that ebfw pinned, once the agent has stopped or was killed: the break-glass."""
    if settings.pin_path.is_dir() and pins.mounted_at(settings.pin_path) is not None:
        lock = pins.Lock(settings.pin_path, "Stop it, then detach again.")
        gone = pins.remove(settings.pin_path, lock.release)
        print(f"removed {len(gone)} pinned objects from {settings.pin_path}")
    else:
        print(f"nothing is pinned at {settings.pin_path}")
    return 0


def check(settings: Settings) -> int:
    """Say what this host allows, and the size of every map; 0 if the agent can run."""
    root = find_root()
    scope_of(settings, root)
    status = preflight.report(
        settings.cgroup,
        root,
        root_problem(root),
        settings.pin_path,
        settings.flows,
        settings.ring_bytes,
        sys.stdout,
    )
    _report_series(settings)
    return status


def _report_series(settings: Settings) -> None:
    """What the agent that runs now, if one does, keeps for Prometheus."""
    found = prometheus.series_of(*settings.metrics_addr) if settings.metrics_addr and settings.metrics_addr[1] else None
    if found is None:
        return
    print(
        f"\nseries: {sum(found.values()):,} instruments of workloads; a histogram counts once, its buckets come on top"
    )
    for name, count in sorted(found.items(), key=lambda pair: -pair[1]):
        if count:
            print(f"  {name:<40} {count:>7,}")
