"""exporter/quic.py: the published Initial packets of both versions, then our own, split, shuffled and broken."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter import decode, quic, tls
from exporter.decode import Sighting
from exporter.handshakes import QUIC_HANDSHAKES, Handshakes
from exporter.health import losses

from .test_tls import alpn, extension, key_share, message, server_name, versions

NUMBERS = {"1": quic.VERSION_1, "2": quic.VERSION_2}


def varint(number: int) -> bytes:
    for size, mark in ((1, 0), (2, 1), (4, 2), (8, 3)):
        if number < 1 << 8 * size - 2:
            return (number | mark << 8 * size - 2).to_bytes(size, "big")
    raise ValueError(number)


def crypto(data: bytes, offset: int) -> bytes:
    return b"\6" + varint(offset) + varint(len(data)) + data


def initial(
    frames: bytes, version: str = "1", destination: bytes = b"\x83\x94\xc8\xf0>QW\x08", number: int = 0,
    size: int = 1200, token: bytes = b"", source: bytes = b"",
) -> bytes:  # fmt: skip
    """A client's Initial packet, padded to `size` bytes."""
    what = quic._VERSIONS[NUMBERS[version]]
    cipher, iv, protection = quic._keys(what, destination)
    first = bytes((0xC0 | what.initial << 4 | 1,))
    head = first + NUMBERS[version].to_bytes(4, "big") + bytes((len(destination),)) + destination
    head += bytes((len(source),)) + source + varint(len(token)) + token
    plain = frames.ljust(size - len(head) - 2 - 2 - 16, b"\0")
    head += (len(plain) + 2 + 16 | 0x4000).to_bytes(2, "big") + number.to_bytes(2, "big")
    nonce = (int.from_bytes(iv, "big") ^ number).to_bytes(12, "big")
    body = cipher.encrypt(nonce, plain, head)
    mask = protection.update(body[2:18])
    at = len(head) - 2
    hidden = bytes(a ^ b for a, b in zip(head[at:], mask[1:3], strict=True))
    return bytes((head[0] ^ mask[0] & 15,)) + head[1:at] + hidden + body


def hello(name: str, share: int = 1216) -> bytes:
    """A ClientHello as browsers send it over QUIC: more than one datagram holds, with a post-quantum key share."""
    return message(
        server_name(name), alpn(b"h3"), versions(0x0304), key_share((0x11EC, share)), extension(57, bytes(40))
    )


def datagrams(data: bytes, version: str = "1", seed: int = 0, pieces: int = 9, size: int = 1200) -> list[bytes]:
    """Two Initial packets with the hello in shuffled pieces, PING and PADDING between them, as Chrome sends them."""
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(1, len(data)), pieces - 1)), len(data)]
    frames = [crypto(data[a:b], a) for a, b in itertools.pairwise(cuts)]
    rng.shuffle(frames)
    packets: list[bytes] = [b"", b""]
    for frame in frames:
        packets[len(packets[0]) + len(frame) > size - 80] += frame + rng.choice([b"", b"\1", bytes(5)])
    return [initial(frames, version, number=n, size=size) for n, frames in enumerate(packets)]


def read(*sent: bytes) -> tuple[str, bytes]:
    stream, version = quic.Crypto(), ""
    for data in sent:
        found = quic.read_initials(data)
        assert found is not None
        version = found.version
        for offset, piece in found.pieces:
            stream.add(offset, piece)
    return version, stream.data if stream.whole else b""


# --- the vectors ------------------------------------------------------------------------------------------------------

# RFC 9001 appendix A.2 and RFC 9369 appendix A.2: a client's first packet, of the same ClientHello.
CLIENT_1 = bytes.fromhex(
    "c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11d242b123dc9bd8bab936b47d92ec356c0bab7df5976d27cd"
    "449f63300099f3991c260ec4c60d17b31f8429157bb35a1282a643a8d2262cad67500cadb8e7378c8eb7539ec4d4905fed1bee1fc8aafba1"
    "7c750e2c7ace01e6005f80fcb7df621230c83711b39343fa028cea7f7fb5ff89eac2308249a02252155e2347b63d58c5457afd84d05dfffd"
    "b20392844ae812154682e9cf012f9021a6f0be17ddd0c2084dce25ff9b06cde535d0f920a2db1bf362c23e596d11a4f5a6cf3948838a3aec"
    "4e15daf8500a6ef69ec4e3feb6b1d98e610ac8b7ec3faf6ad760b7bad1db4ba3485e8a94dc250ae3fdb41ed15fb6a8e5eba0fc3dd60bc8e3"
    "0c5c4287e53805db059ae0648db2f64264ed5e39be2e20d82df566da8dd5998ccabdae053060ae6c7b4378e846d29f37ed7b4ea9ec5d82e7"
    "961b7f25a9323851f681d582363aa5f89937f5a67258bf63ad6f1a0b1d96dbd4faddfcefc5266ba6611722395c906556be52afe3f565636a"
    "d1b17d508b73d8743eeb524be22b3dcbc2c7468d54119c7468449a13d8e3b95811a198f3491de3e7fe942b330407abf82a4ed7c1b311663a"
    "c69890f4157015853d91e923037c227a33cdd5ec281ca3f79c44546b9d90ca00f064c99e3dd97911d39fe9c5d0b23a229a234cb36186c481"
    "9e8b9c5927726632291d6a418211cc2962e20fe47feb3edf330f2c603a9d48c0fcb5699dbfe5896425c5bac4aee82e57a85aaf4e2513e4f0"
    "5796b07ba2ee47d80506f8d2c25e50fd14de71e6c418559302f939b0e1abd576f279c4b2e0feb85c1f28ff18f58891ffef132eef2fa09346"
    "aee33c28eb130ff28f5b766953334113211996d20011a198e3fc433f9f2541010ae17c1bf202580f6047472fb36857fe843b19f5984009dd"
    "c324044e847a4f4a0ab34f719595de37252d6235365e9b84392b061085349d73203a4a13e96f5432ec0fd4a1ee65accdd5e3904df54c1da5"
    "10b0ff20dcc0c77fcb2c0e0eb605cb0504db87632cf3d8b4dae6e705769d1de354270123cb11450efc60ac47683d7b8d0f811365565fd98c"
    "4c8eb936bcab8d069fc33bd801b03adea2e1fbc5aa463d08ca19896d2bf59a071b851e6c239052172f296bfb5e72404790a2181014f3b94a"
    "4e97d117b438130368cc39dbb2d198065ae3986547926cd2162f40a29f0c3c8745c0f50fba3852e566d44575c29d39a03f0cda721984b6f4"
    "40591f355e12d439ff150aab7613499dbd49adabc8676eef023b15b65bfc5ca06948109f23f350db82123535eb8a7433bdabcb909271a6ec"
    "bcb58b936a88cd4e8f2e6ff5800175f113253d8fa9ca8885c2f552e657dc603f252e1a8e308f76f0be79e2fb8f5d5fbbe2e30ecadd220723"
    "c8c0aea8078cdfcb3868263ff8f0940054da48781893a7e49ad5aff4af300cd804a6b6279ab3ff3afb64491c85194aab760d58a606654f9f"
    "4400e8b38591356fbf6425aca26dc85244259ff2b19c41b9f96f3ca9ec1dde434da7d2d392b905ddf3d1f9af93d1af5950bd493f5aa731b4"
    "056df31bd267b6b90a079831aaf579be0a39013137aac6d404f518cfd46840647e78bfe706ca4cf5e9c5453e9f7cfd2b8b4c8d169a44e55c"
    "88d4a9a7f9474241e221af44860018ab0856972e194cd934"
)
CLIENT_2 = bytes.fromhex(
    "d76b3343cf088394c8f03e5157080000449ea0c95e82ffe67b6abcdb4298b485dd04de806071bf03dceebfa162e75d6c96058bdbfb127cdf"
    "cbf903388e99ad049f9a3dd4425ae4d0992cfff18ecf0fdb5a842d09747052f17ac2053d21f57c5d250f2c4f0e0202b70785b7946e992e58"
    "a59ac52dea6774d4f03b55545243cf1a12834e3f249a78d395e0d18f4d766004f1a2674802a747eaa901c3f10cda5500cb9122faa9f1df66"
    "c392079a1b40f0de1c6054196a11cbea40afb6ef5253cd6818f6625efce3b6def6ba7e4b37a40f7732e093daa7d52190935b8da58976ff33"
    "12ae50b187c1433c0f028edcc4c2838b6a9bfc226ca4b4530e7a4ccee1bfa2a3d396ae5a3fb512384b2fdd851f784a65e03f2c4fbe11a53c"
    "7777c023462239dd6f7521a3f6c7d5dd3ec9b3f233773d4b46d23cc375eb198c63301c21801f6520bcfb7966fc49b393f0061d974a2706df"
    "8c4a9449f11d7f3d2dcbb90c6b877045636e7c0c0fe4eb0f697545460c806910d2c355f1d253bc9d2452aaa549e27a1fac7cf4ed77f322e8"
    "fa894b6a83810a34b361901751a6f5eb65a0326e07de7c1216ccce2d0193f958bb3850a833f7ae432b65bc5a53975c155aa4bcb4f7b2c4e5"
    "4df16efaf6ddea94e2c50b4cd1dfe06017e0e9d02900cffe1935e0491d77ffb4fdf85290fdd893d577b1131a610ef6a5c32b2ee0293617a3"
    "7cbb08b847741c3b8017c25ca9052ca1079d8b78aebd47876d330a30f6a8c6d61dd1ab5589329de714d19d61370f8149748c72f132f0fc99"
    "f34d766c6938597040d8f9e2bb522ff99c63a344d6a2ae8aa8e51b7b90a4a806105fcbca31506c446151adfeceb51b91abfe43960977c874"
    "71cf9ad4074d30e10d6a7f03c63bd5d4317f68ff325ba3bd80bf4dc8b52a0ba031758022eb025cdd770b44d6d6cf0670f4e990b22347a7db"
    "848265e3e5eb72dfe8299ad7481a408322cac55786e52f633b2fb6b614eaed18d703dd84045a274ae8bfa73379661388d6991fe39b0d93de"
    "bb41700b41f90a15c4d526250235ddcd6776fc77bc97e7a417ebcb31600d01e57f32162a8560cacc7e27a096d37a1a86952ec71bd89a3e9a"
    "30a2a26162984d7740f81193e8238e61f6b5b984d4d3dfa033c1bb7e4f0037febf406d91c0dccf32acf423cfa1e7071010d3f270121b493c"
    "e85054ef58bada42310138fe081adb04e2bd901f2f13458b3d6758158197107c14ebb193230cd1157380aa79cae1374a7c1e5bbcb80ee23e"
    "06ebfde206bfb0fcbc0edc4ebec309661bdd908d532eb0c6adc38b7ca7331dce8dfce39ab71e7c32d318d136b6100671a1ae6a6600e3899f"
    "31f0eed19e3417d134b90c9058f8632c798d4490da4987307cba922d61c39805d072b589bd52fdf1e86215c2d54e6670e07383a27bbffb5a"
    "ddf47d66aa85a0c6f9f32e59d85a44dd5d3b22dc2be80919b490437ae4f36a0ae55edf1d0b5cb4e9a3ecabee93dfc6e38d209d0fa6536d27"
    "a5d6fbb17641cde27525d61093f1b28072d111b2b4ae5f89d5974ee12e5cf7d5da4d6a31123041f33e61407e76cffcdcfd7e19ba58cf4b53"
    "6f4c4938ae79324dc402894b44faf8afbab35282ab659d13c93f70412e85cb199a37ddec600545473cfb5a05e08d0b209973b2172b4d21fb"
    "69745a262ccde96ba18b2faa745b6fe189cf772a9f84cbfc"
)


@pytest.mark.parametrize(("data", "version"), [(CLIENT_1, "1"), (CLIENT_2, "2")], ids=["RFC 9001", "RFC 9369"])
def test_published_packets(data: bytes, version: str) -> None:
    said, stream = read(data)
    assert said == version
    assert len(stream) == 241
    seen = tls.parse_client_hello(stream, quic=True)
    assert seen is not None
    assert (seen.server_name, seen.offered, seen.alpn, seen.whole) == ("example.com", "1.3", ("alpn",), True)
    assert seen.ja4.startswith("q13d0211an_")


def test_keys_of_the_appendix() -> None:
    """RFC 9001 appendix A.1 and RFC 9369 appendix A.1."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cid = bytes.fromhex("8394c8f03e515708")
    for number, key, iv in (
        (quic.VERSION_1, "1f369613dd76d5467730efcbe3b1a22d", "fa044b2f42a3fd3b46fb255c"),
        (quic.VERSION_2, "8b1a0bc121284290a29e0971b5cd045d", "91f73e2351d8fa91660e909f"),
    ):
        cipher, found, _ = quic._keys(quic._VERSIONS[number], cid)
        assert found.hex() == iv
        sealed = AESGCM(bytes.fromhex(key)).encrypt(bytes(12), b"x", b"")
        assert cipher.decrypt(bytes(12), sealed, b"") == b"x"


# --- as clients send them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("seed", range(23))
def test_a_hello_over_two_datagrams(version: str, seed: int) -> None:
    data = hello("two.example")
    assert len(data) > 1200
    first, second = datagrams(data, version, seed)
    assert read(first, second) == read(second, first) == read(first, first, second) == (version, data)
    assert read(first)[1] == b""


def test_two_datagrams_in_one_buffer() -> None:
    """As the egress hook sees them where the kernel segments (UDP_SEGMENT); and padding behind a packet."""
    data = hello("offload.example")
    first, second = datagrams(data)
    assert read(first + second) == ("1", data)
    short = initial(crypto(hello("s.example", 32), 0), size=400)
    assert read(short + bytes(800)) == ("1", hello("s.example", 32))


def test_tokens_and_connection_ids() -> None:
    data = hello("token.example", 32)
    assert read(initial(crypto(data, 0), token=bytes(70), source=b"12345678", destination=b"x" * 20))[1] == data


def test_frames_beside_crypto() -> None:
    data = hello("frames.example", 32)
    ack = b"\2" + varint(5) + varint(1000) + varint(1) + varint(0) + varint(1) + varint(2)
    ecn = b"\3" + varint(5) + varint(0) + varint(0) + varint(1) + varint(0) + varint(1) + varint(2)
    assert read(initial(ack + ecn + b"\1" + crypto(data, 0) + b"\x1c\0"))[1] == data


def test_what_is_no_initial() -> None:
    good = initial(crypto(hello("x.example", 32), 0))
    for bad in (
        b"",
        bytes(1200),
        good[:-1],
        good[:30],
        bytes((good[0] & 0x7F,)) + good[1:],  # a short header
        bytes((good[0] | 0x20,)) + good[1:],  # a Handshake packet
        good[:1] + b"\xff\0\0\x1d" + good[5:],  # a draft
        good[:-1] + bytes((good[-1] ^ 1,)),  # not what was sealed
    ):
        assert quic.read_initials(bad) is None


# --- handshakes -------------------------------------------------------------------------------------------------------


def sighting(payload: bytes, time: int = 0, cookie: int = 1, port: int = 443) -> Sighting:
    blank = Sighting._make([0] * len(Sighting._fields))
    blank = blank._replace(kind=decode.QUIC_INITIAL, transport="udp", peer="192.0.2.1", port=port)
    return blank._replace(time=time, cookie=cookie, payload=payload)


def test_one_handshake_however_often_it_is_sent() -> None:
    all_ = Handshakes(lambda over: over)
    first, second = datagrams(hello("quic.example"), "2")
    assert all_.initial(sighting(first, 5)) is None
    over = all_.initial(sighting(second, 6))
    assert over is not None
    assert (over.server_name, over.status, over.duration, over.first.time) == ("quic.example", "", None, 5)
    how = over.tls
    assert (how.quic, how.version, how.offered, how.alpn, how.post_quantum) == ("2", "", "1.3", ("h3",), True)
    assert how.ja4.startswith("q13d0105h3_")
    again = initial(crypto(hello("quic.example", 32), 0), "2", b"a retry's", token=b"token")
    assert [all_.initial(sighting(data)) for data in (first, second, again)] == [None] * 3
    assert list(all_.expire(10**12)) == []
    assert len(all_) == 0


def test_half_a_hello_is_told_late_and_without_what_is_missing() -> None:
    all_ = Handshakes(lambda over: over)
    data = hello("half.example")
    all_.initial(sighting(initial(crypto(data[:900], 0))))
    assert list(all_.expire(9_999_999_999)) == []
    (over,) = all_.expire(10_000_000_000)
    assert (over.server_name, over.whole, over.tls.ja4, over.tls.quic) == ("half.example", False, "", "1")


def test_unreadable_ones_are_counted_and_the_table_is_bounded() -> None:
    all_ = Handshakes(lambda over: over)
    before = losses.snapshot()
    assert all_.initial(sighting(bytes(1200))) is None
    assert losses.snapshot()["decode", "quic_initial"] == before.get(("decode", "quic_initial"), 0) + 1
    half = initial(crypto(hello("many.example")[:900], 0))
    for cookie in range(QUIC_HANDSHAKES + 23):
        all_.initial(sighting(half, cookie=cookie))
    assert len(all_) == QUIC_HANDSHAKES
    assert losses.snapshot()["join", "handshakes_full"] == before.get(("join", "handshakes_full"), 0) + 23


def test_decryption_is_imported_when_it_is_needed() -> None:
    """It would cost every host several megabytes."""
    check = "import sys; import exporter.join; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# --- hostile bytes ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.sampled_from(["1", "2"]))
def test_hostile_frames_never_raise(frames: bytes, version: str) -> None:
    found = quic.read_initials(initial(frames, version))
    stream = quic.Crypto()
    for offset, piece in found.pieces if found else ():
        stream.add(offset, piece)
    tls.parse_client_hello(stream.data, quic=True)


@given(st.binary(max_size=100), st.integers(0, 1199), st.integers(0, 255))
def test_hostile_packets_never_raise(tail: bytes, at: int, byte: int) -> None:
    for head in (b"\xc0\0\0\0\1", b"\xd0\x6b\x33\x43\xcf"):
        quic.read_initials(head + tail)
    quic.read_initials(CLIENT_1[:at] + bytes((byte,)) + CLIENT_1[at + 1 :])
    quic.read_initials(CLIENT_2[:at] + tail)


@given(st.lists(st.tuples(st.integers(0, 40_000), st.binary(max_size=2000)), max_size=60))
def test_the_stream_is_bounded(pieces: list[tuple[int, bytes]]) -> None:
    stream = quic.Crypto()
    for offset, piece in pieces:
        stream.add(offset, piece)
    assert len(stream.data) <= quic.CRYPTO_BYTES
    assert sum(map(len, stream._pieces.values())) <= 2 * quic.CRYPTO_BYTES
