"""The command line: exit statuses, one-line complaints, and that help and mistakes need nothing of the
machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter import __main__ as cli
from exporter import __version__
from exporter.errors import PinError, Unsupported
from exporter.settings import Settings

ROOT = Path(cli.__file__).parent.parent


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("EBFW_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Settings]]:
    """The agent replaced by one that notes what it was called with and answers 0, 5 or 0."""
    made: list[tuple[str, Settings]] = []

    def entry(name: str, status: int) -> Callable[[Settings], int]:
        def call(settings: Settings) -> int:
            made.append((name, settings))
            return status

        return call

    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for module, entries in (("agent", {"run": 0}), ("host", {"check": 5, "detach": 0})):
        fake = types.ModuleType(f"exporter.{module}")
        for name, status in entries.items():
            setattr(fake, name, entry(name, status))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return made


def test_without_a_command_it_is_the_agent(calls: list[tuple[str, Settings]]) -> None:
    assert cli.main([]) == 0
    assert calls == [("run", Settings())]


def test_status_is_the_commands(calls: list[tuple[str, Settings]]) -> None:
    assert cli.main(["check"]) == 5
    assert cli.main(["detach"]) == 0
    assert [name for name, _ in calls] == ["check", "detach"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-config", "FILE"],
        ["-config=FILE"],
        ["--config", "FILE", "check"],
        ["--config=FILE", "detach"],
        ["check", "--config", "FILE"],
        ["detach", "-config", "FILE"],
    ],
)
def test_config_stands_before_or_behind(
    calls: list[tuple[str, Settings]], tmp_path: Path, arguments: list[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("cgroup: /x\n")
    cli.main([argument.replace("FILE", str(file)) for argument in arguments])
    assert calls[0][1].cgroup == Path("/x")


def test_mistakes_in_settings_are_two_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EBFW_OUTPUTS", "json")
    assert cli.main([]) == 2
    assert capsys.readouterr().err == ("ebfw: EBFW_OUTPUTS: there is no such setting; did you mean EBFW_OUTPUT?\n")


@pytest.mark.parametrize("error", [Unsupported("no bpffs at\n/sys/fs/bpf"), PinError("not ours")])
def test_errors_are_one_and_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: object
) -> None:
    def fail(settings: Settings) -> int:
        raise error

    monkeypatch.setattr(sys.modules["exporter.agent"], "run", fail)
    assert cli.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "ebfw: " + " ".join(str(error).split()) + "\n"


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: object) -> None:
    def interrupt(settings: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["exporter.agent"], "run", interrupt)
    assert cli.main([]) == 130
    assert capsys.readouterr() == ("", "")


def test_without_root_one_sentence_and_check_still_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[tuple[str, Settings]]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *rest: "Name:\tx\nCapEff:\t0000000000000000\n" if path.name == "status" else read(path, *rest),
    )
    assert cli.main([]) == 1
    assert "sudo ebfw\n" in capsys.readouterr().err
    assert cli.main(["detach"]) == 1
    assert "sudo ebfw detach\n" in capsys.readouterr().err
    assert cli.main(["check"]) == 5
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: "CapEff:\t0000008000000000\n")
    assert cli.main([]) == 0


@pytest.mark.parametrize("arguments", [["--nonsense"], ["policy", "test"], ["check", "extra"], ["--conf", "x"]])
def test_usage_is_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "ebfw" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("examples:", "exit status:", "check", "detach", "version", "EBFW_METRICS_ADDR"):
        assert part in text
    assert "policy" not in text


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "exporter", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_imports_nothing_heavy() -> None:
    done = run("version")
    assert (done.returncode, done.stdout) == (0, f"ebfw {__version__}\n")
    for module in (
        "exporter.agent",
        "exporter.settings",
        "yaml",
        "bcc",
        "opentelemetry",
        "prometheus_client",
    ):
        assert f" {module}\n" not in done.stderr


def test_mistake_in_a_setting_needs_no_kernel() -> None:
    done = run(EBFW_OUTPUT="xml")
    assert done.returncode == 2
    assert "ebfw: EBFW_OUTPUT='xml': use text, json or none" in done.stderr
    assert " bcc\n" not in done.stderr
