"""The documentation names tests, files and anchors of this repository: they have to be there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.emit import semconv as c

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted(REPO.glob("docs/*.md"))


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_the_docs_name_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page.read_text())
    missing = [f"{path}::{name}" for path, name in named if name not in names_in(REPO / path)]
    assert not missing
    # Nothing is written in a way that this test would not see.
    assert page.read_text().count("::test_") == len(named)


def test_every_complaint_has_a_test() -> None:
    text = (REPO / "docs" / "complaints.md").read_text()
    numbered = re.split(r"^(\d+)\. ", text, flags=re.MULTILINE)[1:]
    entries = dict(zip(map(int, numbered[::2]), numbered[1::2], strict=True))
    assert list(entries) == list(range(1, 19))
    assert [number for number, entry in entries.items() if "::test_" not in entry] == []


@pytest.mark.parametrize("decision", ["d15", "d16", "d19"])
def test_decisions_have_a_test_against_the_real_thing(decision: str) -> None:
    names = names_in(REPO / "tests/pipeline/test_collector.py")
    names |= names_in(REPO / "tests/pipeline/test_prometheus_server.py")
    assert [name for name in names if name.startswith(f"test_{decision}_")]


@pytest.mark.parametrize("page", [*PAGES, REPO / "README.md", REPO / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("variable", "known"),
    [
        ("EBFW_METRICS_OPT_IN", {metric.name for metric in c.WORKLOAD_METRICS if metric.opt_in}),
        ("EBFW_METRICS_ATTRIBUTES", {name for metric in c.WORKLOAD_METRICS for name in metric.more}),
    ],
)
def test_the_readme_names_what_can_be_chosen(variable: str, known: set[str]) -> None:
    (row,) = [row for row in (REPO / "README.md").read_text().splitlines() if row.startswith(f"| `{variable}` |")]
    named = re.findall(r"`([\w.]+)`", row)[1:]
    assert sorted(named) == sorted(known)
    page = (REPO / "docs" / "metrics.md").read_text()
    assert [name for name in known if name not in page] == []


def test_the_agent_needs_no_kubernetes_client() -> None:
    code = "import sys, exporter.agent; print([m for m in sys.modules if m.split('.')[0] == 'kubernetes'])"
    done = subprocess.run((sys.executable, "-c", code), cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
