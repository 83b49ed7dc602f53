"""Why pinned maps cannot be adopted, in words. That they are not is tests/pipeline/test_restart.py's."""

from __future__ import annotations

from exporter.kernel import wire
from exporter.kernel.probes import misfit

LAYOUT = wire.LAYOUT_VERSION


def test_maps_that_fit_and_maps_that_do_not() -> None:
    assert misfit(LAYOUT, (1024, 1024), (65536, 65536)) == ""
    assert misfit(LAYOUT, (65536, 4096), (65536, 65536)) == "with 65,536 flows (EBFW_FLOWS is 4096 now)"
    assert misfit(LAYOUT, (65536, 4096), (65536, 131072)) == (
        "with 65,536 flows (EBFW_FLOWS is 4096 now) and with 65,536 bytes of ring (EBFW_RING_BYTES is 131072 now)"
    )
    assert f"layout is {LAYOUT - 1}, this one's {LAYOUT}" in misfit(LAYOUT - 1, (1024, 4096), (65536, 65536))
