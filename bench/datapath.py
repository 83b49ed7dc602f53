"""What a packet costs: BPF_PROG_TEST_RUN of the programs as they are attached, each next to an empty program.

With `repeat` the kernel uses one socket for all runs of a call: after the first run it is an established one.
Without, every call has a fresh socket, a cold path, and the clock's own cost, in both programs alike: so repeated is
compared with repeated, and single-shot with single-shot. The socket of a test run is not connected (protocol 0, state
CLOSE, cgroup 1): connected peers and handshakes are for the live rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from bench import packets, raw
from bench.report import Row, compared, progress
from bench.world import attached, cpus, pinned_to
from exporter.kernel import bpf
from exporter.kernel.probes import Kernel
from lab import Cgroup

_NAME = "a-service.of-some.length.example"
_OTHER = b"\x05\x01\x02\x03" + bytes(508)  # neither TLS nor HTTP, nor perhaps an HTTP/2 frame


def rows(quick: bool) -> Iterator[Row]:
    with Cgroup("bench") as cgroup, attached(cgroup.path) as kernel, pinned_to(cpus()[1]):
        empty = raw.empty_program()
        out = raw.program_of(kernel.pin_path / "link_egress")
        into = raw.program_of(kernel.pin_path / "link_ingress")
        try:
            yield from _Bench(kernel, empty, quick).rows(out, into)
        finally:
            for fd in (empty, out, into):
                os.close(fd)


class _Bench:
    def __init__(self, kernel: Kernel, empty: int, quick: bool) -> None:
        self._kernel, self._empty = kernel, empty
        self._rounds, self._repeat = (11, 5_000) if quick else (41, 20_000)
        self._shots = 300 if quick else 2000

    def rows(self, out: int, into: int) -> Iterator[Row]:
        established = packets.tcp(_OTHER)
        yield self._repeated(
            "established flow, packet out, counted",
            out,
            established,
            2.0,
            "512 B; what a busy node does all day",
        )
        yield self._repeated("established flow, packet in, counted", into, established, 2.0, "512 B")
        yield self._repeated("established flow, ACK only, in", into, packets.tcp(b""), note="no payload")
        yield self._repeated(
            "ACK only, out, before the first data", out, packets.tcp(b""), note="not yet on the fast path"
        )
        yield self._repeated(
            "HTTP/1 connection, packet out, counted",
            out,
            packets.tcp(packets.HTTP, port=80),
            note="between requests; each is looked at, as the next request may begin with it",
        )
        yield self._shot(
            "first packet, new socket and new flow",
            out,
            lambda n: packets.tcp(_OTHER, f"198.18.{n >> 8 & 255}.{n & 255}", 1024 + (n >> 16)),
            note="takes a slot, a row and the socket's storage",
        )
        yield self._shot(
            "first packet, new socket, known flow",
            out,
            lambda n: established,
            note="the socket's storage alone",
        )
        query = packets.udp(packets.dns_query(_NAME))
        yield self._repeated(
            "DNS query, record included",
            out,
            query,
            note="on one socket",
            most=self._kernel.ring_bytes // 800,
        )
        yield self._shot("DNS query, new socket", out, lambda n: query, note="record included")
        hello = packets.tcp(packets.client_hello(_NAME, 1700))
        yield self._shot(
            "ClientHello 1.7 KB, name last, new socket",
            out,
            lambda n: hello,
            25.0,
            "name saved, record written",
        )
        small = packets.tcp(packets.client_hello(_NAME, 1500))
        yield self._shot("ClientHello 1.5 KB, name last, new socket", out, lambda n: small)
        request = packets.tcp(packets.HTTP, port=80)
        yield self._shot("HTTP request, new socket", out, lambda n: request, note="Host saved, record with the head")

    def _repeated(
        self,
        name: str,
        program: int,
        frame: bytes,
        bound: float | None = None,
        note: str = "",
        most: int = 1 << 30,
    ) -> Row:
        ours, theirs = [], []
        repeat = min(self._repeat, most)
        for _ in range(self._rounds):
            theirs.append(float(bpf.test_run(self._empty, frame, repeat)[1]))
            ours.append(float(bpf.test_run(program, frame, repeat)[1]))
            self._kernel.ring.drain()
        progress.step(name)
        self._nothing_lost(name)
        return compared(name, ours, theirs, "ns", "empty, repeated", bound, note)

    def _shot(
        self,
        name: str,
        program: int,
        frame: Callable[[int], bytes],
        bound: float | None = None,
        note: str = "",
    ) -> Row:
        ours, theirs = [], []
        for number in range(self._shots):
            data = frame(number)
            theirs.append(float(bpf.test_run(self._empty, data)[1]))
            ours.append(float(bpf.test_run(program, data)[1]))
            if number % 1000 == 999:
                self._kernel.ring.drain()
                progress.step(f"{name} ({number} of {self._shots})")
        self._kernel.ring.drain()
        self._nothing_lost(name)
        # Neighbours of a single shot are too noisy to be divided one by one; blocks of twenty are not.
        blocks = range(0, self._shots, 20)
        return compared(
            name,
            [sorted(ours[at : at + 20])[10] for at in blocks],
            [sorted(theirs[at : at + 20])[10] for at in blocks],
            "ns",
            "empty, single-shot",
            bound,
            note,
        )

    def _nothing_lost(self, name: str) -> None:
        lost = {cause: n for cause, n in self._kernel.tallies().items() if n and cause[0] != "made"}
        if lost:
            raise RuntimeError(f"{name}: the kernel side lost something, the measurement is void: {lost}")
