"""HTTP/1 heads: by the RFCs, cut off anywhere, and hostile."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import http1
from exporter.http1 import ABSOLUTE, ASTERISK, AUTHORITY, MAX_HEADERS, ORIGIN, parse_request, split_authority

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


_LINES = st.sampled_from(
    ["Host: a", "X-A:b", "x: y ", "A : b", " folded", "\tfolded", "", "nonsense", ":", "a:\tb\t", "B:\r", "\r",
     "C:\xff"]
)  # fmt: skip


@given(st.lists(st.tuples(_LINES, st.sampled_from(["\r\n", "\r\n", "\r\n", "\n"])), max_size=80), st.booleans())
def test_fields_at_once_and_line_by_line_are_the_same(lines: list[tuple[str, str]], ended: bool) -> None:
    text = "".join(line + end for line, end in lines) + ("\r\n" if ended else "")
    data = b"GET / HTTP/1.1\r\n" + text.encode("latin-1")
    alone = http1._meaning(*http1._fields_line_by_line(data, 16))
    assert http1._fields(data, 16) == alone
    assert http1._fields(data, 16) == alone  # as it is remembered
    assert len(http1._lines) <= http1._LINES
    assert len(http1._blocks) <= http1._BLOCKS
