from __future__ import annotations

from collections.abc import Callable

import pytest

from exporter.health import Stage, losses
from tests.unit.host_frames import Walk, compiled

Lost = Callable[[Stage, str], int]


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return compiled(tmp_path_factory.mktemp("frames"))


@pytest.fixture
def lost() -> Lost:
    """lost(stage, cause): how many since the test began."""
    before = losses.snapshot()
    return lambda stage, cause: losses.snapshot().get((stage, cause), 0) - before.get((stage, cause), 0)
