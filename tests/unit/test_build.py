"""Compiled programs kept between starts: only ours, only whole, only of these sources."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from exporter.errors import KernelError
from exporter.kernel import build

CODE = {name: bytes(8) for part in build.PARTS.values() for name in part}


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
