from __future__ import annotations

import pytest

from tests.unit.host_frames import Walk, compiled


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return compiled(tmp_path_factory.mktemp("frames"))
