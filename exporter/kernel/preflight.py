"""`ebfw check`: what this host allows, feature by feature, and what is lost where it does not.

In: where to look. Out: a report for people; nothing stays attached or pinned. It tries the real thing, since version
numbers and configuration say little about what a container may do: every program is compiled and loaded.
"""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import IO

from exporter import hpack
from exporter.errors import EbfwError
from exporter.kernel import bpf, build, maps, pins
from exporter.kernel.probes import EXEC_PROBE, GO_PROBES, NO_HPACK, PROBES, TAIL_PROBES, TLS_PROBES, load
from exporter.kernel.tls_libraries import COVERAGE


class _Report:
    """Aligned lines: yes/no, what, and what is lost without it. Coloured on a terminal."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._colour = out.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.can_run = True

    def head(self, text: str) -> None:
        print(f"\n{text}" if not self._colour else f"\n\033[1m{text}\033[0m", file=self._out)

    def fact(self, name: str, text: str) -> None:
        print(f"  {name:<22} {text}", file=self._out)

    def line(self, name: str, good: bool, text: str, needed: bool = False) -> None:
        word = "yes" if good else "no"
        if self._colour:
            word = f"\033[{'32' if good else '31'}m{word}\033[0m" + " " * (3 - len(word))
        print(f"  {name:<22} {word:<3} {text}".rstrip(), file=self._out)
        if needed and not good:
            self.can_run = False


def report(
    cgroup: Path | None, root: Path, root_problem: str, pin_path: Path, flows: int, ring: int, out: IO[str]
) -> int:
    """Print the report; 0 if the agent can run, 1 if not."""
    r = _Report(out)
    r.head("host")
    r.fact("kernel", f"{platform.release()} {platform.machine()}")
    r.fact("cgroup2", f"{root}" + (f"; watching {cgroup}" if cgroup else ""))
    r.line("host's cgroup root", not root_problem, root_problem)
    for text in _hybrid_limits():
        r.fact("hybrid cgroups", text)
    point = pins.mounted_at(pin_path)
    where = f"(mounted at {point})" if point else f"(ebfw can mount it for {pin_path}, and unmounts it again)"
    refused = pins.problem(pin_path)
    r.line("bpffs", not refused, refused or where, needed=True)
    r.fact("lockdown", _word("/sys/kernel/security/lockdown"))
    r.fact("memlock", _memlock())
    r.line("root", os.geteuid() == 0, "" if os.geteuid() == 0 else "the following may fail for want of it")
    descriptors: dict[str, int] = {}
    try:
        _try_programs(r, descriptors, flows, ring)
    finally:
        for fd in descriptors.values():
            os.close(fd)
    print(f"\n{'the agent can run here' if r.can_run else 'the agent cannot run here'}", file=out)
    return 0 if r.can_run else 1


def _try_programs(r: _Report, fds: dict[str, int], flows: int, ring: int) -> None:
    r.head("programs")
    bpf.lift_memlock_limit()
    try:
        code = build.programs()
        r.line("compile (bcc)", True, "(done when the wheel was built)" if build.brought() else "", needed=True)
    except EbfwError as error:
        r.line("compile (bcc)", False, str(error), needed=True)
        return
    try:
        for name, spec in maps.specs(flows, ring).items():
            fds[name] = maps.create(spec)
        r.line("maps", True, "", needed=True)
    except OSError as error:
        r.line("maps", False, str(bpf.why(error, f"creating map {name}")), needed=True)
        return
    for probe in PROBES:
        try:
            os.close(load(probe, code, fds))
            r.line(probe.name, True, "", probe.needed)
        except EbfwError as error:
            r.line(probe.name, False, f"without it: {probe.lost}. {error}", probe.needed)
    r.line("libnghttp2", hpack.available(), "" if hpack.available() else f"without it: {NO_HPACK}")
    for probe in TAIL_PROBES:
        try:
            os.close(load(probe, code, fds))
            r.line(probe.name, True, "")
        except EbfwError as error:
            r.line(probe.name, False, f"without it: {probe.lost}. {error}")
    try:
        for probe in (*TLS_PROBES, *GO_PROBES):
            os.close(load(probe, code, fds))
        r.line("tls uprobes", *_uprobe_possible())
    except EbfwError as error:
        r.line("tls uprobes", False, f"without them: {TLS_PROBES[0].lost}. {error}")
    try:
        os.close(load(EXEC_PROBE, code, fds))
        r.line("exec", True, "")
    except EbfwError as error:
        r.line("exec", False, f"without it: {EXEC_PROBE.lost}. {error}")
    r.head("classes of ebfw.tls.connections")
    for coverage, meaning in COVERAGE.items():
        r.fact(coverage, meaning)
    r.head("maps")
    total = 0
    for name, spec in maps.specs(flows, ring).items():
        size = bpf.map_memory(fds[name])
        total += size
        r.fact(name, f"{size / 1024:>10,.0f} KiB  {_entries(spec)}".rstrip())
    r.fact("total", f"{total / 1024:>10,.0f} KiB")


def _entries(spec: maps.MapSpec) -> str:
    if spec.kind == bpf.RINGBUF:
        return ""  # what the kernel calls its entries are bytes
    return "one a socket" if spec.kind == bpf.SK_STORAGE else f"{spec.entries:>9,} entries"


def _uprobe_possible() -> tuple[bool, str]:
    if not os.path.exists("/sys/bus/event_source/devices/uprobe/type"):
        return False, f"without them: {TLS_PROBES[0].lost}. The kernel has no uprobe events (CONFIG_UPROBE_EVENTS)."
    return True, ""


def _word(path: str) -> str:
    try:
        text = Path(path).read_text()
    except OSError:
        return "not known"
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else text.strip()


def _memlock() -> str:
    if tuple(map(int, platform.release().split("-")[0].split(".")[:2])) >= (5, 11):
        return "not counted since Linux 5.11"
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard >> 10} KiB"
    return f"BPF memory counts; limit {soft >> 10 if soft >= 0 else 'unlimited'}, at most {shown}"


def _hybrid_limits() -> list[str]:
    """What cgroup v1 hierarchies beside cgroup2 take away."""
    found = []
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as text:
        v1 = [line.split(" ")[3].split(",") for line in text if line.split(" ")[2] == "cgroup"]
    if v1:
        found.append("containers that are in v1 hierarchies only are attributed to their engine's unit")
    if any({"net_cls", "net_prio"} & set(options) for options in v1):
        found.append("net_cls or net_prio is mounted: in use, it ends cgroup2's socket tracking before Linux 5.14")
    return found
