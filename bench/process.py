"""What the agent's process uses: CPU at a steady rate of records. Memory: memory.py, with the same load.

Records are written into the agent's own ring by a BPF program, at a steady pace, in the sizes and the mix of
connections to names: DNS query, answer, opened, ClientHello, closed. The counters of their flows move as well. Time
and memory are what the kernel says of the process. What is lost makes the measurement void.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from bench.feed import AgentMaps, Feed
from bench.http2 import exchanges
from bench.packets import Talk, exchange, talks
from bench.raw import Producer
from bench.report import Row, progress, single
from bench.world import REPOSITORY, Agent, cpus, pin_path, pinned_to
from exporter.kernel import bpf
from exporter.kernel.ring import Ring
from lab import Cgroup, LabError

_MAPS = ("records", "names", "flows", "traffic", "connections", "free_slots", "tallies")
_TICK = 0.01


def cpu_rows(quick: bool) -> Iterator[Row]:
    for rate, bound in ((0, None), (1_000, 2.0), (10_000, 15.0)):
        yield _cpu(quick, rate, bound, {}, "", "metrics on, no lines, no OTLP")
    yield _cpu(quick, 10_000, None, {"EBFW_OUTPUT": "json"}, ", JSON lines", "written to /dev/null")
    with receiver() as url:
        # The default of a minute is longer than the measurement.
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_METRIC_EXPORT_INTERVAL": "5000"}
        yield _cpu(quick, 10_000, None, environment, ", OTLP", "over HTTP, metrics every 5 s")


def http_rows(quick: bool) -> Iterator[Row]:
    """Requests with their answers, 10,000 a second, in both versions: with a span for each, with metrics only, and
    under the budget of the default."""
    with receiver() as url:
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        every = {**endpoint, "OTEL_TRACES_SAMPLER": "always_on", "OTEL_BSP_MAX_QUEUE_SIZE": "32768"}
        yield _requests(quick, "1.1", 35.0, every, "a span for each")
        yield _requests(quick, "1.1", 20.0, endpoint, "the default budget of spans")
        yield _requests(quick, "1.1", None, {}, "metrics only")
        yield _requests(quick, "2", None, every, "a span for each")
        yield _requests(quick, "2", None, {}, "metrics only")


# HTTP/2 needs fewer connections for as much, and of more than 1,024 the agent keeps no state.
_HTTP: dict[str, tuple[int, Callable[[Talk], tuple[list[bytes], list[bytes]]]]] = {
    "1.1": (2000, lambda talk: ([], exchange(talk))),
    "2": (500, exchanges),
}


def _requests(quick: bool, version: str, bound: float | None, environment: dict[str, str], note: str) -> Row:
    def counted(loaded: Loaded) -> None:
        _nothing_lost(loaded)
        want = {"requests": loaded.put()}
        if environment.get("OTEL_TRACES_SAMPLER") == "always_on":
            want["spans"] = loaded.put()
        deadline = time.monotonic() + 15  # the last spans wait for company for five seconds
        while True:
            told = sum(loaded.agent.samples("http_client_request_duration_seconds_count").values())
            found = {"requests": int(told), "spans": _exported(loaded.agent).get("traces", 0)}
            if want.items() <= found.items():
                return
            if time.monotonic() > deadline:
                raise LabError(f"{found} were told of {want}")
            time.sleep(0.5)

    name = f"agent CPU at 10,000 HTTP/{version} requests/s, {note}"
    windows = 3 if quick else 15
    flows, records = _HTTP[version]
    # At 15 MB of records a second the default of 2 MiB is 0.14 s: too little for a machine with other work.
    environment = {"EBFW_RING_BYTES": "8MiB", **environment}
    samples = _windows(name, windows, 20_000, 4, 8000, lambda: Loaded(flows, environment, records=records), counted)
    note = f"{flows:,} flows, {windows * 4} s, a ring of 8 MiB; all told, nothing lost"
    return single(name, samples, "% of a core", bound, note)


def _nothing_lost(loaded: Loaded) -> None:
    time.sleep(3)
    # What is over the budget of spans is counted with what is lost, and was not to be sent.
    found = {labels: count for labels, count in loaded.agent.lost().items() if '"budget"' not in labels}
    if found:
        raise LabError(f"lost: {found}")


def _exported(agent: Agent) -> dict[str, int]:
    """What it has sent, by signal."""
    found = agent.samples("ebfw_export_items_total")
    return {labels.partition('ebfw_signal="')[2].partition('"')[0]: int(count) for labels, count in found.items()}


def _cpu(quick: bool, rate: int, bound: float | None, environment: dict[str, str], title: str, note: str) -> Row:
    flows, windows = 2000, 2 if quick else 5
    name = f"agent CPU at {rate:,} records/s{title}" if rate else "agent CPU, idle"
    sent: dict[str, int] = {}

    def check(loaded: Loaded) -> None:
        _nothing_lost(loaded)
        sent.update(_exported(loaded.agent))

    # Every flow twice before: a busy node knows its peers.
    samples = _windows(name, windows, rate, 2, flows * 10, lambda: Loaded(flows, environment), check)
    if sent:
        note += f"; sent: {', '.join(f'{count:,} of {signal}' for signal, count in sorted(sent.items()))}"
    return single(name, samples, "% of a core", bound, f"{flows:,} flows; {note}")


def _windows(
    name: str,
    windows: int,
    rate: int,
    settle: float,
    before: int,
    load: Callable[[], Loaded],
    check: Callable[[Loaded], None],
) -> list[float]:
    """The agent's CPU in percent over windows of 4 s at `rate` records a second, after `before` records at once and
    `settle` seconds at the rate. Tried three times where the ring was full or `check` raises LabError."""
    for attempt in range(3):
        with load() as loaded:
            samples = []
            loaded.feed(before)
            loaded.pace(rate, settle)
            for number in range(windows):
                used, began = loaded.agent.cpu_seconds(), time.monotonic()
                loaded.pace(rate, 4)
                samples.append((loaded.agent.cpu_seconds() - used) / (time.monotonic() - began) * 100)
                progress.step(f"{name}: {number + 1} of {windows} windows")
            try:
                loaded.check()
                check(loaded)
                break
            except LabError as error:
                if attempt == 2:
                    raise
                progress.say(f"{name}: once more, {error}")
    return samples


class Loaded:
    """An agent on a cgroup of its own with flows that exist, and records for them at any pace."""

    def __init__(
        self,
        flows: int,
        environment: dict[str, str],
        workloads: int = 10,
        records: Callable[[Talk], tuple[list[bytes], list[bytes]]] = lambda talk: ([], talk.records()),
    ) -> None:
        """`records`: of a talk, those that come once, before all others, and those that come again and again."""
        self._count, self._environment, self._workloads = flows, environment, workloads
        self._records, self._each = records, 1
        self._guard = contextlib.ExitStack()
        self._moved = 0
        self._once = 0  # talks of what comes once

    def __enter__(self) -> Loaded:
        with contextlib.ExitStack() as stack:
            cgroup = stack.enter_context(Cgroup("bench"))
            children = [cgroup.child(f"bench-{number}.service") for number in range(self._workloads)]
            pins = stack.enter_context(pin_path())
            self.agent = stack.enter_context(Agent(cgroup, pins, cpus()[1], self._environment))
            stack.enter_context(pinned_to(cpus()[0]))
            fds = stack.enter_context(AgentMaps(str(pins), _MAPS))
            *flows, waking = talks(self._count + 1, [child.id for child in children])
            # Only to see how far behind the agent is: nothing is drained here.
            self._ring = Ring(fds["records"], bpf.map_info(fds["records"]).entries)
            stack.callback(self._ring.close)
            self._feed = Feed(fds)
            stack.callback(self._feed.close)
            self._feed.names(flows)
            self._feed.flows(flows)
            once, again = zip(*map(self._records, flows), strict=True)
            # A talk of its own: between two records of another its own would be out of order.
            waking_once, waking_again = self._records(waking)
            self._each = len(waking_again)
            self._producer = stack.enter_context(Producer(fds["records"], [r for talk in again for r in talk]))
            self._waker = stack.enter_context(Producer(fds["records"], waking_again, wake=True))
            if waking_once:
                first = [record for talk in (*once, waking_once) for record in talk]
                with Producer(fds["records"], first) as producer:
                    producer.put(len(first))
                self._once = len(flows) + 1
            self._guard = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.close()

    def pace(self, rate: int, seconds: float) -> None:
        """`rate` records a second, a few every 10 ms."""
        began = time.monotonic()
        put = 0
        while (now := time.monotonic() - began) < seconds:
            due = int(now * rate) // self._each * self._each - put  # whole talks
            self._put(due)
            put += due
            time.sleep(_TICK)

    def feed(self, total: int) -> None:
        """That many records as fast as the agent takes them in: never more than half a ring ahead of it."""
        for _ in range(total // 1000):
            while self._ring.fill() > 0.4:
                _ = self.agent.pid  # it lives
                time.sleep(_TICK)
            self._put(1000)

    def _put(self, records: int) -> None:
        self._producer.put(records)
        if self._ring.fill() > 0.5:  # as the programs do (bpf/records.h)
            self._waker.put(self._each)
        self._feed.move(self._moved, records // self._each)
        self._moved += records // self._each

    def put(self) -> int:
        """Whole talks so far, lost ones included."""
        return self._once + sum(producer.state()[0] // self._each for producer in (self._producer, self._waker))

    def check(self) -> None:
        """Raises LabError if the ring was full at times: then less was done than was asked for."""
        tried, lost = self._producer.state()
        if lost:
            raise LabError(f"the ring was full {lost} times of {tried}; the machine is too busy to measure")
        _ = self.agent.pid


@contextlib.contextmanager
def receiver() -> Iterator[str]:
    """The tests' OTLP receiver, in a process of its own so that its work is nobody's; its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.process"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def _receive() -> None:
    """Until standard input ends. What arrives is forgotten at once."""
    import importlib.util
    import threading

    path = REPOSITORY / "tests" / "pipeline" / "otlp_receiver.py"
    spec = importlib.util.spec_from_file_location("otlp_receiver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["otlp_receiver"] = module
    spec.loader.exec_module(module)
    with module.Receiver() as receiver:
        print(receiver.http, flush=True)
        over = threading.Event()

        def listen() -> None:
            sys.stdin.read()
            over.set()

        threading.Thread(target=listen, daemon=True).start()
        while not over.wait(0.5):
            receiver.requests.clear()


if __name__ == "__main__":
    _receive()
