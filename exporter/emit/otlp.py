"""The push face: spans, log records and metrics to an OTLP receiver, without ever stalling who observes.

Comes in: events (`emit`, from the pipeline's thread) and Metrics. Goes out: OTLP, one Resource for each
workload. Not its job: the variables (otlp_settings.py), messages (otlp_encode.py), the wire
(otlp_transport.py), redaction (before it).

Nothing is exported, and nothing of OpenTelemetry imported, until an endpoint is set (D10). Each signal has
its own thread, bounded queue and connection. `emit` only appends: when a queue is full the newest is dropped
and counted. Encoding happens in the worker. What is lost, in health.losses under stage `export`: queue_full,
budget (spans above EBFW_SPANS_PER_SECOND), failed (no receiver took it), rejected (the receiver refused
part), encode (a bug), shutdown.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from exporter import health
from exporter.emit import otlp_settings
from exporter.emit import semconv as c
from exporter.emit.instrumented import Instrumented
from exporter.emit.logs import Notable, Note
from exporter.emit.metrics import Metrics
from exporter.emit.otlp_settings import Batch, Endpoint
from exporter.emit.resource import Resources
from exporter.emit.sampling import Budget, Request
from exporter.emit.setup import Setup, Setups
from exporter.emit.spans import grave
from exporter.emit.trace_context import Context, context
from exporter.events import HTTP, HTTPS, SERVER, Event

if TYPE_CHECKING:
    from exporter.emit.otlp_encode import Encoder
    from exporter.emit.otlp_records import Payload
    from exporter.emit.otlp_transport import Sender

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_TICK: Final = 1.0  # seconds after which a worker looks even if nobody woke it


class Otlp:
    """All three signals. `environ` holds the OTEL_* variables (settings.otel).

    `spans_per_second` is the node's budget while no sampler is set; 0 makes no spans. `logs` is notable or all;
    with an `inventory` new destinations are its events.
    `setups` tells how connections came about; `instrumented` who tells its own requests; `template` is a request's
    url.template; `headers` are the request headers that may be told.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        resources: Resources,
        metrics: Metrics,
        *,
        version: str = "",
        spans_per_second: int = 100,
        logs: str = "notable",
        inventory: bool = False,
        losses: health.Losses | None = None,
        setups: Setups | None = None,
        instrumented: Instrumented | None = None,
        template: Callable[[Event], str] | None = None,
        headers: frozenset[str] = frozenset(),
    ) -> None:
        self.settings = settings = otlp_settings.load(environ)
        self._resources, self._metrics, self._version = resources, metrics, version
        pushed = settings.metrics is not None
        metrics.configure(
            exponential=pushed and settings.exponential,
            exemplars=settings.exemplars,
            delta=pushed and settings.delta,
            lowmemory=settings.lowmemory,
        )
        self._losses = losses or health.losses
        self._lock = threading.Lock()
        self._notable = Notable(logs, inventory=inventory)
        self._setups = Setups() if setups is None else setups
        self._instrumented = Instrumented() if instrumented is None else instrumented
        self._template, self._headers = template, headers
        self._spans: _Queue[Request | Setup] | None = None
        self._logs: _Queue[Note] | None = None
        self._sampler = sampler = settings.sampler
        if settings.traces and not sampler.never and (spans_per_second or sampler.ratio is not None):
            self._spans = _Queue(settings.spans, self._losses)
        if settings.logs:
            self._logs = _Queue(settings.records, self._losses)
        self._budget = None if sampler.ratio is not None else Budget(spans_per_second, self._losses)
        self._workers: list[_Worker] = []

    @property
    def active(self) -> bool:
        """Whether anything is exported at all."""
        return bool(self.settings.endpoints)

    def start(self) -> None:
        """Import what the chosen protocols need, and start a thread for each signal that has an endpoint."""
        if not self.active:
            return
        from exporter.emit import otlp_encode, otlp_records

        settings, resource_of = self.settings, self._resources.of
        if settings.traces and self._spans is not None:
            exemplify = None if settings.exemplars == "always_off" else self._metrics.exemplify
            spans = otlp_records.Records(
                resource_of, self._version, settings.span_limits, self._template, self._headers, exemplify
            )
            self._add(settings.traces, _Batches(self._spans, spans.spans, self._poll_spans, self._losses))
        if settings.logs and self._logs is not None:
            records = otlp_records.Records(resource_of, self._version, settings.record_limits)
            self._add(settings.logs, _Batches(self._logs, records.logs, self._poll_logs, self._losses))
        if settings.metrics:
            limits = settings.span_limits
            encoder = otlp_encode.Encoder(self._version, limits.value_length, limits.attributes)
            self._add(settings.metrics, _Pushes(self._metrics, encoder, settings))
        for worker in self._workers:
            worker.start()

    def wants(self, event: Event) -> bool:
        """Whether `emit` makes anything of this event, asked before redaction: under the budget most requests of a busy
        node become nothing, and the answer costs less than hiding their secrets would. Those that the budget refuses
        are counted here. Nothing of the event is kept."""
        exchange = event.exchange
        if exchange is None or exchange.traceparent or event.cookie in self._setups or "@" in event.domain:
            return True
        if grave(event) or (self._logs is not None and not self._notable.plain(event)):
            return True
        if self._spans is None or event.role == SERVER or self._instrumented.traces(event.workload):
            return False
        return self._budget is None or not self._budget.refuses(event.workload.cgroup_id)

    def emit(self, event: Event) -> None:
        """Take one event, redacted. Never waits; about 1 us for an event that needs no record."""
        if event.filtered or event.role == SERVER:
            return
        place = None
        if self._spans is not None:
            place = self._request(event) if event.kind in (HTTP, HTTPS) else self._step(event)
        if self._logs is not None:
            if place is None and event.exchange is not None and event.exchange.traceparent:
                place = context(event.exchange.traceparent)
            with self._lock:
                note = self._notable.of(event, place)
            if note is not None:
                self._logs.put(note)

    def _request(self, event: Event) -> Context | None:
        """Make a request a candidate. Returns where in a trace its log record belongs, if it is to have one."""
        setup = None
        if event.cookie in self._setups:
            with self._lock:
                for told in self._setups.add(event):
                    self._offer(told)
                setup = self._setups.of(event.cookie)
        exchange = event.exchange
        if exchange is None or self._instrumented.traces(event.workload):
            return None
        parent = context(exchange.traceparent) if exchange.traceparent else None
        if not self._sampler.keep(parent):
            return parent
        place = None
        if grave(event):
            # Its log record names it: the ids are given here.
            flags, trace_id = (parent.flags, parent.trace_id) if parent else (1, random.randbytes(16))
            place = Context(trace_id, random.randbytes(8), flags)
        self._put(Request(event, setup, place), event, place is not None)
        return place or parent

    def _step(self, event: Event) -> Context | None:
        """Take a lookup or handshake into its connection's set-up. Returns where in a trace its record belongs."""
        with self._lock:
            told = self._setups.add(event)
        place = None
        for setup in told:
            self._offer(setup)
            if setup.failed and any(step is event for step in setup.events):
                place = Context(setup.trace_id, setup.span_id, 1)
        return place

    def _offer(self, setup: Setup) -> None:
        if self._sampler.keep(None) and not self._instrumented.collector(setup.main.workload):
            self._put(setup, setup.main, setup.failed)

    def _put(self, item: Request | Setup, event: Event, grave: bool) -> None:
        if self._spans is None:
            return
        if self._budget is not None:
            for chosen in self._budget.offer(item, event.workload.cgroup_id, grave):
                self._spans.put(chosen, chosen.weight)
        else:
            if isinstance(item, Setup):
                item.kept = True
            self._spans.put(item, item.weight)

    def shutdown(self, timeout: float = 5.0) -> None:
        """Send what waits, for at most `timeout` seconds; what is left then is counted."""
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            worker.abort()
        for worker in self._workers:
            worker.finish()
        self._workers = []

    def _add(self, endpoint: Endpoint, work: _Work) -> None:
        from exporter.emit import otlp_transport

        sender = otlp_transport.connect(endpoint)
        self._workers.append(_Worker(endpoint, sender, work, self._metrics, self._losses))

    def _poll_spans(self, last: bool) -> None:
        with self._lock:
            told = self._setups.expire(time.time_ns() + (1 << 62 if last else 0))
        for setup in told:
            self._offer(setup)
        if self._spans is not None and self._budget is not None:
            for chosen in self._budget.take(everything=last):
                self._spans.put(chosen, chosen.weight)

    def _poll_logs(self, last: bool) -> None:
        if self._logs is not None:
            with self._lock:
                notes = self._notable.due(everything=last)
            for note in notes:
                self._logs.put(note)


class _Queue(Generic[_Item]):
    """Bounded; many may put, one takes. `wake` is set when a batch is full."""

    def __init__(self, batch: Batch, losses: health.Losses) -> None:
        self.batch, self._losses = batch, losses
        self._items: deque[_Item] = deque()
        self.wake = threading.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: _Item, weight: int = 1) -> None:
        if len(self._items) >= self.batch.queue:
            self._losses.add("export", "queue_full", weight)
            return
        self._items.append(item)
        # Not for every item: waking a thread costs more than all the rest of this.
        if len(self._items) == self.batch.size:
            self.wake.set()

    def take(self) -> list[_Item]:
        return [self._items.popleft() for _ in range(min(len(self._items), self.batch.size))]


class _Batches(Generic[_Item]):
    """Work of a worker: a queue, sent in batches when one is full or the oldest has waited long enough."""

    def __init__(
        self,
        queue: _Queue[_Item],
        encode: Callable[[Iterable[_Item]], Iterator[Payload]],
        poll: Callable[[bool], None],
        losses: health.Losses,
    ) -> None:
        self._queue, self._encode, self._poll, self._losses = queue, encode, poll, losses
        self._since = time.monotonic()
        self.wake = queue.wake
        self.lossy = ""

    def payloads(self, last: bool) -> Iterator[Payload]:
        self._poll(last)
        now = time.monotonic()
        if not len(self._queue):
            self._since = now
        while len(self._queue) >= self._queue.batch.size or (
            len(self._queue) and (last or now - self._since >= self._queue.batch.delay)
        ):
            items = self._queue.take()
            self._since = now
            out = 0
            try:
                for payload in self._encode(items):
                    out += payload.items
                    yield payload
            except Exception:
                # A batch that cannot be encoded must cost that batch, not every one after it.
                self._losses.add("export", "encode", max(1, len(items) - out))
                _log.exception("OTLP: a batch could not be encoded")

    def seconds(self) -> float:
        return min(_TICK, self._queue.batch.delay)

    def waiting(self) -> int:
        return len(self._queue)


class _Pushes:
    """Work of the metrics worker: a snapshot every interval."""

    # A cumulative total that did not arrive is not lost, the next one has it; hence causes of its own.
    lossy = "_points"

    def __init__(self, metrics: Metrics, encoder: Encoder, settings: otlp_settings.Settings) -> None:
        self._metrics, self._encoder = metrics, encoder
        self._interval, self._delta, self._lowmemory = settings.interval, settings.delta, settings.lowmemory
        self._next = time.monotonic() + self._interval
        self._last_ns = 0
        self.wake = threading.Event()
        metrics.take_gone()  # from now on expired series are kept for us

    def payloads(self, last: bool) -> Iterator[Payload]:
        now = time.monotonic()
        if not last and now < self._next:
            return
        self._next = max(self._next + self._interval, now)
        snapshot = self._metrics.snapshot()
        gone = self._metrics.take_gone()
        yield from self._encoder.metrics(snapshot, gone, self._last_ns if self._delta else None, self._lowmemory)
        self._last_ns = snapshot.time_ns

    def seconds(self) -> float:
        return max(0.0, self._next - time.monotonic())

    def waiting(self) -> int:
        return 0


class _Worker:
    """A thread that sends one signal's payloads. It survives whatever they or the receiver do."""

    def __init__(
        self,
        endpoint: Endpoint,
        sender: Sender,
        work: _Work,
        metrics: Metrics,
        losses: health.Losses,
    ) -> None:
        self._endpoint, self._sender, self._work = endpoint, sender, work
        self._metrics, self._losses = metrics, losses
        self._stop = threading.Event()
        self._aborted = False
        self._told = False
        self._runner = threading.Thread(target=self._run, name=f"otlp-{endpoint.signal}", daemon=True)

    def start(self) -> None:
        self._runner.start()

    def stop(self) -> None:
        self._stop.set()
        self._work.wake.set()

    def join(self, timeout: float) -> None:
        self._runner.join(timeout)

    def abort(self) -> None:
        """Give up what is being sent and what waits."""
        self._aborted = True
        self._sender.close()

    def finish(self) -> None:
        """The end of `abort`, once all have been told: one receiver's silence is not waited for three times."""
        self._runner.join(1.0)
        # The thread has counted what it still found, unless the receiver holds it.
        if self._runner.is_alive() and (left := self._work.waiting()):
            self._losses.add("export", "shutdown", left)

    def _run(self) -> None:
        last = False
        while not last:
            self._work.wake.wait(self._work.seconds())
            self._work.wake.clear()
            last = self._stop.is_set()
            try:
                for payload in self._work.payloads(last):
                    self._send(payload)
            except Exception:
                # What cannot be encoded must cost one push, not every one after it.
                self._losses.add("export", "encode" + self._work.lossy)
                _log.exception("OTLP %s: a batch could not be encoded", self._endpoint.signal)
                time.sleep(_TICK)
            self._metrics.gauge(c.QUEUE.name, self._work.waiting(), signal=self._endpoint.signal)

    def _send(self, payload: Payload) -> None:
        signal = self._endpoint.signal
        began = time.monotonic()
        result = None if self._aborted else self._sender.send(payload.message)
        if result is not None:
            outcome = "success" if result.taken else "failure"
            self._metrics.count(c.EXPORT_REQUESTS.name, 1, signal=signal, outcome=outcome)
            self._metrics.count(c.EXPORT_TIME.name, time.monotonic() - began, signal=signal, outcome=outcome)
        if result is None or self._aborted or not result.taken:
            cause = "shutdown" if self._aborted else "failed"
            self._losses.add("export", cause + self._work.lossy, payload.items)
            sentence = self._endpoint.mixed_up() if result is not None and result.mixed_up else self._endpoint.mix_up
            if sentence and not self._told:
                self._told = True
                _log.warning("%s", sentence)
            return
        payload.sent()
        taken = max(0, payload.items - result.rejected)
        self._metrics.count(c.EXPORTED.name, taken, signal=signal)
        if result.rejected:
            self._losses.add("export", "rejected" + self._work.lossy, result.rejected)
            _log.warning("OTLP %s: the receiver rejected items: %s", signal, result.why)


_Work = _Batches[Request | Setup] | _Batches[Note] | _Pushes
