"""Where the programs are that the tests run beside the agent (scripts/tools builds them). Not its job: running
them."""

from __future__ import annotations

from pathlib import Path

_LINKS = Path(__file__).resolve().parents[1] / ".venv" / "tools"


def tool(name: str) -> Path:
    """The executable `name`. Raises FileNotFoundError, with what to do, where it has not been built."""
    path = (_LINKS / name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not built: run `make install-test`")
    return path
