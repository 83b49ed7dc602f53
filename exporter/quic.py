"""QUIC's Initial packets: what a client sends first, protected with keys that everybody on the path can derive.

In: datagrams as a client sent them, possibly cut off, possibly hostile. Out: the bytes of the TLS handshake in them.
Nothing here raises; work is bounded by the length of the input. Not its job: reading the ClientHello (tls), knowing
which datagrams belong together (handshakes). Everything after the Initial packets is encrypted for good.

Sources: RFC 9000 sections 16 to 19 (packets, frames), RFC 9001 section 5 (protection, version 1), RFC 9369 section 3
(version 2), RFC 5869 and RFC 8446 section 7.1 (key derivation)."""

from __future__ import annotations

import hmac
from functools import lru_cache
from typing import Any, NamedTuple

VERSION_1, VERSION_2 = 0x00000001, 0x6B3343CF

CRYPTO_BYTES = 16384  # of one connection; a ClientHello of more is not read
_PACKETS = 8  # of one datagram
_FRAMES = 256  # of one packet; Chrome cuts a hello into a dozen
_TAG = 16


class _Version(NamedTuple):
    name: str
    initial: int  # the two type bits of an Initial packet
    salt: bytes
    label: bytes


_VERSIONS = {
    VERSION_1: _Version("1", 0, bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"), b"quic "),
    VERSION_2: _Version("2", 1, bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), b"quicv2 "),
}


class Initials(NamedTuple):
    """What a datagram holds of a client's Initial packets. `version` is "1" or "2"; `pieces` are (offset, bytes) of
    the TLS handshake, in the order of the datagram."""

    version: str
    pieces: list[tuple[int, bytes]]


class _Unreadable(Exception):
    """The bytes end too early, or are no client's."""


def read_initials(data: bytes) -> Initials | None:
    """All Initial packets at the start of `data`: a datagram, or several that left as one buffer. None where there is
    none that a client sent under keys of its own choice, so also for its later packets, under the server's choice."""
    pieces: list[tuple[int, bytes]] = []
    name = ""
    at = 0
    for _ in range(_PACKETS):
        at = _behind_zeros(data, at)  # some pad behind the packet
        try:
            version, at, plain = _packet(data, at)
            name = name or version.name
            pieces += _crypto_frames(plain)
        except (_Unreadable, IndexError):
            break
    return Initials(name, pieces) if name else None


class Crypto:
    """The TLS handshake of one connection, put together; pieces come in any order."""

    __slots__ = ("_pieces", "_size", "data")

    def __init__(self) -> None:
        self.data = b""  # what is there without a gap
        self._pieces: dict[int, bytes] = {}
        self._size = 0

    def add(self, offset: int, piece: bytes) -> None:
        """A piece more than CRYPTO_BYTES into the stream, or beyond so many bytes, is dropped."""
        self._size += len(piece)
        if not piece or offset + len(piece) > CRYPTO_BYTES or self._size > 2 * CRYPTO_BYTES:
            return
        if len(piece) > len(self._pieces.get(offset, b"")):
            self._pieces[offset] = piece
        moved = True
        while moved:
            moved = False
            for start in sorted(self._pieces):
                if start > len(self.data):
                    break
                piece = self._pieces.pop(start)
                if start + len(piece) > len(self.data):
                    self.data += piece[len(self.data) - start :]
                    moved = True

    @property
    def whole(self) -> bool:
        """Is the first message, the ClientHello, there to its end?"""
        data = self.data
        return len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[1:4], "big")


# --- a packet ---------------------------------------------------------------------------------------------------------


def _packet(data: bytes, at: int) -> tuple[_Version, int, bytes]:
    """(version, where the next packet begins, frames) of the Initial packet at `at`."""
    start = at
    first = data[at]
    version = _VERSIONS.get(int.from_bytes(data[at + 1 : at + 5], "big"))
    if version is None or first & 0xC0 != 0xC0 or first >> 4 & 3 != version.initial:
        raise _Unreadable
    at += 5
    size = data[at]
    destination = data[at + 1 : at + 1 + size]
    at += 1 + size
    at += 1 + data[at]  # the source connection id
    size, at = _varint(data, at)
    at += size  # the token
    size, at = _varint(data, at)
    end = at + size
    sample = data[at + 4 : at + 20]
    if len(destination) > 20 or len(sample) < 16 or end > len(data):
        raise _Unreadable
    cipher, iv, header_cipher = _keys(version, destination)
    mask = header_cipher.update(sample)
    first ^= mask[0] & 0x0F
    length = (first & 3) + 1
    number = bytes(a ^ b for a, b in zip(data[at : at + length], mask[1:], strict=False))
    nonce = (int.from_bytes(iv, "big") ^ int.from_bytes(number, "big")).to_bytes(12, "big")
    header = bytes((first,)) + data[start + 1 : at] + number
    body = data[at + length : end]
    if len(body) < _TAG:
        raise _Unreadable
    try:
        return version, end, cipher.decrypt(nonce, body, header)
    except _invalid_tag():
        raise _Unreadable from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer (RFC 9000 section 16) and the offset behind it."""
    size = 1 << (data[at] >> 6)
    if at + size > len(data):
        raise _Unreadable
    return int.from_bytes(data[at : at + size], "big") & (1 << 8 * size - 2) - 1, at + size


def _behind_zeros(data: bytes, at: int) -> int:
    return len(data) - len(data[at:].lstrip(b"\0")) if at < len(data) and not data[at] else at


def _crypto_frames(plain: bytes) -> list[tuple[int, bytes]]:
    """(offset, bytes) of each CRYPTO frame; ends at a frame that no client's Initial has (RFC 9000 section 12.4)."""
    pieces: list[tuple[int, bytes]] = []
    at, size = 0, len(plain)
    for _ in range(_FRAMES):
        at = _behind_zeros(plain, at)  # PADDING
        if at >= size:
            break
        kind = plain[at]
        at += 1
        if kind == 1:  # PING
            continue
        if kind in (2, 3):  # ACK
            for _field in range(2):
                _, at = _varint(plain, at)
            ranges, at = _varint(plain, at)
            if ranges > size:
                break
            for _field in range(1 + 2 * ranges + (3 if kind == 3 else 0)):
                _, at = _varint(plain, at)
        elif kind == 6:  # CRYPTO
            offset, at = _varint(plain, at)
            length, at = _varint(plain, at)
            if at + length > size:
                break
            pieces.append((offset, plain[at : at + length]))
            at += length
        else:
            break
    return pieces


# --- keys -------------------------------------------------------------------------------------------------------------
# The library that decrypts is imported with the first Initial packet: it takes memory, and most hosts send none.


@lru_cache(maxsize=64)  # a connection's few datagrams come together
def _keys(version: _Version, destination: bytes) -> tuple[Any, bytes, Any]:
    """(AEAD, initialization vector, header protection) of a client that chose this destination connection id."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    secret = hmac.digest(version.salt, destination, "sha256")
    client = _expand(secret, b"client in", 32)
    key = _expand(client, version.label + b"key", 16)
    iv = _expand(client, version.label + b"iv", 12)
    protection = _expand(client, version.label + b"hp", 16)
    # One block at a time without chaining is what header protection asks for (RFC 9001 section 5.4.3).
    return AESGCM(key), iv, Cipher(algorithms.AES(protection), modes.ECB()).encryptor()


def _invalid_tag() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context, for at most one block."""
    name = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes((len(name),)) + name + b"\0"
    return hmac.digest(secret, info + b"\1", "sha256")[:size]
