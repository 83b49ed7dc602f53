"""TLS handshakes on the wire: 23 in, 23 out, with their versions, their ends and how long they took; OpenSSL's own
tools, Python's ssl and curl against servers of the far side. The names in hellos: test_names.py."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import struct
import threading
import time

import pytest

from exporter.events import CLOSE, SNI, TLS
from exporter.kernel import wire
from lab.net import SERVERS4, SERVERS6
from lab.servers import PORTS

from .conftest import SLOW, N, Watch, attach, client
from .test_names import PIECES, SINK, hello

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
NAME = "web.lab.example"

# --- the far side -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tls_server(lab, servers, version=None, address=SERVERS4[0], serve=None, **settings):
    """A server of the far side, outside the watched cgroup, for connections one after the other: (its port, what it
    negotiated). `serve` has the raw connection instead, for what is no proper server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(servers.ca, servers.ca.with_name("key.pem"))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    for setting, value in settings.items():
        getattr(context, setting)(value)
    with lab.world.entered():
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, 0))
    listener.listen(100)
    listener.settimeout(0.1)
    stop, seen = threading.Event(), []

    def speak(connection):
        if serve is not None:
            serve(connection)
            return
        with context.wrap_socket(connection, server_side=True) as secure:
            seen.append((secure.version(), secure.session_reused))
            while data := secure.recv(4096):
                secure.sendall(data)

    def run():
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(20 * SLOW)
                with connection, contextlib.suppress(OSError):
                    speak(connection)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1], seen
    finally:
        stop.set()
        thread.join()
        listener.close()


# --- the near side ----------------------------------------------------------------------------------------------------

SECURE = """
import ssl
context = ssl.create_default_context(cafile=A["ca"]) if A.get("ca") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
if A.get("check", True) is False:
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.minimum_version = A.get("minimum", ssl.TLSVersion.TLSv1_2)
context.set_alpn_protocols(A.get("alpn", ["h2", "http/1.1"]))
session, errors = None, []
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    try:
        s = context.wrap_socket(s, server_hostname=A.get("name"), session=session if A.get("resume") else None)
        s.sendall(b"ping")
        assert s.recv(100) == b"ping"
        session = s.session
        s = s.unwrap()
        finish(s)
    except ssl.SSLError as error:
        errors.append(error.reason)
        s.close()
tell(errors=errors)
"""


def told(watch):
    """Version, status, name and its source of each handshake."""
    return [(e.tls.version, e.status, e.domain, e.name_source) for e in watch.of(TLS)]


@pytest.mark.core
@pytest.mark.parametrize("address", [SERVERS4[0], SERVERS6[0]], ids=["v4", "v6"])
@pytest.mark.parametrize(("version", "word", "written"), [(V12, "1.2", "TLSv1.2"), (V13, "1.3", "TLSv1.3")])
def test_handshakes(version, word, written, address, watch, run, lab, servers):
    """23 in, 23 out; the server agrees about each."""
    with tls_server(lab, servers, version, address) as (port, seen):
        done = run(SECURE, n=N, peer=address, port=port, ca=str(servers.ca), name=NAME)
        watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert done["errors"] == []
    assert seen == [(written, False)] * N
    assert told(watch) == [(word, "ok", NAME, SNI)] * N
    kinds = [s.kind for s in watch.sightings]
    for kind in (wire.RECORD_HELLO, wire.RECORD_SERVER_HELLO, wire.RECORD_HANDSHAKE_END):
        assert kinds.count(kind) == N
    lasted = {e.cookie: e for e in watch.of(CLOSE)}  # a port may be used twice
    for event in watch.of(TLS):
        how = event.tls
        assert (how.offered, how.alpn, how.resumed, how.alert, how.quic) == ("1.3", ("h2", "http/1.1"), False, "", "")
        assert how.ja4.startswith("t13d")
        assert how.group == ("" if word == "1.2" else "x25519")
        assert (event.dst, event.port, event.transport, event.pid) == (address, port, "tcp", done.pid)
        close = lasted[event.cookie]
        assert close.time - close.duration <= event.time  # both ends of the handshake lie within its connection
        assert 0 < event.duration < close.duration
    assert watch.row(client(address, port, NAME)).closed == N


@pytest.mark.parametrize(("version", "word"), [(V12, "1.2"), (V13, "1.3")])
def test_sessions_taken_up_again(version, word, watch, run, lab, servers):
    with tls_server(lab, servers, version) as (port, seen):
        run(SECURE, n=N, peer=SERVERS4[0], port=port, ca=str(servers.ca), name=NAME, resume=True)
        watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert [e.tls.resumed for e in watch.of(TLS)] == [again for _, again in seen] == [False] + [True] * (N - 1)
    assert told(watch) == [(word, "ok", NAME, SNI)] * N


@pytest.mark.core
def test_no_common_version(watch, run, lab, servers):
    """The server's alert ends it."""
    with tls_server(lab, servers, V12) as (port, _):
        done = run(SECURE, n=N, peer=SERVERS4[0], port=port, ca=str(servers.ca), name=NAME, minimum=V13)
        watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert len(done["errors"]) == N
    assert told(watch) == [("", "protocol_version", NAME, SNI)] * N
    assert {e.tls.alert for e in watch.of(TLS)} == {"protocol_version"}
    assert min(e.duration for e in watch.of(TLS)) > 0


@pytest.mark.core
@pytest.mark.parametrize(("version", "word"), [(V12, "1.2"), (V13, "1.3")])
def test_a_certificate_that_is_not_trusted(version, word, watch, run, lab, servers):
    """The client's alert ends it."""
    with tls_server(lab, servers, version) as (port, _):
        done = run(SECURE, n=N, peer=SERVERS4[0], port=port, name=NAME)
        watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert done["errors"] == ["CERTIFICATE_VERIFY_FAILED"] * N
    assert told(watch) == [(word, "unknown_ca", NAME, SNI)] * N


def test_a_name_the_server_does_not_know(watch, run, lab, servers):
    """A warning before the ServerHello (RFC 6066 section 3) is not the end."""

    def warn(connection):
        connection.recv(4096)
        connection.sendall(bytes.fromhex("15030300020170"))
        connection.sendall(bytes.fromhex("160303002c02000028 0303") + bytes(32) + bytes.fromhex("001301000000"))
        connection.recv(4096)
        connection.recv(1)

    lines = """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.sendall(bytes.fromhex(A["hello"]))
    exactly(s, 7 + 49)
    s.sendall(bytes.fromhex("160303000410000000"))
    s.close()
"""
    with tls_server(lab, servers, serve=warn) as (port, _):
        run(lines, n=5, peer=SERVERS4[0], port=port, hello=hello(300, NAME).hex())
        watch.until(lambda w: len(w.of(CLOSE)) == 5)
    assert told(watch) == [("1.2", "ok", NAME, SNI)] * 5


@pytest.mark.core
def test_a_server_that_never_answers(watch, start, servers):
    """Told when the connection ends, or after ten seconds: not twice."""
    lines = """
kept = []
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    s.sendall(bytes.fromhex(A["hello"]))
    kept.append(s)
pause(sent=True)
for s in kept[:A["closed"]]:
    finish(s)
pause(closed=True)
"""
    one = start(lines, n=N, peer=SERVERS4[0], port=SINK, hello=hello(400, NAME).hex(), closed=7)
    one.wait_for("sent")
    one.go()
    one.wait_for("closed")
    watch.until(lambda w: len(w.of(CLOSE)) == 7)
    assert told(watch) == [("", "closed", NAME, SNI)] * 7
    late = list(watch.join.expire(time.monotonic_ns() + 11_000_000_000))
    assert [(e.status, e.domain, e.duration) for e in late] == [("timeout", NAME, None)] * (N - 7)
    one.go()
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert len(watch.of(TLS)) == 7


def test_a_server_that_speaks_no_tls(watch, run, servers):
    """It echoes: a ClientHello is no ServerHello."""
    lines = """
for i in range(A["n"]):
    s = dial(A["peer"], A["port"])
    try:
        s.sendall(bytes.fromhex(A["hello"]))
        s.recv(1)
    except OSError:
        pass
    s.close()
"""
    run(lines, n=N, peer=SERVERS4[0], port=PORTS["tcp_echo"], hello=hello(400, NAME).hex())
    watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert told(watch) == [("", "closed", NAME, SNI)] * N


@pytest.mark.core
def test_a_hello_in_pieces_before_the_answer(watch, run, lab, servers):
    """Cut before and behind the name, by a real client's ClientHello."""
    lines = """
import ssl
context = ssl.create_default_context(cafile=A["ca"])
context.set_alpn_protocols(["h2"])
for cut in A["cuts"]:
    s = dial(A["peer"], A["port"])
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    end = context.wrap_bio(theirs, ours, server_hostname=A["name"])
    for turn in range(4):
        try:
            end.do_handshake()
            break
        except ssl.SSLWantReadError:
            data = ours.read()
            for at in range(0, len(data), cut):
                s.sendall(data[at:at + cut])
            theirs.write(s.recv(65536))
    s.sendall(ours.read())
    s.recv(65536)
    finish(s)
"""
    cuts = [1, 7, 50, 97, 140, 180, 250, 400]
    with tls_server(lab, servers, V13) as (port, _):
        run(lines, cuts=cuts, peer=SERVERS4[0], port=port, ca=str(servers.ca), name=NAME)
        watch.until(lambda w: len(w.of(CLOSE)) == len(cuts))
    assert told(watch) == [("1.3", "ok", NAME, SNI)] * len(cuts)
    assert len({e.tls.ja4 for e in watch.of(TLS)}) == 1
    assert {(e.tls.alpn, e.tls.offered) for e in watch.of(TLS)} == {(("h2",), "1.3")}


def test_hello_retry_request(watch, run, lab, servers):
    """The server wants another group: two ClientHellos and two ServerHellos are one handshake."""
    with tls_server(lab, servers, V13, set_ecdh_curve="secp384r1") as (port, seen):
        run(SECURE, n=N, peer=SERVERS4[0], port=port, ca=str(servers.ca), name=NAME)
        watch.until(lambda w: len(w.of(CLOSE)) == N)
    assert len(seen) == N
    assert told(watch) == [("1.3", "ok", NAME, SNI)] * N
    assert {e.tls.group for e in watch.of(TLS)} == {"secp384r1"}
    assert [s.kind for s in watch.sightings].count(wire.RECORD_SERVER_HELLO) == 2 * N


def test_large_hellos(watch, run, servers):
    """Whole, whatever their size up to 4 KB."""
    sizes = [517, 1024, 1025, 1500, 2048, 2049, 3000, 4000]
    data = [[hello(size, "large.lab.example").hex()] for size in sizes]
    run(PIECES, data=data, peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == len(sizes))
    assert [(e.domain, bool(e.tls.ja4), e.tls.offered) for e in watch.of(TLS)] == [
        ("large.lab.example", True, "1.3")
    ] * len(sizes)
    # Of a hello in one segment most of the key share is left out.
    cut = [bool(s.flags & wire.RECORD_CUT) for s in watch.sightings if s.kind == wire.RECORD_HELLO]
    assert cut == [True] * 3 + [False] * (len(cut) - 3)


def test_a_name_that_comes_first_is_not_the_end_of_the_hello(watch, run, servers):
    """The kernel has its name with the first segment; what follows is still part of the fingerprint."""
    sni = struct.pack("!HHHBH", 0, len(NAME) + 5, len(NAME) + 3, 0, len(NAME)) + NAME.encode()
    rest = struct.pack("!HHH", 16, 5, 3) + b"\2h2" + struct.pack("!HH", 21, 2500) + bytes(2500)
    rest += struct.pack("!HHBH", 43, 3, 2, 0x0304)
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\1" + b"\1\0" + struct.pack("!H", len(sni + rest)) + sni + rest
    whole = b"\x16\x03\x01" + struct.pack("!HB", len(body) + 4, 1) + len(body).to_bytes(3, "big") + body
    cuts = [(100,), (110, 20), (300, 300, 300), ()]
    data = []
    for sizes in cuts:
        pieces, left = [], whole
        for size in sizes:
            pieces.append(left[:size].hex())
            left = left[size:]
        data.append([*pieces, left.hex()])
    run(PIECES, data=data, peer=SERVERS4[0], port=SINK)
    watch.until(lambda w: len(w.of(CLOSE)) == len(data))
    assert [(e.domain, e.tls.offered, e.tls.alpn) for e in watch.of(TLS)] == [(NAME, "1.3", ("h2",))] * len(data)
    assert len({e.tls.ja4 for e in watch.of(TLS)}) == 1


def test_an_excluded_name_is_no_handshake(programs, parent, tmp_path, run, cgroup, lab, servers):
    """Its pieces that had left before the name was read are forgotten."""
    with attach(parent.path, tmp_path / "p", suffixes=["lab.example"]) as tap:
        watch = Watch(tap, {cgroup.id}, lambda name: name.endswith("lab.example"))
        whole = hello(1700, "hidden.lab.example").hex()
        run(PIECES, data=[[whole], [whole[:1000], whole[1000:]]], peer=SERVERS4[0], port=SINK)
        watch.until(lambda w: w.tallies().get("filtered/close") == 2)
        assert not watch.of(TLS)
        assert not len(watch.join)
        assert watch.tallies() == {"filtered/tls": 2, "filtered/close": 2}


@pytest.mark.core
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize(("option", "word"), [("-tls1_2", "1.2"), ("-tls1_3", "1.3")])
def test_openssl_s_client(option, word, watch, cgroup, lab, servers):
    before = len(servers.log("https", "accepted"))
    # fmt: off
    argv = ["openssl", "s_client", "-connect", f"{SERVERS4[0]}:443", "-servername", NAME, option,
            "-CAfile", str(servers.ca), "-brief", "-no_ign_eof"]
    # fmt: on
    for _ in range(5):
        cgroup.run(argv, netns=lab.pods, names=False, check=True, capture_output=True, input=b"")
    watch.until(lambda w: len(w.of(CLOSE)) == 5)
    assert [row["version"] for row in servers.log("https", "accepted")[before:]] == [f"TLSv{word}"] * 5
    assert told(watch) == [(word, "ok", NAME, SNI)] * 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(watch, cgroup, lab, servers):
    argv = ["curl", "-s", "-4", "--resolve", f"{NAME}:443:{SERVERS4[0]}", "--cacert", servers.ca, f"https://{NAME}/"]
    cgroup.run(argv, netns=lab.pods, names=False, check=True, capture_output=True)
    watch.until(lambda w: w.of(CLOSE))
    (event,) = watch.of(TLS)
    assert told(watch) == [("1.3", "ok", NAME, SNI)]
    assert (event.tls.alpn, event.comm) == (("h2", "http/1.1"), "curl")


@pytest.mark.core
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_handshake_behind_a_proxy(watch, cgroup, lab, servers):
    """The proxy's own answer is no ServerHello."""
    proxy = f"{SERVERS4[0]}:{PORTS['proxy']}"
    argv = ["curl", "-s", "--proxy", f"http://{proxy}", "--cacert", servers.ca, f"https://{NAME}/"]
    cgroup.run(argv, netns=lab.pods, names=False, check=True, capture_output=True)
    watch.until(lambda w: w.of(CLOSE) and w.of(TLS))
    (event,) = watch.of(TLS)
    assert told(watch) == [("1.3", "ok", NAME, SNI)]
    assert event.proxy == proxy
    assert event.duration > 0


def test_a_socket_older_than_the_agent(programs, parent, tmp_path, start, cgroup, lab, servers):
    """A handshake met midway is not told: nobody knows when it began, or whose it was."""
    lines = """
import ssl
context = ssl.create_default_context(cafile=A["ca"])
s = dial(A["peer"], A["port"])
ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
end = context.wrap_bio(theirs, ours, server_hostname=A["name"])
try:
    end.do_handshake()
except ssl.SSLWantReadError:
    s.sendall(ours.read())
theirs.write(s.recv(65536))
pause(halfway=True)
end.do_handshake()
end.write(b"ping")
s.sendall(ours.read())
s.recv(65536)
finish(s)
"""
    with tls_server(lab, servers, V13) as (port, _):
        one = start(lines, peer=SERVERS4[0], port=port, ca=str(servers.ca), name=NAME)
        one.wait_for("halfway")
        with attach(parent.path, tmp_path / "p") as tap:
            watch = Watch(tap, {cgroup.id})
            one.go()
            one.finish()
            watch.until(lambda w: w.row(client(SERVERS4[0], port)).rx_packets)
            assert not watch.of(TLS)
            assert not watch.tallies()
