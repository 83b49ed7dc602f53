"""HTTP/1 request heads and DNS messages: by the RFCs, cut off anywhere, and hostile."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import parse
from exporter.parse import (
    ABSOLUTE,
    ASTERISK,
    AUTHORITY,
    MAX_ANSWERS,
    MAX_HEADERS,
    ORIGIN,
    parse_dns,
    parse_request,
    split_authority,
)

HEAD = b"GET /a/b?x=1&y HTTP/1.1\r\nHost: Example.COM.:8080\r\nUser-Agent: curl/8\r\nEmpty:\r\n\r\nbody"


def test_request() -> None:
    request = parse_request(HEAD)
    assert request is not None
    assert request.method == "GET"
    assert request.form == ORIGIN
    assert (request.path, request.query) == ("/a/b", "x=1&y")
    assert (request.host, request.port) == ("example.com", 8080)
    assert request.headers == (("Host", "Example.COM.:8080"), ("User-Agent", "curl/8"), ("Empty", ""))
    assert request.version == "1.1"
    assert (request.proxied, request.truncated, request.complete_line) == (False, False, True)


@pytest.mark.parametrize(
    ("line", "form", "host", "port", "path", "query", "proxied"),
    [
        (b"OPTIONS * HTTP/1.1", ASTERISK, "h.example", None, "*", "", False),
        (b"CONNECT a.example:443 HTTP/1.1", AUTHORITY, "a.example", 443, "", "", True),
        (b"CONNECT [2001:DB8::1]:443 HTTP/1.1", AUTHORITY, "2001:db8::1", 443, "", "", True),
        (b"GET http://A.example/p?q HTTP/1.1", ABSOLUTE, "a.example", None, "/p", "q", True),
        (b"GET http://u:pw@a.example:81?q HTTP/1.0", ABSOLUTE, "a.example", 81, "", "q", True),
        (b"GET http://a.example HTTP/1.1", ABSOLUTE, "a.example", None, "", "", True),
        (b"GET //evil/http://x HTTP/1.1", ORIGIN, "h.example", None, "//evil/http://x", "", False),
        (b"GET /a b HTTP/1.1", ORIGIN, "h.example", None, "/a b", "", False),
        (b"BREW /pot?x?y HTTP/1.1", ORIGIN, "h.example", None, "/pot", "x?y", False),
    ],
)
def test_target_forms(
    line: bytes, form: str, host: str, port: int | None, path: str, query: str, proxied: bool
) -> None:
    request = parse_request(line + b"\r\nHost: h.example\r\n\r\n")
    assert request is not None
    assert request[1:6] == (form, path, query, host, port)
    assert request.proxied is proxied


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"GET",
        b"GET ",
        b"get it from here",
        b"GETTING / on",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET /\r\n",
        b"GET relative HTTP/1.1\r\n\r\n",
        b"CONNECT /a HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"EHLO mail.example\r\n",
    ],
)
def test_what_is_no_request(data: bytes) -> None:
    assert parse_request(data) is None


def test_host_comes_from_one_field_only() -> None:
    def host(*fields: bytes) -> str:
        request = parse_request(b"GET / HTTP/1.1\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n")
        assert request is not None
        return request.host

    assert host(b"HOST: a") == "a"
    assert host(b"Host: a", b"Host: a") == "a"
    assert host(b"Host: a", b"Host: b") == ""
    assert host(b"Host : a") == ""
    assert host(b"Host:") == ""
    assert host(b"Host: a b") == ""
    assert host(b"Host: a:99999") == ""
    assert host(b"Host: [::1]") == "::1"
    assert host(b"Host: " + b"a" * 300) == ""


def test_lenient_where_servers_are() -> None:
    request = parse_request(b"\r\n\nPOST /a HTTP/1.1\nHost: a\nX: 1\n\t 2\n\xff: bad\nY: \xff\n\n")
    assert request is not None
    assert request.headers == (("Host", "a"), ("X", "1 2"), ("Y", "\ufffd"))
    assert not request.truncated


@pytest.mark.parametrize("cut", range(len(HEAD)))
def test_cut_anywhere_it_says_nothing_false(cut: int) -> None:
    whole, part = parse_request(HEAD), parse_request(HEAD[:cut])
    assert whole is not None
    if part is None:
        assert cut < len(b"GET /") + 1
        return
    assert part.method == whole.method
    assert part.truncated == (cut < len(HEAD) - len("body"))
    assert part.host in ("", whole.host)
    assert part.headers == whole.headers[: len(part.headers)]
    if part.complete_line:
        assert (part.path, part.query) == (whole.path, whole.query)


def test_half_an_authority_is_no_name() -> None:
    for data in (b"CONNECT bank.example.evil", b"GET http://bank.example"):
        request = parse_request(data)
        assert request is not None
        assert request.host == ""
        assert request.proxied
    request = parse_request(b"GET http://bank.example/lo")
    assert request is not None
    assert request.host == "bank.example"


def test_headers_are_bounded() -> None:
    request = parse_request(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n")
    assert request is not None
    assert len(request.headers) == MAX_HEADERS
    assert request.truncated


def test_split_authority() -> None:
    assert split_authority("u:p@[::1]:8") == ("::1", 8)
    assert split_authority("A.") == ("a", None)
    assert split_authority("a:") == ("a", None)
    assert split_authority("a:0") == ("", None)
    assert split_authority("a/b") == ("", None)


@given(st.binary(max_size=600))
@settings(max_examples=300)
def test_any_bytes_are_no_error_for_http(data: bytes) -> None:
    parse_request(data)


@given(st.binary(max_size=80), st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_behind_a_method_are_no_error(target: bytes, rest: bytes) -> None:
    request = parse_request(b"GET " + target + b" HTTP/1.1\r\n" + rest)
    assert request is None or len(request.host) <= 253


# --- DNS ----------------------------------------------------------------------------------------------------


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


_LINES = st.sampled_from(
    ["Host: a", "X-A:b", "x: y ", "A : b", " folded", "\tfolded", "", "nonsense", ":", "a:\tb\t", "B:\r", "\r",
     "C:\xff"]
)  # fmt: skip


@given(st.lists(st.tuples(_LINES, st.sampled_from(["\r\n", "\r\n", "\r\n", "\n"])), max_size=80), st.booleans())
def test_fields_at_once_and_line_by_line_are_the_same(lines: list[tuple[str, str]], ended: bool) -> None:
    text = "".join(line + end for line, end in lines) + ("\r\n" if ended else "")
    data = b"GET / HTTP/1.1\r\n" + text.encode("latin-1")
    alone = parse._meaning(*parse._fields_line_by_line(data, 16))
    assert parse._fields(data, 16) == alone
    assert parse._fields(data, 16) == alone  # as it is remembered
    assert len(parse._lines) <= parse._LINES
    assert len(parse._blocks) <= parse._BLOCKS


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
