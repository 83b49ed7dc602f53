"""Requests without an answer, as the gauge of active requests has them."""

from __future__ import annotations

from collections import Counter

from exporter import decode
from exporter.decode import Sighting
from exporter.events import Workload
from exporter.join import Join

HEAD = b"GET /a HTTP/1.1\r\nHost: api.example.com\r\n\r\n"


def sighting(cookie: int, cgroup: int, payload: bytes = HEAD, role: str = "client") -> Sighting:
    return Sighting(
        decode.HEAD, 1_000, cgroup, cookie, 0, 42, "curl", "tcp", role, "internet", "192.0.2.9", 40000, "192.0.2.1", 80,
        "", decode.HEAD_END, 0, 0, 0, 0, 0, 0, 1, payload,
    )  # fmt: skip


def test_open_requests_are_counted_by_workload_method_and_scheme() -> None:
    workloads = {n: Workload(n, f"/{n}", "unit", f"{n}.service") for n in range(3)}
    join = Join(
        workloads.__getitem__,
        lambda identity: "",
        lambda who, peer, now: "",
        lambda who, name, answers, now: None,
        lambda name: False,
        lambda monotonic: monotonic,
        lambda cookie: None,
    )
    for cookie in range(23):
        assert join.add(sighting(cookie + 1, cookie % 2)) is None
    join.add(sighting(100, 2, b"POST" + HEAD[3:]))
    join.add(sighting(101, 2, role="server"))
    assert Counter(join.open_requests()) == {
        (workloads[0], "GET", "http", 12): 1,
        (workloads[1], "GET", "http", 11): 1,
        (workloads[2], "POST", "http", 1): 1,
    }
    list(join.expire(10**15))
    assert list(join.open_requests()) == []
