"""What a TLS handshake shows before it is encrypted: ClientHello, ServerHello, alerts; and the JA4 of a client.

In: captured bytes, possibly cut off, possibly hostile. Out: a small named tuple, or None for "this is not one". Pure
functions; work is bounded by the length of the input; they never raise. Not their job: putting a handshake together
(handshakes), QUIC's packets around a ClientHello (quic), the name that the counters use (the kernel side reads that).

Sources: RFC 8446 sections 4 to 6 (TLS 1.3), RFC 5246 section 7 (TLS 1.2), RFC 6066 section 3 (server_name), RFC 7301
(ALPN), RFC 8701 (GREASE), RFC 9849 (ECH), the IANA registries of TLS parameters, and FoxIO's description of JA4.

A client that knows no ECH key may send an extension that looks like ECH (GREASE ECH); nobody but the client and the
server can tell which it was. `ech` is therefore "offered", in either sense."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import sha256
from typing import Final, Generic, NamedTuple, TypeVar

VERSIONS: Final = {0x0304: "1.3", 0x0303: "1.2", 0x0302: "1.1", 0x0301: "1.0", 0x0300: "ssl3"}

GROUPS: Final = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x0019: "secp521r1",
    0x001D: "x25519",
    0x001E: "x448",
    0x0100: "ffdhe2048",
    0x0101: "ffdhe3072",
    0x0102: "ffdhe4096",
    0x0103: "ffdhe6144",
    0x0104: "ffdhe8192",
    0x0200: "MLKEM512",
    0x0201: "MLKEM768",
    0x0202: "MLKEM1024",
    0x11EB: "SecP256r1MLKEM768",
    0x11EC: "X25519MLKEM768",
    0x11ED: "SecP384r1MLKEM1024",
    0x6399: "X25519Kyber768Draft00",
    0x639A: "SecP256r1Kyber768Draft00",
    0xFE30: "X25519Kyber512Draft00",
    0xFE31: "X25519Kyber768Draft00Old",
}
POST_QUANTUM: Final = frozenset(
    (0x0200, 0x0201, 0x0202, 0x11EB, 0x11EC, 0x11ED, 0x6399, 0x639A, 0xFE30, 0xFE31)
)  # those of GROUPS that rest on ML-KEM or its draft, Kyber

ALERTS: Final = {
    0: "close_notify",
    10: "unexpected_message",
    20: "bad_record_mac",
    21: "decryption_failed",
    22: "record_overflow",
    30: "decompression_failure",
    40: "handshake_failure",
    41: "no_certificate",
    42: "bad_certificate",
    43: "unsupported_certificate",
    44: "certificate_revoked",
    45: "certificate_expired",
    46: "certificate_unknown",
    47: "illegal_parameter",
    48: "unknown_ca",
    49: "access_denied",
    50: "decode_error",
    51: "decrypt_error",
    60: "export_restriction",
    70: "protocol_version",
    71: "insufficient_security",
    80: "internal_error",
    86: "inappropriate_fallback",
    90: "user_canceled",
    100: "no_renegotiation",
    109: "missing_extension",
    110: "unsupported_extension",
    111: "certificate_unobtainable",
    112: "unrecognized_name",
    113: "bad_certificate_status_response",
    114: "bad_certificate_hash_value",
    115: "unknown_psk_identity",
    116: "certificate_required",
    120: "no_application_protocol",
    121: "ech_required",
}

CHANGE_CIPHER_SPEC: Final = 20  # content types of records
ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
_FATAL: Final = 2
_CLOSE_NOTIFY: Final = 0
_CLIENT_HELLO: Final = 1  # handshake types
_SERVER_HELLO: Final = 2

# Extensions.
_SERVER_NAME: Final = 0
_SIGNATURE_ALGORITHMS: Final = 13
_ALPN: Final = 16
_SESSION_TICKET: Final = 35
_PRE_SHARED_KEY: Final = 41
_SUPPORTED_VERSIONS: Final = 43
_KEY_SHARE: Final = 51
_ECH: Final = 0xFE0D
_READ: Final = frozenset(
    (
        _SERVER_NAME,
        _SIGNATURE_ALGORITHMS,
        _ALPN,
        _SESSION_TICKET,
        _PRE_SHARED_KEY,
        _SUPPORTED_VERSIONS,
        _KEY_SHARE,
        _ECH,
    )
)

# The random of a ServerHello that is a HelloRetryRequest: SHA-256 of those words (RFC 8446 section 4.1.3).
_RETRY: Final = sha256(b"HelloRetryRequest").digest()

# 4 + 32 + 1 + 8: no encrypted Finished is shorter (the shortest hash, content type, the shortest tag; RFC 8446).
_SHORTEST_FINISHED: Final = 45

_JA4_VERSIONS: Final = {0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3", 0x0002: "s2"}
_GREASE: Final = frozenset(0x0A0A + 0x1010 * n for n in range(16))
_NOTHING: Final = "000000000000"
_PROTOCOLS: Final = 32  # ALPN names kept
_CACHED: Final = 1024
_MASKS: Final = 8  # tried for one message

_two: Final = struct.Struct("!HH").unpack_from
_short: Final = struct.Struct("!H").unpack_from
_new: Final = tuple.__new__
_T = TypeVar("_T")


class ClientHello(NamedTuple):
    """`server_name` is lower case, without a final dot; "" where there is none. `offered` is the highest version,
    in words of VERSIONS. `resumption`: the client holds something to resume (a pre-shared key or a session ticket).
    `session`: the session id, as sent. `whole`: nothing is missing; where something is, `ja4` is "" and what was
    behind it is as if it were not there."""

    server_name: str
    offered: str
    alpn: tuple[str, ...]
    ja4: str
    post_quantum: bool
    ech: bool
    resumption: bool
    session: bytes
    whole: bool


class ServerHello(NamedTuple):
    """`version` is the negotiated one, "" where the bytes end before it is certain; `group` that of the key share
    (TLS 1.3 only); `retry`: a HelloRetryRequest, after which the client starts again; `psk`: the server took a
    pre-shared key; `session`: the session id that it sent back."""

    version: str
    group: str
    retry: bool
    psk: bool
    session: bytes


class _Shape(NamedTuple):
    """What clients of one kind have in common, whomever they talk to."""

    offered: str
    alpn: tuple[str, ...]
    ja4: str


_shapes: Final[dict[tuple[object, ...], _Shape]] = {}


class _Memo(Generic[_T]):
    """What messages say that were read lately, by their bytes without those in which even alike ones differ: randoms,
    keys, tickets, names. Those are hidden by a mask. Where the bytes that a mask shows are those of a message that was
    read, so are all types and lengths in it, and what is hidden lies at the same places in both."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], list[tuple[int, dict[int, _T]]]] = {}
        self._size = 0

    def find(self, key: tuple[int, int], number: int) -> _T | None:
        """`key`: what messages of one mask have in common; `number`: all bytes of the message, the first the lowest."""
        for mask, messages in self._known.get(key, ()):
            if (found := messages.get(number & mask)) is not None:
                return found
        return None

    def keep(self, key: tuple[int, int], number: int, shown: Iterable[tuple[int, int]], found: _T) -> None:
        """`shown`: the parts of the message that were looked at, from one offset up to another."""
        if self._size >= _CACHED:
            self._known.clear()
            self._size = 0
        mask = 0
        for start, end in shown:
            mask |= (1 << 8 * end) - (1 << 8 * start)
        known = self._known.setdefault(key, [])
        messages = next((messages for other, messages in known if other == mask), None)
        if messages is None:
            messages = {}
            if len(known) >= _MASKS:
                self._size -= len(known.pop(0)[1])
            known.append((mask, messages))
        self._size += number & mask not in messages
        messages[number & mask] = found


# A client's hello, and where in it the name is; the server's.
_hellos: Final[_Memo[tuple[ClientHello, int, int]]] = _Memo()
_answers: Final[_Memo[ServerHello]] = _Memo()


def parse_client_hello(data: bytes, quic: bool = False, kept: int = 0xFFFF) -> ClientHello | None:
    """Read the ClientHello at the start of `data`: TLS records or, with `quic`, the bare handshake message. Of its key
    share `kept` bytes are there."""
    if quic or len(data) < 44:
        seen = _read_client_hello(data if quic else _handshake(data), quic, kept)
        return None if seen is None else seen[0]
    key, number = (len(data), kept), int.from_bytes(data, "little")
    found = _hellos.find(key, number)
    if found is None:
        message = _handshake(data)
        seen = _read_client_hello(message, quic, kept)
        if seen is None:
            return None
        hello, start, end, shown = seen
        if hello.whole and len(message) + 5 == len(data):  # in one record, and nothing else in that
            parts = [(0, 5), *((first + 5, last + 5) for first, last in shown)]
            _hellos.keep(key, number, parts, (hello, start + 5, end + 5))
        return hello
    (_, offered, alpn, ja4, post_quantum, ech, resumption, _, whole), start, end = found
    return _new(
        ClientHello,
        (
            _host_name(data[start:end]),
            offered,
            alpn,
            ja4,
            post_quantum,
            ech,
            resumption,
            data[44 : 44 + data[43]],
            whole,
        ),
    )


def _read_client_hello(
    message: bytes, quic: bool, kept: int
) -> tuple[ClientHello, int, int, list[tuple[int, int]]] | None:
    """The hello, from where to where its name goes, and the parts of the message that were looked at."""
    if len(message) < 39 or message[0] != _CLIENT_HELLO:
        return None
    # handshake type 1, length 3, version 2, random 32, then session id, cipher suites, compression, extensions
    end = 4 + (message[1] << 16 | message[2] << 8 | message[3])
    session = message[39 : 39 + message[38]]
    at = 39 + len(session)
    shown = [(0, 6), (38, 39)]
    (legacy,) = _short(message, 4)
    try:
        (size,) = _short(message, at)
        ciphers = message[at + 2 : at + 2 + size]
        start, at = at, at + 2 + size
        at += 1 + message[at]
    except (struct.error, IndexError):
        return _new(ClientHello, ("", "", (), "", False, False, False, session, False)), 0, 0, shown

    types: list[int] = []
    name_start = name_end = 0
    versions = protocols = signatures = b""
    post_quantum = ech = resumption = False
    if at + 2 <= end:
        at += 2  # the length of all extensions: the message's end says the same
    shown.append((start, at))
    size_of_all = len(message)
    while at + 4 <= end and at + 4 <= size_of_all:
        kind, size = _two(message, at)
        types.append(kind)
        shown.append((at, at + 4))
        at += 4
        if kind in _READ:
            if size > kept and kind == _KEY_SHARE:
                end -= size - kept
                size = kept
            body = message[at : at + size]
            if kind == _SERVER_NAME:
                shown.append((at, at + 5))
                length = _name_length(body)
                name_start, name_end = at + 5, at + 5 + length
            elif kind == _SUPPORTED_VERSIONS:
                shown.append((at, at + size))
                versions = body[1:]
            elif kind == _KEY_SHARE:
                groups = _offered_groups(body)
                shown += [(at + place, at + place + 4) for place, _ in groups]
                post_quantum = any(group in POST_QUANTUM for _, group in groups)
            elif kind == _ALPN:
                shown.append((at, at + size))
                protocols = body[2:]
            elif kind == _SIGNATURE_ALGORITHMS:
                shown.append((at, at + size))
                signatures = body[2:]
            elif kind == _SESSION_TICKET:
                resumption = resumption or size > 0
            elif kind == _PRE_SHARED_KEY:
                resumption = True
            else:
                ech = True
        at += size
    whole = at <= end <= len(message)
    key = (quic, legacy, ciphers, tuple(types), versions, protocols, signatures)
    shape = _shapes.get(key)
    if shape is None:
        if len(_shapes) >= _CACHED:
            _shapes.clear()
        shape = _shapes[key] = _shape(quic, legacy, ciphers, types, versions, protocols, signatures)
    ja4, offered = (shape.ja4, shape.offered) if whole else ("", shape.offered if versions else "")
    name = _host_name(message[name_start:name_end])
    hello = _new(ClientHello, (name, offered, shape.alpn, ja4, post_quantum, ech, resumption, session, whole))
    return hello, name_start, name_end, shown


def parse_server_hello(data: bytes) -> ServerHello | None:
    """Read the ServerHello at the start of `data`, TLS records, behind a warning if there is one (unrecognized_name);
    None where they begin otherwise."""
    if len(data) < 44:
        return None
    end = 9 + (data[7] << 8 | data[8])  # if it is one: nearly all are in a record with nothing before
    key, number = (end, data[43]), int.from_bytes(data[:end], "little")
    found = _answers.find(key, number)
    if found is not None and end <= len(data) and data[11:43] != _RETRY:
        version, group, retry, psk, _ = found
        return _new(ServerHello, (version, group, retry, psk, data[44 : 44 + data[43]]))
    message = _handshake(data[7:] if data[:1] == b"\x15" and data[3:6] == b"\0\2\1" else data)
    if len(message) < 39 or message[0] != _SERVER_HELLO:
        return None
    size = 4 + (message[1] << 16 | message[2] << 8 | message[3])
    retry = message[6:38] == _RETRY
    session = message[39 : 39 + message[38]]
    (version_number,) = _short(message, 4)
    at = 39 + message[38] + 3 + 2  # cipher suite, compression, and the length of all extensions
    shown = [(0, 11), (43, 44)]
    limit = min(size, len(message))
    group, psk, certain = "", False, size <= len(message)
    while at + 4 <= limit:
        kind, length = _two(message, at)
        shown.append((at + 5, at + 9))
        body = message[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == _SUPPORTED_VERSIONS and length == len(body) == 2:
            shown.append((at + 3, at + 5))
            version_number, certain = _short(body)[0], True
        elif kind == _KEY_SHARE and len(body) >= 2:
            shown.append((at + 5 - length, at + 7 - length))
            group = _group(_short(body)[0])
        elif kind == _PRE_SHARED_KEY:
            psk = True
    hello = _new(ServerHello, (VERSIONS.get(version_number, "") if certain else "", group, retry, psk, session))
    plain = data[:1] == b"\x16" and size + 5 == end <= len(data) and message[:size] == data[5:end]
    if plain and certain and not retry and 44 + len(session) <= end and len(session) == data[43]:
        _answers.keep(key, number, shown, hello)
    return hello


def fatal_alert(data: bytes) -> str:
    """The description of the plaintext fatal alert that `data`, TLS records, begins with, in words of RFC 8446
    section 6; "" where it begins with something else. A close_notify counts as one: in a handshake it is its end."""
    if len(data) < 7 or data[0] != ALERT or data[1] != 3 or data[3] or data[4] != 2:
        return ""
    if data[5] != _FATAL and data[6] != _CLOSE_NOTIFY:
        return ""
    return ALERTS.get(data[6]) or f"alert_{data[6]}"


def client_alert(data: bytes) -> str:
    """As `fatal_alert`, for what a client sends after the server's first flight. From TLS 1.3 on that is encrypted;
    what is too short to be a Finished can only be an alert, and is called "encrypted"."""
    if data and data[0] == CHANGE_CIPHER_SPEC and data[3:5] == b"\0\1":  # change_cipher_spec, for middleboxes' sake
        data = data[6:]
    if len(data) < 5 or data[0] != APPLICATION_DATA:
        return fatal_alert(data)
    return "encrypted" if data[3] << 8 | data[4] < _SHORTEST_FINISHED else ""


# --- the parts --------------------------------------------------------------------------------------------------------


def _handshake(data: bytes) -> bytes:
    """The handshake message at the start of records, put together where it is cut into several; b"" where they hold
    something else."""
    size = len(data)
    if size < 6 or data[0] != HANDSHAKE or data[1] != 3:
        return b""
    end = 5 + (data[3] << 8 | data[4])
    if end >= size or end < 9 or end - 5 >= 4 + (data[6] << 16 | data[7] << 8 | data[8]):
        return data[5:end]
    parts, at = [data[5:end]], end
    while at + 5 <= size and data[at] == HANDSHAKE:
        end = at + 5 + (data[at + 3] << 8 | data[at + 4])
        parts.append(data[at + 5 : end])
        at = end
    return b"".join(parts)


def _name_length(body: bytes) -> int:
    """Of the first name in server_name, if it is a host's (type 0); 0 where there is none, or half a one."""
    if len(body) < 5 or body[2]:
        return 0
    length = body[3] << 8 | body[4]
    return length if 5 + length <= len(body) else 0


def _host_name(written: bytes) -> str:
    """A name with bytes beyond ASCII is shown escaped."""
    name = written.decode("ascii", "backslashreplace").lower()
    return name[:-1] if name.endswith(".") else name


def _offered_groups(body: bytes) -> list[tuple[int, int]]:
    """Of the key shares whose bytes are in `body`, or were to be: where each begins, and its group."""
    groups: list[tuple[int, int]] = []
    at = 2
    while at + 4 <= len(body):
        group, size = _two(body, at)
        groups.append((at, group))
        at += 4 + size
    return groups


def _group(number: int) -> str:
    return GROUPS.get(number) or f"0x{number:04x}"


def _numbers(packed: bytes) -> list[int]:
    """16-bit numbers without GREASE; half a one at the end is none."""
    count = len(packed) // 2
    return [number for number in struct.unpack_from(f"!{count}H", packed) if number not in _GREASE]


def _protocol_names(packed: bytes) -> list[bytes]:
    names: list[bytes] = []
    at = 0
    while at < len(packed) and len(names) < _PROTOCOLS:
        size = packed[at]
        name = packed[at + 1 : at + 1 + size]
        if len(name) < size:
            break
        names.append(name)
        at += 1 + size
    return names


def _shape(
    quic: bool, legacy: int, ciphers: bytes, types: list[int], versions: bytes, protocols: bytes, signatures: bytes
) -> _Shape:
    supported = _numbers(versions)
    offered = max(supported) if supported else legacy
    known = [number for number in supported if number in VERSIONS]
    # GREASE is in ALPN too, as names of two equal bytes.
    names = [name for name in _protocol_names(protocols) if len(name) != 2 or _short(name)[0] not in _GREASE]
    extensions = [number for number in types if number not in _GREASE]
    suites = _numbers(ciphers)
    first = (
        ("q" if quic else "t")
        + _JA4_VERSIONS.get(offered, "00")
        + ("d" if _SERVER_NAME in types else "i")
        + f"{min(len(suites), 99):02}{min(len(extensions), 99):02}"
        + _ends(names[0] if names else b"")
    )
    hashed = ",".join(sorted(f"{number:04x}" for number in extensions if number not in (_SERVER_NAME, _ALPN)))
    if signed := _numbers(signatures):
        hashed += "_" + ",".join([f"{number:04x}" for number in signed])
    ja4 = (
        f"{first}_{_digest(','.join(sorted(f'{number:04x}' for number in suites)))}"
        f"_{_digest(hashed) if extensions else _NOTHING}"
    )
    return _Shape(
        VERSIONS.get(max(known) if known else legacy, ""),
        tuple([name.decode("ascii", "backslashreplace") for name in names]),
        ja4,
    )


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12] if text else _NOTHING


def _ends(name: bytes) -> str:
    """First and last character of the first ALPN name; of its hexadecimal form where one of them is neither letter
    nor digit."""
    if not name:
        return "00"
    first, last = chr(name[0]), chr(name[-1])
    if not (first.isascii() and first.isalnum() and last.isascii() and last.isalnum()):
        text = name.hex()
        first, last = text[0], text[-1]
    return first + last
