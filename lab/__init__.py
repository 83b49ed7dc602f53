"""A small network of our own, in which ebfw is demonstrated, tested and measured.

`net` makes the cgroups and network namespaces, `servers` fills the far side, `workload` and `clients` fill
the near side, `demo` puts them together with the agent. Needs root, Linux with cgroup2, and iproute2,
util-linux and openssl; standard library only. Nothing here is imported by the exporter, and nothing here
imports it.
"""

from lab.net import Cgroup, Lab, LabError, sweep

__all__ = ["Cgroup", "Lab", "LabError", "sweep"]
