"""bpf/lib compiled for the host: packets, ClientHellos and HTTP/1 heads, whole, cut anywhere, and hostile.

The answers are compared with what the builders here know, or with a parser here that works on the whole
stream. Not tested here: that the verifier takes the same code, and what the kernel makes of the answers.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import ipaddress
import itertools
import random
import re
import ssl
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
CC = ["cc", "-std=gnu11", "-O1", "-g", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-I"]
CC[-1] += str(HERE.parents[1] / "bpf")
# The parsers load words at any address, which BPF may; gcc's check of that would drown the others.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all"]

READING, NAME, NO_NAME, FAILED = range(4)
BY_HELLO, BY_HEAD = 1, 2  # bpf_host.c's
FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Packet(c.Structure):
    _fields_ = (
        ("source", c.c_uint8 * 16),
        ("dest", c.c_uint8 * 16),
        ("source_port", c.c_uint16),
        ("dest_port", c.c_uint16),
        ("transport", c.c_uint8),
        ("tcp_flags", c.c_uint8),
        ("seq", c.c_uint32),
        ("ack", c.c_uint32),
        ("payload", c.c_uint32),
        ("length", c.c_uint32),
    )


class Answer(c.Structure):
    _fields_ = (
        ("id", c.c_uint64),
        ("prefix_bits", c.c_uint32),
        ("name_length", c.c_uint32),
        ("named_by", c.c_uint32),
        ("ended_by", c.c_uint32),
        ("status", c.c_uint8),
        ("ended", c.c_uint8),
        ("tunnel", c.c_uint8),
        ("pad", c.c_uint8 * 5),
        ("text", c.c_uint8 * 256),
        ("reversed", c.c_uint8 * 256),
    )

    @property
    def name(self) -> bytes | None:
        return bytes(self.text[: self.name_length]) if self.status == NAME else None

    @property
    def seen(self) -> tuple[int, bytes | None, bool]:
        return self.status, self.name, bool(self.ended)


class Host:
    """The shared object. A stream is fed whole, or as pieces [at, at + length) in the order given."""

    def __init__(self, path: Path) -> None:
        self.library = c.CDLL(str(path))
        self.head_reach = c.c_uint32.in_dll(self.library, "host_head_reach").value

    def _feed(self, function: Any, stream: bytes, pieces: Iterable[tuple[int, int]] | None) -> Answer:
        flat = list(itertools.chain.from_iterable(pieces if pieces is not None else [(0, len(stream))]))
        answer = Answer()
        function(stream, (c.c_uint32 * len(flat))(*flat), len(flat) // 2, c.byref(answer))
        return answer

    def hello(self, stream: bytes, pieces: Iterable[tuple[int, int]] | None = None) -> Answer:
        return self._feed(self.library.host_hello, stream, pieces)

    def head(self, stream: bytes, pieces: Iterable[tuple[int, int]] | None = None) -> Answer:
        return self._feed(self.library.host_head, stream, pieces)

    def packet(self, data: bytes, total: int | None = None) -> Packet | None:
        return self._packet(self.library.host_parse, data, total)

    def plain(self, data: bytes, total: int | None = None) -> Packet | None:
        return self._packet(self.library.host_plain, data, total)

    def _packet(self, function: Any, data: bytes, total: int | None) -> Packet | None:
        packet = Packet()
        failed = function(data, len(data), len(data) if total is None else total, c.byref(packet))
        return None if failed else packet


def compiled(out: Path, *flags: str) -> Path:
    subprocess.run([*CC, *flags, str(HERE / "bpf_host.c"), "-o", str(out)], check=True)
    return out


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(compiled(tmp_path_factory.mktemp("host") / "bpf_host.so", "-shared", "-fPIC"))


def in_pieces(cuts: Iterable[int], length: int) -> list[tuple[int, int]]:
    edges = [0, *sorted(set(cuts)), length]
    return [(a, b - a) for a, b in itertools.pairwise(edges) if b > a]


def sent_again(pieces: list[tuple[int, int]], rng: random.Random) -> Iterator[tuple[int, int]]:
    """As TCP does it: the same piece, a piece and those before it as one, one that reaches further back."""
    for at, length in pieces:
        back = rng.randrange(at + 1) if rng.random() < 0.3 else 0
        yield at - back, length + back
        if rng.random() < 0.3:
            yield at, length
        if rng.random() < 0.2:
            yield 0, at + length


def every_way(stream: bytes, rng: random.Random) -> Iterator[list[tuple[int, int]]]:
    length = len(stream)
    for cut in range(1, length):
        two = in_pieces([cut], length)
        yield two
        yield [two[0], *two]
        yield [two[0], (cut // 2, length - cut // 2)]
    yield in_pieces(range(length), length)
    for _ in range(300):
        pieces = in_pieces(rng.choices(range(length), k=rng.randrange(1, 60)), length)
        yield pieces
        yield list(sent_again(pieces, rng))


# --- names


def key_of(name: bytes) -> bytes:
    return name.lower()[::-1] + b"."  # of bytes, lower() is ASCII only


def id_of(name: bytes, evidence: int) -> int:
    value, key = 0xCBF29CE484222325, key_of(name)
    for i in range(0, len(key), 8):
        word = int.from_bytes(key[i : i + 8].ljust(8, b"\0"), "little")
        value = (value ^ word) * 0x9E3779B97F4A7C15 % 2**64
        value ^= value >> 29
    return value & ~3 | evidence


def check_key(answer: Answer, name: bytes, evidence: int = BY_HELLO) -> None:
    assert answer.name == name
    assert bytes(answer.reversed) == key_of(name).ljust(256, b"\0")
    assert answer.prefix_bits == (len(name) + 1) * 8
    assert answer.id == id_of(name, evidence)


# --- packets


class Built(NamedTuple):
    data: bytes
    needed: list[int]  # prefixes shorter than the largest of these cannot be read
    expected: dict[str, int]
    addresses: tuple[bytes, bytes]


@st.composite
def transports(draw: st.DrawFn) -> tuple[int, bytes, int, int, dict[str, int]]:
    """Protocol, header, how much of it is read, its size, the fields."""
    source, dest = draw(st.integers(0, 65535)), draw(st.integers(0, 65535))
    protocol = draw(st.sampled_from([6, 6, 17, 1, 58, 59, 132, 50, 255]))
    ports = {"source_port": source, "dest_port": dest}
    if protocol == 6:
        words, flags = draw(st.integers(5, 15)), draw(st.integers(0, 255))
        seq, ack = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))
        header = struct.pack("!HHIIBBHHH", source, dest, seq, ack, words << 4 | 1, flags, 1, 2, 3)
        header += b"\x01" * (words * 4 - 20)
        return 6, header, 14, words * 4, {**ports, "tcp_flags": flags, "seq": seq, "ack": ack}
    if protocol == 17:
        return 17, struct.pack("!HHHH", source, dest, 8, 0), 8, 8, ports
    return protocol, b"", 0, 0, {}


@st.composite
def packets(draw: st.DrawFn) -> Built:
    protocol, header, read, size, fields = draw(transports())
    body = header + draw(st.binary(max_size=80))
    fragment = draw(st.sampled_from([0, 0, 0, 1, 31, 32, 4096, 8191]))  # in 8-byte units
    if draw(st.booleans()):
        source, dest = draw(st.binary(min_size=4, max_size=4)), draw(st.binary(min_size=4, max_size=4))
        options, flags = draw(st.integers(0, 10)), draw(st.integers(0, 7))
        front = struct.pack("!BBHHHBBH", 0x45 + options, 9, 0, 7, flags << 13 | fragment, 64, protocol, 0)
        front += source + dest
        front += b"\x01" * (4 * options)
        needed, mapped = [20], (b"\0" * 10 + b"\xff\xff" + source, b"\0" * 10 + b"\xff\xff" + dest)
    else:
        mapped = (draw(st.binary(min_size=16, max_size=16)), draw(st.binary(min_size=16, max_size=16)))
        kinds = draw(st.lists(st.sampled_from([0, 43, 51, 60, 135, 139, 140]), max_size=7))
        if fragment or draw(st.booleans()):
            kinds.insert(draw(st.integers(0, len(kinds))), 44)
        else:
            fragment = 0
        front = struct.pack("!IHBB", 6 << 28 | draw(st.integers(0, 2**28 - 1)), 0, [*kinds, protocol][0], 64)
        front += mapped[0] + mapped[1]
        needed = [40]
        for kind, after in itertools.pairwise([*kinds, protocol]):
            needed.append(len(front) + 8)
            if kind == 44:
                reserved, flags = draw(st.integers(0, 255)), draw(st.integers(0, 7))
                front += struct.pack("!BBHI", after, reserved, fragment << 3 | flags, 5)
                if fragment:
                    protocol = after
                    break
            elif kind == 51:
                words = draw(st.integers(0, 20))
                front += bytes([after, words]) + b"\xaa" * (4 * (words + 2) - 2)
            else:
                units = draw(st.integers(0, 4))
                front += bytes([after, units]) + b"\xbb" * (8 * (units + 1) - 2)
    if fragment:
        return Built(front + body, needed, {"transport": protocol}, mapped)
    needed.append(len(front) + read if read else 0)
    where = {"payload": len(front) + size, "length": len(body) - size}
    return Built(front + body, needed, {"transport": protocol, **fields, **where}, mapped)


@FEW
@given(built=packets())
def test_packet(host: Host, built: Built) -> None:
    for captured in range(len(built.data) + 1):
        packet = host.packet(built.data[:captured], len(built.data))
        if captured < max(built.needed):
            assert packet is None
            continue
        assert packet is not None
        assert (bytes(packet.source), bytes(packet.dest)) == built.addresses
        fields = ("source_port", "dest_port", "transport", "tcp_flags", "seq", "ack", "payload", "length")
        assert {f: getattr(packet, f) for f in fields if getattr(packet, f)} == {
            f: v for f, v in built.expected.items() if v
        }


@FEW
@given(built=packets())
def test_plain_packets_read_the_same_where_they_lie(host: Host, built: Built) -> None:
    expected = built.expected
    version, headers = built.data[0] >> 4, expected.get("payload", 0)
    bare = (version == 4 and built.data[0] == 0x45) or (version == 6 and built.data[6] in (6, 17))
    for captured in range(len(built.data) + 1):
        plain = host.plain(built.data[:captured], len(built.data))
        if bare and headers and expected["transport"] in (6, 17) and captured >= (40 if version == 4 else 60):
            assert plain is not None
        if plain is not None:
            packet = host.packet(built.data[:captured], len(built.data))
            assert packet is not None
            assert bytes(plain) == bytes(packet)


@FEW
@given(
    data=st.binary(max_size=120),
    first=st.sampled_from([0x45, 0x4F, 0x44, 0x60, 0x50, 0]),
    total=st.integers(0, 200),
)
def test_packet_of_random_bytes(host: Host, data: bytes, first: int, total: int) -> None:
    packet = host.packet(bytes([first]) + data, total)
    if packet is not None:
        assert packet.length == 0 or packet.payload + packet.length == total
        assert first >> 4 in (4, 6)


def test_more_extension_headers_than_are_looked_at_are_no_transport(host: Host) -> None:
    def chain(count: int) -> bytes:
        tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 0, 0x50, 0, 0, 0, 0)
        headers = b"".join(bytes([60 if i + 1 < count else 6, 0]) + bytes(6) for i in range(count))
        return struct.pack("!IHBB", 6 << 28, 0, 60, 64) + bytes(32) + headers + tcp

    eight, nine = host.packet(chain(8)), host.packet(chain(9))
    assert eight is not None
    assert (eight.transport, eight.dest_port) == (6, 2)
    assert nine is not None
    assert (nine.transport, nine.dest_port) == (60, 0)


# --- ClientHello


def extension(kind: int, body: bytes) -> bytes:
    return struct.pack("!HH", kind, len(body)) + body


def server_name(name: bytes) -> bytes:
    return extension(0, struct.pack("!HBH", len(name) + 3, 0, len(name)) + name)


KEY_SHARE = extension(51, struct.pack("!HHH", 1220, 0x11EC, 1216) + b"\x16\x03" * 608)  # X25519MLKEM768
SMALL = [extension(k, bytes(range(n))) for k, n in ((0x1A1A, 0), (10, 8), (13, 18), (16, 14), (23, 0), (43, 5))]


def hello(*extensions: bytes, session: int = 32, ciphers: int = 17, trailer: bytes = b"") -> bytes:
    body = b"\x03\x03" + b"\x16" * 32 + bytes([session]) + b"\x03" * session
    body += struct.pack("!H", 2 * ciphers) + b"\x13\x01" * ciphers + b"\x01\x00"
    everything = b"".join(extensions)
    body += struct.pack("!H", len(everything)) + everything + trailer
    message = b"\x01" + struct.pack("!I", len(body))[1:] + body
    return b"\x16\x03\x01" + struct.pack("!H", len(message)) + message


def openssl(name: str | None, version: ssl.TLSVersion) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return out.read()


LONG = b".".join([b"x" * 63, b"Y" * 63, b"z" * 63, b"w" * 61])
HELLOS = {
    "openssl 1.3": (openssl("www.Example.com", ssl.TLSVersion.TLSv1_3), b"www.Example.com"),
    "openssl 1.2": (openssl("a.example", ssl.TLSVersion.TLSv1_2), b"a.example"),
    "openssl, no name": (openssl(None, ssl.TLSVersion.TLSv1_3), None),
    "openssl, address": (openssl("192.0.2.1", ssl.TLSVersion.TLSv1_3), None),
    "name first": (hello(server_name(b"first.example"), KEY_SHARE, *SMALL), b"first.example"),
    "name in the middle": (hello(*SMALL, server_name(b"mIdDle.EXAMPLE"), KEY_SHARE), b"mIdDle.EXAMPLE"),
    "name last": (hello(*SMALL, KEY_SHARE, server_name(b"last.example")), b"last.example"),
    "longest name last": (hello(KEY_SHARE, server_name(LONG)), LONG),
    "one character, nothing else": (hello(server_name(b"x"), session=0, ciphers=1), b"x"),
    "address as a name": (hello(*SMALL, server_name(b"192.0.2.1")), b"192.0.2.1"),
    "no name": (hello(*SMALL, KEY_SHARE), None),
    "no extensions": (hello(), None),
}


@pytest.mark.parametrize("which", HELLOS)
def test_hello_however_it_is_cut(host: Host, which: str) -> None:
    stream, name = HELLOS[which]
    status = NO_NAME if name is None else NAME
    whole = host.hello(stream)
    assert (whole.status, whole.name) == (status, name)
    if name is not None:
        check_key(whole, name)
    for pieces in every_way(stream, random.Random(which)):
        cut = host.hello(stream, pieces)
        assert (cut.status, cut.name, cut.id) == (status, name, whole.id), pieces


@pytest.mark.parametrize("which", HELLOS)
def test_hello_is_read_as_soon_as_its_name_is_there_and_not_before(host: Host, which: str) -> None:
    stream, name = HELLOS[which]
    if name is None:
        statuses = [host.hello(stream[:n]).status for n in range(1, len(stream) + 1)]
        first = statuses.index(NO_NAME)
        assert statuses == [READING] * first + [NO_NAME] * (len(stream) - first)
        return
    there = stream.index(name) + len(name)
    for n in range(1, len(stream) + 1):
        assert host.hello(stream[:n]).name == (name if n >= there else None)
        if n < there:
            assert host.hello(stream[:n]).status == READING


def test_names_of_every_length(host: Host) -> None:
    for length in range(1, 254):
        name = bytes(b"Abcdefghij-Zk.lm"[i % 16] for i in range(length))
        answer = host.hello(hello(*SMALL, server_name(name)))
        name = name.removesuffix(b".")  # a final dot, shown by either, does not make another name
        check_key(answer, name)
        check_key(host.head(GET + b"Host: " + name + b"\r\n\r\n"), name, BY_HEAD)
    for length in (0, 254, 255, 256, 509, 5000):
        assert host.hello(hello(server_name(b"n" * length))).status == FAILED


def test_one_id_for_all_cases_and_another_for_another(host: Host) -> None:
    names = (b"www.example.com", b"WWW.EXAMPLE.COM", b"wWw.eXample.Com")
    ids = {host.hello(hello(server_name(name))).id for name in names}
    assert ids == {id_of(b"www.example.com", BY_HELLO)}
    near = [
        b"www.example.co",
        b"ww.example.com",
        b"www.example.com.x",
        b"www-example.com",
        b"www.exbmple.com",
    ]
    assert len({host.hello(hello(server_name(name))).id for name in near} | ids) == 6


def test_only_letters_change_case(host: Host) -> None:
    for position in range(9):
        for value in range(1, 256):
            name = bytearray(b"Ab.cD-eF9")
            name[position] = value
            check_key(host.hello(hello(server_name(bytes(name)))), bytes(name).removesuffix(b"."))


def test_hostile_hellos(host: Host) -> None:
    stream = hello(*SMALL, server_name(b"victim.example"), KEY_SHARE)
    assert host.hello(b"\x17" + stream[1:]).status == FAILED
    assert host.hello(stream[:5] + b"\x02" + stream[6:]).status == FAILED  # a ServerHello
    for position, value in itertools.product(range(43, 200), (0, 1, 0x7F, 0xFF)):
        changed = stream[:position] + bytes([value]) + stream[position + 1 :]
        whole = host.hello(changed)
        assert whole.name is None or len(whole.name) <= 253
        for cut in (position, position + 1, 150):
            parts = host.hello(changed, in_pieces([cut], len(changed)))
            assert (parts.status, parts.name) == (whole.status, whole.name)
    many = [extension(0x2A2A, b"")] * 40
    assert host.hello(hello(*many, server_name(b"behind.example"))).name == b"behind.example"
    assert host.hello(hello(*many * 2, server_name(b"behind.example"))).status == FAILED


def test_a_hello_in_two_records_gives_no_wrong_name(host: Host) -> None:
    """The header of the second record must not be read as part of the name."""
    name = b"two.records.example"
    message = hello(*SMALL, server_name(name), KEY_SHARE)[5:]
    for cut in range(1, len(message)):
        records = [message[:cut], message[cut:]]
        stream = b"".join(b"\x16\x03\x01" + struct.pack("!H", len(record)) + record for record in records)
        answer = host.hello(stream)
        assert answer.name in (None, name), cut
        assert answer.status != READING


# --- HTTP/1 heads


def read_head(stream: bytes) -> tuple[int, bytes | None, bool]:
    """What a whole-stream parser makes of what has come so far: status, name, is the end there."""
    end = re.search(rb"\n\r?\n", stream)
    head = stream[: end.end()] if end else stream
    lines = head.split(b"\n")
    for number, line in enumerate(lines[1:], 2):
        field, colon, value = line.partition(b":")
        closed = number < len(lines)
        if field.lower() != b"host" or not colon or (not value and not closed):
            continue
        value = value[1:] if value[:1] in (b" ", b"\t") else value
        whole = re.split(rb"[\x00-\x20]", value, maxsplit=1)[0]
        if whole[:1] == b"[" or b"@" in whole:
            return NO_NAME, None, bool(end)
        if len(whole) > 254 or (whole == value and not closed):
            break
        name = whole.split(b":")[0].removesuffix(b".")
        return (NAME, name, bool(end)) if name else (NO_NAME, None, bool(end))
    return (NO_NAME, None, True) if end else (READING, None, False)


GET = b"GET /a?b=c HTTP/1.1\r\n"
FIELDS = b"User-Agent: curl/8\r\nX-Host: wrong.example\r\nAccept: */*\r\n"
END = b"\r\n"
HEADS = {
    "first": (GET + b"Host: first.example\r\n" + FIELDS + END, b"first.example"),
    "last": (GET + FIELDS + b"Host: last.example\r\n" + END, b"last.example"),
    "odd case": (GET + FIELDS + b"hOsT: OdD.Example\r\n" + END, b"OdD.Example"),
    "no blank": (GET + b"Host:none.example\r\n" + FIELDS + END, b"none.example"),
    "tab": (GET + b"Host:\ttab.example\r\n" + FIELDS + END, b"tab.example"),
    "blank behind": (GET + b"Host: behind.example  \r\n" + FIELDS + END, b"behind.example"),
    "port": (GET + b"Host: port.example:8080\r\n" + FIELDS + END, b"port.example"),
    "IPv4": (GET + b"Host: 192.0.2.1:80\r\n" + END, b"192.0.2.1"),
    "IPv6": (GET + b"Host: [2001:db8::1]:80\r\n" + FIELDS + END, None),
    "user info": (GET + b"Host: user:pass@inside.example\r\n" + FIELDS + END, None),
    "user alone": (GET + b"Host: user@inside.example:80\r\n" + FIELDS + END, None),
    "final dot": (GET + b"Host: dot.example.\r\n" + FIELDS + END, b"dot.example"),
    "final dot and port": (GET + b"Host: dot.example.:443\r\n" + FIELDS + END, b"dot.example"),
    "only a dot": (GET + b"Host: .\r\n" + FIELDS + END, None),
    "empty": (GET + b"Host:\r\n" + FIELDS + END, None),
    "empty after a blank": (GET + b"Host: \r\n" + FIELDS + END, None),
    "none": (GET + FIELDS + END, None),
    "nothing at all": (b"GET / HTTP/1.0\r\n\r\n", None),
    "absolute form": (
        b"GET http://target.example/x HTTP/1.1\r\nHost: target.example\r\n\r\n",
        b"target.example",
    ),
    "CONNECT": (b"CONNECT far.example:443 HTTP/1.1\r\nHost: far.example:443\r\n\r\n", b"far.example"),
    "bare line feeds": (b"GET / HTTP/1.1\nAccept: */*\nHost: bare.example\n\n", b"bare.example"),
    "two of them": (GET + b"Host: one.example\r\nHost: two.example\r\n" + END, b"one.example"),
    "in the body": (b"POST / HTTP/1.1\r\nA: b\r\n\r\n\r\nHost: body.example\r\n\r\n", None),
    "with a body": (
        b"PUT / HTTP/1.1\r\nhost: put.example\r\n\r\n" + b"\r\n\r\nHost: no.example" * 20,
        b"put.example",
    ),
    "253 characters": (GET + b"Host: " + LONG + b".\r\n" + END, LONG),
    "too long": (GET + b"Host: " + b"n" * 255 + b"\r\n" + FIELDS + END, None),
    "far too long": (GET + b"Host: " + b"n" * 600 + b"\r\n" + FIELDS + END, None),
    "behind long fields": (
        GET + b"Cookie: " + b"c: host: " * 60 + b"\r\nAB: cd\r\nEF: gh\r\nHost: late.example\r\n" + FIELDS + END,
        b"late.example",
    ),
}


@pytest.mark.parametrize("which", HEADS)
def test_head_however_it_is_cut(host: Host, which: str) -> None:
    stream, name = HEADS[which]
    expected = (NO_NAME if name is None else NAME, name, True)
    assert read_head(stream) == expected
    whole = host.head(stream)
    assert whole.seen == expected
    assert whole.tunnel == stream.startswith(b"CONNECT")
    if name is not None:
        check_key(whole, name, BY_HEAD)
    for pieces in every_way(stream, random.Random(which)):
        cut = host.head(stream, pieces)
        assert cut.seen == expected, pieces
        assert (cut.id, cut.tunnel) == (whole.id, whole.tunnel)


@pytest.mark.parametrize("which", HEADS)
def test_head_is_read_as_soon_as_it_is_there_and_not_before(host: Host, which: str) -> None:
    stream, _ = HEADS[which]
    for n in range(1, len(stream) + 1):
        assert host.head(stream[:n]).seen == read_head(stream[:n]), stream[:n]
        assert host.head(stream[:n], in_pieces(range(n), n)).seen == read_head(stream[:n]), stream[:n]


def test_a_line_end_left_over_from_the_piece_before_ends_nothing(host: Host) -> None:
    r"""A piece's room still holds the one before, behind a shorter one: that one's "\n"
    must not complete a last "\r"."""
    for pad in range(12):
        stream = GET + b"A: b\r\n" * 60 + b"P: " + b"p" * pad + b"\r\n\r"
        for cut in range(1, len(stream)):
            assert not host.head(stream, in_pieces([cut], len(stream))).ended
        assert host.head(stream + b"\n", [(0, len(stream)), (len(stream), 1)]).ended_by == 2


@pytest.mark.parametrize("mss", [1, 7, 8, 55, 56, 57, 248, 249, 536, 1220, 1448, 8948])
def test_the_host_of_a_long_head(host: Host, mss: int) -> None:
    """Lines are looked for in the first `head_reach` bytes of a segment; more may go unseen."""
    for before in range(7600, 7700, 1 if mss > 8 else 13):
        field = b"Cookie: " + b"k=v; " * 97 + b"\r\n"
        fields = field * ((before - 20) // len(field))
        fields += b"Padding: " + b"p" * (before - len(fields) - 11) + b"\r\n"
        stream = GET + fields + b"Host: late.example\r\nAccept: b\r\n\r\n"
        answer = host.head(stream, in_pieces(range(mss, len(stream), mss), len(stream)))
        at = len(GET + fields) - 1
        line_seen = max(at % mss + 7, (at + 6) % mss) <= host.head_reach
        end_seen = max((len(stream) - 3) % mss + 3, (len(stream) - 1) % mss + 1) <= host.head_reach
        if line_seen:
            assert answer.name == b"late.example"
        if end_seen:
            assert answer.ended
        assert answer.name in (None, b"late.example")


def test_a_host_behind_a_line_shorter_than_a_word_is_found_or_not_but_never_wrong(host: Host) -> None:
    for pad, line in itertools.product(range(9), (b"A: b\r\n", b"A:\r\n", b"A:\n", b"DNT:1\r\n", b"A: b\n")):
        answer = host.head(GET + b"P: " + b"p" * (8 + pad) + b"\r\n" + line + b"Host: short.example\r\n\r\n")
        assert answer.name in (None, b"short.example")
        assert answer.ended


def test_a_head_without_an_end_is_left_alone_after_8_kib(host: Host) -> None:
    stream = GET + b"A: " + b"a" * 9000 + b"\r\nHost: late.example\r\n\r\n"
    answer = host.head(stream, in_pieces(range(1448, len(stream), 1448), len(stream)))
    assert answer.seen == (READING, None, False)


@st.composite
def heads(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    token = st.text("abcXYZ-019", min_size=1, max_size=12).map(str.encode)
    value = st.text("abc :;=/.\t[]Host", max_size=60).map(str.encode)
    names = st.sampled_from([b"Host", b"host", b"HOST", b"X-Host", b"Hos", b"Host2", b"A", b"Accept"])
    field = st.tuples(names | token, st.sampled_from([b":", b": ", b":\t"]), value).map(b"".join)
    # after a line shorter than a word the Host may be missed
    fields = draw(st.lists(field.filter(lambda line: len(line) > 6), max_size=12))
    method = draw(st.sampled_from([b"GET / HTTP/1.1", b"POST /x HTTP/1.1", b"CONNECT a:1 HTTP/1.1"]))
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\n"]))
    stream = end.join([method, *fields, b"", b""]) + draw(st.binary(max_size=40))
    return stream, draw(st.lists(st.integers(1, len(stream)), max_size=40))


@settings(FEW, max_examples=1000)
@given(case=heads(), rng=st.randoms(use_true_random=False))
@example(case=(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", [16, 17]), rng=random.Random(1))
def test_heads_as_a_whole_stream_parser_reads_them(
    host: Host, case: tuple[bytes, list[int]], rng: random.Random
) -> None:
    stream, cuts = case
    expected = read_head(stream)
    pieces = in_pieces(cuts, len(stream))
    assert host.head(stream).seen == expected
    assert host.head(stream, pieces).seen == expected
    assert host.head(stream, sent_again(pieces, rng)).seen == expected


# --- anything


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(8)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.choice([0, 1, 0x0A, 0x0D, 0x3A, 0x7F, 0x80, 0xFF, rng.randrange(256)])])
            case 1:
                data[at : at + rng.randrange(1, 40)] = b""
            case 2:
                data[at:at] = rng.choice([b"\r\n", b"\n", b"\r\n\r\n", b"Host:", b"host: x", rng.randbytes(9)])
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 300)]
    return bytes(data[:9000])


def seeds() -> list[list[bytes]]:
    v4, v6 = ipaddress.ip_address("192.0.2.1").packed, ipaddress.ip_address("2001:db8::1").packed
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 0, 0x80, 0x18, 0, 0, 0) + bytes(12) + b"payload"
    options = struct.pack("!BBHHHBBH", 0x46, 0, 0, 0, 0, 64, 6, 0) + v4 + v4 + b"\x01\x01\x01\x01" + tcp
    chain = b"".join(bytes([after, 0]) + bytes(6) for after in (43, 44, 51, 60, 6))
    return [
        [options, struct.pack("!IHBB", 6 << 28, 0, 0, 64) + v6 + v6 + chain + tcp],
        [stream for stream, _ in HELLOS.values()],
        [stream for stream, _ in HEADS.values()],
        [
            b"".join(
                [
                    frame(4, 0, 0, 12),
                    frame(1, 4, 1, 60),
                    frame(0, 8, 1, 30) * 9,
                    frame(0, 1, 1, 700),
                    frame(1, 5, 3, 400),
                ]
            )
        ],
    ]


def frame(kind: int, flags: int, stream: int, size: int) -> bytes:
    return struct.pack("!IBBI", size, kind, flags, stream)[1:] + b"\x05" * size


def cases(count: int) -> Iterator[bytes]:
    """For bpf_host.c: the parser, three bytes that say how to cut, then what it reads."""
    rng, inputs = random.Random(3), seeds()
    for i in range(count):
        kind = i % 4
        data = rng.randbytes(rng.randrange(200)) if rng.random() < 0.1 else mutated(rng, inputs[kind])
        yield bytes([kind]) + rng.randbytes(3) + data


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """Mutated and random input under the sanitizers; bpf_host.c holds cut streams against whole ones."""
    try:
        program = compiled(tmp_path / "fuzz", "-DFUZZ", *SANITIZE)
    except subprocess.CalledProcessError:
        program = compiled(tmp_path / "fuzz", "-DFUZZ")  # no sanitizers here: bpf_host.c's own checks only
    batch = list(cases(8000))
    fed = b"".join(struct.pack("=I", len(case)) + case for case in batch)
    ran = subprocess.run([program], input=fed, capture_output=True, timeout=100, check=False)
    assert (ran.returncode, ran.stdout) == (0, b"%d\n" % len(batch)), ran.stderr.decode(errors="replace")


@FEW
@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(1, 3000), max_size=10))
def test_random_bytes(host: Host, data: bytes, cuts: list[int]) -> None:
    for start in (b"", b"\x16\x03\x01\x40\x00\x01", b"GET / HTTP/1.1\r\n"):
        stream = start + data
        pieces = in_pieces((cut for cut in cuts if cut < len(stream)), len(stream))
        assert host.hello(stream, pieces).status <= FAILED
        assert host.head(stream, pieces).status <= FAILED


def test_a_segment_takes_bounded_time(host: Host) -> None:
    """64 KiB in one segment, as segmentation offload hands it to the hook."""
    for data in (b"\n" * 65536, b"GET " + b"\nHost:" * 10000, b"\x16\x03\x01\xff\xff\x01" + bytes(65000)):
        began = time.perf_counter()
        for _ in range(100):
            host.hello(data)
            host.head(data)
        assert (time.perf_counter() - began) / 200 < 0.005
