"""Compiled programs that a wheel brought or an earlier start kept: only ours, only whole, only of these sources."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import KernelError
from exporter.kernel import build

CODE = {name: bytes(8) for part in build.PARTS.values() for name in part}


@pytest.fixture(autouse=True)
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The C sources, without what this very tree may have been built with."""
    folder = tmp_path / "wheel"
    shutil.copytree(build.source_folder(), folder, ignore=shutil.ignore_patterns("programs-*"))
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often it was compiled, one item each."""
    times: list[int] = []

    def compile_programs() -> dict[str, bytes]:
        times.append(1)
        return CODE

    monkeypatch.setattr(build, "compile_programs", compile_programs)
    return times


def test_compiled_once(compiled: list[int], tmp_path: Path) -> None:
    cache = tmp_path / "not" / "there"
    assert [build.programs(cache) for _ in range(3)] == [CODE] * 3
    assert len(compiled) == 1
    assert len(list(cache.iterdir())) == 1
    assert os.stat(cache).st_mode & 0o777 == 0o700


def test_no_cache(compiled: list[int]) -> None:
    assert build.programs() == build.programs() == CODE
    assert len(compiled) == 2


def test_other_sources(compiled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled anew, and what they replace is gone."""
    build.programs(tmp_path / "c")
    monkeypatch.setattr(build, "build_id", lambda: b"another")
    build.programs(tmp_path / "c")
    assert len(compiled) == 2
    assert len(list((tmp_path / "c").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ebfw_egress": "!"}', json.dumps({"ebfw_egress": "AAAA"})])
def test_what_is_not_whole(compiled: list[int], tmp_path: Path, text: str) -> None:
    build.programs(tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    file.write_text(text)
    assert build.programs(tmp_path / "c") == CODE
    assert len(compiled) == 2


@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_could_write_is_not_read(compiled: list[int], tmp_path: Path, which: str) -> None:
    build.programs(tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    (file if which == "file" else file.parent).chmod(0o777)
    build.programs(tmp_path / "c")
    assert len(compiled) == 2


def test_a_place_that_cannot_be_written(compiled: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, which names the variable; none where it can."""
    build.programs(tmp_path / "fine")
    assert caplog.text == ""
    (tmp_path / "c").write_text("a file")
    assert build.programs(tmp_path / "c") == CODE
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"EBFW_CACHE_PATH={tmp_path / 'c'}: the compiled programs cannot be kept there: ")


def test_filled_for_later_starts(tmp_path: Path, compiled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """What `ebfw compile` does, in an image say; a folder that anybody may write is of no use, and said to be none."""
    file = build.fill(tmp_path / "c")
    assert Path(file).is_file()
    assert build.fill(tmp_path / "c") == file
    assert build.programs(tmp_path / "c") == CODE
    assert compiled == [1]
    (tmp_path / "c").chmod(0o777)
    with pytest.raises(KernelError, match="cannot be kept"):
        build.fill(tmp_path / "c")


def test_brought_by_the_wheel(compiled: list[int], wheel: Path, tmp_path: Path) -> None:
    """No compiler, no cache; as soon as a source is another, both."""
    assert not build.brought()
    build._keep(build._wheel_file(), CODE)
    assert build.brought()
    assert build.programs() == build.programs(tmp_path / "c") == CODE
    build.ahead(None, tmp_path)
    assert build.fill(tmp_path / "c") == str(build._wheel_file())
    assert (compiled, build._begun, (tmp_path / "c").exists()) == ([], [], False)
    with (wheel / "tls.h").open("a") as source:
        source.write("// changed")
    assert not build.brought()
    assert build.programs(tmp_path / "c") == CODE
    assert compiled == [1]


def test_compiling_begins_ahead_where_it_will_be_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that are under way are waited for, and used once."""
    begun: list[int] = []

    def child(text: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", f"print({text!r})"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def begin() -> list[subprocess.Popen[str]]:
        begun.append(1)
        texts = [{name: base64.b64encode(bytes(8)).decode() for name in part} for part in build.PARTS.values()]
        return [child(json.dumps(text)) for text in texts]

    monkeypatch.setattr(build, "_begin", begin)
    cache, pins = tmp_path / "c", tmp_path / "pins"
    build.ahead(cache, pins)
    assert len(begun) == 1
    assert build.programs(cache) == CODE
    assert len(begun) == 1
    build.ahead(cache, pins)  # they are kept
    assert len(begun) == 1
    pins.mkdir()
    (pins / "map_stamp").touch()
    build.ahead(None, pins)  # and these may be adopted
    assert len(begun) == 1
    assert build.programs() == CODE
    assert len(begun) == 2
    build.ahead(None, tmp_path)
    (one, two) = build._begun
    build.abandon()  # a start that came to nothing
    assert build._begun == []
    assert None not in (one.returncode, two.returncode)
