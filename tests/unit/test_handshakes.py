"""exporter/handshakes.py: in any order, with anything missing, a handshake is told at most once, and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exporter import decode
from exporter.decode import Sighting
from exporter.events import SECOND, Tls
from exporter.handshakes import HANDSHAKES, Handshake, Handshakes
from exporter.health import losses

from .test_tls import alpn, answer, extension, hello, record, server_name, u16s, versions

HELLO = hello(server_name("one.example"), alpn(b"h2"), versions(0x0304))
ANSWER = answer(extension(43, u16s(0x0304)))
FINISHED = b"\x14\3\3\0\1\1" + record(bytes(53), 23)
ALERT = record(b"\2\x28", 21)


def sighting(
    kind: int, payload: bytes = b"", time: int = 0, *, cookie: int = 1, offset: int = 0, flags: int = 0, name: int = 0
) -> Sighting:
    blank = Sighting._make([0] * len(Sighting._fields))
    return blank._replace(
        kind=kind, time=time, cookie=cookie, name=name, transport="tcp", flags=flags, offset=offset, payload=payload
    )


def sent(payload: bytes = HELLO, time: int = 0, *, cookie: int = 1, offset: int = 0, end: bool = True) -> Sighting:
    flags = decode.HEAD_END if end else 0
    return sighting(decode.HELLO, payload, time, cookie=cookie, offset=offset, flags=flags)


def answered(payload: bytes = ANSWER, time: int = 0) -> Sighting:
    return sighting(decode.SERVER_HELLO, payload, time)


def said(payload: bytes = FINISHED, time: int = 0) -> Sighting:
    return sighting(decode.HANDSHAKE_END, payload, time)


def closed(time: int = 0) -> Sighting:
    return sighting(decode.CLOSED, time=time)


def shown(over: Handshake | None) -> tuple[str, str, str, int | None]:
    assert over is not None
    return over.server_name, over.tls.version, over.status, over.duration


def test_hello_answer_end() -> None:
    all_ = Handshakes(lambda over: over)
    assert all_.hello(sent(time=100)) is None
    assert all_.answer(answered(time=200)) is None
    over = all_.end(said(time=350))
    assert shown(over) == ("one.example", "1.3", "ok", 250)
    assert over is not None
    assert over.tls == Tls("1.3", "1.3", ("h2",), "", False, False, over.tls.ja4, False, "", "")
    assert over.tls.ja4.startswith("t13d0103h2_")
    assert (len(all_), all_.closed(closed(400)), list(all_.expire(10**12))) == (0, None, [])


def test_every_other_end() -> None:
    all_ = Handshakes(lambda over: over)
    all_.hello(sent())
    assert shown(all_.answer(answered(ALERT, 5))) == ("one.example", "", "handshake_failure", 5)
    all_.hello(sent())
    all_.answer(answered())
    assert shown(all_.end(said(ALERT, 6))) == ("one.example", "1.3", "handshake_failure", 6)
    all_.hello(sent())
    assert shown(all_.closed(closed(7))) == ("one.example", "", "closed", 7)
    all_.hello(sent())
    assert list(all_.expire(10 * SECOND - 1)) == []
    assert [shown(over) for over in all_.expire(10 * SECOND)] == [("one.example", "", "timeout", None)]
    all_.hello(sent())
    assert shown(all_.end(said(time=8))) == ("one.example", "", "ok", 8)  # the answer's record was lost


def test_pieces() -> None:
    """In order, sent again and cut differently; a lost one costs what was in it, and the fingerprint."""
    for cuts in ([(0, 50), (50, 999)], [(0, 50), (0, 50), (20, 90), (90, 999)], [(0, 1), (1, 999)]):
        all_ = Handshakes(lambda over: over)
        for start, end in cuts:
            all_.hello(sent(HELLO[start:end], offset=start, end=end == 999))
        over = all_.end(said())
        assert shown(over)[0] == "one.example"
        assert over is not None
        assert over.tls.ja4
    all_ = Handshakes(lambda over: over)
    all_.hello(sent(HELLO[:50], end=False))
    all_.hello(sent(HELLO[60:], offset=60))
    over = all_.end(said())
    assert over is not None
    assert (over.whole, over.tls.ja4, over.tls.offered, over.server_name) == (False, "", "", "")
    assert all_.hello(sent(HELLO[50:], offset=50)) is None  # the first piece was lost: nothing
    assert all_.closed(closed()) is None


def test_a_hello_that_never_ends_is_none() -> None:
    all_ = Handshakes(lambda over: over)
    all_.hello(sent(HELLO[:20], end=False))
    assert all_.closed(closed()) is None
    all_.hello(sent(HELLO[:60], end=False))
    all_.hello(sighting(decode.HELLO, HELLO[60:], offset=60, flags=decode.ABANDONED))
    assert len(all_) == 0


def test_a_retry_is_no_answer() -> None:
    all_ = Handshakes(lambda over: over)
    random = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
    all_.hello(sent())
    all_.answer(answered(answer(extension(43, u16s(0x0304)), extension(51, u16s(24)), random=random)))
    assert all_.answer(answered(answer(extension(43, u16s(0x0304)), extension(51, u16s(24)), session=b""))) is None
    over = all_.end(said())
    assert over is not None
    assert (over.tls.version, over.tls.group) == ("1.3", "secp384r1")


def test_too_many_at_once() -> None:
    """The oldest goes, named and counted."""
    all_ = Handshakes(lambda over: over)
    before = losses.snapshot().get(("join", "handshakes_full"), 0)
    for cookie in range(HANDSHAKES):
        assert all_.hello(sent(cookie=cookie + 1)) is None
    assert shown(all_.hello(sent(cookie=99_999))) == ("one.example", "", "", None)
    assert len(all_) == HANDSHAKES
    assert losses.snapshot()["join", "handshakes_full"] == before + 1


_STEPS = st.tuples(
    st.sampled_from(["hello", "answer", "end", "closed"]),
    st.sampled_from([HELLO, HELLO[:40], HELLO[40:], ANSWER, FINISHED, ALERT, b"", b"\x16\3\1"])
    | st.binary(max_size=60),
    st.integers(1, 3),
    st.sampled_from([0, 0, 40, 5000]),
    st.sampled_from([0, decode.HEAD_END, decode.TRUNCATED, decode.ABANDONED]),
)


@given(st.lists(_STEPS, max_size=40))
def test_any_order(steps: list[tuple[str, bytes, int, int, int]]) -> None:
    all_ = Handshakes(lambda over: over)
    begun = told = 0
    for number, (what, payload, cookie, offset, flags) in enumerate(steps):
        seen = sighting(decode.HELLO, payload, number, cookie=cookie, offset=offset, flags=flags)
        begun += what == "hello" and offset == 0
        told += getattr(all_, what)(seen) is not None
    told += len(list(all_.expire(10**12)))
    assert told <= begun
    assert len(all_) == 0
