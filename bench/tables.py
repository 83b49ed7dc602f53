"""What the maps take in the kernel, and how long it takes to read all counters when the table is full."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.feed import Feed
from bench.packets import talks
from bench.report import Row, progress, single
from bench.world import FLOWS, attached, cpus, pinned_to
from exporter.kernel import bpf, maps
from exporter.kernel.probes import Kernel
from lab import Cgroup

_MANY = 64


def rows(quick: bool) -> Iterator[Row]:
    with Cgroup("bench") as cgroup, attached(cgroup.path) as kernel:
        yield from _memory(kernel)
        yield from _reading(kernel, 3 if quick else 15)


def _memory(kernel: Kernel) -> Iterator[Row]:
    sizes = kernel.memory()
    total = sum(sizes.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    note = ", ".join(f"{name} {sizes[name] / 2**20:.1f}" for name in largest)
    yield Row("maps, all", total / 2**20, "MiB", bound=32, bound_of="value", note=note)
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as text:
        here = int(text.read().strip().replace(",", "-").split("-")[-1]) + 1
    # What grows with CPUs: per-CPU arrays, and one spare element a CPU in preallocated hashes.
    growth = sum(
        spec.entries * (spec.value + 7 & ~7)
        if spec.kind == bpf.PERCPU_ARRAY
        else sizes[spec.name] / spec.entries
        if spec.kind == bpf.HASH and not spec.flags & bpf.NO_PREALLOC
        else 0
        for spec in maps.specs(kernel.flows, kernel.ring_bytes).values()
    )
    then = (total + growth * (_MANY - here)) / 2**20
    yield Row(
        f"maps, all, computed for {_MANY} CPUs",
        then,
        "MiB",
        f"on {here} CPUs",
        total / 2**20,
        then / (total / 2**20),
        32,
        "value",
        note=f"{growth:.0f} bytes more for each CPU",
    )


def _reading(kernel: Kernel, rounds: int) -> Iterator[Row]:
    flows = talks(FLOWS, [kernel.cgroup.stat().st_ino])
    feed = Feed(kernel.maps)
    progress.step(f"filling {FLOWS:,} rows")
    feed.flows(flows)
    feed.move(0, FLOWS)
    table = kernel.flow_table
    try:
        with pinned_to(cpus()[1]):
            first = _read(table, FLOWS)
            every, some, none = [], [], []
            for number in range(rounds):
                feed.move(0, FLOWS)
                every.append(_read(table, FLOWS))
                feed.move(number * 1000, FLOWS // 100)
                some.append(_read(table, FLOWS // 100))
                none.append(_read(table, 0))
                progress.step(f"reading {FLOWS:,} rows, round {number + 1} of {rounds}")
    finally:
        feed.close()
    what = f"reading all counters, {FLOWS:,} flows"
    yield single(f"{what}, all moved", every, "ms", note=f"the first read, new to the agent: {first:.0f} ms")
    yield single(f"{what}, 1 % moved", some, "ms", note="every 5 s in the agent")
    yield single(f"{what}, none moved", none, "ms")


def _read(table: maps.FlowTable, expected: int) -> float:
    began = time.perf_counter()
    rows = table.read(time.monotonic(), 0)
    took = (time.perf_counter() - began) * 1000
    if len(rows) != expected:
        raise RuntimeError(f"{len(rows)} rows moved, {expected} were expected")
    return took
