"""The tables of the docs are those of the code, the configurations that they show are those that the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.emit import otlp_settings, registry
from exporter.emit import semconv as c
from exporter.settings import VARIABLES
from scripts import reference

DOCS = Path(reference.DOCS)


@pytest.mark.parametrize("name", ["telemetry.md", "configuration.md"])
def test_the_tables_are_not_stale(name: str) -> None:
    """`make docs` writes them."""
    path = DOCS / name
    assert reference.made(path) == path.read_text()


def test_every_table_is_in_one_of_the_files() -> None:
    text = (DOCS / "telemetry.md").read_text() + (DOCS / "configuration.md").read_text()
    for table in reference.TABLES:
        assert text.count(f"<!-- table: {table} -->") == text.count(f"<!-- end of table: {table} -->") == 1


def test_everything_is_there_with_type_unit_and_stability() -> None:
    text = (DOCS / "telemetry.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for metric in c.METRICS:
        (row,) = [row for row in rows if row.startswith(f"| `{metric.name}` | `{c.prometheus_series(metric)}` |")]
        assert metric.stability in row
        assert metric.unit in row
    for name, attribute in registry.BY_NAME.items():
        shown = f"{name}<key>" if name.endswith(".") else name
        (row,) = [row for row in rows if row.startswith(f"| `{shown}` | {attribute.type} |")]
        assert attribute.stability in row
        assert registry.UNITS.get(name, "") in row
    for kind in (*registry.SPANS, *registry.EVENTS):
        assert [row for row in rows if row.startswith(f"| `{kind.name}` |") and kind.stability in row]


def test_every_variable_is_there() -> None:
    text = (DOCS / "configuration.md").read_text()
    for name in (*(v.name for v in VARIABLES), "EBFW_CONFIG", "NO_COLOR", *(v.name for v in otlp_settings.VARIABLES)):
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("name", sorted(path.name for path in reference.EXAMPLES.glob("*.yaml")))
def test_every_example_is_shown_as_it_stands(name: str) -> None:
    text = (DOCS / "telemetry.md").read_text()
    _, _, rest = text.partition(f"<!-- example: {name} -->")
    shown, end, _ = rest.partition(f"<!-- end of example: {name} -->")
    assert end
    assert shown == f"\n\n```yaml\n{(reference.EXAMPLES / name).read_text()}```\n\n"


def test_a_change_of_an_example_makes_the_file_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in reference.EXAMPLES.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(reference, "EXAMPLES", tmp_path)
    assert reference.made(DOCS / "telemetry.md") == (DOCS / "telemetry.md").read_text()
    (tmp_path / "prometheus.yaml").write_text("global: {}\n")
    assert "```yaml\nglobal: {}\n```" in reference.made(DOCS / "telemetry.md")


def test_a_change_makes_a_file_stale(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.md"
    path.write_text((DOCS / "telemetry.md").read_text().replace("| `connection` |", "| `conection` |", 1))
    assert reference.made(path) != path.read_text()
    assert reference.made(path) == (DOCS / "telemetry.md").read_text()
