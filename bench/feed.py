"""Fills an agent's maps as the kernel side would: names, flows with counters that move.

In: descriptors of the maps. Out: nothing. What BPF does for real traffic is done from here so that the load on the
agent is steady and exact, and costs this machine next to nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence

from bench import raw
from bench.packets import Talk
from exporter.kernel import bpf, maps, wire

_TRAFFIC = struct.Struct("<QQQQ")


class Feed:
    """`names` and `flows` once, then `move` as often as wanted."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self._fds = fds
        info = bpf.map_info(fds["connections"])
        self._slots_total = info.entries
        self._slots: list[int] = []
        self._traffic: mmap.mmap | None = None

    def names(self, flows: Sequence[Talk]) -> None:
        """As many as the table takes."""
        for flow in flows[: bpf.map_info(self._fds["names"]).entries]:
            bpf.map_update(
                self._fds["names"],
                struct.pack("<Q", flow.name_id),
                flow.reversed_name().ljust(wire.NAME_SIZE, b"\0"),
            )

    def flows(self, flows: Sequence[Talk]) -> None:
        """A row and a slot for each."""
        traffic = self._mapped()
        now = time.monotonic_ns()
        for flow in flows:
            slot = raw.pop(self._fds["free_slots"])
            generation, _ = struct.unpack_from("<II", traffic, slot * 40 + 32)
            struct.pack_into("<I", traffic, slot * 40 + 36, 1)
            key = wire.FLOW_KEY.pack(flow.cgroup, flow.name_id, flow.peer, 443, 6, 1, 0, wire.FLOW_PEER, 0, 0)
            bpf.map_update(self._fds["flows"], key, wire.FLOW_ROW.pack(slot, generation, now))
            self._slots.append(slot)
        self._made(len(flows))

    def _made(self, count: int) -> None:
        """Say that there are new rows, as the kernel does: the agent reads the table only then."""
        place = struct.pack("<I", wire.TALLIES.index(("made", "flows")))
        cpus = maps.possible_cpus()
        values = list(
            struct.unpack(f"<{cpus}Q", bpf.map_lookup(self._fds["tallies"], place, 8 * cpus) or bytes(8 * cpus))
        )
        values[0] += count
        bpf.map_update(self._fds["tallies"], place, struct.pack(f"<{cpus}Q", *values))

    def move(self, first: int, count: int) -> None:
        """The counters of `count` flows from the `first` on, around the corner where there are no more."""
        traffic, slots, known = self._mapped(), self._slots, len(self._slots)
        for number in range(first, first + count):
            slot = slots[number % known]
            at = (slot + number % wire.STRIPES * self._slots_total) * 40
            tx, tx_packets, rx, rx_packets = _TRAFFIC.unpack_from(traffic, at)
            _TRAFFIC.pack_into(traffic, at, tx + 900, tx_packets + 7, rx + 5000, rx_packets + 8)

    def _mapped(self) -> mmap.mmap:
        if self._traffic is None:
            self._traffic = maps.mapped(self._fds["traffic"], self._slots_total * wire.STRIPES * 40)
        return self._traffic

    def close(self) -> None:
        if self._traffic is not None:
            self._traffic.close()


class AgentMaps:
    """Descriptors of a running agent's maps by name; a context manager that closes them."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.fds = {name: bpf.get_pinned(f"{folder}/map_{name}") for name in names}

    def __enter__(self) -> dict[str, int]:
        return self.fds

    def __exit__(self, *_: object) -> None:
        for fd in self.fds.values():
            os.close(fd)
