"""Who a series, span or log record belongs to: a Workload (or the agent itself) as resource attributes.

Comes in: events.Workload, the node's name, the value of OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME. Goes
out: Resource, cached by workload. Not its job: finding out who a workload is and what it says of itself (enrich/),
encoding (otlp_*.py).

service.name: what the workload was started with; a pod's name without what its controller put behind it; the
container's name; the systemd unit; else `unknown_service`. It never contains an id (D17).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

from exporter.emit import semconv as c
from exporter.enrich import is_static_pod
from exporter.events import Workload

_log = logging.getLogger(__name__)

Attributes = tuple[tuple[str, str | int], ...]

# Workloads on one node at one time are hundreds; past this the oldest half of the cache is dropped and made
# anew.
_CACHE = 8192

# Container ids, pod UIDs, systemd's transient units and replica hashes: whatever changes with every start.
_ID = re.compile(r"[0-9a-f]{12,}|[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|^(?:session|run)-[a-z]*\d+")

# What Kubernetes puts behind the name of a Deployment, DaemonSet, Job or CronJob to make a pod's: a template's hash
# or a time, and five characters, all from an alphabet without vowels. A StatefulSet's ordinal stays: a pod that
# somebody made by hand may be called so.
_POD_SUFFIX = re.compile(r"(?:-(?:[bcdfghjklmnpqrstvwxz2456789]{6,10}|\d{8}))?-[bcdfghjklmnpqrstvwxz2456789]{5}$")

# Keys of OTEL_RESOURCE_ATTRIBUTES that describe the agent only. A DaemonSet's own name would be as wrong on a
# workload as its pod's, so of k8s.* only what the cluster and the node share is passed on.
_OWN = re.compile(r"(?:service|container|process|telemetry|k8s\.(?!cluster\.|node\.))")


class Resource(NamedTuple):
    """`identity`: what tells series apart on both faces, in label order, empty values left out. `workload_id`
    is set only where the identity alone would merge different workloads. `attributes`: everything, for
    OTLP."""

    identity: tuple[tuple[str, str], ...]
    workload_id: str
    attributes: Attributes


class Resources:
    """Makes the Resource of the agent and of each workload.

    `environ` supplies OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; the first, and the service, pod,
    container and process keys of the second, describe the agent only (D17), the rest goes on everything.
    """

    def __init__(
        self,
        host_name: str,
        node_name: str = "",
        version: str = "",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        environ = environ or {}
        given = _parse(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
        self._host = node_name or host_name
        common: dict[str, str | int] = {c.HOST_NAME: host_name, c.K8S_NODE_NAME: node_name}
        common |= {c.DISTRO_NAME: "ebfw", c.DISTRO_VERSION: version}
        common |= {key: value for key, value in given.items() if not _OWN.match(key)}
        self._common = {key: value for key, value in common.items() if value}
        own: dict[str, str | int] = {
            c.SERVICE_NAME: "ebfw",
            c.SERVICE_VERSION: version,
            c.SERVICE_INSTANCE_ID: self._host,
        }
        own |= self._common | {key: value for key, value in given.items() if value}
        if name := environ.get("OTEL_SERVICE_NAME", ""):
            own[c.SERVICE_NAME] = name
        self.agent = _resource({key: value for key, value in own.items() if value})
        self._cache: dict[int, tuple[Workload, Resource]] = {}

    def of(self, workload: Workload) -> Resource:
        """The workload's Resource; made anew when the workload of that cgroup id has changed (a name was
        learned)."""
        known = self._cache.get(workload.cgroup_id)
        if known is not None and known[0] == workload:
            return known[1]
        if len(self._cache) >= _CACHE:
            for cgroup_id in list(self._cache)[: _CACHE // 2]:
                self._cache.pop(cgroup_id, None)  # another thread may be doing the same
        made = self._make(workload)
        self._cache[workload.cgroup_id] = (workload, made)
        return made

    def other(self) -> Resource:
        """The Resource of what found no room on this node: `~other`."""
        return _resource({c.SERVICE_NAME: c.OTHER} | self._common)

    def _make(self, w: Workload) -> Resource:
        name, workload_id = _service_name(w)
        instance = workload_id or ".".join(
            filter(None, (w.namespace, w.pod_name, w.container_name)) if w.pod_uid else (self._host, name)
        )
        attributes: dict[str, str | int | None] = {
            c.SERVICE_NAME: name,
            c.SERVICE_NAMESPACE: w.namespace,
            c.SERVICE_INSTANCE_ID: instance,
            c.K8S_NAMESPACE_NAME: w.namespace,
            c.K8S_POD_NAME: w.pod_name,
            # A static pod's is the kubelet's hash of its manifest: the API knows it by another.
            c.K8S_POD_UID: "" if is_static_pod(w.pod_uid) else w.pod_uid,
            c.K8S_CONTAINER_NAME: w.container_name if w.pod_uid else "",
            c.CONTAINER_NAME: w.container_name,
            c.CONTAINER_ID: w.container_id,
            c.CONTAINER_IMAGE_NAME: w.image,
            c.CONTAINER_RUNTIME: w.runtime,
            c.SYSTEMD_UNIT: w.unit,
            c.USER_ID: None if w.user_id is None else str(w.user_id),
            c.WORKLOAD_KIND: w.kind,
            c.WORKLOAD_QOS: w.qos,
        }
        made = self._common | {key: value for key, value in attributes.items() if value} | dict(w.given)
        return _resource(made, "" if c.SERVICE_NAME in dict(w.given) else workload_id)


def _resource(attributes: Mapping[str, str | int], workload_id: str = "") -> Resource:
    identity = tuple((key, str(attributes[key])) for key in c.IDENTITY if key in attributes)
    return Resource(identity, workload_id, tuple(attributes.items()))


def _service_name(w: Workload) -> tuple[str, str]:
    """(service.name, id): a name that never contains an id, and the id that tells the nameless apart."""
    if w.pod_uid:
        name = _POD_SUFFIX.sub("", w.pod_name) or w.container_name
        if w.pod_name and (w.container_name or not w.container_id):
            return name, ""
        return name or "unknown_service", w.container_id or w.pod_uid
    name = w.container_name or w.name or w.unit
    if name and not _ID.search(name):
        return name, ""
    return "unknown_service", w.container_id or w.unit or w.path or w.name or str(w.cgroup_id)


def _parse(text: str) -> dict[str, str]:
    """OTEL_RESOURCE_ATTRIBUTES: `key=value` pairs between commas, percent-encoded. A bad pair warns and is
    left out."""
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            _log.warning("OTEL_RESOURCE_ATTRIBUTES: %r is not key=value; left out", pair)
            continue
        found[key.strip()] = unquote(value.strip())
    return found
