"""The lock on a pin path: one holder, and who it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import PinError
from exporter.kernel.pins import Lock

HOLD = "import sys; from pathlib import Path; from exporter.kernel.pins import Lock; lock = Lock(Path(sys.argv[1]))"


def test_who_has_the_lock_is_named(tmp_path: Path) -> None:
    code = f"{HOLD}; print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(PinError) as caught:
            Lock(tmp_path, "Wait.")
        assert str(caught.value) == f"another ebfw runs with the pin path {tmp_path} (process {other.pid}). Wait."
        other.kill()
    Lock(tmp_path).release()
