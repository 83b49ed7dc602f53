"""What the pipeline sustains on one core: from the ring to aggregated, attributed events, nothing lost.

A real ring is filled from the kernel's side, then drained by the agent's own `Pipeline.drain`, by turns with bcc's
ring callback that does nothing, in a process of its own, on as many records of the same sizes. Rates are records a
second of CPU time, all threads of the process included, on one CPU: what others do on the machine stays out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from bench.feed import Feed
from bench.packets import TALK, Talk, talks
from bench.raw import Producer
from bench.report import Row, compared, progress
from bench.world import REPOSITORY, RING, attached, cpus, pinned_to
from exporter.agent import Pipeline
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.enrich import find_root
from exporter.health import losses
from exporter.kernel.probes import Kernel
from exporter.settings import Settings
from lab import Cgroup

_WORKLOADS, _TALKS = 10, 2000
_SETS = {
    "DNS, connect, TLS and close": range(TALK),
    "connect and close": (2, TALK - 1),
    "DNS query and answer": (0, 1),
}
_BATCH = 4_900  # whole talks, and no more than the ring holds


def rows(quick: bool) -> Iterator[Row]:
    rounds = 4 if quick else 16
    with Cgroup("bench") as cgroup:
        children = [cgroup.child(f"bench-{number}.service") for number in range(_WORKLOADS)]
        flows = talks(_TALKS, [child.id for child in children])
        with attached(cgroup.path) as kernel, pinned_to(cpus()[1]):
            Feed(kernel.maps).names(flows)
            for title, kinds in _SETS.items():
                yield _measure(kernel, flows, title, kinds, "none", rounds, 1 / 8)
            yield _measure(kernel, flows, "all of it, JSON to /dev/null", range(TALK), "json", rounds, None)


def _measure(
    kernel: Kernel,
    flows: list[Talk],
    title: str,
    kinds: Sequence[int],
    output: str,
    rounds: int,
    bound: float | None,
) -> Row:
    templates = [record for flow in flows for at, record in enumerate(flow.records()) if at in kinds]
    # The console's queue holds 8,192 lines and is emptied by a thread.
    batch = _BATCH
    ours, theirs = [], []
    before = losses.snapshot()
    with (
        _pipeline(kernel, output) as pipeline,
        Producer(kernel.maps["records"], templates) as producer,
        _Idle(templates) as idle,
    ):
        warm = -(-len(templates) // batch)  # the first rounds meet every name and address for the first time
        for number in range(warm + rounds):
            theirs.append(idle.rate(batch))
            producer.put(batch)
            began = time.process_time()
            got = pipeline.drain()
            while pipeline.console._queue or pipeline.console._writing:
                time.sleep(0.001)
            ours.append(got / (time.process_time() - began))
            if got != batch or producer.state()[1]:
                raise RuntimeError(f"{title}: {got} of {batch} records arrived")
            progress.step(f"{title}, round {number + 1} of {warm + rounds}")
    lost = {cause: n - before.get(cause, 0) for cause, n in losses.snapshot().items() if n != before.get(cause, 0)}
    if lost:
        raise RuntimeError(f"{title}: lost {lost}")
    size = sum(map(len, templates)) // len(templates)
    row = compared(
        f"pipeline: {title}",
        ours[warm:],
        theirs[warm:],
        "rec/s",
        "bcc's no-op callback",
        bound,
        f"{size} B a record, {_TALKS:,} flows, {_WORKLOADS} workloads; one core",
    )
    return row._replace(at_least=True)


@contextlib.contextmanager
def _pipeline(kernel: Kernel, output: str) -> Iterator[Pipeline]:
    settings = Settings(cgroup=kernel.cgroup, output=output, uprobes=False, exclude_suffixes=())
    resources = Resources("bench", settings.node_name, "0", {})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pipeline = Pipeline(settings, find_root(), kernel, resources, Metrics(resources))
        try:
            yield pipeline
        finally:
            pipeline.close()


class _Idle:
    """bcc's ring with a callback that does nothing, in a child: `rate(n)` fills it and times ring_buffer_consume."""

    def __init__(self, templates: list[bytes]) -> None:
        # One of each is enough: the callback does not look. Equal sizes in equal shares.
        self._sizes = [len(template) for template in templates[:50]]

    def __enter__(self) -> _Idle:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.pipeline", json.dumps(self._sizes)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def rate(self, count: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("bcc's side of the comparison ended; is python3-bpfcc installed?")
        return float(answer)


def _idle_child(sizes: list[int]) -> None:
    from exporter.kernel import build

    os.environ["BCC_KERNEL_SOURCE"] = str(build.source_folder() / "include")
    from bcc import BPF

    module = BPF(text=f"BPF_RINGBUF_OUTPUT(records, {RING // 4096});")
    seen = [0]

    def nothing(_context: object, _data: object, _size: object) -> None:
        seen[0] += 1

    module["records"].open_ring_buffer(nothing)
    with Producer(module["records"].map_fd, [bytes(size) for size in sizes]) as producer:
        for line in sys.stdin:
            count, seen[0] = int(line), 0
            producer.put(count)
            began = time.process_time()
            module.ring_buffer_consume()
            took = time.process_time() - began
            if seen[0] != count:
                sys.exit(f"bcc: {seen[0]} of {count} records arrived")
            print(count / took, flush=True)
    os._exit(0)


if __name__ == "__main__":
    _idle_child(json.loads(sys.argv[1]))
