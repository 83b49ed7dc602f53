"""A workload by what stays the same when it is started again: namespace and owner of a pod, unit, container name.

In: `events.Workload`. Out: `Who`, never with an id in it. The owner of a pod is guessed from the pod's name, without
what its controller appends: no API server is asked.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from exporter.events import Workload

UNNAMED = "~unnamed"

# What controllers append to a pod's name. Their random letters are never vowels, nor 0, 1 and 3 (apimachinery's
# rand.SafeEncodeString), so that they spell nothing.
_RANDOM = "[bcdfghjklmnpqrstvwxz2456789]"
_OWNERS = (
    re.compile(rf"(.+)-{_RANDOM}{{6,10}}-{_RANDOM}{{5}}"),  # Deployment, ReplicaSet
    re.compile(rf"(.+)-\d{{8,10}}-{_RANDOM}{{5}}"),  # CronJob, Job
    re.compile(rf"(.+)-{_RANDOM}{{5}}"),  # DaemonSet, Job
    re.compile(r"(.+)-\d{1,5}"),  # StatefulSet
)
_ID = re.compile(r"[0-9a-f]{12,64}")


class Who(NamedTuple):
    """A workload by what stays the same when it is started again."""

    kind: str
    namespace: str  # of a pod; user-1000 for the units of a user
    name: str
    container: str  # of a pod

    def __str__(self) -> str:
        path = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{path}:{self.container}" if self.container else path


def who(w: Workload) -> Who:
    """The workload by what stays; UNNAMED where nothing does."""
    if w.kind == "pod":
        return Who("pod", w.namespace, owner(w.pod_name) if w.pod_name else UNNAMED, w.container_name)
    name = w.container_name or w.name
    if not name or w.kind == "unknown" or (w.kind == "container" and _ID.fullmatch(name)):
        name = UNNAMED
    space = f"user-{w.user_id}" if w.user_id is not None and w.kind in ("unit", "cgroup", "container") else ""
    return Who(w.kind, space, name, "")


def owner(pod: str) -> str:
    """A pod's name without what its controller appends: web-7d9f8c6b5d-x2x9z is of web."""
    for pattern in _OWNERS:
        if match := pattern.fullmatch(pod):
            return match[1]
    return pod
