"""DNS beyond a datagram for a datagram: over TCP, after a truncated answer, through a search list (D3)."""

from __future__ import annotations

import pytest

from exporter.decode import ANSWER_PIECE, QUERY_PIECE
from exporter.events import CLOSE, CONNECT, DNS, HTTP
from lab import dns
from lab.net import RESOLVER4, RESOLVER6, SERVERS4

from .conftest import N

# `how`: the length and the message in one write, in two, or all messages in one. Answers are read to the last byte.
OVER_TCP = """
def answer(s):
    return exactly(s, int.from_bytes(exactly(s, 2), "big"))

def framed(query):
    return struct.pack("!H", len(query)) + query

asked = [bytes.fromhex(query) for query in A["queries"]]
for batch in [asked] if A["how"] == "pipelined" else [[query] for query in asked]:
    s = dial(A["resolver"], 53)
    if A["how"] == "two writes":
        for query in batch:
            s.sendall(framed(query)[:2])
            time.sleep(0.01)
            s.sendall(query)
    else:
        s.sendall(b"".join(map(framed, batch)))
    tell(sizes=[len(answer(s)) for query in batch])
    finish(s)
"""


def queries(name, n=N, kind="A"):
    return [dns.query(name, kind, id=1000 + i).hex() for i in range(n)]


@pytest.mark.core
@pytest.mark.parametrize("resolver", [RESOLVER4, RESOLVER6], ids=["v4", "v6"])
def test_d3_lookups_over_tcp(resolver, watch, cgroup, run, servers):
    before = len(servers.log("dns", "query"))
    done = run(OVER_TCP, resolver=resolver, how="one write", queries=queries("www.lab.example"))
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert len(servers.wait("dns", "query", before + N)) - before == N
    lookups = watch.of(DNS)
    assert len(lookups) == N
    for event in lookups:
        assert (event.domain, event.dns_type, event.status, event.pid) == ("www.lab.example", "A", "NOERROR", done.pid)
        assert event.answers == ("web.lab.example", SERVERS4[0])
        assert (event.dst, event.port, event.transport) == (resolver, 53, "tcp")
        assert event.workload.cgroup_id == cgroup.id
        assert 0 < event.duration < 5e9
    assert len(watch.of(CONNECT)) == N
    assert len(watch.events) == 3 * N
    assert len(watch.join) == 0


@pytest.mark.core
@pytest.mark.parametrize("how", ["two writes", "pipelined"])
def test_d3_lookups_over_tcp_however_they_are_cut(how, watch, run):
    run(OVER_TCP, resolver=RESOLVER4, how=how, queries=queries("web.lab.example"))
    watch.until(lambda w: len(w.of(CLOSE)) == (1 if how == "pipelined" else N)).expire()
    assert [(e.domain, e.status, e.answers) for e in watch.of(DNS)] == [
        ("web.lab.example", "NOERROR", (SERVERS4[0],))
    ] * N


def test_d3_an_answer_of_many_addresses_is_read_to_its_end(watch, run):
    done = run(OVER_TCP, resolver=RESOLVER4, how="one write", queries=queries("many.lab.example"))
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert done["sizes"][0] > 1232
    assert [len(e.answers) for e in watch.of(DNS)] == [60] * N


@pytest.mark.core
def test_d3_a_truncated_answer_and_the_retry_over_tcp(watch, run, servers):
    """What a resolver does of itself: over UDP TC is set, and the same question goes over TCP."""
    before = len(servers.log("dns", "query"))
    code = 'for i in range(A["n"]):\n    socket.getaddrinfo("many.lab.example", 80, socket.AF_INET, TCP)'
    run(code, n=N, names=True)
    watch.until(lambda w: len(w.of(CLOSE)) == N).expire()
    asked = [row["transport"] for row in servers.wait("dns", "query", before + 2 * N)[before:]]
    assert (asked.count("udp"), asked.count("tcp")) == (N, N)
    told = [(e.transport, len(e.answers)) for e in watch.of(DNS)]
    assert (told.count(("udp", 0)), told.count(("tcp", 60)), len(told)) == (N, N, 2 * N)


@pytest.mark.core
def test_other_protocols_on_port_53_are_what_they_are(watch, run):
    """A request to a web server on port 53 is a request, and its body is not shipped as DNS."""
    head = "POST / HTTP/1.1\r\nHost: odd.example\r\nContent-Length: 50000\r\n\r\n"
    lines = 's = dial(A["peer"], 53)\ns.sendall(A["head"].encode())\ns.sendall(bytes(50000))\ns.close()'
    run(lines, peer=RESOLVER4, head=head)
    watch.until(lambda w: w.of(CLOSE))
    assert [(e.method, e.domain) for e in watch.of(HTTP)] == [("POST", "odd.example")]
    assert not watch.of(DNS)
    assert not [s for s in watch.sightings if s.kind in (QUERY_PIECE, ANSWER_PIECE)]


@pytest.fixture
def search_list(lab):
    """A resolver that tries three endings before the name itself."""
    path = lab.pods.etc / "resolv.conf"
    before = path.read_text()
    # On an emulated CPU two seconds without an answer are nothing; after a timeout the resolver leaves the search.
    search = "search shop.svc.cluster.example svc.cluster.example cluster.example\noptions ndots:5 timeout:30\n"
    path.write_text(before + search)
    yield
    path.write_text(before)


@pytest.mark.core
def test_d3_a_search_list_is_no_failure(search_list, watch, run, servers):
    before = len(servers.log("dns", "query"))
    lines = 'for i in range(A["n"]):\n    socket.getaddrinfo("v4.lab.example", 80, socket.AF_INET, TCP)'
    run(lines, n=N, names=True)
    assert len(servers.wait("dns", "query", before + 4 * N)) - before == 4 * N
    watch.until(lambda w: len(w.of(DNS)) >= N and len(w.sightings) == 8 * N).expire(1.1)
    found = watch.of(DNS)
    assert len(found) == 4 * N
    assert {e.domain for e in found if e.search_expansion} == {
        f"v4.lab.example.{ending}" for ending in ("shop.svc.cluster.example", "svc.cluster.example", "cluster.example")
    }
    assert sum(e.search_expansion for e in found) == 3 * N
    assert [(e.domain, e.status) for e in found if not e.search_expansion] == [("v4.lab.example", "NOERROR")] * N


def test_d3_a_name_that_does_not_exist_is_one_failure(search_list, watch, run):
    lines = """
try:
    socket.getaddrinfo("nobody.lab.example", 80, socket.AF_INET, TCP)
except OSError:
    pass
"""
    run(lines, names=True)
    watch.until(lambda w: len(w.sightings) == 8).expire(1.1)
    assert sorted((e.domain, e.search_expansion) for e in watch.of(DNS)) == [
        ("nobody.lab.example", False),
        ("nobody.lab.example.cluster.example", True),
        ("nobody.lab.example.shop.svc.cluster.example", True),
        ("nobody.lab.example.svc.cluster.example", True),
    ]
