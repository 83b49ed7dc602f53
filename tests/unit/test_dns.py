"""DNS messages: by the RFCs, cut off anywhere, and hostile."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.dns import MAX_ANSWERS, parse_dns


def name(text: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in text.split(".") if label) + b"\0"


def message(
    *answers: tuple[bytes, int, int, bytes],
    question: bytes = name("Www.Example.com"),
    qtype: int = 1,
    flags: int = 0x8180,
    count: int | None = None,
) -> bytes:
    head = struct.pack("!HHHHHH", 7, flags, 1, len(answers) if count is None else count, 0, 0)
    body = question + struct.pack("!HH", qtype, 1)
    for owner, kind, ttl, data in answers:
        body += owner + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data
    return head + body


SAME = b"\xc0\x0c"


def test_query() -> None:
    read = parse_dns(message(flags=0x0100, qtype=28))
    assert read is not None
    assert read == (False, "", "www.example.com", "AAAA", (), (), False)


def test_answers_of_each_type() -> None:
    read = parse_dns(
        message(
            (SAME, 5, 300, name("cdn.example.net")),
            (b"\xc0\x2d", 1, 60, bytes((192, 0, 2, 1))),
            (SAME, 28, 1 << 31, bytes.fromhex("20010db8000000000000000000000001")),
            (SAME, 28, 1, bytes(10) + b"\xff\xff\xc0\x00\x02\x02"),
            (SAME, 65, 1, b"\0\1" + name("svc.example") + b"\0\1\0\3\2h2"),
            (SAME, 64, 1, b"\0\0\0"),
            (SAME, 15, 1, b"\0\x0a" + b"\3MX1" + SAME),
            (SAME, 33, 1, struct.pack("!HHH", 0, 5, 443) + name("t.example")),
            (SAME, 16, 1, b"\4text"),
            (SAME, 1, 1, b"\1\2\3"),
            (name(""), 12345, 1, b"?"),
        )
    )
    assert read is not None
    assert not read.truncated
    assert read.answers == (
        "cdn.example.net",
        "192.0.2.1",
        "2001:db8::1",
        "192.0.2.2",
        "1 svc.example alpn=h2",
        "0 .",
        "10 mx1.www.example.com",
        "0 5 443 t.example",
    )
    assert read.addresses == (("192.0.2.1", 60), ("2001:db8::1", 0), ("192.0.2.2", 1))


@pytest.mark.parametrize(
    ("code", "text"), [(0, "NOERROR"), (2, "SERVFAIL"), (3, "NXDOMAIN"), (5, "REFUSED"), (15, "RCODE15")]
)
def test_rcode(code: int, text: str) -> None:
    read = parse_dns(message(flags=0x8180 | code))
    assert read is not None
    assert read.rcode == text


def test_truncation_is_told() -> None:
    assert parse_dns(message(flags=0x8380)).truncated  # type: ignore[union-attr]
    whole = message((SAME, 1, 60, b"\1\2\3\4"), (SAME, 1, 60, b"\1\2\3\5"))
    question = len(message())
    for cut in range(len(whole)):
        read = parse_dns(whole[:cut])
        if cut < question:
            assert read is None
        else:
            assert read is not None
            assert read.truncated
            assert len(read.answers) == (1 if cut >= question + 16 else 0)
    many = parse_dns(message(*[(SAME, 1, 1, b"\1\2\3\4")] * 200))
    assert many is not None
    assert (len(many.answers), many.truncated) == (MAX_ANSWERS, True)


def test_names_are_escaped_and_bounded() -> None:
    read = parse_dns(message(question=b"\x05a.b\\c\x03\x1b \xff\0"))
    assert read is not None
    assert read.qname == "a\\.b\\\\c.\\027\\032\\255"
    assert parse_dns(message(question=name(""))).qname == "."  # type: ignore[union-attr]
    label = b"\x3f" + b"a" * 63
    assert parse_dns(message(question=label * 3 + b"\x3d" + b"a" * 61 + b"\0")) is not None
    assert parse_dns(message(question=label * 4 + b"\0")) is None


@pytest.mark.parametrize(
    "question",
    [
        b"\xc0\x0c",  # points to itself
        b"\1a\xc0\x0c",  # points to its own start
        b"\xc0\xff",  # points forward
        b"\xc0\x00",  # points into the header
        b"\x41a\0",  # reserved label types
        b"\x80\0",
        b"\x3fshort",
    ],
)
def test_malformed_question_is_none(question: bytes) -> None:
    assert parse_dns(message(question=question)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(16),
        message(flags=0x2800),  # UPDATE
        message()[:4] + b"\0\2" + message()[6:],
        message()[:4] + b"\0\0" + message()[6:],
        message()[:-2] + b"\x13\x37",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_message(data: bytes) -> None:
    assert parse_dns(data) is None


def test_pointer_chains_end_soon() -> None:
    # Answers whose owner is a chain of pointers, each to the one before: quadratic without a limit.
    chain = b"".join(struct.pack("!H", 0xC000 | (12 + 2 * max(step - 1, 0))) for step in range(5000))
    data = message((chain[-2:], 16, 1, b"x")) + chain
    loop = message((SAME, 5, 1, b"\xc0\x21"), (b"\xc0\x21", 1, 1, b"\1\2\3\4"))
    began = time.perf_counter()
    for _ in range(100):
        parse_dns(data)
        parse_dns(loop)
    assert time.perf_counter() - began < 1.0


@given(st.binary(max_size=600))
@settings(max_examples=300)
def test_any_bytes_are_no_error_for_dns(data: bytes) -> None:
    parse_dns(data)


@given(
    st.lists(st.tuples(st.binary(max_size=20), st.integers(0, 300), st.binary(max_size=40)), max_size=5),
    st.integers(0, 65535),
)
@settings(max_examples=300)
def test_any_answers_are_no_error(answers: list[tuple[bytes, int, bytes]], count: int) -> None:
    read = parse_dns(message(*((owner, kind, 1, data) for owner, kind, data in answers), count=count))
    assert read is not None
    assert len(read.answers) <= MAX_ANSWERS
    assert all(answer.isprintable() for answer in read.answers)


_LABEL = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=20)


@given(st.lists(_LABEL, min_size=1, max_size=8), st.binary(min_size=4, max_size=4), st.integers(0, 2**31 - 1))
def test_what_is_packed_is_read(labels: list[str], address: bytes, ttl: int) -> None:
    text = ".".join(labels)
    read = parse_dns(message((SAME, 1, ttl, address), question=name(text)))
    assert read is not None
    assert read.qname == text
    assert read.answers == (".".join(map(str, address)),)
    assert read.addresses == ((read.answers[0], ttl),)


# --- services, extended codes -------------------------------------------------------------------------------


def parameter(key: int, value: bytes) -> bytes:
    return struct.pack("!HH", key, len(value)) + value


HINTS = bytes((192, 0, 2, 1, 192, 0, 2, 2))
HINT6 = bytes.fromhex("20010db8000000000000000000000001")


@pytest.mark.parametrize(
    ("data", "text", "addresses"),
    [
        (b"\0\0" + name("alias.example"), "0 alias.example", ()),
        (b"\0\1\0", "1 .", ()),
        (b"\0\1\0" + parameter(1, b"\2h3\2h2"), "1 . alpn=h3,h2", ()),
        (
            b"\0\2" + name("svc.example") + parameter(0, b"\0\1") + parameter(1, b"\2h2") + parameter(2, b"")
            + parameter(3, b"\x20\xfb") + parameter(4, HINTS) + parameter(5, b"config") + parameter(6, HINT6)
            + parameter(65280, b"?"),
            "2 svc.example alpn=h2 port=8443 ipv4hint=192.0.2.1,192.0.2.2 ech ipv6hint=2001:db8::1",
            (("192.0.2.1", 60), ("192.0.2.2", 60), ("2001:db8::1", 60)),
        ),
        (b"\0\1\0" + parameter(1, b"\3a\x1bb"), "1 . alpn=a\\027b", ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("number", "kind"), [(64, "SVCB"), (65, "HTTPS")])
def test_services(data: bytes, text: str, addresses: tuple[tuple[str, int], ...], number: int, kind: str) -> None:
    read = parse_dns(message((SAME, number, 60, data)))
    assert read is not None
    assert (read.answers, read.addresses, read.truncated) == ((text,), addresses, False)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\0" + parameter(4, HINTS[:-1]),
        b"\0\1\0" + parameter(1, b"\5h3"),
        b"\0\1\0" + parameter(3, b"\0\1")[:-1],
        b"\0\1\0\0",
        b"\0",
    ],
)
def test_a_malformed_service_ends_the_answers(data: bytes) -> None:
    read = parse_dns(message((SAME, 1, 60, b"\1\2\3\4"), (SAME, 65, 60, data)))
    assert read is not None
    assert (read.answers, read.truncated) == (("1.2.3.4",), True)


def opt(upper: int, options: bytes = b"") -> bytes:
    return struct.pack("!BHHBBHH", 0, 41, 1232, upper, 0, 0, len(options)) + options


@pytest.mark.parametrize(
    ("flags", "additional", "text"),
    [
        (0x8180, opt(1), "BADVERS"),
        (0x8187, opt(1), "BADCOOKIE"),
        (0x8187, opt(1, b"\0\x0a\0\x08cookie__"), "BADCOOKIE"),
        (0x8183, opt(0), "NXDOMAIN"),
        (0x8180, opt(0, b"\0\x0a\0\x08cookie__"), "NOERROR"),
        (0x818F, opt(255), "RCODE4095"),
        (0x8183, b"\0\0", "NXDOMAIN"),
        (0x8183, b"", "NXDOMAIN"),
    ],
)
def test_extended_codes(flags: int, additional: bytes, text: str) -> None:
    soa = SAME + struct.pack("!HHIH", 6, 1, 60, 22) + name("") + name("") + bytes(20)
    for authority in (b"", soa):
        data = bytearray(message(flags=flags) + authority + additional)
        data[8:12] = struct.pack("!HH", 1 if authority else 0, 1)
        read = parse_dns(bytes(data))
        assert read is not None
        assert read.rcode == text
