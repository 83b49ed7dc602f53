"""DNS, TLS and HTTP: what peers are called, from the messages that say so, however they are cut into segments."""

from __future__ import annotations

import shutil
import socket
import struct
import time

import pytest

from exporter.events import ADDRESS, CLOSE, CONNECT, DNS, DNS_ANSWER, HOST, HTTP, SNI, TLS, Counts
from exporter.kernel import wire
from lab import dns
from lab.clients import compiled
from lab.net import POD4, RESOLVER4, RESOLVER6, SERVERS4, SERVERS6
from lab.servers import PORTS

from .conftest import N, Packets, client

OURS = socket.inet_aton(POD4)
SINK = PORTS["tcp_sink"]

# --- DNS ----------------------------------------------------------------------------------------------------------

ASK = """
s = dial(A["resolver"], 53, UDP) if A["connected"] else make(A["resolver"], UDP)
for query in A["queries"]:
    s.send(bytes.fromhex(query)) if A["connected"] else s.sendto(bytes.fromhex(query), (A["resolver"], 53))
    if A.get("answered", True):
        s.recv(2000)
"""


def queries(name, n=N, kind="A"):
    return [dns.query(name, kind, id=1000 + i).hex() for i in range(n)]


@pytest.mark.core
@pytest.mark.parametrize("resolver", [RESOLVER4, RESOLVER6], ids=["v4", "v6"])
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
def test_dns(resolver, connected, watch, cgroup, run, servers, capture):
    before = len(servers.log("dns", "query"))
    with capture("udp port 53") as dump:
        done = run(ASK, resolver=resolver, connected=connected, queries=queries("www.lab.example"))
        watch.until(lambda w: len(w.of(DNS)) == N)
    kinds = [s.kind for s in watch.sightings]
    assert (kinds.count(wire.RECORD_DNS_QUERY), kinds.count(wire.RECORD_DNS_ANSWER), len(kinds)) == (N, N, 2 * N)
    row = watch.row(client(resolver, 53, transport="udp"))
    ours = OURS if "." in resolver else socket.inet_pton(socket.AF_INET6, "2001:db8:1::1")
    assert Packets(*row[:4]) == dump.packets(ours)
    assert (row.tx_packets, row.rx_packets) == (N, N)
    assert len(servers.wait("dns", "query", before + N)) - before == N
    assert len(watch.events) == N
    for event in watch.events:
        assert (event.domain, event.dns_type, event.status, event.pid) == ("www.lab.example", "A", "NOERROR", done.pid)
        assert event.answers == ("web.lab.example", SERVERS4[0])
        assert (event.dst, event.port, event.transport) == (resolver, 53, "udp")
        assert event.workload.cgroup_id == cgroup.id
        assert 0 < event.duration < 5e9


def test_dns_answers_of_every_kind(watch, run):
    names = ["web.lab.example", "nobody.lab.example", "servfail.lab.example", "many.lab.example", "slow.lab.example"]
    run(ASK, resolver=RESOLVER4, connected=True, queries=[q for name in names for q in queries(name, 1)])
    watch.until(lambda w: len(w.sightings) == 2 * len(names)).expire(1.1)
    found = {e.domain: e for e in watch.events}
    assert len(watch.events) == len(found) == len(names)
    assert [found[name].status for name in names] == ["NOERROR", "NXDOMAIN", "SERVFAIL", "NOERROR", "NOERROR"]
    assert [len(found[name].answers) for name in names] == [1, 0, 0, 0, 1]
    assert 0.25e9 <= found["slow.lab.example"].duration < 3e9
    assert not any(e.search_expansion for e in watch.events)


@pytest.mark.core
def test_dns_without_an_answer(watch, run):
    run(ASK, resolver=RESOLVER4, connected=False, queries=queries("silent.lab.example"), answered=False)
    watch.until(lambda w: len(w.sightings) == N)
    assert not watch.events
    assert not list(watch.join.expire(time.monotonic_ns()))
    timeouts = list(watch.join.expire(time.monotonic_ns() + 6_000_000_000))
    assert [(e.kind, e.domain, e.status) for e in timeouts] == [(DNS, "silent.lab.example", "timeout")] * N
    assert not list(watch.join.expire(time.monotonic_ns() + 6_000_000_000))


def test_dns_asked_again_is_one_question(watch, run):
    """The same id, name and socket: a retry. One event, with the time since the first."""
    again = queries("slow.lab.example", 1) * 3
    run(ASK + "for i in range(3): s.recv(999)", resolver=RESOLVER4, connected=True, queries=again, answered=False)
    watch.until(lambda w: len(w.sightings) == 6)
    assert [(e.domain, e.status) for e in watch.events] == [("slow.lab.example", "NOERROR")]
    watch.losses_expected = True  # the answers to the other two are of no use


@pytest.mark.core
def test_names_learned_from_answers(watch, run, servers):
    """What the workload has asked for names what it then connects to; an address it was never told does not."""
    run(ASK, resolver=RESOLVER4, connected=True, queries=queries("v4.lab.example", 1))
    watch.until(lambda w: w.of(DNS))
    run('for i in range(A["n"]):\n    finish(dial(A["peer"], 7))', n=N, peer=SERVERS4[0])
    run('finish(dial(A["peer"], 7))', peer=SERVERS4[5])
    watch.until(lambda w: len(w.of(CLOSE)) == N + 1)
    assert [(e.domain, e.name_source) for e in watch.of(CONNECT)] == [("v4.lab.example", DNS_ANSWER)] * N + [
        (SERVERS4[5], ADDRESS)
    ]


def test_real_resolver(watch, run, servers):
    """getaddrinfo(): two questions, one socket, sendmmsg()."""
    before = len(servers.log("dns", "query"))
    run('for i in range(A["n"]):\n    socket.getaddrinfo("web.lab.example", 80)', n=N, names=True)
    watch.until(lambda w: len(w.of(DNS)) == 2 * N)
    assert len(servers.log("dns", "query")) - before == 2 * N
    assert sorted(e.dns_type for e in watch.events) == ["A"] * N + ["AAAA"] * N
    assert {a for e in watch.events for a in e.answers} == {SERVERS4[0], SERVERS6[0]}


# --- TLS ----------------------------------------------------------------------------------------------------------


def hello(size, name):
    """A TLS 1.3 ClientHello (RFC 8446 section 4.1.2) of `size` bytes whose server_name, if any, is the last
    extension, behind as much key share and padding as it takes."""
    sni = struct.pack("!HHHBH", 0, len(name) + 5, len(name) + 3, 0, len(name)) + name.encode() if name else b""
    fixed = struct.pack("!HHBH", 43, 3, 2, 0x0304)
    head = 5 + 4 + 2 + 32 + 1 + 32 + 2 + 6 + 2 + 2
    room = size - head - len(fixed) - len(sni) - 4
    share = min(room, 1220)
    body = fixed + struct.pack("!HH", 51, share) + bytes(share)
    if room - share >= 4:
        body += struct.pack("!HH", 21, room - share - 4) + bytes(room - share - 4)
    body += sni
    message = b"\x03\x03" + bytes(32) + b"\x20" + bytes(32) + b"\0\x06\x13\1\x13\2\x13\3" + b"\1\0"
    message += struct.pack("!H", len(body)) + body
    return b"\x16\x03\x01" + struct.pack("!HB", len(message) + 4, 1) + len(message).to_bytes(3, "big") + message


# Each piece leaves in a segment of its own.
PIECES = """
for data in A["data"]:
    s = make(A["peer"])
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if A.get("mss"):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, A["mss"])
    s.connect((A["peer"], A["port"]))
    for piece in data:
        s.sendall(bytes.fromhex(piece))
    finish(s)
"""


def cut(data, *sizes):
    """Pieces in hex: of these sizes, then the rest."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size].hex())
        data = data[size:]
    return [*pieces, data.hex()] if data else pieces


def after_our_fin(dump):
    """How many packets came behind one that acknowledged our FIN, of all connections in an IPv4 capture."""
    ends, acknowledged, behind = {}, set(), 0
    for head, _ in dump.headers():
        size, (total,) = (head[0] & 15) * 4, struct.unpack_from("!H", head, 2)
        source, dest, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", head, size)
        if head[12:16] == OURS:
            if flags & 1:
                ends[source] = (seq + total - size - (offset >> 4) * 4 + 1) % 2**32
        elif dest in acknowledged:
            behind += 1
        elif ends.get(dest) == ack:
            acknowledged.add(dest)
    return behind


@pytest.mark.parametrize("size", [300, 1500, pytest.param(1700, marks=pytest.mark.core), 4000])
def test_client_hello_with_its_name_last(size, watch, start, cgroup, lab, servers, capture):
    """loadgen's hello, in the shape of a browser's: a post-quantum key share, padding, server_name."""
    argv = [compiled(), "hello", SERVERS4[0], str(SINK), "-n", str(N), "-m", str(size), "-s", "www.Last.Example"]
    with capture(f"tcp port {SINK}") as dump:
        cgroup.run(argv, netns=lab.pods, names=False, check=True, capture_output=True)
        watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert [(e.domain, e.name_source, e.dst, e.proxy) for e in watch.of(TLS)] == [
        ("www.last.example", SNI, SERVERS4[0], "")
    ] * N
    # The handshake counts in the address's row, all that follows in the name's.
    unnamed, named = watch.row(client(SERVERS4[0], SINK)), watch.row(client(SERVERS4[0], SINK, "www.last.example"))
    assert len(watch.rows) == 2
    assert (unnamed.opened, unnamed.closed, named.opened, named.closed) == (N, 0, 0, N)
    assert {(e.domain, e.name_source) for e in watch.of(CLOSE)} == {("www.last.example", SNI)}
    # loadgen closes first: what comes after the far side has acknowledged its FIN may be TIME_WAIT's, which is no
    # socket, and so may the answer; or it is counted while another CPU ends the socket, after the close was told.
    seen, behind = dump.packets(OURS), after_our_fin(dump)
    assert 0 <= seen.tx_packets - watch.total.tx_packets <= seen.rx_packets - watch.total.rx_packets <= behind
    assert sum(e.tx_bytes for e in watch.of(CLOSE)) == watch.total.tx_bytes
    assert 0 <= watch.total.rx_bytes - sum(e.rx_bytes for e in watch.of(CLOSE)) <= 52 * behind


SPLITS = {
    "1+rest": (1,),
    "5+rest": (5,),
    "1+4+1+rest": (1, 4, 1),
    "43+1+rest": (43, 1),
    "536s": (536, 536, 536),
    "700+rest": (700,),
    "all but the name's last byte": (-1,),
    "in the middle of the name": (-8,),
    "before the name's length": (-18, 1, 1, 1),
}


@pytest.mark.core
def test_client_hello_in_pieces(watch, run, servers, capture):
    """Every cut, at once and MSS-sized: the name all the same, and every byte counted once."""
    whole = hello(1700, "pieces.lab.example")
    data = [cut(whole, *(s if s > 0 else len(whole) + s for s in sizes)) for sizes in SPLITS.values()]
    data.append([piece.hex() for piece in (whole[i : i + 97] for i in range(0, len(whole), 97))])
    with capture(f"tcp port {SINK}") as dump:
        run(PIECES, data=data, peer=SERVERS4[0], port=SINK)
        watch.until(lambda w: len(w.of(CLOSE)) == len(data))
    assert [(e.domain, e.name_source) for e in watch.of(TLS)] == [("pieces.lab.example", SNI)] * len(data)
    named = watch.row(client(SERVERS4[0], SINK, "pieces.lab.example"))
    assert (named.closed, watch.total.opened) == (len(data), len(data))
    assert Packets(*watch.total[:4]) == dump.packets(OURS)


@pytest.mark.core
def test_client_hello_in_segments_of_536_bytes(watch, run, servers):
    run(PIECES, data=[[hello(4000, "mss.lab.example").hex()]] * N, mss=536, peer=SERVERS6[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert [(e.domain, e.name_source) for e in watch.of(TLS)] == [("mss.lab.example", SNI)] * N


def test_client_hello_cut_at_every_byte(watch, run, servers):
    whole = hello(330, "every.lab.example")
    data = [cut(whole, at) for at in range(1, len(whole))]
    run(PIECES, data=data, peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == len(data), 30)
    assert [e.domain for e in watch.of(TLS)] == ["every.lab.example"] * len(data)


def test_client_hello_without_a_name(watch, run, servers):
    run(PIECES, data=[cut(hello(600, ""))] * N, peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert [(e.domain, e.name_source) for e in watch.of(TLS)] == [(SERVERS4[0], ADDRESS)] * N
    assert list(watch.rows) == [client(SERVERS4[0], SINK)]


def test_names_of_any_length_and_case(watch, run, servers):
    """1 to 253 characters; upper case is lower case; a final dot is none."""
    labels = ".".join(["x" * 63] * 3)
    names = ["a", "a.b", "UPPER.Lab.EXAMPLE", "dot.lab.example.", labels + "." + "y" * 61, "z" * 63 + ".example"]
    run(PIECES, data=[cut(hello(1600, name)) for name in names], peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == len(names))
    shown = [name.lower().rstrip(".") for name in names]
    assert [e.domain for e in watch.of(TLS)] == shown
    assert {place.name for place in watch.rows} == {"", *shown}


def test_bytes_that_are_no_hello(watch, run, servers):
    """A first byte of 0x16 and then no TLS: counted as unreadable, never a name."""
    run(PIECES, data=[[(b"\x16" + bytes(200)).hex()]] * N, peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert not watch.of(TLS)
    assert list(watch.rows) == [client(SERVERS4[0], SINK)]
    assert watch.tallies() == {"decode/client_hello": N}
    watch.losses_expected = True


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_over_tls(watch, cgroup, lab, servers):
    before = len(servers.log("https", "accepted"))
    argv = ["curl", "-s", "-4", "--cacert", servers.ca, "https://web.lab.example/?[1-5]"]
    cgroup.run(argv, netns=lab.pods, check=True, capture_output=True)
    watch.until(lambda w: w.of(CLOSE))
    log = servers.log("https", "accepted")[before:]
    assert [line["sni"] for line in log] == ["web.lab.example"]  # one connection, five requests
    assert [(e.domain, e.name_source, e.comm) for e in watch.of(TLS)] == [("web.lab.example", SNI, "curl")]
    assert [(e.domain, e.name_source) for e in watch.of(CONNECT) if e.transport == "tcp"] == [
        ("web.lab.example", DNS_ANSWER)
    ]


# --- HTTP ---------------------------------------------------------------------------------------------------------

HTTP_PORT = PORTS["http"]


def request(host, target="/", extra="", method="GET", before="", close=True):
    end = "Connection: close\r\n" if close else ""
    return f"{method} {target} HTTP/1.1\r\n{before}Host: {host}\r\n{extra}{end}\r\n".encode()


def requests_seen(watch):
    return [(e.method, e.domain, e.path, e.name_source) for e in watch.of(HTTP)]


@pytest.mark.core
def test_host_anywhere_in_the_head(watch, run, servers, capture):
    """First, or behind up to four kilobytes of other headers, in any spelling."""
    before_host = len(servers.log("http", "request"))
    paddings = ["", "A: b\r\n", *(f"Cookie: {'c' * size}\r\n" for size in (60, 500, 1300, 1500, 3000, 4000))]
    heads = [request("anywhere.lab.example", f"/{i}", before=padding) for i, padding in enumerate(paddings)]
    heads.append(b"GET /8 HTTP/1.1\r\nHOST:Anywhere.Lab.Example:80\r\nConnection: close\r\n\r\n")
    heads.append(b"GET /9 HTTP/1.1\r\nConnection: close\r\nhOsT:\tanywhere.lab.example.\r\n\r\n")
    with capture(f"tcp port {HTTP_PORT}") as dump:
        run(PIECES, data=[cut(head) for head in heads], peer=SERVERS4[0], port=HTTP_PORT)
        watch.until(lambda w: len(w.of(CLOSE)) == len(heads))
    assert [(e.method, e.path) for e in watch.of(HTTP)] == [("GET", f"/{i}") for i in range(len(heads))]
    assert {place.name for place in watch.rows} == {"", "anywhere.lab.example"}
    assert watch.row(client(SERVERS4[0], HTTP_PORT, "anywhere.lab.example")).closed == len(heads)
    assert len(servers.log("http", "request")) - before_host == len(heads)
    assert Packets(*watch.total[:4]) == dump.packets(OURS)


@pytest.mark.xfail(reason="the kernel skips one blank before the value; the event has its name, the flow has not")
def test_host_behind_two_blanks(watch, run, servers):
    """RFC 9110 section 5.5 allows any number."""
    head = b"GET / HTTP/1.1\r\nHost: \t blanks.lab.example\r\nConnection: close\r\n\r\n"
    run(PIECES, data=[cut(head)], peer=SERVERS4[0], port=HTTP_PORT)
    watch.until(lambda w: w.of(CLOSE))
    assert requests_seen(watch) == [("GET", "blanks.lab.example", "/", HOST)]
    assert {place.name for place in watch.rows} == {"", "blanks.lab.example"}


@pytest.mark.core
def test_request_cut_in_two(watch, run, servers):
    """Everywhere in the request line and in the Host line."""
    head = request("cut.lab.example", "/path?q=1", before="User-Agent: x\r\n")
    at = range(1, len(head), 1 if len(head) < 150 else 3)
    run(PIECES, data=[cut(head, size) for size in at], peer=SERVERS4[0], port=HTTP_PORT)
    watch.until(lambda w: len(w.of(CLOSE)) == len(at), 30)
    assert requests_seen(watch) == [("GET", "cut.lab.example", "/path?q=1", HOST)] * len(at)
    assert watch.row(client(SERVERS4[0], HTTP_PORT, "cut.lab.example")).closed == len(at)


def test_request_byte_by_byte(watch, run, servers):
    head = request("bytes.lab.example", "/slowly")
    run(PIECES, data=[cut(head, *[1] * (len(head) - 1))], peer=SERVERS4[0], port=HTTP_PORT)
    watch.until(lambda w: w.of(CLOSE))
    assert requests_seen(watch) == [("GET", "bytes.lab.example", "/slowly", HOST)]


@pytest.mark.core
def test_requests_on_one_connection(watch, run, servers, capture):
    """Keep-alive, with bodies between them: 23 requests, 23 events, one row."""
    before = len(servers.log("http", "request"))
    body = "x" * 100
    with capture(f"tcp port {HTTP_PORT}") as dump:
        run(
            """
s = dial(A["peer"], A["port"])
for i in range(A["n"]):
    s.sendall(A["head"].replace("NUMBER", str(i)).encode())
    s.sendall(A["body"].encode())
    data = b""
    while not data.endswith(b"this is the lab\\n"):
        data += s.recv(4096)
finish(s)
""",
            n=N,
            peer=SERVERS4[0],
            port=HTTP_PORT,
            head=request("kept.lab.example", "/NUMBER", "Content-Length: 100\r\n", "POST", close=False).decode(),
            body=body,
        )
        watch.until(lambda w: w.of(CLOSE))
    assert requests_seen(watch) == [("POST", "kept.lab.example", f"/{i}", HOST) for i in range(N)]
    assert len(servers.log("http", "request")) - before == N
    assert len(watch.rows) == 2
    assert Packets(*watch.total[:4]) == dump.packets(OURS)


def test_a_request_sent_again_is_no_second_one(watch, run, servers, lab):
    """Every first data packet is lost."""
    rule = f"INPUT -p tcp --dport {HTTP_PORT} -m length --length 80:65535 -m statistic --mode nth --every 2 --packet 0"
    lab.world.run(["iptables", "-w", "-A", *rule.split(), "-j", "DROP"], check=True)
    try:
        heads = [cut(request("again.lab.example", f"/{i}")) for i in range(5)]
        run(PIECES, data=heads, peer=SERVERS4[0], port=HTTP_PORT)
        watch.until(lambda w: len(w.of(CLOSE)) == 5)
    finally:
        lab.world.run(["iptables", "-w", "-D", *rule.split(), "-j", "DROP"], check=True)
    assert watch.total.retransmits >= 2
    assert requests_seen(watch) == [("GET", "again.lab.example", f"/{i}", HOST) for i in range(5)]


@pytest.mark.core
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_through_a_proxy(watch, cgroup, lab, servers):
    """CONNECT: the request, then the hello inside it; the connection is called what was asked of the proxy."""
    proxy = f"{SERVERS4[0]}:{PORTS['proxy']}"
    argv = ["curl", "-s", "--proxy", f"http://{proxy}", "--cacert", servers.ca, "https://web.lab.example/"]
    cgroup.run(argv, netns=lab.pods, names=False, check=True, capture_output=True)
    watch.until(lambda w: w.of(CLOSE) and w.of(TLS))
    assert [e["host"] for e in servers.log("proxy", "request")][-1] == "web.lab.example"
    (asked,) = watch.of(HTTP)
    assert (asked.method, asked.domain, asked.proxy) == ("CONNECT", "web.lab.example", proxy)
    (inside,) = watch.of(TLS)
    assert (inside.domain, inside.name_source, inside.proxy) == ("web.lab.example", SNI, proxy)


def test_absolute_form(watch, run, servers):
    """A request to a proxy that is no CONNECT (RFC 9112 section 3.2.2)."""
    proxy = (SERVERS4[0], PORTS["proxy"])
    head = request("web.lab.example", "http://web.lab.example/absolute?a=1")
    run(PIECES, data=[cut(head, size) for size in (1, 8, 23, len(head))], peer=proxy[0], port=proxy[1])
    watch.until(lambda w: len(w.of(CLOSE)) == 4)
    assert requests_seen(watch) == [("GET", "web.lab.example", "/absolute?a=1", HOST)] * 4
    assert {e.proxy for e in watch.of(HTTP)} == {"{}:{}".format(*proxy)}


def test_no_http_no_name(watch, run, servers):
    """Letters that begin no request, HTTP/2's preface, zeros: counted, never told."""
    first = [b"GETX / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HELO there\r\n", bytes(100), b"G", b"A"]
    run(PIECES, data=[cut(data) for data in first], peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == len(first))
    assert not watch.of(HTTP, TLS)
    assert list(watch.rows) == [client(SERVERS4[0], SINK)]
    watch.losses_expected = True
    assert watch.total[4:] == Counts(opened=len(first), closed=len(first))[4:]
