"""Writes the tables of docs/telemetry.md and docs/configuration.md from the code, and shows in the first the
configurations that the tests run: `python -m scripts.reference`.

In: exporter.emit.semconv and registry (what is told), exporter.settings and emit.otlp_settings (variables), examples/.
Out: the text between each pair of marks in the two files; what people wrote around them stays. With `--check` nothing
is written, and the exit status says whether something is stale: a test does the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from exporter import settings
from exporter.emit import otlp_settings, registry
from exporter.emit import semconv as c

DOCS = Path(__file__).resolve().parent.parent / "docs"
EXAMPLES = DOCS.parent / "examples"


def main(arguments: Sequence[str]) -> int:
    stale = [path for path in (DOCS / "telemetry.md", DOCS / "configuration.md") if made(path) != path.read_text()]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.name} is stale: run `make docs`", file=sys.stderr)
        else:
            path.write_text(made(path))
            print(f"wrote {path.name}")
    return 1 if stale and "--check" in arguments else 0


def made(path: Path) -> str:
    """The file as it should be."""
    text = path.read_text()
    parts = [(f"table: {name}", table) for name, table in TABLES.items()]
    parts += [(f"example: {file.name}", partial(_example, file)) for file in sorted(EXAMPLES.glob("*.yaml"))]
    for name, lines in parts:
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = "".join((before, begin, "\n\n", "\n".join(lines()), "\n\n", end, after))
    return text


def _example(path: Path) -> list[str]:
    return ["```yaml", *path.read_text().splitlines(), "```"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *escaped]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}<key>`" if name.endswith(".") else f"`{name}`" for name in names)


def _spans() -> list[str]:
    return _table(
        ("name", "kind", "stability", "what it is", "attributes"),
        ((f"`{s.name}`", s.kind, s.stability, s.brief, _names(s.attributes)) for s in registry.SPANS),
    )


def _events() -> list[str]:
    return _table(
        ("event name", "severity", "stability", "what it is", "attributes"),
        ((f"`{e.name}`", e.severity, e.stability, e.brief, _names(e.attributes)) for e in registry.EVENTS),
    )


def _metrics(metrics: Iterable[c.Metric]) -> list[str]:
    rows = []
    for metric in metrics:
        more = getattr(metric, "more", ())
        attributes = _names(metric.attributes) + (f"; opt-in: {_names(more)}" if more else "")
        kind = metric.kind + (", opt-in" if getattr(metric, "opt_in", False) else "")
        rows.append(
            (f"`{metric.name}`", f"`{c.prometheus_series(metric)}`", kind, metric.unit and f"`{metric.unit}`",
             metric.stability, metric.description, attributes)
        )  # fmt: skip
    return _table(("name", "in Prometheus", "type", "unit", "stability", "what it is", "attributes"), rows)


def _attributes() -> list[str]:
    rows = (
        (
            _names((attribute.name,)),
            attribute.type,
            f"`{registry.UNITS[attribute.name]}`" if attribute.name in registry.UNITS else "",
            attribute.stability,
            attribute.description,
        )
        for attribute in sorted(registry.BY_NAME.values())
    )
    return _table(("attribute", "type", "unit", "stability", "what it is"), rows)


def _otel() -> list[str]:
    rows = (
        (f"`{variable.name}`", "yes" if variable.per_signal else "", f"`{variable.default}`", variable.meaning)
        for variable in otlp_settings.VARIABLES
    )
    return _table(("variable", "per signal", "default", "meaning"), rows)


# What `settings.load` reads beside its table.
_ELSEWHERE = (
    ("`EBFW_CONFIG`", "path", "none", "The YAML file with `cgroup` and `exclude`; `--config` wins over it."),
    ("`NO_COLOR`", "text", "none", "Set to anything: no colour on a terminal."),
)


def _ebfw() -> list[str]:
    defaults, help_ = settings.Settings(), _docstrings()
    rows = []
    for variable in settings.VARIABLES:
        default = "the host's name" if variable.field == "node_name" else _shown(getattr(defaults, variable.field))
        rows.append((f"`{variable.name}`", variable.values, default, help_[variable.field]))
    rows += _ELSEWHERE
    return _table(("variable", "values", "default", "meaning"), rows)


def _shown(value: object) -> str:
    if value is None or value == frozenset() or value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{value[0]}:{value[1]}`"
    return f"`{value}`"


def _docstrings() -> dict[str, str]:
    """What stands below each field of Settings."""
    tree = ast.parse(Path(settings.__file__).read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


TABLES = {
    "spans": _spans,
    "events": _events,
    "metrics of workloads": lambda: _metrics(c.WORKLOAD_METRICS),
    "metrics of the agent": lambda: _metrics(c.AGENT_METRICS),
    "attributes": _attributes,
    "OTEL variables": _otel,
    "EBFW variables": _ebfw,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
