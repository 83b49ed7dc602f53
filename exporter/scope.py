"""Which part of the cgroup tree is watched, and whether it is still there.

In: settings and the cgroup2 root. Out: a path, or a SettingsError that says what is wrong with the one that was set.
Not its job: attaching to it (kernel), workloads below it (enrich).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from exporter.enrich import root_problem
from exporter.errors import SettingsError
from exporter.settings import Settings

log = logging.getLogger("ebfw")


def scope_of(settings: Settings, root: Path) -> Path:
    """The cgroup subtree to watch: what is set, else the whole host."""
    if settings.cgroup is None:
        problem = root_problem(root)
        if problem:
            log.warning("%s", problem)
        return root
    cgroup = settings.cgroup
    if not cgroup.is_dir():
        raise SettingsError(f"{settings.cgroup_named}{cgroup} does not exist; cgroup2 is mounted at {root}")
    if not (cgroup / "cgroup.procs").exists() or os.stat(cgroup).st_dev != os.stat(root).st_dev:
        raise SettingsError(f"{settings.cgroup_named}{cgroup} is not in the cgroup2 tree, which is mounted at {root}")
    return cgroup


class Watched:
    """The cgroup that the programs are attached to. The kernel detaches them when it is removed; one that is made again
    at the same place is another."""

    def __init__(self, cgroup: Path) -> None:
        self._cgroup, self._inode = cgroup, _inode(cgroup)
        self._gone = False

    def gone(self) -> str:
        """Said once: that it is gone, and what to do. "" while it is there, and afterwards."""
        if self._gone or (self._inode and _inode(self._cgroup) == self._inode):
            return ""
        self._gone = True
        return f"the cgroup {self._cgroup} is gone; nothing is watched until ebfw is started again"


def _inode(path: Path) -> int:
    """0 where there is nothing."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0
