"""TCP and UDP traffic: every number against tcpdump, the server's own log, ss or nstat."""

from __future__ import annotations

import socket
import struct

import pytest

from exporter.events import CLOSE, CONNECT, DNS, Counts
from lab import dns
from lab.net import POD4, POD6, RESOLVER4, SERVERS4, SERVERS6
from lab.servers import PORTS

from .conftest import N, Packets, client, far_echo, nstat

OURS = (socket.inet_pton(socket.AF_INET, POD4), socket.inet_pton(socket.AF_INET6, POD6))


def traffic(counts):
    return Packets(*counts[:4])


@pytest.mark.core
@pytest.mark.parametrize(
    ("asked", "peer"),
    [(SERVERS4[0], SERVERS4[0]), (SERVERS6[0], SERVERS6[0]), ("::ffff:" + SERVERS4[0], SERVERS4[0])],
    ids=["v4", "v6", "v4-mapped"],
)
def test_connections(asked, peer, watch, cgroup, run, servers, capture):
    """opened, closed, bytes, packets, durations and who, of connections that end in order."""
    port = PORTS["tcp_echo"]
    before = len(servers.log("tcp_echo", "closed"))
    with capture(f"tcp port {port}") as dump:
        done = run(
            """
open("/proc/self/comm", "w").write("twenty-three")
began = time.monotonic_ns()
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.sendall(bytes(3001))
    exactly(s, 3001)
    time.sleep(0.005)
    finish(s)
tell(took=time.monotonic_ns() - began)
""",
            n=N,
            peer=asked,
            port=port,
        )
        watch.until(lambda w: w.row(client(peer, port)).closed == N)
    row = watch.rows.pop(client(peer, port))
    assert list(watch.rows) == [client(peer, port)]
    assert traffic(row) == dump.packets(*OURS)
    assert row[4:] == Counts(opened=N, closed=N)[4:]
    log = servers.wait("tcp_echo", "closed", before + N)[before:]
    assert [(line["rx"], line["tx"]) for line in log] == [(3001, 3001)] * N

    opened, closed = watch.of(CONNECT), watch.of(CLOSE)
    assert len(opened) == len(closed) == N
    assert len(watch.events) == 2 * N
    for event in (*opened, *closed):
        assert (event.pid, event.comm, event.workload.cgroup_id) == (done.pid, "twenty-three", cgroup.id)
        assert (event.role, event.transport, event.dst, event.port, event.status) == (
            "client", "tcp", peer, port, "ok",
        )  # fmt: skip
        assert event.src in (POD4, POD6)
    assert {(e.cookie, e.src_port) for e in opened} == {(e.cookie, e.src_port) for e in closed}
    assert {e.src_port for e in opened} == {line["peer"][1] for line in log}
    assert len({e.cookie for e in opened}) == N
    assert sum(e.tx_bytes for e in closed) == row.tx_bytes
    assert sum(e.rx_bytes for e in closed) == row.rx_bytes
    assert all(e.duration >= 5_000_000 and e.rtt for e in closed)
    assert sum(e.duration for e in (*opened, *closed)) <= done["took"]


def test_one_connection_kept_alive(watch, run, capture):
    port = PORTS["tcp_echo"]
    with capture(f"tcp port {port}") as dump:
        run(
            """
s = dial(A["peer"], A["port"])
for i in range(A["n"]):
    s.sendall(bytes(100))
    exactly(s, 100)
finish(s)
""",
            n=N,
            peer=SERVERS4[0],
            port=port,
        )
        watch.until(lambda w: w.row(client(SERVERS4[0], port)).closed)
    row = watch.row(client(SERVERS4[0], port))
    assert traffic(row) == dump.packets(*OURS)
    assert (row.opened, row.closed, row.tx_packets >= N) == (1, 1, True)
    assert len(watch.events) == 2


@pytest.mark.core
def test_bulk_both_ways(watch, run, capture):
    """Half a megabyte each way, cwnd- and ACK-clocked: packets that leave in softirq of another task count too."""
    port = PORTS["tcp_echo"]
    with capture(f"tcp port {port}") as dump:
        run(
            """
s = dial(A["peer"], A["port"])
thread = threading.Thread(target=s.sendall, args=(bytes(500_000),))
thread.start()
exactly(s, 500_000)
thread.join()
finish(s)
""",
            peer=SERVERS4[0],
            port=port,
        )
        watch.until(lambda w: w.row(client(SERVERS4[0], port)).closed)
    row = watch.row(client(SERVERS4[0], port))
    assert traffic(row) == dump.packets(*OURS)
    (closed,) = watch.of(CLOSE)
    assert (closed.tx_bytes, closed.rx_bytes) == (row.tx_bytes, row.rx_bytes)
    assert row.tx_bytes > 500_000 < row.rx_bytes


@pytest.mark.core
def test_reset_after_accept(watch, run, servers, capture):
    port = PORTS["reset"]
    before = len(servers.log("reset", "accepted"))
    with capture(f"tcp port {port}") as dump:
        run(
            """
for i in range(A["n"]):
    s = make(A["peer"])
    try:
        s.connect((A["peer"], A["port"]))  # the RST may come before this returns
        assert not s.recv(1)
    except ConnectionResetError:
        pass
    s.close()
""",
            n=N,
            peer=SERVERS4[0],
            port=port,
        )
        watch.until(lambda w: w.row(client(SERVERS4[0], port)).closed == N)
    row = watch.row(client(SERVERS4[0], port))
    assert traffic(row) == dump.packets(*OURS)
    assert row[4:] == Counts(opened=N, closed=N)[4:]
    assert [e.status for e in watch.of(CLOSE)] == ["reset"] * N
    assert len(servers.log("reset", "accepted")) - before == N


def test_reset_by_us(watch, run, capture):
    """SO_LINGER 0: close() sends a RST."""
    port = PORTS["tcp_sink"]
    with capture(f"tcp port {port}") as dump:
        run(
            """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
""",
            n=N,
            peer=SERVERS4[0],
            port=port,
        )
        watch.until(lambda w: w.row(client(SERVERS4[0], port)).closed == N)
    row = watch.row(client(SERVERS4[0], port))
    assert traffic(row) == dump.packets(*OURS)
    assert row[4:] == Counts(opened=N, closed=N)[4:]
    assert [e.status for e in watch.of(CLOSE)] == ["reset"] * N


def test_retransmits(watch, run, lab, capture):
    """Every fifth data packet is lost on the far side; the kernel's own count of what it sent again is ours."""
    port = PORTS["tcp_sink"]
    rule = f"INPUT -p tcp --dport {port} -m length --length 200:65535 -m statistic --mode nth --every 5 --packet 1"
    lab.world.run(["iptables", "-w", "-A", *rule.split(), "-j", "DROP"], check=True)
    try:
        before = nstat(lab.pods, "TcpRetransSegs")
        with capture(f"tcp port {port}") as dump:
            run(
                """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.sendall(bytes(20_000))
    finish(s)
""",
                n=N,
                peer=SERVERS4[0],
                port=port,
            )
            watch.until(lambda w: w.row(client(SERVERS4[0], port)).closed == N)
        sent_again = nstat(lab.pods, "TcpRetransSegs") - before
    finally:
        lab.world.run(["iptables", "-w", "-D", *rule.split(), "-j", "DROP"], check=True)
    row = watch.row(client(SERVERS4[0], port))
    assert sent_again >= N
    assert row.retransmits == sent_again == sum(e.retransmits for e in watch.of(CLOSE))
    assert traffic(row) == dump.packets(*OURS)  # sent again counts again


# --- UDP ----------------------------------------------------------------------------------------------------------

ECHO = PORTS["udp_echo"]


@pytest.mark.core
@pytest.mark.parametrize("peer", [SERVERS4[0], SERVERS6[0]], ids=["v4", "v6"])
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
def test_udp(peer, connected, watch, cgroup, run, servers, capture):
    before = len(servers.log("udp_echo", "datagram"))
    with capture(f"udp port {ECHO}") as dump:
        done = run(
            """
s = make(A["peer"], UDP)
if A["connected"]:
    s.connect((A["peer"], A["port"]))
for i in range(A["n"]):
    s.send(bytes(99)) if A["connected"] else s.sendto(bytes(99), (A["peer"], A["port"]))
    assert len(s.recv(200)) == 99
""",
            n=N,
            peer=peer,
            port=ECHO,
            connected=connected,
        )
        watch.until(lambda w: w.row(client(peer, ECHO, transport="udp")).rx_packets == N)
    assert list(watch.rows) == [client(peer, ECHO, transport="udp")]
    size = 99 + 8 + (40 if ":" in peer else 20)
    assert traffic(watch.total) == (N * size, N, N * size, N) == dump.packets(*OURS)
    assert watch.total[4:] == Counts()[4:]
    assert len(servers.wait("udp_echo", "datagram", before + N)) - before == N
    (event,) = watch.events
    assert (event.kind, event.role, event.transport, event.dst, event.port) == (CONNECT, "client", "udp", peer, ECHO)
    assert (event.pid, event.workload.cgroup_id, event.status) == (done.pid, cgroup.id, "ok")


@pytest.mark.core
def test_udp_many_peers_of_one_socket(watch, run, capture):
    """Answers count in the row of whoever sent them, whatever was asked in between."""
    with capture(f"udp port {ECHO}") as dump:
        run(
            """
s = make(A["peers"][0], UDP)
for i in range(A["n"]):
    for size, peer in enumerate(A["peers"], 100):
        s.sendto(bytes(size), (peer, A["port"]))
for i in range(A["n"] * len(A["peers"])):
    s.recv(200)
""",
            n=N,
            peers=SERVERS4[:3],
            port=ECHO,
        )
        watch.until(lambda w: w.total.rx_packets == 3 * N)
    assert watch.rows == {
        client(peer, ECHO, transport="udp"): Counts(N * size, N, N * size, N)
        for size, peer in enumerate(SERVERS4[:3], 128)
    }
    assert traffic(watch.total) == dump.packets(*OURS)
    assert sorted((e.dst, e.port) for e in watch.events) == [(peer, ECHO) for peer in SERVERS4[:3]]


def test_udp_detour_and_back(watch, run, capture):
    """sendto() on a connected socket goes elsewhere once; what follows goes to the connected peer again."""
    there, else_ = SERVERS4[0], SERVERS4[1]
    with capture(f"udp port {ECHO} or udp port {PORTS['udp_sink']}") as dump:
        run(
            """
s = dial(A["there"], A["echo"], UDP)
for i in range(A["n"]):
    s.send(bytes(10))
    s.recv(100)
    s.sendto(bytes(20), (A["elsewhere"], A["sink"]))
    s.send(bytes(30))
    s.recv(100)
""",
            n=N,
            there=there,
            elsewhere=else_,
            echo=ECHO,
            sink=PORTS["udp_sink"],
        )
        watch.until(lambda w: w.total.rx_packets == 2 * N)
    assert watch.rows == {
        client(there, ECHO, transport="udp"): Counts(N * (38 + 58), 2 * N, N * (38 + 58), 2 * N),
        client(else_, PORTS["udp_sink"], transport="udp"): Counts(N * 48, N),
    }
    assert traffic(watch.total) == dump.packets(*OURS)


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
def test_answer_that_comes_after_something_else_was_sent(connected, watch, run):
    """A slow DNS answer, and a datagram to somebody else before it comes: the answer is told, and counts in the row
    of whoever gave it."""
    query = dns.query("slow.lab.example", id=1)
    run(
        """
s = make(A["resolver"], UDP)
if A["connected"]:
    s.connect((A["resolver"], 53))
for i in range(A["n"]):
    query = struct.pack("!H", i) + bytes.fromhex(A["query"])[2:]
    s.send(query) if A["connected"] else s.sendto(query, (A["resolver"], 53))
    s.sendto(bytes(20), (A["elsewhere"], A["sink"]))
for i in range(A["n"]):
    s.recv(1000)
""",
        n=N,
        connected=connected,
        query=query.hex(),
        resolver=RESOLVER4,
        elsewhere=SERVERS4[1],
        sink=PORTS["udp_sink"],
    )
    watch.until(lambda w: w.total.rx_packets == N)
    asked, other = (
        watch.row(client(RESOLVER4, 53, transport="udp")),
        watch.row(client(SERVERS4[1], PORTS["udp_sink"], transport="udp")),
    )
    assert (asked.tx_packets, asked.rx_packets) == (N, N)
    assert other == Counts(N * 48, N)
    assert [(e.domain, e.status) for e in watch.of(DNS)] == [("slow.lab.example", "NOERROR")] * N


@pytest.mark.core
def test_answers_from_another_scope(watch, run, lab):
    """One socket asks the internet and its own host by turns; each answer is in its own row."""
    with far_echo(lab.pods, "127.0.0.1", socket.SOCK_DGRAM) as port:
        run(
            """
s = make(A["peer"], UDP)
for i in range(A["n"]):
    s.sendto(bytes(50), (A["peer"], A["echo"]))
    s.sendto(bytes(60), ("127.0.0.1", A["port"]))
    s.recv(100)
    s.recv(100)
""",
            n=N,
            peer=SERVERS4[0],
            echo=ECHO,
            port=port,
        )
        watch.until(lambda w: w.total.rx_packets == 2 * N)
    assert watch.rows == {
        client(SERVERS4[0], ECHO, transport="udp"): Counts(N * 78, N, N * 78, N),
        client("127.0.0.1", port, transport="udp"): Counts(N * 88, N, N * 88, N),
    }


@pytest.mark.core
def test_udp_connect_alone_is_nothing(watch, run):
    run('for i in range(A["n"]):\n    dial(A["peer"], 7, UDP).close()', n=N, peer=SERVERS4[0])
    assert not watch.settle().rows
    assert not watch.sightings


def test_udp_socket_connected_anew(watch, run):
    """One socket, connected to one peer after another: a row each."""
    run(
        """
s = make(A["peers"][0], UDP)
for i in range(A["n"]):
    for peer in A["peers"]:
        s.connect((peer, A["port"]))
        s.send(bytes(100))
        s.recv(200)
""",
        n=N,
        peers=SERVERS4[:3],
        port=ECHO,
    )
    watch.until(lambda w: w.total.rx_packets == 3 * N)
    assert watch.rows == {client(peer, ECHO, transport="udp"): Counts(N * 128, N, N * 128, N) for peer in SERVERS4[:3]}


# --- options and extension headers --------------------------------------------------------------------------------


def test_ipv4_options(watch, run, capture):
    """IP_OPTIONS (RFC 791, four no-operations) on TCP and UDP: lengths right, payload found."""
    with capture(f"port {PORTS['http']} or port {ECHO}") as dump:
        run(
            """
s = make(A["peer"])
s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1, 1, 1, 1]))
s.connect((A["peer"], A["http"]))
s.sendall(b"GET / HTTP/1.1\\r\\nHost: options.lab.example\\r\\nConnection: close\\r\\n\\r\\n")
read_to_end(s)
s.close()
s = make(A["peer"], UDP)
s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1, 1, 1, 1]))
for i in range(A["n"]):
    s.sendto(bytes(50), (A["peer"], A["echo"]))
    s.recv(100)
""",
            n=N,
            peer=SERVERS4[0],
            http=PORTS["http"],
            echo=ECHO,
        )
        watch.until(lambda w: w.of(CLOSE) and w.row(client(SERVERS4[0], ECHO, transport="udp")).rx_packets == N)
    assert traffic(watch.total) == dump.packets(*OURS)
    assert watch.row(client(SERVERS4[0], ECHO, transport="udp")).tx_bytes == N * (20 + 4 + 8 + 50)
    assert [(e.domain, e.method) for e in watch.of("http")] == [("options.lab.example", "GET")]


@pytest.mark.core
def test_ipv6_extension_headers(watch, run, capture):
    """Hop-by-hop and destination options (RFC 8200 section 4) before TCP and UDP."""
    with capture(f"ip6 and host {SERVERS6[0]}") as dump:
        run(
            """
PADDING = bytes([0, 0, 1, 4, 0, 0, 0, 0])
def decorated(kind):
    s = make(A["peer"], kind)
    for option in (socket.IPV6_HOPOPTS, socket.IPV6_DSTOPTS):
        s.setsockopt(socket.IPPROTO_IPV6, option, PADDING)
    s.connect((A["peer"], A["http"] if kind == TCP else A["echo"]))
    return s
s = decorated(TCP)
s.sendall(b"GET / HTTP/1.1\\r\\nHost: extended.lab.example\\r\\nConnection: close\\r\\n\\r\\n")
read_to_end(s)
s.close()
s = decorated(UDP)
for i in range(A["n"]):
    s.send(bytes(50))
    s.recv(100)
""",
            n=N,
            peer=SERVERS6[0],
            http=PORTS["http"],
            echo=ECHO,
        )
        watch.until(lambda w: w.of(CLOSE) and w.row(client(SERVERS6[0], ECHO, transport="udp")).rx_packets == N)
    neighbours = [h for h, _ in dump.headers() if h[6] == 58]  # neighbour discovery is no socket's
    assert traffic(watch.total) == _without(dump.packets(OURS[1]), neighbours)
    assert watch.row(client(SERVERS6[0], ECHO, transport="udp")).tx_bytes == N * (40 + 8 + 8 + 8 + 50)
    assert [(e.domain, e.method) for e in watch.of("http")] == [("extended.lab.example", "GET")]


def _without(packets, heads):
    for head in heads:
        size = 40 + struct.unpack_from("!H", head, 4)[0]
        out = head[8:24] == OURS[1]
        packets = Packets(
            packets.tx_bytes - size * out,
            packets.tx_packets - out,
            packets.rx_bytes - size * (not out),
            packets.rx_packets - (not out),
        )
    return packets


# --- the boundary -------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_outside_the_cgroup_nothing_is_seen(tap, watch, run, capture):
    """The same traffic from a process outside the subtree: no row, no record, no tally."""
    tap.pump()
    records, totals = len(tap.sightings), dict(tap.totals)
    with capture(f"port {PORTS['tcp_echo']} or port {PORTS['http']}") as dump:
        run(
            """
for i in range(A["n"]):
    s = dial(A["peer"], 7)
    s.sendall(b"\\x16\\x03\\x01\\x00\\x05hello")
    finish(s)
    s = dial(A["peer"], 80)
    s.sendall(b"GET / HTTP/1.1\\r\\nHost: outside.lab.example\\r\\nConnection: close\\r\\n\\r\\n")
    read_to_end(s)
    s = dial(A["peer"], 7, UDP)
    s.send(bytes(10))
    s.recv(100)
    try:
        dial(A["peer"], 1)
    except ConnectionRefusedError:
        pass
""",
            cgroup=None,
            n=N,
            peer=SERVERS4[0],
        )
        watch.settle()
    assert dump.packets(*OURS).tx_packets > 10 * N
    assert len(tap.sightings) == records
    assert tap.totals == totals
    assert not watch.tallies()
