"""What a workload says of itself: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES of one of its processes (D17).

Comes in: a pid. Goes out: its cgroup, and resource attributes. Not its job: who a workload is otherwise (cgroup.py).
Of an environment only these two keys are looked at and nothing else is kept (D8). What the kernel and the engine
know (who and where it is) a workload cannot say differently.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

MAX_BYTES = 1 << 20
MAX_PAIRS = 32
MAX_LENGTH = 256  # of a value, in characters

_SERVICE, _ATTRIBUTES = b"OTEL_SERVICE_NAME=", b"OTEL_RESOURCE_ATTRIBUTES="
_KEY = re.compile(r"[a-z][a-z0-9_.-]{0,127}")
_KNOWN_BETTER = re.compile(r"(?:k8s|container|host|ebfw|user|telemetry|process)\.")

Pairs = tuple[tuple[str, str], ...]


def cgroup_path(pid: int, proc: str = "/proc") -> str:
    """The path of the process's cgroup below the cgroup2 root, "" for the root itself and where it cannot be
    told."""
    try:
        with open(f"{proc}/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                if line.startswith("0::/"):
                    return line[3:].rstrip("\n").rstrip("/")
    except OSError:
        pass
    return ""


def read(pid: int, proc: str = "/proc") -> Pairs:
    """The resource attributes that the process was started with; () where it has none, is gone, or is not ours to
    read. OTEL_SERVICE_NAME wins over service.name (specification, "Resource SDK")."""
    try:
        with open(f"{proc}/{pid}/environ", "rb") as file:
            entries = file.read(MAX_BYTES).split(b"\0")
    except OSError:
        return ()
    name, text = b"", b""
    for entry in entries:
        if entry.startswith(_SERVICE):
            name = entry[len(_SERVICE) :]
        elif entry.startswith(_ATTRIBUTES):
            text = entry[len(_ATTRIBUTES) :]
    return attributes(name.decode("utf-8", "replace"), text.decode("utf-8", "replace")) if name or text else ()


def attributes(service_name: str, text: str) -> Pairs:
    """`key=value` pairs between commas, percent-encoded. What is malformed is left out: it is not our user's."""
    found: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        key, value = key.strip(), unquote(value.strip())
        if equals and value and _KEY.fullmatch(key) and not _KNOWN_BETTER.match(key) and len(found) < MAX_PAIRS:
            found[key] = _clean(value)
    if service_name.strip():
        found["service.name"] = _clean(service_name.strip())
    return tuple(sorted((key, value) for key, value in found.items() if value))


def _clean(value: str) -> str:
    return "".join(char for char in value[:MAX_LENGTH] if char.isprintable())
