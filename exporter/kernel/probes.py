"""What is attached where, and what is lost without it: attach, adopt, replace, detach.

In: the settings that the kernel side needs. Out: a `Kernel`, whose maps the pipeline reads. Pins outlive the agent:
a start finds the maps, goes on with their counters, and replaces the programs when the build is another.
Not its job: what a record means.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from exporter import hpack
from exporter.errors import KernelError
from exporter.health import features
from exporter.kernel import bpf, build, maps, pins, wire
from exporter.kernel.ring import Ring

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

log = logging.getLogger(__name__)


class Probe(NamedTuple):
    name: str
    kind: int
    attach: int
    lost: str  # without it
    needed: bool = False


# In the order of a socket's life. All load on Linux 5.10 and later.
PROBES = (
    Probe("connect4", bpf.CGROUP_SOCK_ADDR, bpf.CONNECT4, "process and connect time of IPv4 connections"),
    Probe("connect6", bpf.CGROUP_SOCK_ADDR, bpf.CONNECT6, "process and connect time of IPv6 connections"),
    Probe("sendmsg4", bpf.CGROUP_SOCK_ADDR, bpf.SENDMSG4, "process and asked address of unconnected IPv4 UDP"),
    Probe("sendmsg6", bpf.CGROUP_SOCK_ADDR, bpf.SENDMSG6, "process and asked address of unconnected IPv6 UDP"),
    Probe("sockops", bpf.SOCK_OPS, bpf.SOCK_OPS_ATTACH, "TCP opens, closes, failures, RTT, retransmits"),
    Probe("egress", bpf.CGROUP_SKB, bpf.EGRESS, "everything", needed=True),
    Probe("ingress", bpf.CGROUP_SKB, bpf.INGRESS, "received bytes, DNS answers, refused connections", needed=True),
    Probe("release", bpf.CGROUP_SOCK, bpf.SOCK_RELEASE, "connections given up or without a route"),
)
# Pinned, but linked to nothing: tls_libraries.py and tls_processes.py put them where they are needed, for as long as
# the agent lives. By the feature that fails where one of them does not load. UPROBE_MULTI is a kind of link since
# Linux 6.6; older kernels load the programs all the same.
TLS_PROBES = tuple(
    Probe(name, bpf.KPROBE, bpf.UPROBE_MULTI, "HTTP requests inside TLS")
    for name in (
        "ssl_write",
        "ssl_write_ex",
        "ssl_write_return",
        "ssl_read",
        "ssl_read_ex",
        "ssl_read_return",
        "ssl_free",
    )
)
GO_PROBES = tuple(
    Probe(name, bpf.KPROBE, bpf.UPROBE_MULTI, "HTTP requests inside TLS of Go programs")
    for name in ("go_write", "go_read", "go_read_return", "go_close")
)
# In maps of their names, from which egress, ingress and what is on TLS libraries call them.
TAIL_PROBES = (
    Probe("frames_out", bpf.CGROUP_SKB, bpf.EGRESS, "HTTP/2 and gRPC requests"),
    Probe("frames_in", bpf.CGROUP_SKB, bpf.INGRESS, "answers to HTTP/2 and gRPC requests"),
    Probe("frames_tls", bpf.KPROBE, bpf.UPROBE_MULTI, "HTTP/2 and gRPC requests inside TLS"),
)
EXEC_PROBE = Probe("exec", bpf.RAW_TRACEPOINT, 0, "TLS libraries of processes that live a few seconds")
UNLINKED: dict[str, tuple[Probe, ...]] = {
    "tls_uprobes": TLS_PROBES,
    "tls_uprobes_go": GO_PROBES,
    "exec": (EXEC_PROBE,),
}

_SCOPES: tuple[tuple[str, str], ...] = (
    ("127.0.0.0/8", "loopback"),
    ("::1/128", "loopback"),
    ("10.0.0.0/8", "private"),
    ("172.16.0.0/12", "private"),
    ("192.168.0.0/16", "private"),
    ("100.64.0.0/10", "private"),
    ("fc00::/7", "private"),
    ("169.254.0.0/16", "link_local"),
    ("fe80::/10", "link_local"),
    ("224.0.0.0/4", "link_local"),
    ("ff00::/8", "link_local"),
)


def destination_entries(exclude: Iterable[Network]) -> dict[bytes, bytes]:
    """The destinations trie: scope and exclusion of every prefix that has either. A look-up finds the longest prefix
    alone, so each entry holds what all prefixes above it say, too."""
    scopes = [(ipaddress.ip_network(text), scope) for text, scope in _SCOPES]
    excluded = list(exclude)
    entries = {}
    for network in {network for network, _ in scopes} | set(excluded):
        scope = max(
            ((n.prefixlen, s) for n, s in scopes if n.version == network.version and network.subnet_of(n)),  # type: ignore[arg-type]  # same version
            default=(0, "internet"),
        )[1]
        hidden = any(n.version == network.version and network.subnet_of(n) for n in excluded)  # type: ignore[arg-type]  # same version
        entries[_address_key(network)] = struct.pack("<BBH", wire.SCOPES.index(scope), hidden, 0)
    return entries


def _address_key(network: Network) -> bytes:
    if network.version == 4:
        mapped = bytes(10) + b"\xff\xff" + network.network_address.packed
        return struct.pack("<I", 96 + network.prefixlen) + mapped
    return struct.pack("<I", network.prefixlen) + network.network_address.packed


def name_entries(suffixes: Iterable[str]) -> dict[bytes, bytes]:
    """The excluded names trie: each suffix reversed, with a final dot, so that it matches whole labels."""
    entries = {}
    for suffix in suffixes:
        key = suffix.lower().strip(".").encode()[::-1][: wire.NAME_SIZE - 1] + b"."
        entries[struct.pack("<I", len(key) * 8) + key.ljust(wire.NAME_SIZE, b"\0")] = struct.pack("<I", 1)
    return entries


def patch(instructions: bytes, fds: dict[str, int]) -> bytes:
    """Put descriptors where the compiled code has map numbers (64-bit loads with source register 1)."""
    code = bytearray(instructions)
    at = 0
    while at < len(code):
        wide = code[at] == 0x18
        if wide and code[at + 1] >> 4 == 1:
            (number,) = struct.unpack_from("<i", code, at + 4)
            struct.pack_into("<i", code, at + 4, fds[wire.MAP_IDS[number - 1]])
        at += 16 if wide else 8
    return bytes(code)


def load(probe: Probe, code: dict[str, bytes], fds: dict[str, int]) -> int:
    """Load one program; its descriptor. Raises bpf.Refused with the verifier's log, or a KernelError."""
    try:
        return bpf.prog_load(probe.kind, patch(code["ebfw_" + probe.name], fds), "ebfw_" + probe.name, probe.attach)
    except OSError as error:
        raise bpf.why(error, f"loading the BPF program {probe.name}") from None


def load_all(probes: Sequence[Probe], code: dict[str, bytes], fds: dict[str, int]) -> dict[str, int | KernelError]:
    """Each program's descriptor by its probe's name, or why there is none. Two at a time: the verifier needs half a
    second for egress, and takes no lock for who may load everything."""

    def one(probe: Probe) -> int | KernelError:
        try:
            return load(probe, code, fds)
        except KernelError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        loads = {probe.name: pool.submit(one, probe) for probe in sorted(probes, key=lambda probe: not probe.needed)}
    return {name: done.result() for name, done in loads.items()}


NO_HPACK = f"{TAIL_PROBES[0].lost} (libnghttp2.so.14 is missing; Debian's package is libnghttp2-14)"


def misfit(layout: int, flows: tuple[int, int], ring_bytes: tuple[int, int]) -> str:
    """How pinned maps were made, where that is not how they would be made now; "" where it is. Pairs: then, now."""
    if layout != wire.LAYOUT_VERSION:
        return f"by another version of ebfw (their layout is {layout}, this one's {wire.LAYOUT_VERSION})"
    settings = (("flows", "EBFW_FLOWS", flows), ("bytes of ring", "EBFW_RING_BYTES", ring_bytes))
    return " and ".join(
        f"with {then:,} {what} ({name} is {now} now)" for what, name, (then, now) in settings if then != now
    )


class Kernel:
    """The kernel side, attached. `maps` are descriptors by name."""

    def __init__(self, pin_path: Path, cgroup: Path, flows: int, ring_bytes: int, cache: Path | None = None) -> None:
        self.pin_path, self.cgroup, self.cache = pin_path, cgroup, cache
        self.flows, self.ring_bytes = flows, ring_bytes
        self.maps: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self.adopted_maps = self.adopted_programs = False
        self._lock: pins.Lock | None = None

    def attach(self, exclude: Iterable[Network], suffixes: Iterable[str]) -> None:
        """Adopt or create everything. On an error nothing new stays attached."""
        bpf.lift_memlock_limit()
        pins.prepare(self.pin_path)
        self._lock = pins.Lock(self.pin_path)
        try:
            self._open_maps()
            self._configure(exclude, suffixes)
            self._attach_programs()
        except OSError as error:
            self.close(unpin=not self.adopted_maps)
            raise bpf.why(error, "preparing the BPF maps and programs") from None
        except BaseException:
            self.close(unpin=not self.adopted_maps)
            raise
        self.ring = Ring(self.maps["records"], self.ring_bytes)
        self.executions = Ring(self.maps["executions"], maps.EXECUTION_BYTES)
        self.flow_table = maps.FlowTable(self.maps, self.flows)
        self.names = maps.NameTable(self.maps["names"])
        if self.adopted_maps:
            self.flow_table.recover()

    # --- maps -----------------------------------------------------------------------------------------------------

    def _stamp(self) -> tuple[int, int, int, int, bytes]:
        return (wire.LAYOUT_VERSION, self.flows, self.ring_bytes, 0, build.build_id())

    def _open_maps(self) -> None:
        specs = maps.specs(self.flows, self.ring_bytes)
        found = self._adopt_maps(specs)
        if found is not None:
            self.maps, self.adopted_maps = found, True
            return
        pins.remove_entries(self.pin_path)  # of another layout or size, or of a start that was cut off
        for name, spec in specs.items():
            self.maps[name] = maps.create(spec)
        slots = self.flows + 1
        bpf.map_push_range(self.maps["free_slots"], 1, slots)
        bpf.map_push_range(self.maps["spare_slots"], slots, maps.slots_of(self.flows))
        bpf.map_push_range(self.maps["free_scratch"], 0, maps.SCRATCH)
        for name, fd in self.maps.items():
            if name != "stamp":
                bpf.pin(fd, str(self.pin_path / f"map_{name}"))
        bpf.map_update(self.maps["stamp"], bytes(4), maps.STAMP.pack(*self._stamp()[:4], bytes(32)))
        bpf.pin(self.maps["stamp"], str(self.pin_path / "map_stamp"))

    def _adopt_maps(self, specs: dict[str, maps.MapSpec]) -> dict[str, int] | None:
        """The maps that are pinned; None where there are none that fit, and a warning where those had counted."""
        if not (self.pin_path / "map_stamp").exists():
            return None  # or of a start that was cut off, and counted nothing
        found: dict[str, int] = {}
        why = "by another version of ebfw, or are not whole"
        try:
            for name in specs:
                found[name] = bpf.get_pinned(str(self.pin_path / f"map_{name}"))
            raw = bpf.map_lookup(found["stamp"], bytes(4), maps.STAMP.size) or b""
            layout, flows, ring_bytes, *_ = maps.STAMP.unpack(raw)
            why = misfit(layout, (flows, self.flows), (ring_bytes, self.ring_bytes))
            if not why:
                return found
        except (OSError, struct.error):
            pass
        for fd in found.values():
            os.close(fd)
        log.warning("counters pinned at %s were made %s; they begin anew", self.pin_path, why)
        return None

    def _configure(self, exclude: Iterable[Network], suffixes: Iterable[str]) -> None:
        settings = struct.pack("<IIII", maps.slots_of(self.flows), self.ring_bytes // 2, 0, 0)
        bpf.map_update(self.maps["settings"], bytes(4), settings)
        self._fill("destinations", destination_entries(exclude))
        self._fill("excluded_names", name_entries(suffixes))
        folder = os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            bpf.map_update(self.maps["scope"], bytes(4), struct.pack("<I", folder))
        finally:
            os.close(folder)

    def _fill(self, name: str, entries: dict[bytes, bytes]) -> None:
        """Make the map hold these entries and no others. What stays is never absent."""
        fd = self.maps[name]
        for key, value in entries.items():
            bpf.map_update(fd, key, value)
        for key in [key for key in bpf.map_keys(fd, bpf.map_info(fd).key) if key not in entries]:
            bpf.map_delete(fd, key)

    # --- programs -------------------------------------------------------------------------------------------------

    def _attach_programs(self) -> None:
        cgroup = os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            cgroup_id = os.stat(self.cgroup).st_ino
            raw = bpf.map_lookup(self.maps["stamp"], bytes(4), maps.STAMP.size) or bytes(maps.STAMP.size)
            if maps.STAMP.unpack(raw)[4] == build.build_id() and self._links_stand(cgroup_id):
                self.adopted_programs = True
                for probe in PROBES:
                    features.set(probe.name, True, "")
                features.set("http2", hpack.available(), NO_HPACK)
                self._open_unlinked()
                return
            code = build.programs(self.cache)
            tails = TAIL_PROBES if hpack.available() else ()
            loaded = load_all((*PROBES, *tails), code, self.maps)
            try:
                self._set_tail_programs(loaded)  # first: what calls them may find them
                for probe in PROBES:
                    self._attach_one(probe, loaded[probe.name], cgroup, cgroup_id)
            finally:
                for program in loaded.values():
                    if isinstance(program, int):
                        os.close(program)
            self._load_unlinked(code)
            bpf.map_update(self.maps["stamp"], bytes(4), maps.STAMP.pack(*self._stamp()))
        finally:
            os.close(cgroup)

    def _links_stand(self, cgroup_id: int) -> bool:
        for probe in PROBES:
            try:
                link = bpf.get_pinned(self._link_path(probe))
            except OSError:
                return False
            try:
                if bpf.link_info(link).cgroup_id != cgroup_id:
                    return False
            finally:
                os.close(link)
        # Where the library for header blocks has come or gone since, the tail programs must do the same.
        return all((self._tail_program(probe) is not None) == hpack.available() for probe in TAIL_PROBES)

    def _tail_program(self, probe: Probe) -> bytes | None:
        return bpf.map_lookup(self.maps[probe.name], bytes(4), 4)

    def _set_tail_programs(self, loaded: Mapping[str, int | KernelError]) -> None:
        features.set("http2", hpack.available(), NO_HPACK)
        for probe in TAIL_PROBES:
            program = loaded.get(probe.name)
            if isinstance(program, int):
                bpf.map_update(self.maps[probe.name], bytes(4), struct.pack("<I", program))
            elif program is not None:
                features.set("http2", False, f"{probe.lost} ({program})")
            elif self._tail_program(probe) is not None:
                bpf.map_delete(self.maps[probe.name], bytes(4))

    def _link_path(self, probe: Probe) -> str:
        return str(self.pin_path / f"link_{probe.name}")

    def _attach_one(self, probe: Probe, program: int | KernelError, cgroup: int, cgroup_id: int) -> None:
        if isinstance(program, KernelError):
            if probe.needed:
                raise program
            features.set(probe.name, False, f"{probe.lost} ({program})")
            return
        self._link(probe, program, cgroup, cgroup_id)
        features.set(probe.name, True, "")

    def _link(self, probe: Probe, program: int, cgroup: int, cgroup_id: int) -> None:
        path = self._link_path(probe)
        try:
            link = bpf.get_pinned(path)
        except OSError:
            link = -1
        if link >= 0:
            try:
                if bpf.link_info(link).cgroup_id == cgroup_id:
                    bpf.link_update(link, program)
                    return
                bpf.link_detach(link)
                os.unlink(path)
            finally:
                os.close(link)
        link = bpf.link_create(program, cgroup, probe.attach)
        try:
            bpf.pin(link, path)
        finally:
            os.close(link)

    def _load_unlinked(self, code: dict[str, bytes]) -> None:
        for feature, probes in UNLINKED.items():
            try:
                for probe in probes:
                    path = self.pin_path / f"prog_{probe.name}"
                    path.unlink(missing_ok=True)
                    program = self.programs[probe.name] = load(probe, code, self.maps)
                    bpf.pin(program, str(path))
            except KernelError as error:
                self._without(feature, str(error))

    def _open_unlinked(self) -> None:
        for feature, probes in UNLINKED.items():
            try:
                for probe in probes:
                    self.programs[probe.name] = bpf.get_pinned(str(self.pin_path / f"prog_{probe.name}"))
            except OSError:
                self._without(feature, "a program is not pinned")

    def _without(self, feature: str, why: str) -> None:
        """Without one of a feature's programs, none of them."""
        for probe in UNLINKED[feature]:
            if probe.name in self.programs:
                os.close(self.programs.pop(probe.name))
        features.set(feature, False, f"{UNLINKED[feature][0].lost} ({why})")

    # --- the rest of its life -------------------------------------------------------------------------------------

    def tallies(self) -> dict[tuple[str, str], int]:
        """Losses by (stage, cause), and ("filtered", kind): totals since the maps were made."""
        totals = zip(wire.TALLIES, maps.read_tallies(self.maps["tallies"]), strict=True)
        return {cause: total for cause, total in totals if cause[0] != "made"}

    def received(self, cookie: int) -> tuple[int, int] | None:
        """Of an HTTP/1 response that comes in several pieces: how many bytes have come, and when the last did."""
        found = bpf.map_lookup(self.maps["received"], struct.pack("<Q", cookie), 16)
        return struct.unpack("<QQ", found) if found else None

    def memory(self) -> dict[str, int]:
        """Bytes by map, as the kernel accounts them."""
        return {name: bpf.map_memory(fd) for name, fd in self.maps.items()}

    def close(self, unpin: bool) -> None:
        """Let go. With `unpin` everything is detached and removed; else the kernel goes on counting."""
        for part in ("ring", "executions", "flow_table"):
            if hasattr(self, part):
                getattr(self, part).close()
        for fd in (*self.maps.values(), *self.programs.values()):
            os.close(fd)
        self.maps, self.programs = {}, {}
        if self._lock is not None:
            lock, self._lock = self._lock, None
            if unpin:
                pins.remove(self.pin_path, lock.release)
            else:
                lock.release()
