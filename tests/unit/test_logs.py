"""Which events are records, and what a record says (D13).

Excluded: what the receiver gets (test_otlp.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from exporter.emit import registry
from exporter.emit.logs import INFO, WARN, Notable, Note, record
from exporter.emit.trace_context import context
from exporter.events import Event
from tests.unit.samples import EVENT, EXCHANGE, FOUND, HELLO, LOOKUP, PARENT, REQUEST, WEB, outcome


def test_d13_notable_is_first_seen_and_failures() -> None:
    now = [0.0]
    notable = Notable(clock=lambda: now[0])
    assert notable.of(EVENT) is not None
    assert notable.of(EVENT) is None
    assert notable.of(EVENT._replace(workload=WEB._replace(cgroup_id=77, container_id="d" * 64))) is None
    assert notable.of(EVENT._replace(port=444)) is not None
    assert notable.of(EVENT._replace(kind="close")) is None
    assert notable.of(EVENT._replace(status="cancelled")) is None
    assert notable.of(EVENT._replace(domain="new", filtered=True)) is None
    assert notable.of(EVENT._replace(domain="new", role="server")) is None
    assert notable.of(LOOKUP._replace(status="NOERROR")) is None
    for _ in range(23):
        notes = [notable.of(EVENT._replace(status="refused"))]
    assert notes == [None]
    now[0] = 59
    assert notable.due() == []
    now[0] = 61
    (repeated,) = notable.due()
    assert repeated.repeats == 22
    assert record(repeated).body == "curl to example.com:443: connection_refused, 22 more times within 60 s"
    assert notable.due() == []
    assert notable.of(EVENT._replace(status="refused")) is not None
    assert notable.due(everything=True) == []


def test_d13_memory_of_destinations_and_failures_is_bounded() -> None:
    notable = Notable()
    for n in range(100_000):
        notable.of(EVENT._replace(domain=f"h{n}", status="refused"))
        if n % 1000 == 0:
            notable.due()
    notable.due()
    assert len(notable._young) + len(notable._old) <= 32_768
    assert len(notable._windows) <= 4096


def test_a_request_is_a_record_without_headers() -> None:
    note = Notable("all").of(
        EVENT._replace(
            kind="https",
            method="BREW",
            path="/a/b?key=REDACTED",
            headers=(("authorization", "canary"),),
            proxy="p:3128",
        )
    )
    assert note is not None
    made = record(note)
    found = dict(made.attributes)
    assert made.name == "ebfw.egress.http.request"
    assert (found["http.request.method"], found["http.request.method_original"]) == ("_OTHER", "BREW")
    assert (found["url.path"], found["url.query"], found["url.scheme"]) == ("/a/b", "key=REDACTED", "https")
    assert found["ebfw.proxy.address"] == "p:3128"
    assert "canary" not in repr(made)
    assert made.body == "curl sent BREW https://example.com/a/b"


@pytest.mark.parametrize(
    ("event", "severity"),
    [
        (EVENT, INFO),
        (EVENT._replace(status="refused"), WARN),
        (EVENT._replace(status="denied"), WARN),
        (EVENT._replace(status="cancelled"), INFO),
        (LOOKUP, INFO),
        (LOOKUP._replace(status="SERVFAIL"), WARN),
        (LOOKUP._replace(status="timeout"), WARN),
        (LOOKUP._replace(search_expansion=True), INFO),
        (outcome(status=200), INFO),
        (outcome(status=404), INFO),
        (outcome(status=500), WARN),
        (outcome(status=0, error="timeout"), WARN),
        (outcome(grpc_status=5), INFO),
        (outcome(grpc_status=14), WARN),
    ],
)
def test_d13_severity_is_by_impact_and_what_warns_is_notable(event: Event, severity: int) -> None:
    assert record(Note(event)).severity == severity
    notable = Notable()
    notable.of(EVENT)
    assert (notable.of(event) is not None) == (severity == WARN or (event is LOOKUP))


def test_d13_repeats_within_a_minute_are_one_record_with_a_count() -> None:
    now = [0.0]
    notable = Notable(clock=lambda: now[0])
    notes = [notable.of(outcome(status=503), context(PARENT)) for _ in range(100)]
    notes += [notable.of(outcome(status=502)) for _ in range(3)]  # another failure
    assert [note is not None for note in notes].count(True) == 2
    now[0] = 60.5
    first, second = notable.due()
    assert (first.repeats, second.repeats) == (99, 2)
    assert first.context == context(PARENT)
    assert dict(record(first).attributes)["ebfw.repeats"] == 99


def test_d13_all_adds_the_rest() -> None:
    notable = Notable("all")
    events = [EVENT, EVENT, LOOKUP, FOUND, HELLO, REQUEST, outcome(status=404), EVENT._replace(kind="close")]
    assert all(notable.of(event) for event in events)
    assert notable.of(EVENT._replace(filtered=True)) is None


def test_records_have_the_attributes_that_the_table_says() -> None:
    """Both ways, as for spans."""
    assert HELLO.tls is not None
    more: dict[str, Any] = {"method": "BREW", "proxy": "p:1"}
    events: dict[str, list[Event]] = {
        "ebfw.egress.connection": [EVENT, EVENT._replace(kind="close", rtt=1), EVENT._replace(status="refused")],
        "ebfw.egress.dns": [LOOKUP, FOUND, LOOKUP._replace(search_expansion=True)],
        "ebfw.egress.tls": [
            HELLO._replace(tls=HELLO.tls._replace(alert="x", quic="1", resumed=True), proxy="p:1"),
        ],
        "ebfw.egress.http.request": [
            outcome(status=500, partial="lost")._replace(**more),
            outcome(grpc_status=12)._replace(**more, path="/a.B/C"),
        ],
        "ebfw.egress.destination.new": [EVENT._replace(kind="new", status="", duration=None)],
    }  # fmt: skip
    for event_type in registry.EVENTS:
        got: set[str] = set()
        for event in [one._replace(group="g", credentials=True, redirected=True) for one in events[event_type.name]]:
            # a new destination is told once
            for note in (Note(event, first_seen=True), Note(event, repeats=2))[: 1 if event.kind == "new" else 2]:
                made = record(note)
                assert made.name == event_type.name
                got |= {key for key, _ in made.attributes}
        said = set(event_type.attributes)
        assert got == said, event_type.name


def test_a_record_has_the_kernels_time_and_the_outcome() -> None:
    made = record(Note(REQUEST._replace(exchange=EXCHANGE._replace(status=201))))
    assert made.time_ns == REQUEST.time
    found = dict(made.attributes)
    assert (found["http.response.status_code"], found["network.protocol.version"]) == (201, "1.1")
    assert (found["ebfw.http.duration"], found["ebfw.http.first_byte"]) == (0.009, 0.004)
    assert made.body == "curl sent GET https://example.com/v1/items/42: 201"
