"""What outlives the agent: totals that go on, programs that are replaced and never doubled, nothing after detach.

The kernel side is looked at with bpftool; how much was sent is known from what the clients did. Traffic goes to
addresses, not names: names that DNS taught are the agent's memory, and change the series, not the sums.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from exporter.kernel.probes import TAIL_PROBES, UNLINKED
from lab import Cgroup
from lab.clients import cache_folder
from lab.net import SERVERS4, SERVERS6
from lab.servers import PORTS
from tests.pipeline.conftest import PROGRAMS, REPO, UDP, Agent, Host, Samples, World, bpftool, eventually

pytestmark = pytest.mark.kernel

SINK = str(PORTS["udp_sink"])


def send(world: World, host: Host | Sender, count: int = 23, size: int = 100) -> None:
    """`count` datagrams each over IPv4 and IPv6, and five connections."""
    for address in (SERVERS4[4], SERVERS6[4]):
        world.python(host.shop, UDP, address, SINK, str(count), str(size), "0")
    world.curl(host.shop, *(f"http://{SERVERS4[5]}/{n}" for n in range(5)), "-H", "Connection: close")


class Totals(tuple[int, ...]):
    """(bytes, packets) sent to the two sinks, connections opened and closed, bytes of all connections."""

    @classmethod
    def of(cls, page: Samples) -> Totals:
        def sent(name: str) -> int:
            peers = (SERVERS4[4], SERVERS6[4])
            return sum(page.total(name, server_address=p, network_io_direction="transmit") for p in peers)

        return cls(
            (
                sent("ebfw_network_io_bytes_total"),
                sent("ebfw_network_packets_total"),
                page.total("ebfw_tcp_connections_total", ebfw_connection_state="opened"),
                page.total("ebfw_tcp_connections_total", ebfw_connection_state="closed"),
            )
        )


def after(rounds: int, count: int = 23, size: int = 100) -> tuple[int, ...]:
    """The totals after so many calls of `send`."""
    return (rounds * count * (2 * size + 28 + 48), rounds * count * 2, rounds * 5, rounds * 5)


def reads(agent: Agent, wanted: tuple[int, ...], stay: bool = False) -> None:
    """The agent's totals come to be exactly these and, if asked, stay so over another reading of the kernel's."""
    found: tuple[int, ...] = ()
    deadline = time.monotonic() + 10
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
        found = Totals.of(agent.metrics())
    if stay:
        time.sleep(2.2)
        found = Totals.of(agent.metrics())
    assert found == wanted


def ids(host: Host) -> list[int]:
    return [row["id"] for row in host.attached()]


def test_kill_and_start(host: Host, world: World) -> None:
    """SIGKILL, traffic while nobody is there, start: the same programs, and totals as if nothing had happened."""
    agent = host.start().ready()
    send(world, host)
    reads(agent, after(1))
    programs, everything, links = ids(host), host.programs(), host.pinned("link")
    assert len(programs) == PROGRAMS
    agent.kill()
    assert ids(host) == programs
    send(world, host)

    agent = host.start().ready()
    assert "(adopted)" in agent.log
    reads(agent, after(2))
    assert ids(host) == programs
    assert host.programs() == everything
    assert host.pinned("link") == links
    send(world, host)
    reads(agent, after(3), stay=True)
    # The records of what happened meanwhile were in the ring, and are told once.
    opened = [line for line in agent.lines if line.startswith("CONNECT") and f"{SERVERS4[5]}:80" in line]
    assert len(opened) == 10


def test_killed_again_and_again(host: Host, world: World) -> None:
    """At any moment of its start: the next one that is left alone works, with one set of programs."""
    for pause in (0.4, 1.2):
        agent = host.start()
        time.sleep(pause)
        agent.kill()
    agent = host.start().ready()
    assert len(ids(host)) == PROGRAMS
    assert len(host.programs()) == PROGRAMS + len(TAIL_PROBES) + sum(map(len, UNLINKED.values()))
    send(world, host)
    reads(agent, after(1), stay=True)


def another_build(directory: Path, comment: str = "another build") -> Path:
    """A copy of the product whose BPF sources differ, in a comment."""
    tree = directory / "tree"
    for name in ("exporter", "bpf"):
        shutil.copytree(REPO / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for library in REPO.glob("*__mypyc.*.so"):  # what compiled modules share, where they are compiled
        shutil.copy(library, tree)
    source = tree / "bpf" / "ebfw.bpf.c"
    source.write_text(source.read_text() + f"\n/* {comment} */\n")
    return tree


def test_another_build(host: Host, world: World, tmp_path: Path) -> None:
    """New programs take the old links over: not a packet of a running stream goes uncounted."""
    agent = host.start().ready()
    old, links, maps = ids(host), host.pinned("link"), host.pinned("map")
    tree = another_build(tmp_path)
    # Compiled before, or the stream would have to last as long as a compiler on a slow machine.
    code = "import pathlib, sys; from exporter.kernel import build; build.programs(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(cache_folder() / "programs")], cwd=tree, check=True)
    agent.kill()
    count = 4000
    stream = world.popen(host.shop, UDP, SERVERS4[4], SINK, str(count), "100", "0.001")
    agent = host.start(tree=tree).ready()
    assert stream.poll() is None, "the stream ended before the programs were replaced"
    new = ids(host)
    assert len(new) == PROGRAMS
    assert not set(new) & set(old)
    assert host.pinned("link") == links
    assert host.pinned("map") == maps
    assert len(host.programs()) == PROGRAMS + len(TAIL_PROBES) + sum(map(len, UNLINKED.values()))
    out, _ = stream.communicate(timeout=30)
    assert int(out) == count
    reads(agent, (count * 128, count, 0, 0), stay=True)


def test_another_size(host: Host, world: World) -> None:
    """Maps of another size cannot be adopted: everything is made anew, and nothing of the old stays."""
    agent = host.start().ready()
    send(world, host)
    reads(agent, after(1))
    maps, programs = set(host.pinned("map").values()), host.programs()
    agent.kill()
    assert "begin anew" not in agent.log
    agent = host.start(EBFW_FLOWS="4096").ready()
    assert "(new)" in agent.log
    why = "were made with 65,536 flows (EBFW_FLOWS is 4096 now); they begin anew"
    assert f"counters pinned at {host.pins} {why}" in agent.log
    assert len(ids(host)) == PROGRAMS
    assert not set(host.pinned("map").values()) & maps
    eventually(lambda: not host.programs() & programs)
    assert agent.metrics().total("ebfw_table_size", ebfw_table="flows") == 4096
    assert Totals.of(agent.metrics()) == (0, 0, 0, 0)
    send(world, host)
    reads(agent, after(1))


def test_debris(host: Host, world: World) -> None:
    """Pins of a start that was cut off before its last one: cleaned, not adopted."""
    agent = host.start().ready()
    old = set(host.pinned("map").values())
    agent.kill()
    (host.pins / "map_stamp").unlink()
    (host.pins / "link_sockops").unlink()
    (host.pins / "map_flows").unlink()
    agent = host.start().ready()
    assert "(new)" in agent.log
    assert len(ids(host)) == PROGRAMS
    assert not set(host.pinned("map").values()) & old
    send(world, host)
    reads(agent, after(1))


def test_a_missing_link_is_put_back(host: Host, world: World) -> None:
    """One program was detached behind our back: it is attached again, and the counters stay."""
    agent = host.start().ready()
    send(world, host)
    reads(agent, after(1))
    agent.kill()
    (host.pins / "link_egress").unlink()
    eventually(lambda: len(ids(host)) == PROGRAMS - 1)
    agent = host.start().ready()
    assert "counters adopted" in agent.log
    assert len(ids(host)) == PROGRAMS
    assert len(host.programs()) == PROGRAMS + len(TAIL_PROBES) + sum(map(len, UNLINKED.values()))
    send(world, host)
    reads(agent, after(2))


def test_persist_and_detach(host: Host, world: World) -> None:
    """EBFW_PERSIST: counting goes on after a clean exit, into the next agent. `ebfw detach` ends it; twice is fine."""
    agent = host.start(EBFW_PERSIST="true").ready()
    send(world, host)
    reads(agent, after(1))
    assert agent.stop() == 0
    assert len(ids(host)) == PROGRAMS
    send(world, host)
    agent = host.start(EBFW_PERSIST="true").ready()
    assert "(adopted)" in agent.log
    reads(agent, after(2))
    assert agent.stop() == 0

    done = host.ebfw("detach")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"removed \d+ pinned objects from .*\n", done.stdout)
    assert host.left_behind() == []
    done = host.ebfw("detach")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"nothing is pinned at {host.pins}\n"


def test_two_agents_one_pin_path(host: Host, world: World) -> None:
    """The second says so in one sentence and leaves the first alone; so does a detach meanwhile."""
    agent = host.start().ready()
    programs = ids(host)
    second = host.start()
    assert second.process.wait(30) == 1
    (told,) = [line for line in second.log.splitlines() if "metrics at" not in line]
    holder = f"another ebfw runs with the pin path {host.pins} (process {agent.pid})."
    assert told == f"ebfw: {holder} Stop it first, or set EBFW_BPF_PIN_PATH to another path."
    done = host.ebfw("detach")
    assert done.returncode == 1
    assert done.stderr == f"ebfw: {holder} Stop it, then detach again.\n"
    assert ids(host) == programs
    send(world, host)
    reads(agent, after(1))
    assert agent.stop(signal.SIGINT) == 0


def test_another_cgroup(host: Host, world: World) -> None:
    """The next start watches another subtree: the programs move there, the counters stay."""
    agent = host.start().ready()
    send(world, host)
    reads(agent, after(1))
    agent.kill()
    beside = host.cgroup.child("beside")
    agent = host.start(EBFW_CGROUP=str(beside.path)).ready()
    rows = {folder: len(bpftool("cgroup", "show", str(folder))) for folder in (host.cgroup.path, beside.path)}
    assert rows == {host.cgroup.path: 0, beside.path: PROGRAMS}
    send(world, host)
    send(world, Sender(beside))
    reads(agent, after(2), stay=True)


class Sender(NamedTuple):
    """What `send` needs of a Host."""

    shop: Cgroup


def test_a_cgroup_that_was_made_again(host: Host, world: World) -> None:
    """A unit that was restarted while no agent was there: dead links are replaced."""
    unit = host.cgroup.child("unit")
    host.start(EBFW_CGROUP=str(unit.path)).ready().kill()
    unit.remove()
    unit = host.cgroup.child("unit")
    agent = host.start(EBFW_CGROUP=str(unit.path)).ready()
    assert len(ids(host)) == PROGRAMS
    send(world, Sender(unit))
    reads(agent, after(1))


@pytest.fixture
def bpffs(host: Host) -> Path:
    """A BPF file system that somebody else mounted, and keeps something on. The host unmounts it."""
    point = host.directory / "theirs"
    point.mkdir()
    subprocess.run(("mount", "-t", "bpf", "bpf", str(point)), check=True)
    (point / "their-folder").mkdir()
    return point


@pytest.mark.parametrize("folder", ["", "their-folder"])
def test_what_is_not_ours_stays(host: Host, bpffs: Path, folder: str) -> None:
    """Pins in the root of somebody's file system, and in a folder of theirs."""
    host.pins = bpffs / folder
    pinned = bpffs / "their-folder" / "their-map"
    created = ("type", "array", "key", "4", "value", "4", "entries", "1", "name", "theirs")
    subprocess.run(("bpftool", "map", "create", str(pinned), *created), check=True)
    agent = host.start().ready()
    assert len(host.pinned("link")) == PROGRAMS
    assert agent.stop() == 0, agent.log
    names = {entry.name for entry in bpffs.iterdir()}
    assert names - {"maps.debug", "progs.debug"} == {"their-folder"}
    assert [entry.name for entry in (bpffs / "their-folder").iterdir()] == ["their-map"]
    assert ids(host) == []
    host.pins = host.directory / "pins"
    subprocess.run(("umount", str(bpffs)), check=True)
