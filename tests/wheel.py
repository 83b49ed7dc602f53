"""The wheel that scripts/wheel builds, and the tree in which the same modules are compiled in place. Not named test_*:
only `make test-compiled` has them, and asks for this file by its name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
COMPILED = [
    path.strip("/").removesuffix(".py").replace("/", ".")
    for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["mypyc"]["include"]
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, far from the checkout."""
    (wheel,) = (REPO / "dist").glob("ebfw-*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    return folder


def run(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("name", COMPILED)
def test_these_tests_run_on_compiled_modules(name: str) -> None:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    assert found.origin.startswith(str(REPO))
    assert found.origin.endswith(".so")


@pytest.mark.parametrize("name", COMPILED)
def test_and_so_does_the_wheel(installed: Path, name: str) -> None:
    origin = run(installed, "-c", f"import {name} as m; print(m.__file__)").strip()
    assert origin.startswith(str(installed))
    assert origin.endswith(".so")


PROGRAMS = "from exporter.kernel import build; print({name: len(code) for name, code in build.programs().items()})"


def test_the_wheel_has_the_kernel_side_with_it(installed: Path) -> None:
    """Compiled: no compiler is asked. And its sources: it compiles without a checkout or kernel headers beside it."""
    brought = run(installed, "-c", "import subprocess; subprocess.Popen = None; " + PROGRAMS)
    (file,) = (installed / "exporter" / "_bpf").glob("programs-*.json")
    file.rename(installed / "elsewhere.json")
    try:
        assert run(installed, "-c", PROGRAMS) == brought
    finally:
        (installed / "elsewhere.json").rename(file)


def test_changed_sources_are_compiled(installed: Path) -> None:
    """What the wheel brought is of its own sources alone."""
    source = installed / "exporter" / "_bpf" / "tls.h"
    whole = source.read_text()
    try:
        source.write_text(whole + "\n#error changed\n")
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run(installed, "-c", PROGRAMS)
    finally:
        source.write_text(whole)
    assert "changed" in failed.value.stderr


def test_the_command_is_in_it(installed: Path) -> None:
    version = run(installed, "-c", "import exporter; print(exporter.__version__)")
    assert run(installed, "-m", "exporter", "version") == f"ebfw {version}"
    (entry,) = installed.glob("ebfw-*.dist-info/entry_points.txt")
    assert "ebfw = exporter.__main__:main" in entry.read_text()
