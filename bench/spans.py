"""What a span costs: an HTTP request as OTLP bytes, against what the SDK's own encoder takes for the same span.

Two rows: encoding alone, and the whole way from the ring's records to bytes: decode, join, redact, metrics, budget
aside (every span is kept), encode. CPU time of one thread; batches of the size that is sent at a time.
"""

from __future__ import annotations

import ipaddress
import random
import time
from collections.abc import Callable, Iterator

from bench import packets
from bench.report import Row, compared
from bench.world import cpus, pinned_to
from exporter.decode import decode
from exporter.emit.metrics import Metrics
from exporter.emit.otlp_records import Records
from exporter.emit.redact import Options, redact
from exporter.emit.resource import Resources
from exporter.emit.sampling import Request
from exporter.emit.spans import request
from exporter.events import Event, Workload
from exporter.join import Join
from exporter.kernel import wire

_BATCH = 512
_ASKED, _ANSWERED = 1_000_000, 9_000_000  # ns
_PEERS = 100  # names, addresses and workloads as on a busy node
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5123\r\n\r\n"


def rows(quick: bool) -> Iterator[Row]:
    world = _World()
    events = world.events(0)
    if len(events) != _BATCH or any(event.exchange is None or event.exchange.status != 200 for event in events):
        raise RuntimeError(f"{len(events)} of {_BATCH} requests with their answers came out of the join")
    from_sdk = _sdk(events, world.resources)
    ours, whole, theirs = [], [], []
    with pinned_to(cpus()[1]):
        for number in range(6 if quick else 25):
            theirs.append(_timed(from_sdk))
            ours.append(_timed(lambda: world.encode(events)))
            records = world.records(number + 1)
            whole.append(_timed(lambda records=records: world.encode(world.through(records))))  # type: ignore[misc]
    note = f"{len(request(events[0]).attributes)} attributes, {_PEERS} peers"  # type: ignore[union-attr]
    reference = "the SDK's encoder"
    # The first rounds meet every name for the first time.
    yield compared("HTTP span: encoding", ours[2:], theirs[2:], "ns", reference, 0.25, note)
    yield compared("HTTP span: ring records to bytes", whole[2:], theirs[2:], "ns", reference, 0.5, note)


def _timed(work: Callable[[], object]) -> float:
    began = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - began) / _BATCH


class _World:
    """The stages between ring and bytes, as the agent puts them together."""

    def __init__(self) -> None:
        workloads = {
            number: Workload(
                number, f"/kubepods/{number}", "pod", "", f"uid-{number}", f"{number:064x}", "containerd", "burstable",
                pod_name=f"web-{number}", namespace="shop", container_name="nginx",
            )
            for number in range(1, 11)
        }  # fmt: skip
        offset = time.time_ns() - time.monotonic_ns()
        self.resources = Resources("bench", "bench", "0")
        self.metrics = Metrics(self.resources)
        self.join = Join(
            lambda cgroup: workloads[cgroup],
            lambda name: "",
            lambda who, address, now: "",
            lambda who, name, answers, now: None,
            lambda name: False,
            lambda monotonic: monotonic + offset,
            lambda cookie: None,
        )
        self.options = Options()
        self.encoder = Records(self.resources.of, "0")

    def records(self, round_: int) -> list[bytes]:
        """A request's head and its response's, one connection each time."""
        found = []
        for number in range(_BATCH):
            cookie = round_ * _BATCH + number + 1
            head = (
                f"GET /v1/items/{cookie}?page=2 HTTP/1.1\r\nHost: svc{cookie % _PEERS}.bench.example\r\n"
                "User-Agent: bench/1\r\nAccept: */*\r\n\r\n"
            ).encode()
            found.append(_record(wire.RECORD_HEAD, cookie, head, wire.RECORD_HEAD_END, _ASKED))
            found.append(_record(wire.RECORD_RESPONSE, cookie, _RESPONSE, 0, _ANSWERED, len(_RESPONSE) + 5123))
        return found

    def events(self, round_: int) -> list[Event]:
        return self.through(self.records(round_))

    def through(self, records: list[bytes]) -> list[Event]:
        add, options, observe = self.join.add, self.options, self.metrics.observe
        sightings = [sighting for data in records if (sighting := decode(data)) is not None]
        events = [event for sighting in sightings if (event := add(sighting)) is not None]
        events += self.join.expire(_ANSWERED)
        for event in events:
            observe(event)
        return [redact(event, options) for event in events]

    def encode(self, events: list[Event]) -> int:
        return sum(len(payload.message) for payload in self.encoder.spans([Request(event) for event in events]))


def _record(kind: int, cookie: int, payload: bytes, flags: int, at: int, received: int = 0) -> bytes:
    number = cookie % _PEERS
    return wire.RECORD.pack(
        at,
        1 + number % 10,
        cookie,
        0,
        bytes(10) + b"\xff\xff" + ipaddress.IPv4Address(packets.CLIENT).packed,
        bytes(10) + b"\xff\xff" + (ipaddress.IPv4Address("198.18.0.0") + number).packed,
        b"curl".ljust(16, b"\0"),
        1000 + number % 50,
        32768 + cookie % 28000,
        80,
        kind,
        6,
        1,  # client
        0,
        0,
        flags,
        len(payload),
        0,
        0,
        received,
        0,
        0,
        0,
        1,
    ) + payload.ljust(256, b"\0")


def _sdk(events: list[Event], resources: Resources) -> Callable[[], object]:
    """The SDK's encoder over the same spans, made before: what it gets are finished ReadableSpans."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
    from opentelemetry.trace.status import Status

    scope = InstrumentationScope("ebfw", "0")
    theirs = {
        event.workload.cgroup_id: Resource(dict(resources.of(event.workload).attributes)) for event in events
    }  # fmt: skip
    spans = []
    for event in events:
        made = request(event)
        assert made is not None
        place = SpanContext(random.getrandbits(128), random.getrandbits(64), False, TraceFlags(1))
        spans.append(
            ReadableSpan(
                made.name, place, resource=theirs[event.workload.cgroup_id], attributes=dict(made.attributes),
                kind=SpanKind.CLIENT, start_time=made.start_ns, end_time=made.end_ns, instrumentation_scope=scope,
                status=Status(),
            )
        )  # fmt: skip
    return lambda: encode_spans(spans).SerializePartialToString()
