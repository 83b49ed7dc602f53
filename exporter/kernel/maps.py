"""The maps: their sizes, and typed access to what they hold. bpf/maps.h says what each is for.

In: descriptors of pinned maps. Out: flows with their counters, names, losses. Counters are read from mapped memory,
without a system call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import NamedTuple
from zlib import crc32

from exporter.kernel import bpf, wire

SPARE_SLOTS = 1024  # for ~other rows, one a workload
EXECUTION_BYTES = 1 << 16  # 2,730 programs that began and were not looked at yet
SCRATCH = 256  # packets that are read for a name at the same moment: CPUs, and the interrupts on top of each

# What made these pins: layout version, flows, ring bytes, padding, build id. Written last: without it pins are debris.
STAMP = struct.Struct("<IIII32s")
_COUNTS = struct.Struct("<12Q")


class MapSpec(NamedTuple):
    name: str
    kind: int
    key: int
    value: int
    entries: int
    flags: int = 0


def slots_of(flows: int) -> int:
    """All slots: 0 (node-wide overflow), one a flow, and the spare ones."""
    return flows + SPARE_SLOTS


def specs(flows: int, ring_bytes: int) -> dict[str, MapSpec]:
    """Every map by name, in the order of enum map_id. About 29 MiB at 65,536 flows and a 4 MiB ring; only
    `tallies`, `accepting` and `inbound` grow with the number of CPUs, by 1.7 KB each."""
    size = ctypes.sizeof
    slots = slots_of(flows)
    table = (
        MapSpec("settings", bpf.ARRAY, 4, size(wire.Settings), 1),
        MapSpec("sockets", bpf.SK_STORAGE, 4, wire.SOCKET_SIZE, 0, bpf.NO_PREALLOC),
        MapSpec("inspections", bpf.SK_STORAGE, 4, wire.INSPECTION_SIZE, 0, bpf.NO_PREALLOC),
        MapSpec("scratch", bpf.ARRAY, 4, wire.SCRATCH_SIZE, SCRATCH),
        MapSpec("free_scratch", bpf.STACK, 0, 4, SCRATCH),
        MapSpec("flows", bpf.HASH, size(wire.FlowKey), size(wire.FlowRow), slots),
        MapSpec("traffic", bpf.ARRAY, 4, size(wire.Traffic), slots * wire.STRIPES, bpf.MMAPABLE),
        MapSpec("connections", bpf.ARRAY, 4, size(wire.Connections), slots, bpf.MMAPABLE),
        MapSpec("free_slots", bpf.STACK, 0, 4, flows),
        MapSpec("spare_slots", bpf.STACK, 0, 4, SPARE_SLOTS),
        MapSpec("names", bpf.HASH, 8, wire.NAME_SIZE, 8192, bpf.NO_PREALLOC),
        MapSpec("destinations", bpf.LPM_TRIE, size(wire.AddressKey), size(wire.Destination), 4096, bpf.NO_PREALLOC),
        MapSpec("excluded_names", bpf.LPM_TRIE, size(wire.NameKey), 4, 1024, bpf.NO_PREALLOC),
        MapSpec("tallies", bpf.PERCPU_ARRAY, 4, 8, len(wire.TALLIES)),
        MapSpec("scope", bpf.CGROUP_ARRAY, 4, 4, 1),
        MapSpec("records", bpf.RINGBUF, 0, 0, ring_bytes),
        MapSpec("received", bpf.LRU_HASH, 8, size(wire.Received), 8192),
        MapSpec("tls_streams", bpf.LRU_HASH, wire.TLS_KEY_SIZE, wire.TLS_STREAM_SIZE, 8192),
        MapSpec("tls_calls", bpf.LRU_HASH, 8, wire.TLS_CALL_SIZE, 8192),
        MapSpec("executions", bpf.RINGBUF, 0, 0, EXECUTION_BYTES),
        MapSpec("http2", bpf.SK_STORAGE, 4, wire.HTTP2_SIZE, 0, bpf.NO_PREALLOC),
        MapSpec("frames_out", bpf.PROG_ARRAY, 4, 4, 1),
        MapSpec("frames_in", bpf.PROG_ARRAY, 4, 4, 1),
        MapSpec("frames_tls", bpf.PROG_ARRAY, 4, 4, 1),
        MapSpec("tls_http2", bpf.LRU_HASH, wire.TLS_KEY_SIZE, wire.HTTP2_SIZE, 4096),
        MapSpec("accepting", bpf.PERCPU_ARRAY, 4, wire.ACCEPTING_SIZE, 1),
        MapSpec("inbound", bpf.PERCPU_ARRAY, 4, wire.INBOUND_SIZE, wire.INBOUND_CACHE),
    )
    assert tuple(spec.name for spec in table) == wire.MAP_IDS
    own = (  # no program uses these: the agent's memory beyond its own life
        MapSpec("folded", bpf.HASH, size(wire.FlowKey), _COUNTS.size, SPARE_SLOTS, bpf.NO_PREALLOC),
        MapSpec("stamp", bpf.ARRAY, 4, STAMP.size, 1),
    )
    return {spec.name: spec for spec in (*table, *own)}


def create(spec: MapSpec) -> int:
    """The new map's descriptor."""
    if spec.kind != bpf.SK_STORAGE:
        return bpf.map_create(spec.kind, spec.key, spec.value, spec.entries, spec.flags, spec.name)
    btf = bpf.btf_for_storage(spec.value)
    try:
        return bpf.map_create(spec.kind, spec.key, spec.value, 0, spec.flags, spec.name, (btf, 1, 3))
    finally:
        os.close(btf)


def mapped(fd: int, length: int) -> mmap.mmap:
    page = mmap.PAGESIZE
    return mmap.mmap(fd, (length + page - 1) // page * page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


class FlowKey(NamedTuple):
    """struct flow_key. `role` and `kind` are numbers as in wire.h, `peer` is 16 bytes."""

    cgroup: int
    name: int
    peer: bytes
    port: int
    transport: int
    role: int
    scope: int
    kind: int
    redirected: int
    pad: int


class Row(NamedTuple):
    """A flow that moved: its key, since when it counts (CLOCK_MONOTONIC ns), by how much its counters moved, in the
    order of struct traffic (four) and struct connections (eight)."""

    key: FlowKey
    since_ns: int
    delta: tuple[int, ...]


_TRAFFIC = struct.Struct("<QQQQII")
_NAME = struct.Struct("<Q")
_CONNECTIONS = struct.Struct("<8Q")
_ZERO = (0,) * 12
_NOTHING = _COUNTS.pack(*_ZERO)
_NOBODY = wire.FLOW_KEY.pack(0, 0, bytes(16), 0, 0, 0, 0, wire.FLOW_OTHER, 0, 0)
_MADE = wire.TALLIES.index(("made", "flows"))
_GROUP = 16  # slots compared at once


class _Live:
    """A slot that a flow has. Key and totals are kept packed: as integers they take four times the memory."""

    __slots__ = ("generation", "moved", "packed_key", "packed_totals", "since")

    def __init__(self, key: bytes, generation: int, since: int, now: float) -> None:
        self.packed_key, self.generation, self.since, self.moved = key, generation, since, now
        self.packed_totals = _NOTHING

    @property
    def key(self) -> FlowKey:
        return FlowKey._make(wire.FLOW_KEY.unpack(self.packed_key))


class FlowTable:
    """The kernel's counters, read as deltas; frees the slots of flows that went idle.

    A slot is freed in two steps, so that no packet is lost or counted twice: its row is deleted and its generation
    raised, after which every socket looks its flow up anew; what the slot holds a grace period later is final. It
    goes to the workload's ~other total, which is pinned too: no total ever falls, not even over a restart.
    """

    def __init__(self, fds: dict[str, int], flows: int) -> None:
        self._fds = fds
        self.flows, self._slots = flows, slots_of(flows)
        self._traffic = mapped(fds["traffic"], self._slots * wire.STRIPES * _TRAFFIC.size)
        self._connections = mapped(fds["connections"], self._slots * _CONNECTIONS.size)
        self._reader = bpf.BatchReader(fds["flows"], wire.FLOW_KEY.size, wire.FLOW_ROW.size)
        self._live: dict[int, _Live] = {0: _Live(_NOBODY, 0, 0, 0.0)}
        self._leaving: dict[int, _Live] = {}
        self._traffic_view, self._connections_view = memoryview(self._traffic), memoryview(self._connections)
        self._sums: list[int] = []  # by group
        self._fresh: list[int] = []
        self._made = -1
        self.first_read = True

    def __len__(self) -> int:
        return len(self._live) - 1

    def read(self, now: float, since_start: int) -> list[Row]:
        """The rows that moved since the last read; the first time, all of them with all that they hold.

        `now`: seconds, any monotonic clock. `since_start`: CLOCK_MONOTONIC ns that the node-wide row counts from."""
        rows: list[Row] = []
        self._live[0].since = self._live[0].since or since_start
        if self.first_read:
            self.first_read = False
            # Before the slots that recover() found are folded, or these would count twice.
            self._take_folded(rows, since_start)
        self._finish_leaving(rows)
        self._discover(now)
        for slot in self._changed_slots():
            live = self._live.get(slot)
            if live is not None:
                self._read_slot(slot, live, now, rows)
        return rows

    def _discover(self, now: float) -> None:
        """New rows, and rows that have taken a slot over."""
        made = read_tallies(self._fds["tallies"])[_MADE]  # before the table: what is made meanwhile counts next time
        if made == self._made:
            return
        self._made = made
        live, key_size = self._live, wire.FLOW_KEY.size
        for keys, values, count in self._reader.chunks():
            for index, (slot, generation, since) in enumerate(
                wire.FLOW_ROW.iter_unpack(values[: count * wire.FLOW_ROW.size])
            ):
                known = live.get(slot)
                if known is None or known.generation != generation:
                    key = bytes(keys[index * key_size : (index + 1) * key_size])
                    live[slot] = _Live(key, generation, since, now)
                    self._fresh.append(slot)  # whatever it holds is new to us

    def _changed_slots(self) -> list[int]:
        """Slots in groups whose memory differs from the last read, by checksum: a copy of the memory would double what
        it takes, and a change that a checksum misses (one in 2^32) is read with the next. Only slots up to the highest
        in use are touched: untouched pages of a mapped array cost no memory."""
        top = max(self._live) + 1
        size, other = _TRAFFIC.size, _CONNECTIONS.size
        traffic, connections, sums = self._traffic_view, self._connections_view, self._sums
        starts = [stripe * self._slots * size for stripe in range(wire.STRIPES)]
        changed = self._fresh
        self._fresh = []
        for number, first in enumerate(range(0, top, _GROUP)):
            after = first + _GROUP
            total = crc32(connections[first * other : after * other])
            for start in starts:
                total = crc32(traffic[start + first * size : start + after * size], total)
            if number == len(sums):
                sums.append(~total)
            if sums[number] != total:
                sums[number] = total
                changed.extend(range(first, min(after, top)))
        return changed

    def _totals(self, slot: int) -> tuple[int, ...]:
        tx = tx_packets = rx = rx_packets = 0
        for stripe in range(wire.STRIPES):
            a, b, c, d, _, _ = _TRAFFIC.unpack_from(self._traffic, (stripe * self._slots + slot) * _TRAFFIC.size)
            tx += a
            tx_packets += b
            rx += c
            rx_packets += d
        return (tx, tx_packets, rx, rx_packets, *_CONNECTIONS.unpack_from(self._connections, slot * _CONNECTIONS.size))

    def _read_slot(self, slot: int, live: _Live, now: float, rows: list[Row]) -> None:
        totals = self._totals(slot)
        packed = _COUNTS.pack(*totals)
        if packed == live.packed_totals:
            return
        rows.append(Row(live.key, live.since, tuple(map(int.__sub__, totals, _COUNTS.unpack(live.packed_totals)))))
        live.packed_totals = packed
        live.moved = now

    def names_in_use(self) -> set[int]:
        """Ids of the names that flows carry."""
        names = (_NAME.unpack_from(live.packed_key, 8)[0] for live in (*self._live.values(), *self._leaving.values()))
        return {name for name in names if name}

    # --- freeing --------------------------------------------------------------------------------------------------

    def free_idle(self, now: float, idle_seconds: float, most: int = 2000) -> int:
        """Begin to free flows that have not moved for so long; how many. Their sockets may still be open: the next
        packet finds the flow a slot again."""
        begun = 0
        for slot, live in list(self._live.items()):
            if begun == most:
                break
            if slot == 0 or slot > self.flows or now - live.moved < idle_seconds or slot in self._leaving:
                continue
            bpf.map_delete(self._fds["flows"], live.packed_key)
            self._raise_generation(slot)
            self._leaving[slot] = live
            del self._live[slot]
            begun += 1
        return begun

    def _raise_generation(self, slot: int) -> None:
        for stripe in range(wire.STRIPES):
            at = (stripe * self._slots + slot) * _TRAFFIC.size + 32
            (generation,) = struct.unpack_from("<I", self._traffic, at)
            struct.pack_into("<I", self._traffic, at, (generation + 1) & 0xFFFFFFFF)

    def _finish_leaving(self, rows: list[Row]) -> None:
        for slot, live in self._leaving.items():
            self._retire(slot, live, rows)
        self._leaving.clear()

    def _retire(self, slot: int, live: _Live, rows: list[Row]) -> None:
        size, slots = _TRAFFIC.size, self._slots
        totals = self._totals(slot)
        before = _COUNTS.unpack(live.packed_totals)
        if totals != before:
            rows.append(Row(live.key, live.since, tuple(map(int.__sub__, totals, before))))
        self._fold(live.key, totals)
        for stripe in range(wire.STRIPES):
            at = (stripe * slots + slot) * size
            self._traffic[at : at + 32] = bytes(32)
        self._connections[slot * _CONNECTIONS.size : (slot + 1) * _CONNECTIONS.size] = bytes(_CONNECTIONS.size)
        struct.pack_into("<I", self._traffic, slot * size + 36, 0)  # not taken
        bpf.map_update(self._fds["free_slots"], b"", struct.pack("<I", slot))

    def _fold(self, key: FlowKey, totals: tuple[int, ...]) -> None:
        packed = wire.FLOW_KEY.pack(key.cgroup, 0, bytes(16), 0, key.transport, key.role, 0, wire.FLOW_OTHER, 0, 0)
        old = bpf.map_lookup(self._fds["folded"], packed, _COUNTS.size)
        values = _COUNTS.unpack(old) if old else _ZERO
        try:
            bpf.map_update(self._fds["folded"], packed, _COUNTS.pack(*map(int.__add__, values, totals)))
        except OSError:
            # More workloads than the table holds have come and gone: the node's row takes it.
            old = bpf.map_lookup(self._fds["folded"], _NOBODY, _COUNTS.size)
            values = _COUNTS.unpack(old) if old else _ZERO
            bpf.map_update(self._fds["folded"], _NOBODY, _COUNTS.pack(*map(int.__add__, values, totals)))

    def _take_folded(self, rows: list[Row], since: int) -> None:
        """After a restart: what was folded before counts on."""
        for raw in bpf.map_keys(self._fds["folded"], wire.FLOW_KEY.size):
            value = bpf.map_lookup(self._fds["folded"], raw, _COUNTS.size)
            if value:
                rows.append(Row(FlowKey._make(wire.FLOW_KEY.unpack(raw)), since, _COUNTS.unpack(value)))

    def recover(self) -> int:
        """After an agent was killed while it freed: slots that are taken and have no row. How many were freed."""
        used = {0}
        for _, values, count in self._reader.chunks():
            used.update(row[0] for row in wire.FLOW_ROW.iter_unpack(values[: count * wire.FLOW_ROW.size]))
        orphans = [
            slot
            for slot in range(1, self.flows + 1)
            if slot not in used and struct.unpack_from("<I", self._traffic, slot * _TRAFFIC.size + 36)[0]
        ]
        for slot in orphans:
            self._raise_generation(slot)
            self._leaving[slot] = _Live(_NOBODY, 0, 0, 0.0)
        return len(orphans)

    def close(self) -> None:
        self._traffic_view.release()
        self._connections_view.release()
        self._traffic.close()
        self._connections.close()


_NAMES_CACHED = 2048


class NameTable:
    """Names by id, as the kernel saved them; the last few thousand are kept here, the others cost a system call."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._names: dict[int, str] = {}

    def get(self, identity: int) -> str:
        """The name, "" for id 0 and for one that found no room."""
        name = self._names.get(identity)
        if name is None:
            if not identity:
                return ""
            raw = bpf.map_lookup(self._fd, struct.pack("<Q", identity), wire.NAME_SIZE)
            name = forwards(raw) if raw else ""
            if len(self._names) >= _NAMES_CACHED:
                self._names.clear()
            self._names[identity] = name
        return name

    def prune(self, used: set[int]) -> int:
        """Delete the names that no flow carries; how many. Call it when flows were freed."""
        gone = 0
        for key in list(bpf.map_keys(self._fd, 8)):
            (identity,) = struct.unpack("<Q", key)
            if identity not in used:
                gone += bpf.map_delete(self._fd, key)
                self._names.pop(identity, None)
        return gone


def forwards(reversed_name: bytes) -> str:
    """ "moc.elpmaxe." and zeros -> "example.com"."""
    return reversed_name.split(b"\0", 1)[0].rstrip(b".")[::-1].decode("ascii", "backslashreplace")


def possible_cpus() -> int:
    """How many values a per-CPU map has for each key."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as text:
        return int(text.read().strip().replace(",", "-").split("-")[-1]) + 1


def read_tallies(fd: int) -> list[int]:
    """Sums over all possible CPUs, in the order of enum tally."""
    cpus = possible_cpus()
    totals = []
    for index in range(len(wire.TALLIES)):
        raw = bpf.map_lookup(fd, struct.pack("<I", index), 8 * cpus) or bytes(8)
        totals.append(sum(value for (value,) in struct.iter_unpack("<Q", raw)))
    return totals
