"""Who is client and who is server, NAT, excludes, the table's bounds, and what is older than the agent."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import time
from collections import Counter

import pytest

from exporter.decode import address
from exporter.events import ADDRESS, CLOSE, CONNECT, HTTP, Counts
from exporter.kernel import bpf, wire
from lab import Cgroup
from lab.cgroup import cgroup2_root
from lab.net import BLACKHOLE4, POD4, POD6, SERVERS4, SERVERS6, VIRTUAL4, VIRTUAL6
from lab.servers import PORTS

from .conftest import N, Packets, Place, Watch, add, attach, client, far_echo, sees_synacks6, server

OURS = (socket.inet_pton(socket.AF_INET, POD4), socket.inet_pton(socket.AF_INET6, POD6))

# An echo server in the cgroup: one connection after another, A["n"] of them.
TCP_SERVER = """
listener = listen(A["address"], A.get("port", 0))
listener.settimeout(120)
for i in range(A["n"]):
    s, _ = listener.accept()
    while data := s.recv(65536):
        s.sendall(data)
    s.close()
"""

# The echo of so many datagrams.
UDP_SERVER = """
s = make(A["address"], UDP)
s.bind((A["address"], 0))
tell(port=s.getsockname()[1])
for i in range(A["n"]):
    data, peer = s.recvfrom(2000)
    s.sendto(data, peer)
"""

TCP_CLIENT = """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.sendall(bytes(50))
    exactly(s, 50)
    finish(s)
"""


# --- servers ------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("address", [POD4, POD6], ids=["v4", "v6"])
def test_server_in_the_cgroup(address, watch, start, run, lab, capture):
    """One row, both directions, handshake included; never an event."""
    process = start(TCP_SERVER, address=address, n=N)
    port = process.wait_for("port")
    with capture(f"tcp port {port}") as dump:
        run(TCP_CLIENT, cgroup=None, netns=lab.world, peer=address, port=port, n=N)
        process.finish()
        watch.until(lambda w: w.row(server(port)).opened == N)
    assert list(watch.rows) == [server(port)]
    seen = dump.packets(*OURS)
    if not sees_synacks6():
        seen = seen if watch.total.tx_packets == seen.tx_packets else dump.packets(*OURS, synacks6=False)
    assert Packets(*watch.total[:4]) == seen
    assert not watch.sightings
    assert watch.total.opened == N


@pytest.mark.core
def test_d2_5000_clients_of_one_server(tap, watch, start, run, lab):
    """One row however many clients, and none of them costs a slot or a record."""
    process = start(TCP_SERVER, address=POD4, n=5000)
    port = process.wait_for("port")
    tap.pump()
    slots = len(tap.kernel.flow_table)
    run(
        """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.shutdown(socket.SHUT_WR)
    s.recv(1)
    s.close()
""",
        cgroup=None,
        netns=lab.world,
        peer=POD4,
        port=port,
        n=5000,
    )
    process.finish()
    watch.until(lambda w: w.row(server(port)).opened == 5000)
    assert list(watch.rows) == [server(port)]
    assert len(tap.kernel.flow_table) - slots == 1
    assert not watch.sightings


# It keeps what it accepts, and echoes once on each when told to.
KEEPING_SERVER = """
listener = make(A["address"])
if A["refused"]:
    listener.settimeout(None)
    assert listener.connect_ex((A["address"], 9)) == errno.ECONNREFUSED
listener.bind((A["address"], 0))
listener.listen(100)
tell(port=listener.getsockname()[1])
kept = [listener.accept()[0] for i in range(A["n"])]
for times in (1, 40):
    pause(sockets=[listener.fileno(), *(s.fileno() for s in kept)])
    for s in kept * times:
        s.sendall(exactly(s, 50))
pause(done=True)
"""

KEEPING_CLIENT = """
kept = [dial(A["peer"], A["port"]) for i in range(A["n"])]
for times in (1, 40):
    pause(ready=True)
    for s in kept * times:
        s.sendall(bytes(50))
        exactly(s, 50)
pause(done=True)
"""

_PIDFD_GETFD = 438


def has_storage(kernel, pid: int, descriptor: int) -> bool:
    pidfd = os.pidfd_open(pid)
    ours = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
    os.close(pidfd)
    assert ours >= 0, os.strerror(ctypes.get_errno())
    try:
        return bpf.map_lookup(kernel.maps["sockets"], struct.pack("<i", ours), wire.SOCKET_SIZE) is not None
    finally:
        os.close(ours)


@pytest.mark.core
@pytest.mark.parametrize("refused", [False, True], ids=["server", "client-before"])
def test_accepted_connections(refused, late, start, lab, capture, tmp_path):
    """Until they have lived for a while they keep no storage, their listening socket does; each counts as opened once,
    and their packets in one row, also when that was freed in between. A listening socket that was a client once is
    known as such: its connections have storage at once, and count alike."""
    with attach(late.path, tmp_path / "pins") as tap:
        watch = Watch(tap, {late.id})
        here = start(KEEPING_SERVER, cgroup=late, address=POD4, refused=refused, n=N)
        port = here.wait_for("port")
        with capture(f"tcp port {port}") as dump:
            there = start(KEEPING_CLIENT, cgroup=None, netns=lab.world, peer=POD4, port=port, n=N)
            there.wait_for("ready")
            listener, *accepted = here.wait_for("sockets")
            assert has_storage(tap.kernel, here.pid, listener)
            assert [has_storage(tap.kernel, here.pid, s) for s in accepted] == [refused] * N
            for process in (here, there):
                process.go()
            for process, key in ((there, "ready"), (here, "sockets")):
                process.wait_for(key)
            first = watch.settle().total
            assert tap.kernel.flow_table.free_idle(time.monotonic() + 1000, 900)
            assert watch.settle().total == first
            for process in (here, there):
                process.go()
            for process in (there, here):
                process.wait_for("done")
            assert all(has_storage(tap.kernel, here.pid, s) for s in accepted)
            watch.settle()
        assert watch.row(server(port)).opened == watch.total.opened == N
        if not refused:
            assert Packets(*watch.total[:4]) == dump.packets(*OURS)
        assert not watch.tallies()


@pytest.mark.core
def test_one_port_of_two_workloads(tap, parent, start, run, lab):
    """As every pod has its 8080, here by turns on one CPU: a handshake's end is counted where its packet was."""
    with contextlib.ExitStack() as cleanup:
        cgroups = [parent.child(name) for name in ("one", "other")]
        for made in cgroups:
            cleanup.callback(made.remove)
        watches = [Watch(tap, {made.id}) for made in cgroups]
        one = start(TCP_SERVER, cgroup=cgroups[0], address=POD4, n=2 * N)
        cleanup.callback(one.end)
        port = one.wait_for("port")
        other = start(TCP_SERVER, cgroup=cgroups[1], address=POD6, port=port, n=3 * N)
        cleanup.callback(other.end)
        other.wait_for("port")
        run(
            """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for i in range(A["n"]):
    for s in [dial(peer, A["port"]) for peer in A["peers"]]:
        s.sendall(bytes(50))
        finish(s)
""",
            cgroup=None,
            netns=lab.world,
            peers=[POD6, POD4, POD6, POD4, POD6],
            port=port,
            n=N,
        )
        one.finish()
        other.finish()
        for watch, accepted in zip(watches, (2 * N, 3 * N), strict=True):
            watch.until(lambda w, n=accepted: w.row(server(port)).opened >= n)
            assert list(watch.rows) == [server(port)]
            assert watch.total.opened == accepted
            assert not watch.tallies()


@pytest.mark.core
def test_udp_server_in_the_cgroup(watch, start, run, lab, capture):
    """It receives first, so it is a server: many clients, one row, no event."""
    process = start(UDP_SERVER, address=POD4, n=N)
    port = process.wait_for("port")
    with capture(f"udp port {port}") as dump:
        run(
            """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"], UDP)
    s.send(bytes(70))
    s.recv(100)
""",
            cgroup=None,
            netns=lab.world,
            peer=POD4,
            port=port,
            n=N,
        )
        process.finish()
        watch.until(lambda w: w.total.tx_packets == N)
    assert watch.rows == {server(port, "udp"): Counts(N * 98, N, N * 98, N)}
    assert Packets(*watch.total[:4]) == dump.packets(*OURS)
    assert not watch.sightings


@pytest.mark.core
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"], ids=["v4", "v6"])
def test_both_ends_in_the_cgroup(address, watch, start, run, capture):
    """Loopback: the client's end is the flow, the server's the server row; each is exact."""
    process = start(TCP_SERVER, address=address, n=N)
    port = process.wait_for("port")
    with capture(f"tcp port {port}", device="lo") as dump:
        run(TCP_CLIENT, peer=address, port=port, n=N)
        process.finish()
        watch.until(lambda w: w.row(client(address, port)).closed == N)
    there, here = watch.row(client(address, port)), watch.row(server(port))
    assert set(watch.rows) == {client(address, port), server(port)}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    end = socket.inet_pton(family, address) + struct.pack("!H", port)
    served = counted = dump.packets(end)
    if not sees_synacks6() and here.tx_packets < served.tx_packets:
        counted = dump.packets(end, synacks6=False)
    assert Packets(*here[:4]) == counted
    assert Packets(*there[:4]) == Packets(*served[2:], *served[:2])
    assert (there.opened, there.closed, here.opened) == (N, N, N)
    assert {e.role for e in watch.events} == {"client"}
    assert {e.scope for e in watch.events} == {"loopback"}


# --- NAT ----------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(("asked", "to"), [(VIRTUAL4, SERVERS4[2]), (VIRTUAL6, "2001:db8:2::3")], ids=["v4", "v6"])
def test_d1_dnat(asked, to, watch, run, lab, servers, capture):
    """The peer is whom the application asked for; both directions are in its row."""
    lab.dnat(asked, 1001, to, PORTS["tcp_echo"])
    before = len(servers.log("tcp_echo", "closed"))
    with capture(f"tcp port {PORTS['tcp_echo']}") as dump:
        run(TCP_CLIENT, peer=asked, port=1001, n=N)
        watch.until(lambda w: w.row(client(asked, 1001)).closed == N)
    assert list(watch.rows) == [client(asked, 1001)]
    assert Packets(*watch.total[:4]) == dump.packets(*OURS)
    assert (watch.total.opened, watch.total.closed) == (N, N)
    assert {(e.dst, e.port, e.redirected) for e in watch.events} == {(asked, 1001, False)}
    log = servers.wait("tcp_echo", "closed", before + N)[before:]
    assert [(line["rx"], line["tx"]) for line in log] == [(50, 50)] * N


@pytest.mark.core
@pytest.mark.parametrize(("asked", "local"), [(VIRTUAL4, "0.0.0.0"), (VIRTUAL6, "::")], ids=["IPv4", "IPv6"])
def test_d1_redirect(asked, local, watch, run, lab, servers):
    """As with a mesh's sidecar: what goes to anybody ends at a port of our own, and is marked; what the sidecar sends
    on is not."""
    onward = client(SERVERS6[0] if ":" in asked else SERVERS4[0], PORTS["tcp_echo"])
    with far_echo(lab.pods, local, socket.SOCK_STREAM) as port:
        lab.redirect(asked, 1002, port)
        run(TCP_CLIENT, peer=asked, port=1002, n=N)
        run(TCP_CLIENT, peer=onward.peer, port=onward.port, n=N)
        watch.until(lambda w: w.row(client(asked, 1002)).closed == w.row(onward).closed == N)
    assert set(watch.rows) == {client(asked, 1002), onward}
    assert {address(key.peer): key.redirected for key in watch.moved} == {asked: 1, onward.peer: 0}
    assert (watch.total.opened, watch.total.closed, watch.total.refused) == (2 * N, 2 * N, 0)
    assert watch.row(client(asked, 1002)).tx_bytes > N * 50 < watch.row(client(asked, 1002)).rx_bytes
    told = Counter((e.kind, e.dst, e.port, e.redirected) for e in watch.events)
    assert told == {(kind, *place, mark): N for kind in ("connect", "close")
                    for place, mark in (((asked, 1002), True), ((onward.peer, onward.port), False))}  # fmt: skip


def test_d1_udp_redirect(watch, run, lab, servers):
    """As with a mesh that takes DNS, too. The socket's next peer is another matter."""
    with far_echo(lab.pods, "0.0.0.0", socket.SOCK_DGRAM) as port:
        lab.redirect(VIRTUAL4, 1006, port, protocol="udp")
        run(
            """
s = make(A["peer"], UDP)
for i in range(A["n"]):
    s.sendto(bytes(10), (A["peer"], 1006))
    s.recv(100)
    s.sendto(bytes(10), (A["other"], A["port"]))
    s.recv(100)
""",
            peer=VIRTUAL4,
            other=SERVERS4[0],
            port=PORTS["udp_echo"],
            n=N,
        )
        watch.until(lambda w: w.total.rx_packets == 2 * N)
    expected = Counts(N * 38, N, N * 38, N)
    assert watch.rows == {client(peer, port, transport="udp"): expected
                          for peer, port in ((VIRTUAL4, 1006), (SERVERS4[0], PORTS["udp_echo"]))}  # fmt: skip
    assert {address(key.peer): key.redirected for key in watch.moved} == {VIRTUAL4: 1, SERVERS4[0]: 0}


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
def test_d1_udp_through_dnat(connected, watch, run, lab, servers):
    asked = 1003 + connected
    lab.dnat(VIRTUAL4, asked, SERVERS4[3], PORTS["udp_echo"], protocol="udp")
    run(
        """
s = make(A["peer"], UDP)
if A["connected"]:
    s.connect((A["peer"], A["port"]))
for i in range(A["n"]):
    s.send(bytes(10)) if A["connected"] else s.sendto(bytes(10), (A["peer"], A["port"]))
    s.recv(100)
""",
        peer=VIRTUAL4,
        port=asked,
        connected=connected,
        n=N,
    )
    watch.until(lambda w: w.total.rx_packets == N)
    assert watch.rows == {client(VIRTUAL4, asked, transport="udp"): Counts(N * 38, N, N * 38, N)}


# --- older than the agent -----------------------------------------------------------------------------------------


@pytest.fixture
def late(programs, tmp_path):
    """A cgroup that nobody watches yet."""
    with Cgroup("late") as made:
        yield made


@pytest.mark.core
def test_connections_older_than_the_agent(late, start, lab, servers, capture, tmp_path):
    """Their bytes count from the first packet seen, in the right role; `opened` does not."""
    old_server = start(TCP_SERVER, cgroup=late, address=POD4, n=1)
    port = old_server.wait_for("port")
    there = start(
        """
s = dial(A["peer"], A["port"])
pause(ready=True)
for i in range(A["n"]):
    s.sendall(bytes(40))
    exactly(s, 40)
pause(done=True)
finish(s)
""",
        cgroup=None,
        netns=lab.world,
        peer=POD4,
        port=port,
        n=N,
    )
    here = start(
        """
s = dial(A["peer"], A["port"])
pause(ready=True)
for i in range(A["n"]):
    s.sendall(bytes(30))
    exactly(s, 30)
pause(done=True)
finish(s)
""",
        cgroup=late,
        peer=SERVERS4[0],
        port=PORTS["tcp_echo"],
        n=N,
    )
    for process in (there, here):
        process.wait_for("ready")
    time.sleep(0.1)  # the last ACKs of the handshakes
    with attach(late.path, tmp_path / "pins") as tap:
        watch = Watch(tap, {late.id})
        with capture(f"port {port} or port {PORTS['tcp_echo']}") as dump:
            for process in (there, here):
                process.go()
                process.wait_for("done")
            watch.until(lambda w: w.total.tx_packets >= 2 * N)
        assert set(watch.rows) == {server(port), client(SERVERS4[0], PORTS["tcp_echo"])}
        assert Packets(*watch.total[:4]) == dump.packets(*OURS)
        assert watch.total[4:] == Counts()[4:]
        assert not watch.of(CONNECT)
        for process in (there, here):
            process.go()
            process.finish()


@pytest.mark.core
def test_udp_server_older_than_the_agent(late, start, run, lab, tmp_path):
    process = start(UDP_SERVER, cgroup=late, address=POD4, n=N + 1)
    port = process.wait_for("port")
    ask = """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"], UDP)
    s.send(bytes(70))
    s.recv(100)
"""
    run(ask, cgroup=None, netns=lab.world, peer=POD4, port=port, n=1)
    with attach(late.path, tmp_path / "pins") as tap:
        watch = Watch(tap, {late.id})
        run(ask, cgroup=None, netns=lab.world, peer=POD4, port=port, n=N)
        watch.until(lambda w: w.total.tx_packets == N)
        assert watch.rows == {server(port, "udp"): Counts(N * 98, N, N * 98, N)}
        assert not watch.sightings


# --- excludes -----------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_excluded_addresses(late, start, run, lab, servers, tmp_path):
    """One row a scope, a tally of what was not told, no record; everybody else as ever."""
    exclude = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network(f"{SERVERS4[1]}/32")]
    with attach(late.path, tmp_path / "pins", exclude=exclude) as tap:
        watch = Watch(tap, {late.id})
        with far_echo(lab.pods, "127.0.0.1", socket.SOCK_STREAM) as port:
            run(TCP_CLIENT, cgroup=late, peer="127.0.0.1", port=port, n=N)
        run(TCP_CLIENT, cgroup=late, peer=SERVERS4[1], port=PORTS["tcp_echo"], n=N)
        run(TCP_CLIENT, cgroup=late, peer=SERVERS4[0], port=PORTS["tcp_echo"], n=1)
        watch.until(lambda w: w.total.closed == 2 * N + 1)
        excluded = [(key.scope, counts) for key, counts in watch.moved.items() if key.kind == wire.FLOW_EXCLUDED]
        assert {wire.SCOPES[scope]: (c.opened, c.closed) for scope, c in excluded} == {
            "loopback": (N, N),
            "internet": (N, N),
        }
        assert len(watch.moved) == 3
        assert {e.dst for e in watch.events} == {SERVERS4[0]}
        assert watch.tallies() == {"filtered/connect": 2 * N, "filtered/close": 2 * N}


@pytest.mark.core
def test_d12_connections_to_an_excluded_collector_are_known_and_not_told(late, run, lab, tmp_path):
    """By the two ports of OTLP; everything else that is excluded makes no record."""
    with attach(late.path, tmp_path / "pins", exclude=[ipaddress.ip_network("127.0.0.0/8")]) as tap:
        watch = Watch(tap, {late.id})
        for otlp in (4317, 4318):
            with far_echo(lab.pods, "127.0.0.1", socket.SOCK_STREAM, otlp) as port:
                run(TCP_CLIENT, cgroup=late, peer="127.0.0.1", port=port, n=N)
        with far_echo(lab.pods, "127.0.0.1", socket.SOCK_STREAM) as port:
            run(TCP_CLIENT, cgroup=late, peer="127.0.0.1", port=port, n=N)
        watch.until(lambda w: w.total.closed == 3 * N)
        assert Counter((e.kind, e.port, e.filtered) for e in watch.events) == {
            (CONNECT, 4317, True): N,
            (CONNECT, 4318, True): N,
        }
        assert watch.tallies() == {"filtered/connect": 3 * N, "filtered/close": 3 * N}


@pytest.mark.core
def test_excluded_names(late, run, servers, tmp_path):
    """Whole labels: notlab.example is not lab.example."""
    ask = """
for host in A["hosts"]:
    s = dial(A["peer"], 80)
    s.sendall(f"GET / HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode())
    read_to_end(s)
    s.close()
"""
    hidden, shown = ["web.lab.example"] * N, ["notlab.example", "lab.example.org"]
    suffix = lambda name: name == "lab.example" or name.endswith(".lab.example")  # noqa: E731
    with attach(late.path, tmp_path / "pins", suffixes=["lab.example"]) as tap:
        watch = Watch(tap, {late.id}, suffix)
        run(ask, cgroup=late, peer=SERVERS4[0], hosts=[*hidden, *shown])
        watch.until(lambda w: w.total.closed == N + 2)
        (row,) = (counts for key, counts in watch.moved.items() if key.kind == wire.FLOW_EXCLUDED)
        assert (row.opened, row.closed) == (0, N)  # it was opened under its address
        assert {place.name for place in watch.rows if place.kind == wire.FLOW_PEER} == {"", *shown}
        assert [e.domain for e in watch.of(HTTP) if not e.filtered] == shown
        assert [e.domain for e in watch.of(CLOSE) if not e.filtered] == shown
        assert watch.tallies()["filtered/close"] == N


# --- bounds -------------------------------------------------------------------------------------------------------

MANY = """
s = make(A["peer"], UDP)
for port in range(A["first"], A["first"] + A["n"]):
    s.sendto(bytes(10), (A["peer"], port))
"""


@pytest.mark.core
def test_more_flows_than_slots(late, run, tmp_path):
    """1,024 slots, 2,000 peers: the rest goes to the workload's ~other row, and is counted as such."""
    with attach(late.path, tmp_path / "pins", flows=1024) as tap:
        watch = Watch(tap, {late.id})
        run(MANY, cgroup=late, peer=BLACKHOLE4, first=20_000, n=2000)
        watch.until(lambda w: w.total.tx_packets == 2000)
        other = watch.row(Place("client", "udp", "", 0, wire.FLOW_OTHER))
        assert other == Counts(976 * 38, 976)
        assert len(watch.rows) == 1025
        assert watch.total == Counts(2000 * 38, 2000)
        assert watch.tallies() == {"table/flows_full": 976}


def test_freed_flows_fold(late, run, tmp_path):
    """Idle rows give their slots back; totals never fall, and a flow that comes back counts on."""
    place = Place("client", "udp", BLACKHOLE4, 20_007)
    with attach(late.path, tmp_path / "pins", flows=1024) as tap:
        watch = Watch(tap, {late.id})
        table = tap.kernel.flow_table
        for round_ in range(1, 4):
            run(MANY, cgroup=late, peer=BLACKHOLE4, first=20_000, n=1000)
            watch.until(lambda w, r=round_: w.total.tx_packets == 1000 * r)
            assert watch.row(place) == Counts(38 * round_, round_)
            assert table.free_idle(time.monotonic() + 1000, 900) == 1000
            assert watch.settle().total == Counts(1000 * round_ * 38, 1000 * round_)
            assert len(table) == 0
        assert not watch.tallies()
        assert not tap.fallen


@pytest.mark.core
def test_totals_over_a_restart(late, run, tmp_path):
    """Killed in the middle of freeing: the next agent finds every byte, in rows and in ~other."""
    pin_path = tmp_path / "pins"
    with attach(late.path, pin_path, flows=1024, unpin=False) as tap:
        watch = Watch(tap, {late.id})
        run(MANY, cgroup=late, peer=BLACKHOLE4, first=20_000, n=500)
        watch.until(lambda w: w.total.tx_packets == 500)
        assert tap.kernel.flow_table.free_idle(time.monotonic() + 1000, 900, most=100) == 100
    run(MANY, cgroup=late, peer=BLACKHOLE4, first=20_500, n=100)  # nobody is there to read
    with attach(late.path, pin_path, flows=1024) as tap:
        assert tap.kernel.adopted_maps
        assert tap.kernel.adopted_programs
        tap.pump()
        tap.pump()
        assert add(*map(Counts._make, tap.totals.values())) == Counts(600 * 38, 600)
        # The slots that were on their way are free again: 500 rows, and 524 more fit.
        run(MANY, cgroup=late, peer=BLACKHOLE4, first=30_000, n=524)
        tap.pump()
        assert tap.kernel.tallies()["table", "flows_full"] == 0
        assert add(*map(Counts._make, tap.totals.values())) == Counts(1124 * 38, 1124)
    assert not pin_path.exists()


# --- the whole machine --------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.skipif(os.environ.get("EBFW_TEST_ROOT_CGROUP") != "1", reason="the machine is not ours alone")
def test_root_cgroup(programs, cgroup, run, servers, tmp_path):
    """Attached to the machine's root: every workload under its own cgroup, the far side as one, too."""
    with attach(cgroup2_root(), tmp_path / "pins") as tap:
        watch = Watch(tap, {cgroup.id})
        run(TCP_CLIENT, peer=SERVERS4[0], port=PORTS["tcp_echo"], n=N)
        watch.until(lambda w: w.row(client(SERVERS4[0], PORTS["tcp_echo"])).closed == N)
        assert len(watch.rows) == 1
        assert (watch.total.opened, watch.total.closed) == (N, N)
        assert [(e.kind, e.name_source) for e in watch.of(CONNECT)] == [(CONNECT, ADDRESS)] * N
        everybody = Counts._make(map(sum, zip(*tap.totals.values(), strict=True)))
        assert everybody.opened >= 2 * N  # the servers' row is in sight, too
