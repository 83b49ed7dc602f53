"""Connections that came to nothing, each kind 23 times, and nothing in the columns beside it."""

from __future__ import annotations

import pytest

from exporter.events import CONNECT, Counts
from lab.net import (
    BLACKHOLE4,
    BLACKHOLE6,
    CLOSED_PORT,
    NO_ROUTE4,
    NO_ROUTE6,
    REJECT6,
    SERVERS4,
    SERVERS6,
)

from .conftest import N, client, nstat

# 23 sockets that connect at once and wait for `seconds` or their end; then they are closed.
TOGETHER = """
socks = []
for i in range(A["n"]):
    s = make(A["peer"])
    s.setblocking(False)
    code = s.connect_ex((A["peer"], A["port"]))
    assert code in (errno.EINPROGRESS, *A.get("codes", ())), code
    socks.append(s)
pause(connecting=True)
deadline = time.monotonic() + A["seconds"]
left = set(socks)
while left and time.monotonic() < deadline:
    _, done, _ = select.select([], list(left), [], max(0, deadline - time.monotonic()))
    left -= set(done)
tell(errors=sorted(s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for s in socks))
for s in socks:
    s.close()
"""


def check(watch, peer, port, outcome, pid, n=N, seconds=5):
    """n failures of that kind in the one row, and as events; nothing else anywhere."""
    watch.until(lambda w: getattr(w.row(client(peer, port)), outcome) == n, seconds)
    assert list(watch.rows) == [client(peer, port)]
    assert watch.total[4:] == Counts(**{outcome: n, "retransmits": watch.total.retransmits})[4:]
    assert [(e.kind, e.status, e.dst, e.port, e.pid, e.role) for e in watch.events] == [
        (CONNECT, outcome, peer, port, pid, "client")
    ] * n
    assert all(e.duration > 0 for e in watch.events)


@pytest.mark.core
@pytest.mark.parametrize("peer", [SERVERS4[0], SERVERS6[0]], ids=["v4", "v6"])
def test_refused(peer, watch, run, servers, lab):
    before = nstat(lab.world, "TcpOutRsts")
    done = run(
        """
for i in range(A["n"]):
    try:
        dial(A["peer"], A["port"])
        raise SystemExit("connected")
    except ConnectionRefusedError:
        pass
""",
        n=N,
        peer=peer,
        port=CLOSED_PORT,
    )
    check(watch, peer, CLOSED_PORT, "refused", done.pid)
    assert (watch.total.tx_packets, watch.total.rx_packets) == (N, N)
    assert nstat(lab.world, "TcpOutRsts") - before == N


def test_refused_again_and_again_on_one_socket(watch, run, servers):
    done = run(
        """
s = make(A["peer"])
s.settimeout(None)  # after a non-blocking attempt the kernel answers every other connect() with ECONNABORTED
for i in range(A["n"]):
    try:
        s.connect((A["peer"], A["port"]))
        raise SystemExit("connected")
    except ConnectionRefusedError:
        pass
""",
        n=N,
        peer=SERVERS4[0],
        port=CLOSED_PORT,
    )
    check(watch, SERVERS4[0], CLOSED_PORT, "refused", done.pid)


@pytest.mark.core
@pytest.mark.parametrize("peer", [BLACKHOLE4, BLACKHOLE6], ids=["v4", "v6"])
def test_timed_out_by_the_kernel(peer, watch, start, lab):
    """tcp_syn_retries is 1: two SYNs (from Linux 6.5 on three), and the kernel gives up after three seconds."""
    before = nstat(lab.pods, "TcpRetransSegs")
    done = start(TOGETHER, n=N, peer=peer, port=81, seconds=30)
    done.wait_for("connecting")
    argv = ["ss", "-Htn", "state", "syn-sent", "dst", f"[{peer}]" if ":" in peer else peer]
    states = lab.pods.run(argv, capture_output=True, text=True, check=True)
    assert len(states.stdout.splitlines()) == N
    done.go()
    done.finish()
    assert set(done["errors"]) == {110}  # ETIMEDOUT
    check(watch, peer, 81, "timed_out", done.pid)
    sent_again = nstat(lab.pods, "TcpRetransSegs") - before
    assert sent_again in (N, 2 * N)
    assert watch.total.tx_packets == N + sent_again
    assert watch.total.retransmits == sent_again
    assert all(2.5e9 < e.duration < 1e11 for e in watch.events)


@pytest.mark.core
def test_timed_out_by_the_application(watch, start):
    """It closes the socket after the second SYN and before the kernel gives up."""
    done = start(TOGETHER, n=N, peer=BLACKHOLE4, port=82, seconds=1.6)
    done.wait_for("connecting")
    done.go()
    done.finish()
    assert set(done["errors"]) == {0}
    check(watch, BLACKHOLE4, 82, "timed_out", done.pid)
    assert watch.total.tx_packets == N + watch.total.retransmits


@pytest.mark.core
def test_cancelled(watch, start):
    """Closed before a second SYN: a lost race of Happy Eyeballs."""
    done = start(TOGETHER, n=N, peer=BLACKHOLE4, port=83, seconds=0.05)
    done.wait_for("connecting")
    done.go()
    done.finish()
    check(watch, BLACKHOLE4, 83, "cancelled", done.pid)
    assert watch.total.tx_packets == N


@pytest.mark.core
@pytest.mark.parametrize("peer", [NO_ROUTE4, NO_ROUTE6], ids=["v4", "v6"])
def test_unreachable_without_a_route(peer, watch, run):
    done = run(
        """
for i in range(A["n"]):
    s = make(A["peer"])
    assert s.connect_ex((A["peer"], 84)) == errno.ENETUNREACH
    s.close()
""",
        n=N,
        peer=peer,
    )
    check(watch, peer, 84, "unreachable", done.pid)
    assert watch.total[:4] == (0, 0, 0, 0)


@pytest.fixture
def rejected(lab):
    """An address whose every SYN is answered with "host unreachable". (A route of type `unreachable` answers five
    times and then once a second: net.ipv4.route.error_cost, which namespaces do not have.)"""
    rule = f"INPUT -p tcp -d {SERVERS4[4]} --dport 85:86 -j REJECT --reject-with icmp-host-unreachable".split()
    lab.world.run(["iptables", "-w", "-A", *rule], check=True)
    yield SERVERS4[4]
    lab.world.run(["iptables", "-w", "-D", *rule], check=True)


_SOFT = pytest.mark.xfail(
    reason="poll() tells of an ICMP error that the kernel holds for soft, the application closes a socket that is "
    "still in SYN_SENT, and no hook of ours sees either: counted as cancelled"
)


@pytest.mark.parametrize("v6", [pytest.param(False, marks=_SOFT), pytest.param(True)], ids=["v4", "v6"])
def test_unreachable_by_icmp(v6, rejected, watch, start):
    peer = REJECT6 if v6 else rejected
    done = start(TOGETHER, n=N, peer=peer, port=85, seconds=20, codes=[113, 101])
    done.wait_for("connecting")
    done.go()
    done.finish()
    check(watch, peer, 85, "unreachable", done.pid, seconds=1)


def test_unreachable_by_icmp_in_a_blocking_connect(rejected, watch, run):
    """The ICMP error finds the socket locked; the one that answers the second SYN ends the attempt."""
    done = run(
        """
def attempt():
    s = socket.socket(socket.AF_INET, TCP)  # no time-out: truly blocking
    try:
        s.connect((A["peer"], 86))
        codes.append(0)
    except OSError as error:
        codes.append(error.errno)
codes = []
threads = [threading.Thread(target=attempt) for i in range(A["n"])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
tell(codes=codes)
""",
        n=N,
        peer=rejected,
    )
    assert set(done["codes"]) == {113}  # EHOSTUNREACH
    check(watch, rejected, 86, "unreachable", done.pid)


def test_killed_while_connecting(watch, start):
    """SIGKILL releases the sockets too."""
    done = start(TOGETHER, n=N, peer=BLACKHOLE4, port=87, seconds=30)
    done.wait_for("connecting")
    done.end()
    check(watch, BLACKHOLE4, 87, "cancelled", done.pid)
