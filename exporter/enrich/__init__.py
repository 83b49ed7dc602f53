"""Who and to whom: cgroup ids become workloads, addresses become the names that a workload asked for."""

from exporter.enrich.cgroup import Workloads, find_root, is_host_root, root_problem
from exporter.enrich.cgroup_path import is_static_pod, parse
from exporter.enrich.groups import PeerGroups
from exporter.enrich.names import ContainerNames, HiddenNames, HiddenPlaces, Names, key

__all__ = [
    "ContainerNames",
    "HiddenNames",
    "HiddenPlaces",
    "Names",
    "PeerGroups",
    "Workloads",
    "find_root",
    "is_host_root",
    "is_static_pod",
    "key",
    "parse",
    "root_problem",
]
