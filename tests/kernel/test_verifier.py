"""How much of the verifier's patience each program takes. It gives up after a million instructions, on every kernel;
what comes near that on one is refused by another."""

from __future__ import annotations

import ctypes
import os
import re
import struct

import pytest

from exporter.kernel import bpf, maps, probes

MOST = 700_000
_PROG_LOAD, _STATISTICS = 5, 4

pytestmark = pytest.mark.kernel


def processed(probe, instructions):
    """Instructions that the verifier went through, those of each path counted anew."""
    code, words = ctypes.create_string_buffer(instructions, len(instructions)), ctypes.create_string_buffer(1 << 16)
    licence = ctypes.create_string_buffer(bpf.LICENSE)
    attributes = struct.pack(
        "<IIQQIIQII16sII",
        probe.kind,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        _STATISTICS,
        len(words),
        ctypes.addressof(words),
        0,
        0,
        b"ebfw_verifier",
        0,
        probe.attach,
    )
    os.close(bpf._call(_PROG_LOAD, attributes)[0])
    return int(re.search(rb"processed (\d+) insns", words.value)[1])


@pytest.mark.core
def test_no_program_comes_near_what_the_verifier_takes(programs):
    everything = (*probes.PROBES, *probes.TAIL_PROBES, *probes.TLS_PROBES, *probes.GO_PROBES, probes.EXEC_PROBE)
    bpf.lift_memlock_limit()
    fds = {name: maps.create(spec) for name, spec in maps.specs(1024, 1 << 20).items()}
    try:
        found = {p.name: processed(p, probes.patch(programs["ebfw_" + p.name], fds)) for p in everything}
    finally:
        for fd in fds.values():
            os.close(fd)
    assert len(found) == len(programs)
    assert {name: count for name, count in found.items() if count > MOST} == {}
