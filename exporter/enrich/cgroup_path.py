"""A cgroup's path -> Workload: the grammar of kubelets, container engines and systemd.

In: a path below the cgroup2 root. Out: `events.Workload`. Pure: no file is read. Not its job: ids, what is alive and
what was (cgroup.py), names that only an engine or the API knows (names.py).
"""

from __future__ import annotations

import re

from exporter.events import Workload

RUNTIMES = {
    "cri-containerd": "containerd",
    "containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "docker": "docker",
    "libpod": "podman",
}
# Of a bare <64 hex> the directory above tells the runtime, where it tells anything.
PARENTS = {"docker": "docker", "libpod_parent": "podman", "default": "containerd", "moby": "docker"}

UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")
# Directories that people make inside a cgroup to hold its processes, because the cgroup itself may not.
INNER = frozenset(("init", "payload", "container", "supervisor", "leaf", "tasks"))

# systemd driver; after ':' the form of a runtime that uses cgroupfs under a kubelet that uses systemd.
_POD_SLICE = re.compile(
    r"(?:.*-)?kubepods(?:-(burstable|besteffort))?-pod([0-9A-Za-z_]+)\.slice(?::([a-z-]+):([0-9a-f]{64}))?"
)
_POD_DIR = re.compile(r"pod([0-9A-Za-z-]+)")  # cgroupfs driver, below kubepods[/burstable|/besteffort]
_CONTAINER = re.compile(r"(?:([a-z][a-z0-9_.-]*?)-(?:(?:conmon|payload)-)?)?([0-9a-f]{64})(?:\.scope)?")
_LXC = re.compile(r"lxc\.(?:payload|monitor)\.(.+)")
_NSPAWN = re.compile(r"machine-(.+)\.scope|systemd-nspawn@(.+)\.service")
_VM = re.compile(r"machine-qemu\\x2d\d+\\x2d(.+)\.scope")
_USER = re.compile(r"user-(\d+)\.slice|user@(\d+)\.service")
_SESSION = re.compile(r"session-[0-9a-z]+\.scope")
_STATIC = re.compile(r"[0-9a-f]{32}")

_ESCAPED = re.compile(r"(?:\\x[0-9a-f]{2})+")
_TRANSIENT = re.compile(r"run-(?:r[0-9a-f]{32}|u\d+|p\d+-i\d+)\.(?:service|scope)")
_ACCEPTED = re.compile(r"@\d+-.+:\d+-.+:\d+.*(?=\.service$)")  # Accept=yes: it names one connection
_UNIT_ID = re.compile(
    r"[-@.]?(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|[0-9a-f]{32,64}(?:-[0-9a-f]+)?)(?=\.)"
)
_APP_ID = re.compile(r"-\d+(?=\.scope$)|@[0-9a-f]+(?=\.service$)")  # XDG: app-<launcher>-<id>-RANDOM
_OPAQUE = re.compile(r"[0-9a-f]{24,}|[0-9a-f]{8}-[0-9a-f-]{27}|\d+")


def parse(path: str, cgroup_id: int) -> Workload:
    """Read `path`, a cgroup's path below the cgroup2 root, as a Workload. Pure; never fails.

    kind is pod, container, unit, session, host (the root), or `cgroup`: one that somebody made by hand, named
    by its last telling component.

    A pod wins over everything, wherever it is in the path: the "node" of kind, k3d or minikube is a container
    that holds pods. Otherwise the outermost container wins, and of two pods the outermost: that is what this
    host's engine and API server know, and nothing inside a pod can pass for another pod. Who may make cgroups
    outside of pods can pretend to be one: a container with a writable cgroup, or a user below
    user@UID.service (`user_id` marks these). A monitor (conmon) belongs to the container that it monitors.

    `pod_uid` of a static pod is the kubelet's hash of its manifest, not the UID that the API knows:
    `is_static_pod` tells.
    """
    if not path.isprintable():
        # Whoever may make a cgroup chooses its name, terminal escapes and invalid UTF-8 included.
        path = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path)
    parts = [part for part in path.split("/") if part]
    if not parts:
        return Workload(cgroup_id, "/", "host", "host")
    path = "/" + "/".join(parts)
    return _pod(parts, path, cgroup_id) or _container(parts, path, cgroup_id) or _unit(parts, path, cgroup_id)


def is_static_pod(pod_uid: str) -> bool:
    """Whether this pod UID, taken from a cgroup path, is a manifest hash and so unknown to the API server."""
    return _STATIC.fullmatch(pod_uid) is not None


def _pod(parts: list[str], path: str, cgroup_id: int) -> Workload | None:
    for i, part in enumerate(parts):
        runtime = container = ""
        if match := _POD_SLICE.fullmatch(part):
            qos, uid, prefix, container = (group or "" for group in match.groups())
            uid, runtime = uid.replace("_", "-"), RUNTIMES.get(prefix, "")
        elif match := _POD_DIR.fullmatch(part):
            above = parts[max(0, i - 2) : i]
            if above[-1:] == ["kubepods"]:
                qos = ""
            elif above[:1] == ["kubepods"] and above[1] in ("burstable", "besteffort"):
                qos = above[1]
            else:
                continue
            uid = match[1]
        else:
            continue
        if not container:
            for below in parts[i + 1 :]:
                if match := _CONTAINER.fullmatch(below):
                    runtime, container = RUNTIMES.get(match[1] or "", ""), match[2]
                    break
        return Workload(
            cgroup_id,
            path,
            "pod",
            f"pod-{uid[:8]}",
            pod_uid=uid,
            container_id=container,
            runtime=runtime,
            qos=qos or "guaranteed",
            user_id=_user(parts[:i]),
        )
    return None


def _container(parts: list[str], path: str, cgroup_id: int) -> Workload | None:
    for i, part in enumerate(parts):
        above = parts[i - 1] if i else ""
        container = unit = ""
        if match := _CONTAINER.fullmatch(part):
            if above == "libpod_parent" and not match[1] and i + 1 < len(parts) and "libpod" in parts[i + 1]:
                continue  # a Podman pod, which has no cgroup2 identity of its own; its container comes next
            prefix, container = match[1] or "", match[2]
            runtime, name = RUNTIMES.get(prefix) or PARENTS.get(above, ""), container[:12]
            if runtime == "podman" and above.endswith(".service") and not _USER.fullmatch(above):
                unit, name = above, _display(above)  # podman --cgroups=split, as Quadlet units have it
        elif match := _LXC.fullmatch(part):
            runtime, name = "lxc", match[1]
        elif above in ("lxc", "lxc.payload", "lxc.monitor") and i == 1:
            runtime, name = "lxc", part
        elif (match := _NSPAWN.fullmatch(part)) and not _VM.fullmatch(part):
            runtime, name, unit = "systemd-nspawn", _unescape(match[1] or match[2]), part
        else:
            continue
        return Workload(
            cgroup_id,
            path,
            "container",
            name,
            container_id=container,
            runtime=runtime,
            unit=unit,
            user_id=_user(parts[:i]),
        )
    return None


def _unit(parts: list[str], path: str, cgroup_id: int) -> Workload:
    user_id = None
    unit = ""
    for part in parts:
        if match := _USER.fullmatch(part):
            user_id = int(match[1] or match[2])
        if part.endswith(".slice"):
            if not unit.endswith(".service"):
                unit = part
        elif _USER.fullmatch(part):
            unit = part  # the user's manager, which has units of its own below
        elif part.endswith(UNIT_SUFFIXES) and (not unit or unit.endswith(".slice") or _USER.fullmatch(unit)):
            if part != "init.scope" or not _USER.fullmatch(unit):  # else the manager's own process
                unit = part
            break
        elif unit.endswith(".service"):
            break  # what a unit delegates belongs to it
        else:
            telling = (p for p in reversed(parts) if p not in INNER and not _OPAQUE.fullmatch(p))
            name = _unescape(next(telling, parts[-1]))
            return Workload(cgroup_id, path, "cgroup", name, user_id=user_id)
    if user_id is not None and _SESSION.fullmatch(unit):
        return Workload(cgroup_id, path, "session", f"user-{user_id}", unit=unit, user_id=user_id)
    return Workload(cgroup_id, path, "unit", _display(unit), unit=unit, user_id=user_id)


def _user(parts: list[str]) -> int | None:
    for part in parts:
        if match := _USER.fullmatch(part):
            return int(match[1] or match[2])
    return None


def _display(unit: str) -> str:
    """A unit's name for people: unescaped, and without the ids that systemd makes up for each start."""
    if match := _VM.fullmatch(unit):
        return _unescape(match[1])
    if _TRANSIENT.fullmatch(unit):
        return "systemd-run"
    name = _UNIT_ID.sub("", _ACCEPTED.sub("@", unit))
    if name.startswith("app-"):
        name = _APP_ID.sub("", name)
    return _unescape(name if not name.startswith(".") else "transient" + name)


def _unescape(text: str) -> str:
    """Undo systemd's \\xHH; what would not be printable stays escaped."""

    def plain(match: re.Match[str]) -> str:
        found = bytes.fromhex(match[0].replace("\\x", "")).decode("utf-8", "replace")
        return found if found.isprintable() and "\ufffd" not in found else match[0]

    return _ESCAPED.sub(plain, text)
