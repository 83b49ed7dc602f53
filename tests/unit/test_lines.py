"""docs/lines.md has every key of a line, JSON and text, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from exporter import events
from exporter.emit.console import JsonFormat, TextFormat
from exporter.events import Event, Exchange, Tls, Workload

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lines.md"

# Every field that a line can show, set.
WORKLOAD = Workload(
    7, "/kubepods/x", "pod", "web", "u-1", "c0ffee", "containerd", "burstable", "a.service", 1000, "web-1", "shop",
    "app",
)  # fmt: skip
TLS = Tls("1.3", "1.3", ("h2",), "x25519", True, True, "t13d", False, "unknown_ca", "1")
EXCHANGE = Exchange("2", "https", 200, "goaway", 1, 1, 1, 1, f"00-{1:032x}-{1:016x}-01", 1, "lost", "a=b", 443)
FULL = Event(
    "", 1, WORKLOAD, 42, "curl", "tcp", "client", "10.0.0.5", 4444, "192.0.2.1", 443, "internet", "example.com", "dns",
    "ok", 1, 1, 1, 1, 1, "A", ("192.0.2.1",), "GET", "/", (("a", "b"),), "192.0.2.9:3128", 1, False, EXCHANGE, TLS,
    True, "s3", True, True,
)  # fmt: skip
KINDS = ("pod", "container", "unit", "session", "cgroup", "host", "unknown")  # of workloads
SILENT = {"cookie", "filtered"}  # fields that no line shows

TYPES = {str: "string", int: "number", float: "number", bool: "boolean"}


def keys(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Each key of a JSON value with its type, as the table writes them."""
    if isinstance(value, dict):
        for key, member in value.items():
            yield from keys(member, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for member in value:
            if isinstance(member, dict):
                yield from keys(member, f"{name}[]")
            else:
                yield name, f"array of {TYPES[type(member)]}s"
    else:
        yield name, TYPES[type(value)]


def table() -> dict[str, tuple[str, str]]:
    """key -> its type and its kinds."""
    _, _, rest = PAGE.read_text().partition("<!-- keys -->")
    rows, end, _ = rest.partition("<!-- end of keys -->")
    assert end
    found = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]*\| ([^|]+) \|", rows, re.M)
    assert len({key for key, *_ in found}) == len(found) == rows.count("\n| `")
    return {key: (kind, kinds) for key, kind, kinds in found}


def test_every_field_is_set() -> None:
    """A field that is new in `Event`, `Tls` or `Exchange` is set here, or the test below would not see it."""
    for part in (FULL._replace(kind="tls"), EXCHANGE):
        assert [name for name in part._fields if not getattr(part, name) and name not in SILENT] == []
    assert [name for name in TLS._fields if getattr(TLS, name) == Tls._field_defaults[name]] == []


def test_the_keys_are_those_of_the_table() -> None:
    shown: dict[str, str] = {}
    for kind in events.KINDS:
        shown.update(keys(json.loads(JsonFormat("node-1").line(FULL._replace(kind=kind)))))
    assert {key: kind for key, (kind, _) in table().items()} == shown


def test_the_kinds_of_the_table_are_kinds() -> None:
    for key, (_, kinds) in table().items():
        assert kinds == "all" or set(kinds.split(", ")) <= set(events.KINDS), key


def test_the_pairs_of_text_are_those_of_the_table() -> None:
    changes: list[dict[str, object]] = [{"workload": WORKLOAD._replace(kind=kind)} for kind in KINDS]
    changes += [{"role": "server", "transport": "udp"}, {"tls": TLS._replace(version="")}]
    lines = [
        TextFormat().line(FULL._replace(kind=kind, headers=(), **change))  # type: ignore[arg-type]
        for kind in events.KINDS
        for change in changes
    ]
    _, _, rest = PAGE.read_text().partition("| pair | meaning |\n|---|---|\n")
    rows, _, _ = rest.partition("\n\n")
    written = [pair for row in rows.splitlines() for pair in re.findall(r"`([a-z-]+)=", row.split("|")[1])]
    assert len(written) == len(set(written))
    assert {pair for text in lines for pair in re.findall(r" ([a-z-]+)=", text)} == set(written)
