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
from typing import TYPE_CHECKING, Generic, TypeVar

from exporter import health
from exporter.emit import otlp_settings
from exporter.emit import semconv as c
from exporter.emit.logs import Notable, Note
from exporter.emit.metrics import Metrics
from exporter.emit.otlp_settings import Batch, Endpoint
from exporter.emit.resource import Resources
from exporter.emit.spans import failed, is_span
from exporter.events import OK, SERVER, Event

if TYPE_CHECKING:
    from exporter.emit.otlp_encode import Encoder, Payload
    from exporter.emit.otlp_transport import Sender

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_TICK = 1.0  # seconds after which a worker looks even if nobody woke it
_CANDIDATES = 4096


class Otlp:
    """All three signals. `environ` holds the OTEL_* variables (settings.otel).

    `spans_per_second` is the node's budget while no sampler is set; 0 makes no spans. `logs` is notable or
    all; with an `inventory` new destinations are its events.
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
        self._spans: _Queue[Event] | None = None
        self._logs: _Queue[Note] | None = None
        if settings.traces and settings.sampled != 0 and (spans_per_second or settings.sampled is not None):
            self._spans = _Queue(settings.spans, self._losses)
        if settings.logs:
            self._logs = _Queue(settings.records, self._losses)
        self._budget = None if settings.sampled is not None else Budget(spans_per_second, self._losses)
        self._workers: list[_Worker] = []

    @property
    def active(self) -> bool:
        """Whether anything is exported at all."""
        return bool(self.settings.endpoints)

    def start(self) -> None:
        """Import what the chosen protocols need, and start a thread for each signal that has an endpoint."""
        if not self.active:
            return
        from exporter.emit import otlp_encode

        def encoder() -> Encoder:
            limits = (self.settings.value_length, self.settings.attribute_count)
            return otlp_encode.Encoder(self._resources.of, self._version, *limits)

        if self.settings.traces and self._spans is not None:
            make, queue = encoder(), self._spans
            self._add(self.settings.traces, _Batches(queue, make.spans, self._poll_spans))
        if self.settings.logs and self._logs is not None:
            make, notes = encoder(), self._logs
            self._add(self.settings.logs, _Batches(notes, make.logs, self._poll_logs))
        if self.settings.metrics:
            self._add(self.settings.metrics, _Pushes(self._metrics, encoder(), self.settings))
        for worker in self._workers:
            worker.start()

    def emit(self, event: Event) -> None:
        """Take one event, redacted. Never waits; about 1 us for an event that needs no record."""
        if event.filtered or event.role == SERVER:
            return
        if self._logs is not None:
            with self._lock:
                note = self._notable.of(event)
            if note is not None:
                self._logs.put(note)
        if self._spans is not None and is_span(event):
            if self._budget is not None:
                for chosen in self._budget.offer(event):
                    self._spans.put(chosen)
            elif random.random() < (self.settings.sampled or 0):
                self._spans.put(event)

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

    def _add(self, endpoint: Endpoint, work: _Batches[Event] | _Batches[Note] | _Pushes) -> None:
        from exporter.emit import otlp_transport

        sender = otlp_transport.connect(endpoint)
        self._workers.append(_Worker(endpoint, sender, work, self._metrics, self._losses))

    def _poll_spans(self, last: bool) -> None:
        if self._spans is not None and self._budget is not None:
            for chosen in self._budget.take(everything=last):
                self._spans.put(chosen)

    def _poll_logs(self, last: bool) -> None:
        if self._logs is not None:
            with self._lock:
                notes = self._notable.due(everything=last)
            for note in notes:
                self._logs.put(note)


class Budget:
    """At most `rate` spans a second, failures first, then shared fairly between workloads; the rest is
    counted.

    Candidates wait until their second is over: only then is it known who else wants a share.
    """

    def __init__(self, rate: int, losses: health.Losses, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._losses, self._clock = rate, losses, clock
        self._lock = threading.Lock()
        self._second = int(clock())
        self._count = self._dropped = 0
        # cgroup id -> candidates; each workload may bring as many as the whole budget, twice
        self._failures: dict[int, list[Event]] = {}
        self._others: dict[int, list[Event]] = {}

    def offer(self, event: Event) -> list[Event]:
        """Take a candidate; returns what was chosen of the second before, if that has just ended."""
        with self._lock:
            chosen = self._rotate() if int(self._clock()) != self._second else []
            group = self._failures if event.status != OK and failed(event) else self._others
            waiting = group.get(event.workload.cgroup_id)
            if waiting is None:
                waiting = group[event.workload.cgroup_id] = []
            if len(waiting) < self._rate and self._count < _CANDIDATES:
                waiting.append(event)
                self._count += 1
            else:
                self._dropped += 1
            return chosen

    def take(self, everything: bool = False) -> list[Event]:
        """What was chosen of a second that is over; `everything` ends the running one too."""
        with self._lock:
            return self._rotate() if everything or int(self._clock()) != self._second else []

    def _rotate(self) -> list[Event]:
        chosen: list[Event] = []
        for waiting in (self._failures, self._others):
            chosen += _fair(list(waiting.values()), self._rate - len(chosen))
        if dropped := self._dropped + self._count - len(chosen):
            self._losses.add("export", "budget", dropped)
        self._failures, self._others, self._count, self._dropped = {}, {}, 0, 0
        self._second = int(self._clock())
        return chosen


def _fair(shares: list[list[Event]], room: int) -> list[Event]:
    """Up to `room` items, one from each list in turn."""
    chosen: list[Event] = []
    turn = 0
    while shares and room > 0:
        shares = [share for share in shares if len(share) > turn]
        taken = [share[turn] for share in shares[:room]]
        chosen += taken
        room -= len(taken)
        turn += 1
    return chosen


class _Queue(Generic[_Item]):
    """Bounded; many may put, one takes. `wake` is set when a batch is full."""

    def __init__(self, batch: Batch, losses: health.Losses) -> None:
        self.batch, self._losses = batch, losses
        self._items: deque[_Item] = deque()
        self.wake = threading.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: _Item) -> None:
        if len(self._items) >= self.batch.queue:
            self._losses.add("export", "queue_full")
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
    ) -> None:
        self._queue, self._encode, self._poll = queue, encode, poll
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
            yield from self._encode(items)

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
        work: _Batches[Event] | _Batches[Note] | _Pushes,
        metrics: Metrics,
        losses: health.Losses,
    ) -> None:
        self._endpoint, self._sender, self._work = endpoint, sender, work
        self._metrics, self._losses = metrics, losses
        self._stop = threading.Event()
        self._aborted = False
        self._told = False
        self._thread = threading.Thread(target=self._run, name=f"otlp-{endpoint.signal}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._work.wake.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def abort(self) -> None:
        """Give up what is being sent and what waits."""
        self._aborted = True
        self._sender.close()

    def finish(self) -> None:
        """The end of `abort`, once all have been told: one receiver's silence is not waited for three times."""
        self._thread.join(1.0)
        # The thread has counted what it still found, unless the receiver holds it.
        if self._thread.is_alive() and (left := self._work.waiting()):
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
                # A batch that cannot be encoded must cost that batch, not every one after it.
                self._losses.add("export", "encode" + self._work.lossy)
                _log.exception("OTLP %s: a batch could not be encoded", self._endpoint.signal)
                time.sleep(_TICK)
            self._metrics.gauge(c.QUEUE.name, self._work.waiting(), signal=self._endpoint.signal)

    def _send(self, payload: Payload) -> None:
        if self._aborted or not (result := self._sender.send(payload.message)).taken:
            cause = "shutdown" if self._aborted else "failed"
            self._losses.add("export", cause + self._work.lossy, payload.items)
            if not self._told and self._endpoint.mix_up:
                self._told = True
                _log.warning("%s", self._endpoint.mix_up)
            return
        payload.sent()
        taken = max(0, payload.items - result.rejected)
        self._metrics.count(c.EXPORTED.name, taken, signal=self._endpoint.signal)
        if result.rejected:
            self._losses.add("export", "rejected" + self._work.lossy, result.rejected)
            _log.warning("OTLP %s: the receiver rejected items: %s", self._endpoint.signal, result.why)
