"""Lines on standard output: the first version's form, escaped, counted; and an output that stalls or closes harms
nobody."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import threading
import time
from collections.abc import Iterator
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.emit.console import BATCH, Console, JsonFormat, TextFormat, _duration, _size
from exporter.events import CLOSE, CONNECT, DNS, HTTP, HTTPS, TLS, Event, Tls, Workload
from exporter.health import losses

NODE = "node-1"
POD = Workload(
    7, "/kubepods.slice/x", "pod", "web", pod_uid="u-1", container_id="c0ffee", runtime="containerd",
    qos="burstable", pod_name="web-1", namespace="shop", container_name="app",
)  # fmt: skip
UNIT = Workload(8, "/system.slice/a.service", "unit", "a.service", unit="a.service")
WHEN = 1_700_000_000_120_000_000


SHOWN = Tls(
    "1.3", "1.3", ("h2", "a b"), "X25519MLKEM768", True, True, "t13d1516h2_8daaf6152771_e5627efa2ab1", False
)  # fmt: skip


def event(kind: str, **change: object) -> Event:
    base = Event(
        kind, WHEN, UNIT, 42, "curl", "tcp", "client", "10.0.0.5", 4444, "93.184.216.34", 443,
        "internet", "example.com", "dns", "",
    )  # fmt: skip
    return base._replace(**change)  # type: ignore[arg-type]


def line(given_event: Event) -> str:
    return TextFormat().line(given_event)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            event(CONNECT, status="ok", duration=1_234_567),
            "CONNECT  10.0.0.5 -> 93.184.216.34:443  unit=a.service status=ok took=1.23ms proc=curl[42] "
            "name=example.com via=dns",
        ),
        (
            event(CONNECT, dst="2001:db8::1", domain="2001:db8::1", name_source="address", workload=POD, pid=0),
            "CONNECT  10.0.0.5 -> [2001:db8::1]:443  pod=shop/web-1 container=app via=address",
        ),
        (
            event(CONNECT, workload=POD._replace(pod_name="", namespace="", container_name=""), status="refused"),
            "CONNECT  10.0.0.5 -> 93.184.216.34:443  pod=uid:u-1 status=refused proc=curl[42] name=example.com via=dns",
        ),
        (
            event(CLOSE, tx_bytes=1000, rx_bytes=222_222, retransmits=1, rtt=333_000, duration=123_456_789),
            "CLOSE    10.0.0.5 -> 93.184.216.34:443  unit=a.service took=123ms tx=1000B rx=217.0KiB "
            "retransmits=1 rtt=333us proc=curl[42] name=example.com via=dns",
        ),
        (
            event(DNS, dns_type="A", status="NXDOMAIN", name_source="", transport="udp"),
            "DNS      10.0.0.5 ? example.com (A)  unit=a.service status=NXDOMAIN proc=curl[42]",
        ),
        (
            event(DNS, dns_type="A", answers=("a", "b", "c", "d", "e", "f"), pid=0),
            "DNS      10.0.0.5 ? example.com (A)  unit=a.service answers=a,b,c,d,+2",
        ),
        (
            event(TLS, name_source="sni"),
            "TLS      10.0.0.5 -> example.com  (93.184.216.34:443)  unit=a.service proc=curl[42] via=sni",
        ),
        (
            event(TLS, name_source="sni", status="ok", duration=4_500_000, tls=SHOWN),
            "TLS      10.0.0.5 -> example.com  (93.184.216.34:443)  unit=a.service status=ok took=4.5ms version=1.3 "
            "alpn=h2,a\\x20b proc=curl[42] via=sni",
        ),
        (
            event(TLS, transport="udp", pid=0, tls=Tls(offered="1.3", alpn=("h3",), quic="2")),
            "TLS      10.0.0.5 -> example.com  (93.184.216.34:443)  unit=a.service quic=2 offered=1.3 alpn=h3 via=dns",
        ),
        (
            event(HTTP, method="GET", path="/a?b=REDACTED", name_source="host", headers=(("A", "b c"),)),
            "HTTP     10.0.0.5 -> GET example.com/a?b=REDACTED  unit=a.service proc=curl[42] via=host\n"
            "           A: b c",
        ),
        (
            event(HTTP, method="GET", path="/a", domain="", dst="::1", port=80, proxy="192.0.2.9:3128"),
            "HTTP     10.0.0.5 -> GET [::1]:80/a  unit=a.service proc=curl[42] via=dns proxy=192.0.2.9:3128",
        ),
        (
            event(HTTPS, method="POST", path="/a", src="", workload=UNIT._replace(kind="host")),
            "HTTPS    [pid=42 curl] POST example.com/a  via=dns",
        ),
        (
            event(CONNECT, role="server", transport="udp", domain="", name_source=""),
            "CONNECT  10.0.0.5 -> 93.184.216.34:443  unit=a.service dir=ingress proto=udp proc=curl[42]",
        ),
    ],
)
def test_text(made: Event, text: str) -> None:
    assert line(made) == text + "\n"


def test_text_cannot_be_forged() -> None:
    hostile = "x pod=a/b\n\x1b[2J\u202e\udcff\x9b"
    made = event(
        HTTPS, comm=hostile, domain=hostile, path="/" + hostile, method=hostile,
        headers=((hostile, hostile),),
        workload=POD._replace(pod_name=hostile, namespace=hostile, container_name=hostile),
    )  # fmt: skip
    text = line(made)
    assert text.count("\n") == 2
    assert all(char.isprintable() for char in text.replace("\n", ""))
    assert text.count(" pod=") == 1 + 1  # the header's value may hold blanks; it has a line of its own
    text.encode("utf-8")


def test_terminal_has_time_alignment_and_colour() -> None:
    text = TextFormat(colour=False, terminal=True).line(event(TLS))
    stamp = time.strftime("%H:%M:%S", time.localtime(WHEN // 10**9))
    assert text.startswith(f"{stamp}.120 TLS      10.0.0.5 -> example.com")
    assert "\x1b" not in text
    assert text.index("unit=") == len(f"{stamp}.120 TLS      ") + 64 + 2
    red = TextFormat(colour=True, terminal=True).line(event(CONNECT, status="timed_out"))
    assert "\x1b[31mCONNECT" in red
    assert "\x1b[31m" not in TextFormat(colour=True).line(event(CONNECT, status="cancelled"))


def test_json_has_the_seeds_fields_and_ours() -> None:
    made = event(
        CLOSE, workload=POD, status="ok", duration=1_500_000, tx_bytes=1, rx_bytes=2, retransmits=3,
        rtt=250_000, dns_type="A", answers=("192.0.2.1",), method="GET", path="/a", headers=(("A", "b"),),
        proxy="192.0.2.9:1",
    )  # fmt: skip
    text = JsonFormat(NODE).line(made)
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "ts": "2023-11-14T22:13:20.12Z",
        "kind": "close",
        "src": "10.0.0.5",
        "dst": "93.184.216.34",
        "port": 443,
        "domain": "example.com",
        "dns_type": "A",
        "method": "GET",
        "path": "/a",
        "headers": [{"name": "A", "value": "b"}],
        "pid": 42,
        "comm": "curl",
        "pod": {
            "namespace": "shop",
            "name": "web-1",
            "uid": "u-1",
            "container": "app",
            "qos": "burstable",
            "node": NODE,
        },
        "workload": {
            "kind": "pod",
            "name": "web",
            "cgroup": "/kubepods.slice/x",
            "container_id": "c0ffee",
            "runtime": "containerd",
        },
        "transport": "tcp",
        "src_port": 4444,
        "scope": "internet",
        "name_source": "dns",
        "status": "ok",
        "duration_ms": 1.5,
        "direction": "egress",
        "tx_bytes": 1,
        "rx_bytes": 2,
        "retransmits": 3,
        "rtt_ms": 0.25,
        "answers": ["192.0.2.1"],
        "proxy": "192.0.2.9:1",
    }


def test_json_of_a_handshake() -> None:
    assert json.loads(JsonFormat().line(event(TLS, tls=SHOWN)))["tls"] == {
        "version": "1.3",
        "offered": "1.3",
        "group": "X25519MLKEM768",
        "ja4": "t13d1516h2_8daaf6152771_e5627efa2ab1",
        "alpn": ["h2", "a b"],
        "post_quantum": True,
        "ech": True,
        "resumed": False,
    }
    failed = Tls(offered="1.2", alert="handshake_failure", quic="1")
    assert json.loads(JsonFormat().line(event(TLS, tls=failed)))["tls"] == {
        "offered": "1.2",
        "alert": "handshake_failure",
        "quic": "1",
    }


def test_json_leaves_out_what_is_empty() -> None:
    bare = Event(CONNECT, 10**18, Workload(0, "", "unknown", ""), 0, "", "", "unknown", "", 0, "", 0, "", "", "", "")
    assert json.loads(JsonFormat().line(bare)) == {
        "ts": "2001-09-09T01:46:40Z",
        "kind": "connect",
        "workload": {"kind": "unknown"},
    }
    assert json.loads(JsonFormat().line(bare._replace(duration=0, rtt=0)))["duration_ms"] == 0


def test_json_follows_a_workload_that_changes() -> None:
    format_ = JsonFormat(NODE)
    assert json.loads(format_.line(event(TLS, workload=POD)))["pod"]["name"] == "web-1"
    assert json.loads(format_.line(event(TLS, workload=POD._replace(pod_name="web-2"))))["pod"]["name"] == "web-2"
    assert "pod" not in json.loads(format_.line(event(TLS)))
    for number in range(10_000):
        format_.line(event(TLS, workload=UNIT._replace(cgroup_id=number)))
    assert len(format_._workloads) <= 4096


@given(st.text(), st.text())
def test_json_is_one_line_that_strict_parsers_read(name: str, value: str) -> None:
    text = JsonFormat(NODE).line(event(HTTP, path=name, comm=value, headers=((name, value),)))
    assert text.count("\n") == 1
    assert text.isascii()
    assert all(char >= " " for char in text[:-1])
    assert json.loads(text).get("path", "") == name
    surrogate = json.loads(JsonFormat(NODE).line(event(HTTP, path=name + "\udcff")))
    assert surrogate["path"] == name + "\ufffd"
    TextFormat().line(event(HTTP, path=name, comm=value)).encode()


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0us"), (850_000, "850us"), (12_345_678, "12.3ms"), (999_999_999, "1s"), (4_560_000_000, "4.56s")],
)
def test_duration(nanoseconds: int, text: str) -> None:
    assert _duration(nanoseconds) == text


def test_long_durations_and_sizes() -> None:
    assert _duration(61 * 60 * 10**9) == "61.0min"
    assert _duration(599 * 10**9) == "599s"
    assert [_size(n) for n in (0, 1023, 1024, 5 << 20, 1 << 50)] == [
        "0B",
        "1023B",
        "1.0KiB",
        "5.0MiB",
        "1024.0TiB",
    ]


# --- the writer ---------------------------------------------------------------------------------------------


def lost(cause: str) -> int:
    return losses.snapshot().get(("queue", cause), 0)


@pytest.fixture
def pipe() -> Iterator[tuple[int, IO[str]]]:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    yield reader, stream
    for close in (lambda: os.close(reader), stream.close):
        with contextlib.suppress(OSError):
            close()


def drain(reader: int, into: list[bytes]) -> threading.Thread:
    def read() -> None:
        while data := os.read(reader, 65536):
            into.append(data)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_23_in_23_out(pipe: tuple[int, IO[str]]) -> None:
    reader, stream = pipe
    console = Console(stream, "json", node=NODE)
    for number in range(23):
        console.write(event(TLS, src_port=number + 1))
        console.write(event(TLS, filtered=True))
    console.close()
    read = os.read(reader, 1 << 20).decode().splitlines()
    assert [json.loads(text)["src_port"] for text in read] == list(range(1, 24))


def test_a_stream_without_a_descriptor() -> None:
    stream = io.StringIO()
    console = Console(stream, "text")
    console.write(event(TLS))
    console.close()
    assert stream.getvalue() == line(event(TLS))


def test_none_writes_nothing_and_starts_nothing() -> None:
    stream = io.StringIO()
    console = Console(stream, "none")
    console.write(event(TLS))
    console.close()
    assert (stream.getvalue(), console._thread) == ("", None)


def test_a_pipe_that_nobody_reads_costs_lines_not_time(pipe: tuple[int, IO[str]]) -> None:
    reader, stream = pipe
    before = lost("console_full")
    console = Console(stream, "json", queue=1000)
    worst = 0.0
    for number in range(20_000):
        began = time.perf_counter()
        console.write(event(TLS, src_port=number % 60_000 + 1))
        worst = max(worst, time.perf_counter() - began)
    assert worst < 0.5
    began = time.perf_counter()
    console.close(timeout=0.3)
    assert time.perf_counter() - began < 2
    dropped = lost("console_full") - before
    # Every line is in the pipe or counted as lost; those of the one write that stuck half-way may be both.
    os.set_blocking(reader, False)
    held = os.read(reader, 1 << 20).count(b"\n")
    assert 20_000 <= dropped + held <= 20_000 + BATCH
    assert dropped > 15_000


def test_a_full_pipe_that_is_non_blocking_loses_nothing(pipe: tuple[int, IO[str]]) -> None:
    reader, stream = pipe
    os.set_blocking(stream.fileno(), False)
    console = Console(stream, "json")
    for number in range(500):
        console.write(event(TLS, src_port=number + 1))
    time.sleep(0.2)
    parts: list[bytes] = []
    thread = drain(reader, parts)
    console.close(timeout=10)
    stream.close()
    thread.join(10)
    ports = [json.loads(text)["src_port"] for text in b"".join(parts).splitlines()]
    assert ports == list(range(1, 501))


def test_a_closed_pipe_is_counted(pipe: tuple[int, IO[str]]) -> None:
    reader, stream = pipe
    os.close(reader)
    before = lost("console_closed")
    console = Console(stream, "text")
    console.write(event(TLS))
    deadline = time.monotonic() + 5
    while not console._broken and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(22):
        console.write(event(TLS))
    console.close()
    assert lost("console_closed") - before == 23


def test_one_bad_event_does_not_end_the_rest() -> None:
    stream = io.StringIO()
    console = Console(stream, "json")
    console.write(event(TLS, time="not a time"))
    console.write(event(TLS))
    console.close()
    assert stream.getvalue() == JsonFormat().line(event(TLS))
    assert losses.snapshot()[("export", "console_format")] >= 1


def test_on_a_terminal() -> None:
    leader, follower = pty.openpty()
    try:
        with os.fdopen(follower, "w") as stream:
            for colour, escapes in ((None, True), (False, False)):
                console = Console(stream, "text", colour=colour)
                console.write(event(TLS))
                console.close()
                text = os.read(leader, 65536).decode()
                assert (text.count("\x1b[") > 0) is escapes
                assert "unit=a.service" in text
    finally:
        os.close(leader)
