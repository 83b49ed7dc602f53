"""What the demo prints at its end: tables from the agent's /metrics, next to what the workload knows it did.

In: Prometheus text. Out: text for a terminal. A metric that is not there is named, not taken for zero.
Not its job: a complete parser of the exposition format: no exemplars, no timestamps are expected.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

EVENTS = "ebfw_events_total"
BYTES = "ebfw_network_io_bytes_total"
CONNECTIONS = "ebfw_tcp_connections_total"
FAILURES = "ebfw_tcp_connection_failures_total"
LOOKUPS = "dns_lookup_duration_seconds_count"
LOST = "ebfw_records_lost_total"

_ROWS = 20  # of the table of peers

# What a reader who adds up would stumble over.
_KINDS = (
    "  Most steps ask for an IPv4 and an IPv6 address: two lookups, two failures where there is no such name.",
    "  A connection that failed, and UDP, has no `close`. Through a proxy there are two requests: CONNECT, and",
    "  the one inside. HTTPS requests may be missing in the first half second, until probes are on the library.",
)
_PEERS = (
    "  A connection is counted under the name known at the time. Behind the proxy it opens under the proxy's",
    "  name and goes on under the one in its TLS: `opened` in one row, most bytes in another.",
    "  `-`: opened under another name, never opened, or UDP.",
)
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? +(\S+)(?: \S+)?$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


class Sample(NamedTuple):
    """One line of /metrics."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    """Samples of a Prometheus text exposition; comments and lines that are none are passed over."""

    def unescape(value: str) -> str:
        return _ESCAPE.sub(lambda match: "\n" if match[1] == "n" else match[1], value)

    found = []
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            labels = {name: unescape(value) for name, value in _LABEL.findall(match[2] or "")}
            found.append(Sample(match[1], labels, float(match[3])))
    return found


_FIGURE = re.compile(r"\d[\d,]*(\.\d+)?( [KMG]?B)?$|-$")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns aligned: text to the left, figures to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if _FIGURE.match(text) else text.ljust(width)

    return ["  " + "  ".join(map(cell, line, widths)).rstrip() for line in lines]


def _size(count: float) -> str:
    # Units as in the agent's own lines.
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def describe(text: str, steps: Mapping[str, int], odd: Sequence[str], roles: Sequence[str]) -> str:
    """The summary. `steps`: what the workload did, by name; `odd`: what of it went wrong; `roles`: the
    workloads that must show up."""
    samples = parse(text)
    by_name: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.name].append(sample)
    out = ["", "What the workload did"]
    out += _table(("step", "times"), ((name, str(count)) for name, count in sorted(steps.items())))
    out += [f"  not as planned: {line}" for line in odd[:5]]

    def total(name: str, key: Callable[[Mapping[str, str]], tuple[str, ...]]) -> Counter[tuple[str, ...]]:
        counts: Counter[tuple[str, ...]] = Counter()
        for sample in by_name[name]:
            if sample.value:
                counts[key(sample.labels)] += int(sample.value)
        return counts

    def who(labels: Mapping[str, str]) -> str:
        return labels.get("service_name", "?")

    def peer(labels: Mapping[str, str]) -> str:
        return labels.get("server_address", "?")

    out += ["", "What the agent told, by kind"]
    out += _table(
        ("kind", "events"),
        ((kind, str(n)) for (kind,), n in total(EVENTS, lambda labels: (labels.get("kind", "?"),)).most_common()),
    )
    out += _KINDS

    sent = total(BYTES, lambda labels: (who(labels), peer(labels), labels.get("network_io_direction", "?")))
    opened = total(CONNECTIONS, lambda labels: (who(labels), peer(labels), labels.get("ebfw_connection_state", "?")))
    pairs = Counter[tuple[str, str]]()
    for (name, address, _), count in sent.items():
        pairs[name, address] += count
    out += ["", "Who talked to whom"]
    out += _table(
        ("workload", "peer", "opened", "sent", "received"),
        (
            (
                name,
                address,
                str(opened[name, address, "opened"] or "-"),
                _size(sent[name, address, "transmit"]),
                _size(sent[name, address, "receive"]),
            )
            for (name, address), _ in sorted(pairs.most_common(_ROWS))
        ),
    )
    if len(pairs) > _ROWS:
        out.append(f"  and {len(pairs) - _ROWS} more")

    out += _PEERS

    failed = total(FAILURES, lambda labels: (who(labels), peer(labels), labels.get("error_type", "?")))
    unanswered = total(
        LOOKUPS,
        lambda labels: (who(labels), labels.get("dns_question_name", "?"), labels.get("error_type", "")),
    )
    failed.update({(name, asked, f"DNS: {why}"): n for (name, asked, why), n in unanswered.items() if why})
    out += ["", "What failed"]
    out += _table(
        ("workload", "peer", "reason", "times"),
        ((name, address, why, str(n)) for (name, address, why), n in sorted(failed.items())),
    )

    missing = [n for n in (EVENTS, BYTES, CONNECTIONS, FAILURES, LOOKUPS, LOST) if not by_name[n]]
    if missing:
        out += ["", f"Not in /metrics: {', '.join(missing)}"]
    if absent := [role for role in roles if role not in {name for name, _ in pairs}]:
        out += ["", f"Not seen at all: {', '.join(absent)}"]
    lost = sum(total(LOST, lambda labels: ()).values())
    out += ["", f"Records lost: {lost if by_name[LOST] else 'not told'}", ""]
    return "\n".join(out)
