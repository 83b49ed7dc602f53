"""exporter/tls.py: ClientHellos, ServerHellos and alerts, made by hand and by OpenSSL; JA4 against published ones."""

from __future__ import annotations

import ssl
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import tls

GREASE = 0x3A3A


def u16s(*numbers: int) -> bytes:
    return struct.pack(f"!{len(numbers)}H", *numbers)


def vector(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size, "big") + data


def record(message: bytes, kind: int = 22) -> bytes:
    return bytes((kind, 3, 1)) + vector(message)


def handshake(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + vector(body, 3)


def extension(kind: int, body: bytes) -> bytes:
    return u16s(kind) + vector(body)


def server_name(name: str) -> bytes:
    return extension(0, vector(b"\0" + vector(name.encode())))


def alpn(*names: bytes) -> bytes:
    return extension(16, vector(b"".join(vector(name, 1) for name in names)))


def versions(*numbers: int) -> bytes:
    return extension(43, vector(u16s(*numbers), 1))


def signatures(*numbers: int) -> bytes:
    return extension(13, vector(u16s(*numbers)))


def key_share(*shares: tuple[int, int]) -> bytes:
    return extension(51, vector(b"".join(u16s(group) + vector(bytes(size)) for group, size in shares)))


def message(
    *extensions: bytes, ciphers: tuple[int, ...] = (0x1301,), legacy: int = 0x0303, session: bytes = b""
) -> bytes:
    body = u16s(legacy) + bytes(32) + vector(session, 1) + vector(u16s(*ciphers)) + b"\1\0"
    return handshake(1, body + vector(b"".join(extensions)))


def hello(*extensions: bytes, ciphers: tuple[int, ...] = (0x1301,), legacy: int = 0x0303) -> bytes:
    return record(message(*extensions, ciphers=ciphers, legacy=legacy))


# --- JA4 --------------------------------------------------------------------------------------------------------------

# Published with what they are made of: FoxIO's description of JA4; shigshag.com/tools/ja4.
PUBLISHED = {
    "t13d1516h2_8daaf6152771_e5627efa2ab1": (
        "002f,0035,009c,009d,1301,1302,1303,c013,c014,c02b,c02c,c02f,c030,cca8,cca9",
        "0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,4469,ff01",
        "0403,0804,0401,0503,0805,0501,0806,0601",
    ),
    "t13d1011h2_61a7ad8aa9b6_3fcd1a44f3e3": (
        "00ff,1301,1302,1303,c02b,c02c,c02f,c030,cca8,cca9",
        "0005,000a,000b,000d,0017,0023,002b,002d,0033",
        "0503,0403,0807,0806,0805,0804,0601,0501,0401",
    ),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("expected", PUBLISHED)
def test_ja4_as_published(expected: str, order: int) -> None:
    """In any order of ciphers and extensions, with GREASE in every list."""
    ciphers, kinds, signed = (list(map(lambda n: int(n, 16), part.split(","))) for part in PUBLISHED[expected])
    bodies = {13: signatures(GREASE, *signed), 43: versions(GREASE, 0x0304, 0x0303)}
    extensions = [bodies.get(kind, extension(kind, b"")) for kind in kinds][::order]
    data = hello(
        extension(GREASE, b""),
        *extensions,
        server_name("example.com"),
        alpn(b"h2", b"http/1.1"),
        ciphers=(GREASE, *ciphers[::order]),
    )
    seen = tls.parse_client_hello(data)
    assert seen is not None
    assert seen.ja4 == expected


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"h2", "h2"), (b"http/1.1", "h1"), (b"\xab", "ab"), (b"\xab\xcd", "ad"), (b"0\xab", "3b"), (b"h3-29", "h9")],
)
def test_ja4_first_alpn(name: bytes, shown: str) -> None:
    seen = tls.parse_client_hello(hello(alpn(name)))
    assert seen is not None
    assert seen.ja4.startswith(f"t12i0101{shown}_")


def test_ja4_of_nothing() -> None:
    seen = tls.parse_client_hello(hello(ciphers=(), legacy=0x0301))
    assert seen is not None
    assert seen.ja4 == "t10i000000_000000000000_000000000000"


def test_ja4_of_quic_says_so() -> None:
    seen = tls.parse_client_hello(message(alpn(b"h3"), versions(0x0304)), quic=True)
    assert seen is not None
    assert seen.ja4.startswith("q13i0102h3_")


# --- ClientHello ------------------------------------------------------------------------------------------------------


def test_what_a_hello_offers() -> None:
    data = hello(
        server_name("WWW.Example.com."),
        alpn(b"\x1a\x1a", b"h2", b"http/1.1"),
        versions(GREASE, 0x0304, 0x0303),
        key_share((GREASE, 1), (0x11EC, 1216), (29, 32)),
    )
    seen = tls.parse_client_hello(data)
    assert seen == tls.ClientHello(
        "www.example.com", "1.3", ("h2", "http/1.1"), seen.ja4 if seen else "", True, False, False, b"", True
    )


@pytest.mark.parametrize("group", sorted(tls.POST_QUANTUM))
def test_post_quantum_shares(group: int) -> None:
    classical = tls.parse_client_hello(hello(key_share((29, 32), (23, 65))))
    second = tls.parse_client_hello(hello(key_share((29, 32), (group, 1184))))
    assert classical is not None
    assert second is not None
    assert (classical.post_quantum, second.post_quantum) == (False, True)


def test_ech_and_resumption() -> None:
    ech = tls.parse_client_hello(hello(extension(0xFE0D, bytes(200))))
    assert ech is not None
    assert ech.ech
    for resuming in (extension(41, bytes(100)), extension(35, bytes(64))):
        seen = tls.parse_client_hello(hello(resuming))
        assert seen is not None
        assert seen.resumption
    fresh = tls.parse_client_hello(hello(extension(35, b"")))  # asks for a ticket, has none
    assert fresh is not None
    assert not fresh.resumption


@pytest.mark.parametrize(("legacy", "word"), [(0x0303, "1.2"), (0x0302, "1.1"), (0x0301, "1.0"), (0x0300, "ssl3")])
def test_the_version_of_a_hello_without_supported_versions(legacy: int, word: str) -> None:
    seen = tls.parse_client_hello(hello(legacy=legacy))
    assert seen is not None
    assert seen.offered == word


def test_a_hello_in_several_records() -> None:
    whole = message(server_name("pieces.example"), versions(0x0304))
    pieces = b"".join(record(whole[at : at + 20]) for at in range(0, len(whole), 20))
    assert tls.parse_client_hello(pieces) == tls.parse_client_hello(record(whole))


def test_a_hello_without_most_of_its_key_share() -> None:
    """As the kernel hands over a long one."""
    post_quantum, classical = (0x11EC, 1216), (29, 32)
    for shares in (
        [post_quantum, classical],
        [classical, post_quantum],
        [(GREASE, 1), classical, (23, 65), post_quantum],
    ):
        share = key_share(*shares)
        data = hello(server_name("cut.example"), share, alpn(b"h2"), versions(0x0304))
        at = data.index(share) + 4
        short = data[: at + 128] + data[at + len(share) - 4 :]
        assert tls.parse_client_hello(short, kept=128) == tls.parse_client_hello(data)
        cut = tls.parse_client_hello(short[:-1], kept=128)
        assert cut is not None
        assert not cut.whole


def test_a_hello_cut_off_has_no_ja4() -> None:
    data = hello(server_name("cut.example"), alpn(b"h2"), extension(21, bytes(400)))
    full = tls.parse_client_hello(data)
    assert full is not None
    assert full.whole
    for size in range(len(data)):
        seen = tls.parse_client_hello(data[:size])
        if seen is not None:
            assert (seen.whole, seen.ja4) == (False, "")
    cut = tls.parse_client_hello(data[:-300])
    assert cut is not None
    assert (cut.server_name, cut.alpn) == ("cut.example", ("h2",))


@pytest.mark.parametrize("data", [b"", b"\x16", b"GET / HTTP/1.1\r\n\r\n", bytes(100), record(handshake(2, bytes(60)))])
def test_what_is_no_hello(data: bytes) -> None:
    assert tls.parse_client_hello(data) is None


# --- ServerHello ------------------------------------------------------------------------------------------------------


def answer(*extensions: bytes, legacy: int = 0x0303, random: bytes = bytes(32), session: bytes = b"") -> bytes:
    body = u16s(legacy) + random + vector(session, 1) + u16s(0x1301) + b"\0"
    return record(handshake(2, body + (vector(b"".join(extensions)) if extensions else b"")))


def test_a_server_hello_of_1_3() -> None:
    data = answer(extension(51, u16s(0x11EC) + vector(bytes(1120))), extension(43, u16s(0x0304)), session=b"s" * 32)
    assert tls.parse_server_hello(data) == ("1.3", "X25519MLKEM768", False, False, b"s" * 32)
    # Cut before supported_versions: 1.2 as it stands there would be a guess.
    assert tls.parse_server_hello(data[:200]) == ("", "X25519MLKEM768", False, False, b"s" * 32)
    resumed = answer(extension(43, u16s(0x0304)), extension(51, u16s(29) + vector(bytes(32))), extension(41, u16s(0)))
    assert tls.parse_server_hello(resumed) == ("1.3", "x25519", False, True, b"")


def test_a_server_hello_of_1_2_and_before() -> None:
    for legacy, word in ((0x0303, "1.2"), (0x0302, "1.1"), (0x0301, "1.0")):
        assert tls.parse_server_hello(answer(legacy=legacy)) == (word, "", False, False, b"")
    assert tls.parse_server_hello(answer(extension(0xFF01, b"\0"), session=b"again")) == (
        "1.2",
        "",
        False,
        False,
        b"again",
    )


def test_a_server_hello_behind_a_warning() -> None:
    warning = record(b"\1\x70", 21)
    assert tls.parse_server_hello(warning + answer()) == tls.parse_server_hello(answer())
    assert tls.fatal_alert(warning) == ""


def test_hello_retry_request() -> None:
    random = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
    data = answer(extension(43, u16s(0x0304)), extension(51, u16s(24)), random=random)
    assert tls.parse_server_hello(data) == ("1.3", "secp384r1", True, False, b"")


# --- alerts -----------------------------------------------------------------------------------------------------------


def test_alerts() -> None:
    assert tls.fatal_alert(record(b"\2\x28", 21)) == "handshake_failure"
    assert tls.fatal_alert(record(b"\2\x46", 21)) == "protocol_version"
    assert tls.fatal_alert(record(b"\2\xc8", 21)) == "alert_200"
    assert tls.fatal_alert(record(b"\1\0", 21)) == "close_notify"
    assert tls.fatal_alert(record(b"\1\x70", 21)) == ""  # a warning: unrecognized_name, and on it goes
    assert tls.fatal_alert(record(b"\2", 22)) == ""


def test_alerts_of_clients() -> None:
    spec = b"\x14\3\3\0\1\1"
    assert tls.client_alert(record(b"\2\x30", 21)) == "unknown_ca"
    assert tls.client_alert(spec + record(bytes(19), 23)) == "encrypted"
    assert tls.client_alert(record(bytes(19), 23)) == "encrypted"
    assert tls.client_alert(spec + record(bytes(53), 23)) == ""
    assert tls.client_alert(spec + record(b"\2\x30", 21)) == "unknown_ca"
    assert tls.client_alert(record(handshake(16, bytes(66)))) == ""


# --- against OpenSSL --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    # fmt: off
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-days", "2", "-subj", "/CN=x", "-keyout", str(path), "-out", str(path) + ".crt"],
                   check=True, capture_output=True)
    # fmt: on
    path.write_bytes(path.read_bytes() + Path(str(path) + ".crt").read_bytes())
    return path


class Ends:
    """Both ends of a handshake in memory; `sent` and `answered` are the flights in turn."""

    def __init__(self, certificate: Path, version: ssl.TLSVersion, session: ssl.SSLSession | None = None) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        self.context.set_alpn_protocols(["h2", "http/1.1"])
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(certificate)
        self.server.minimum_version = self.server.maximum_version = version

    def run(self, session: ssl.SSLSession | None = None) -> ssl.SSLObject:
        a, b = (ssl.MemoryBIO(), ssl.MemoryBIO()), (ssl.MemoryBIO(), ssl.MemoryBIO())
        near = self.context.wrap_bio(*a, server_hostname="memory.example", session=session)
        far = self.server.wrap_bio(*b, server_side=True)
        self.sent: list[bytes] = []
        self.answered: list[bytes] = []
        for _ in range(4):
            for end in (near, far):
                try:
                    end.do_handshake()
                    end.read(1)
                except (ssl.SSLWantReadError, ssl.SSLError):
                    pass
                if end is near:
                    self.sent.append(a[1].read())
                    b[0].write(self.sent[-1])
                else:
                    self.answered.append(b[1].read())
                    a[0].write(self.answered[-1])
        return near


@pytest.mark.parametrize(("version", "word"), [(ssl.TLSVersion.TLSv1_2, "1.2"), (ssl.TLSVersion.TLSv1_3, "1.3")])
def test_a_handshake_of_openssl_and_its_resumption(certificate: Path, version: ssl.TLSVersion, word: str) -> None:
    ends = Ends(certificate, version)
    near = ends.run()
    for session, resumed in ((None, False), (near.session, True)):
        ends.run(session)
        seen, told = tls.parse_client_hello(ends.sent[0]), tls.parse_server_hello(ends.answered[0])
        assert seen is not None
        assert told is not None
        assert (seen.server_name, seen.offered, seen.alpn) == ("memory.example", "1.3", ("h2", "http/1.1"))
        assert (seen.whole, seen.resumption, seen.ja4[:4]) == (True, resumed, "t13d")
        assert (told.version, told.retry) == (word, False)
        assert (told.psk if word == "1.3" else told.session == seen.session != b"") == resumed
        assert tls.client_alert(ends.sent[1]) == ""


def test_no_common_version(certificate: Path) -> None:
    ends = Ends(certificate, ssl.TLSVersion.TLSv1_2)
    ends.context.minimum_version = ssl.TLSVersion.TLSv1_3
    ends.run()
    assert tls.fatal_alert(ends.answered[0]) == "protocol_version"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_that_does_not_trust(certificate: Path, version: ssl.TLSVersion) -> None:
    """OpenSSL sends this alert in plaintext in TLS 1.3, too: it has not begun to encrypt."""
    ends = Ends(certificate, version)
    ends.context.verify_mode = ssl.CERT_REQUIRED
    ends.run()
    assert tls.client_alert(ends.sent[1]) == "unknown_ca"


# --- hostile bytes ----------------------------------------------------------------------------------------------------

_BASE = hello(server_name("a.b"), alpn(b"h2"), versions(0x0304), key_share((0x11EC, 30)), signatures(0x0403))


@given(st.binary(max_size=600))
def test_hostile_bytes_never_raise(data: bytes) -> None:
    for body in (data, b"\x16\3\1" + data, b"\x16\3\1\1\xff\1\0\1\xfb" + data, b"\x16\3\3\1\xff\2\0\1\xfb" + data):
        tls.parse_client_hello(body)
        tls.parse_client_hello(body, quic=True)
        tls.parse_server_hello(body)
        tls.fatal_alert(body)
        tls.client_alert(body)


@given(st.integers(0, len(_BASE) - 1), st.integers(0, 255), st.integers(0, len(_BASE)))
def test_a_hello_with_one_wrong_byte(at: int, byte: int, cut: int) -> None:
    data = _BASE[:at] + bytes((byte,)) + _BASE[at + 1 :]
    tls.parse_client_hello(data[:cut] if cut else data)
    tls.parse_client_hello(data[5:], quic=True)


# --- what is remembered of a message is what is read in it ------------------------------------------------------------

_HELLOS = (
    _BASE,
    hello(versions(0x0304), key_share((0x1D, 32), (0x11EC, 20)), extension(21, bytes(9)), server_name("name.last")),
    hello(server_name("a.b"), extension(35, b"ticket"), extension(0xFE0D, bytes(12)), extension(41, bytes(20))),
    record(message(server_name("with.a.session"), versions(0x0304), session=b"s" * 32)),
)
_ANSWERS = (
    answer(extension(51, u16s(0x1D) + vector(bytes(32))), extension(43, u16s(0x0304)), session=b"s" * 32),
    answer(extension(43, u16s(0x0304)), extension(51, u16s(0x1D) + vector(bytes(32))), extension(41, u16s(0))),
    answer(extension(0xFF01, b"\0")) + record(b"more"),
)


def _changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for at, byte in changes:
        changed[at % len(data)] = byte
    return bytes(changed)


@settings(max_examples=500)
@given(st.sampled_from(_HELLOS), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3))
def test_a_hello_like_one_before_is_read_alike(base: bytes, changes: list[tuple[int, int]]) -> None:
    data = _changed(base, changes)
    tls._hellos = tls._Memo()
    alone = tls.parse_client_hello(data)
    tls._hellos = tls._Memo()
    tls.parse_client_hello(base)
    assert tls.parse_client_hello(data) == alone
    assert tls.parse_client_hello(data) == alone


@settings(max_examples=500)
@given(st.sampled_from(_ANSWERS), st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), max_size=3))
def test_an_answer_like_one_before_is_read_alike(base: bytes, changes: list[tuple[int, int]]) -> None:
    data = _changed(base, changes)
    tls._answers = tls._Memo()
    alone = tls.parse_server_hello(data)
    tls._answers = tls._Memo()
    tls.parse_server_hello(base)
    assert tls.parse_server_hello(data) == alone
    assert tls.parse_server_hello(data) == alone


def test_what_is_remembered_is_found_whatever_its_random_key_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tls.parse_client_hello(_HELLOS[1])
    monkeypatch.setattr(tls, "_read_client_hello", None)  # who reads it again, fails
    data = bytearray(_HELLOS[1].replace(b"name.last", b"Last.Name"))
    data[11:43] = b"r" * 32
    share = data.index(u16s(0x1D, 32)) + 4
    data[share : share + 32] = b"k" * 32
    assert first is not None
    assert tls.parse_client_hello(bytes(data)) == first._replace(server_name="last.name")


def test_what_is_remembered_is_bounded() -> None:
    memo: tls._Memo[int] = tls._Memo()
    for number in range(5 * tls._CACHED):
        memo.keep((number % 5, 0), number, [(0, 1 + number % 50)], number)
    assert sum(len(messages) for known in memo._known.values() for _, messages in known) <= tls._CACHED
    assert all(len(known) <= tls._MASKS for known in memo._known.values())
