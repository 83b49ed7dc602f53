"""HTTP/1 exchanges over plain TCP: each request with its answer's status, times and sizes, however the answer ends.

The server says just what the test wrote down for it, in the pieces and with the pauses that the test wants.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pytest

from exporter.events import CLOSE, HTTP
from lab.net import SERVERS4, SERVERS6, Namespace

from .conftest import SLOW

pytestmark = pytest.mark.kernel

N = 23
RESET, CLOSE_NOW = "reset", "close"
Step = bytes | float | str  # say this; wait so many seconds; end the connection


class Seen(NamedTuple):
    method: str
    path: str
    status: int
    error: str
    sent: int | None
    got: int | None
    sequence: int


@contextlib.contextmanager
def answering(netns: Namespace, address: str, script: Mapping[str, Sequence[Step]]) -> Iterator[int]:
    """A server that answers each path with its steps, outside the cgroup; its port."""
    with netns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, 0))
    sock.listen(100)
    sock.settimeout(0.1)
    stop = threading.Event()
    threads = []

    def talk(connection: socket.socket) -> None:
        connection.settimeout(20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        with contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in data:
                    more = connection.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
                )
                expects = b"100-continue" in head
                if expects:
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                while len(data) < length:
                    data += connection.recv(65536)
                data = data[length:]
                for step in script[head.split(b" ")[1].decode()]:
                    if isinstance(step, bytes):
                        connection.sendall(step)
                    elif isinstance(step, float):
                        time.sleep(step)
                    else:
                        if step == RESET:
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = sock.accept()
                threads.append(threading.Thread(target=end, args=(connection,)))
                threads[-1].start()

    def end(connection: socket.socket) -> None:
        with contextlib.closing(connection):
            talk(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        for one in threads:
            one.join()
        sock.close()


# Each entry of `talk`: what to send, and how many bytes of answers to wait for; -1 = until the end.
CLIENT = """
s = dial(A["peer"], A["port"])
for text, size in A["talk"]:
    s.sendall(text.encode("latin-1"))
    if size >= 0:
        exactly(s, size)
    else:
        try:
            read_to_end(s)
        except OSError:
            pass
try:
    finish(s)
except OSError:
    s.close()
"""


def ask(path: str, method: str = "GET", body: bytes = b"", more: str = "") -> str:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: h.lab.example\r\n{length}{more}\r\n{body.decode('latin-1')}"


def reply(body: bytes = b"", status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def seen(watch) -> list[Seen]:
    found = []
    for event in watch.of(HTTP):
        x = event.exchange
        assert x.scheme == "http"
        assert not x.partial
        found.append(Seen(event.method, event.path, x.status, x.error, x.request_size, x.response_size, x.sequence))
    return found


@pytest.fixture
def converse(lab, run, watch):
    """converse(script, talk): the client's side of one connection; what was seen of it."""

    def go(script, talk, address=SERVERS4[0]) -> list[Seen]:
        before = len(watch.of(HTTP))
        with answering(lab.world, address, script) as port:
            run(CLIENT, peer=address, port=port, talk=talk)
        watch.until(lambda w: w.of(CLOSE))
        return seen(watch)[before:]

    return go


@pytest.mark.core
@pytest.mark.parametrize("address", [SERVERS4[0], SERVERS6[0]], ids=["v4", "v6"])
def test_keep_alive(watch, converse, address):
    """23 requests on one connection, each with a status of its own; times as the server took them."""
    delay = 0.05 * SLOW
    script = {f"/{i}": [delay if i == 7 else 0.0, reply(b"x" * i, f"{200 + i} Said")] for i in range(N)}
    talk = [(ask(f"/{i}"), len(reply(b"x" * i, f"{200 + i} Said"))) for i in range(N)]
    found = converse(script, talk, address)
    assert found == [Seen("GET", f"/{i}", 200 + i, "", 0, 0 if 200 + i == 204 else i, i + 1) for i in range(N)]
    slow = watch.of(HTTP)[7]
    assert delay * 1e9 <= slow.exchange.first_byte <= slow.duration < (delay + 1 * SLOW) * 1e9
    assert all(e.duration < delay * 1e9 for i, e in enumerate(watch.of(HTTP)) if i != 7) or SLOW > 1


@pytest.mark.core
def test_how_responses_end(watch, converse):
    """By length, over several segments and with pauses; by chunks; without a body; by the connection's end."""
    big = b"B" * 3_000_000
    pieces = [big[i : i + 100_000] for i in range(0, len(big), 100_000)]
    chunks = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n", 0.05, b"0\r\n\r\n"]
    script = {
        "/big": [reply(big)[: -len(big)], *pieces],
        "/late": [reply(b"12345")[:-5], 0.05, b"12", 0.05, b"345"],
        "/chunks": chunks,
        "/chunk": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"],
        "/head": [b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"],
        "/204": [b"HTTP/1.1 204 No Content\r\n\r\n"],
        "/304": [b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"],
        "/long": [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2000 + b"\r\nContent-Length: 3\r\n\r\nend"],
        "/close": [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil ", 0.05, b"the end", CLOSE_NOW],
    }

    def size(path):
        return sum(len(step) for step in script[path] if isinstance(step, bytes))

    talk = [(ask(path, "HEAD" if path == "/head" else "GET"), size(path)) for path in script if path != "/close"]
    talk.append((ask("/close"), -1))
    found = converse(script, talk)
    got = {s.path: s.got for s in found}
    assert [(s.path, s.status, s.error) for s in found] == [(path, int(script[path][0][9:12]), "") for path in script]
    assert got == {
        "/big": len(big),
        "/late": 5,
        "/chunks": 15,  # with its framing
        "/chunk": 12,
        "/head": 0,
        "/204": 0,
        "/304": 0,
        "/long": None,  # the head is longer than what is looked at
        "/close": 13,
    }
    took = {e.path: (e.exchange.first_byte, e.duration) for e in watch.of(HTTP)}
    for path, pause in (("/late", 0.1), ("/chunks", 0.05), ("/close", 0.05)):
        assert took[path][1] - took[path][0] >= pause * 0.98e9, path
    for path in ("/chunk", "/head", "/204", "/304"):
        assert took[path][0] == took[path][1], path


@pytest.mark.core
def test_request_bodies(converse):
    """One that comes with its head, one behind a 100, one in chunks."""
    body = b"z" * 50_000
    script = {"/small": [reply()], "/continued": [reply(b"ok")], "/chunked": [reply()]}
    go_on = len(b"HTTP/1.1 100 Continue\r\n\r\n")
    whole = ask("/continued", "PUT", body, "Expect: 100-continue\r\n")
    at = whole.index("\r\n\r\n") + 4
    talk = [
        (ask("/small", "POST", b"12345"), len(reply())),
        (whole[:at], go_on),
        (whole[at:], len(reply(b"ok"))),
    ]
    found = converse(script, talk)
    assert found == [
        Seen("POST", "/small", 200, "", 5, 0, 1),
        Seen("PUT", "/continued", 200, "", 50_000, 2, 2),
    ]


@pytest.mark.core
def test_heads_in_every_form_behind_the_first(converse):
    """The first names the connection; of the others the kernel reads those that do not end with their segment."""
    paths = ["/first", "/whole", "/body", "/split", "/long", "/last"]
    split, size = ask("/split"), len(reply())
    body = b"a\r\n\r\nGET /no HTTP/1.1\r\n\r\n"  # it ends as a head does
    talk = [
        (ask("/first"), size),
        (ask("/whole", "DELETE"), size),
        (ask("/body", "POST", body), size),
        (split[:-2], 0),
        (split[-2:], size),
        (ask("/long", more=f"X-Long: {'y' * 3000}\r\n"), size),
        (ask("/last", "HEAD"), size),
    ]
    found = converse({path: [0.01, reply()] for path in paths}, talk)
    methods = ["GET", "DELETE", "POST", "GET", "GET", "HEAD"]
    sizes = [0, 0, len(body), 0, 0, 0]
    assert found == [
        Seen(method, path, 200, "", sent, 0, number)
        for number, (method, path, sent) in enumerate(zip(methods, paths, sizes, strict=True), 1)
    ]


@pytest.mark.core
def test_pipelined(converse):
    """Three requests before the first answer; the answers in one segment, then one alone."""
    script = {"/1": [0.05, reply(b"one")], "/2": [reply(b"two", "404 No")], "/3": [reply(b"three", "500 Oh")]}
    head = sum(len(step) for steps in script.values() for step in steps if isinstance(step, bytes))
    talk = [(ask("/1"), 0), (ask("/2"), 0), (ask("/3"), head)]
    assert [(s.path, s.status, s.got) for s in converse(script, talk)] == [
        ("/1", 200, 3),
        ("/2", 404, 3),
        ("/3", 500, 5),
    ]


@pytest.mark.core
@pytest.mark.parametrize(
    ("end", "error"), [(RESET, "connection_reset"), (CLOSE_NOW, "connection_closed")], ids=["reset", "closed"]
)
def test_no_answer(watch, converse, end, error):
    """A connection that ends instead: a record with its error, and how long it was waited for."""
    (found,) = converse({"/": [0.05, end]}, [(ask("/"), -1)])
    assert found == Seen("GET", "/", 0, error, 0, None, 1)
    assert watch.of(HTTP)[0].duration >= 0.049e9


@pytest.mark.core
def test_half_an_answer(converse):
    (found,) = converse({"/": [reply(b"x" * 100)[:-40], 0.05, RESET]}, [(ask("/"), -1)])
    assert found == Seen("GET", "/", 200, "connection_reset", 0, 60, 1)


@pytest.mark.core
def test_upgrade(watch, converse):
    """101 ends the request and HTTP on this connection: what looks like a request after it is none."""
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    talk = [(ask("/ws", more="Upgrade: x\r\nConnection: upgrade\r\n"), len(switch)), (ask("/frame"), 5)]
    found = converse({"/ws": [switch], "/frame": [b"frame"]}, talk)
    assert found == [Seen("GET", "/ws", 101, "", 0, 0, 1)]
    assert not [key for key in watch.moved if not key.peer]


def test_answers_that_arrive_out_of_order(watch, converse, lab):
    """Every fourth packet of the server's is lost once: what comes again is not counted twice."""
    body = b"o" * 200_000
    rule = "OUTPUT -p tcp -m length --length 200:65535 -m statistic --mode nth --every 4 --packet 1 -j DROP"
    lab.world.run(["iptables", "-w", "-A", *rule.split()], check=True)
    try:
        script = {f"/{i}": [reply(body)] for i in range(3)}
        found = converse(script, [(ask(path), len(reply(body))) for path in script])
    finally:
        lab.world.run(["iptables", "-w", "-D", *rule.split()], check=True)
    assert found == [Seen("GET", f"/{i}", 200, "", 0, len(body), i + 1) for i in range(3)]


def test_traceparent(watch, converse):
    """Read, and only where it is valid."""
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    values = [good, good.upper(), "00-" + "0" * 32 + good[35:], good + "-more", "ff" + good[2:], "junk"]
    script = {f"/{i}": [reply()] for i in range(len(values))}
    talk = [(ask(f"/{i}", more=f"TraceParent: {value}\r\n"), len(reply())) for i, value in enumerate(values)]
    converse(script, talk)
    assert [event.exchange.traceparent for event in watch.of(HTTP)] == [good, "", "", "", "", ""]
