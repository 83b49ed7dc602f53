"""The far side of the lab: one process of servers in `world`, on fixed ports, that logs all it sees.

In: a lab and, if wanted, more names for its DNS. Out: running servers, and per server a file of JSON lines
with which tests check what the agent said. All are dual-stack. Each line has `time` (seconds), `event` and
`peer` [address, port]; TCP lines also `id`, the connection's number:

    accepted  local                    once per connection (https: once the handshake is done, with `sni`)
    closed    rx, tx                   bytes of payload the server got and sent, on the end of a connection
    request   method, target, host, status, headers, rx   (http, https, proxy)
    query     name, type, transport, rcode ("" for silence), answers                    (dns)
    datagram  bytes, local                                         (udp_echo, udp_sink)

Not its job: the serving itself (`serving`, the child process), and to be fast: for measuring there is
clients/loadgen.c, which is also a server.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import net
from lab.cgroup import LabError
from lab.dns import Entry

if TYPE_CHECKING:
    from types import TracebackType

PORTS = {
    "http": 80,
    "https": 443,
    "dns": 53,  # UDP and TCP, on the resolver's and all server addresses
    "udp_echo": 7,
    "udp_sink": 8125,
    "tcp_echo": 7,
    "tcp_sink": 9,
    "reset": 666,  # accepts, then RST
    "proxy": 3128,  # CONNECT and absolute-form requests
}

_BOTH = (net.SERVERS4[0], net.SERVERS6[0])

# What everybody may ask for. Anything else under any name is NXDOMAIN.
NAMES: dict[str, Entry] = {
    "web.lab.example": Entry(_BOTH),
    "v4.lab.example": Entry(_BOTH[:1]),
    "v6.lab.example": Entry(_BOTH[1:]),
    "www.lab.example": Entry(cname="web.lab.example"),
    "many.lab.example": Entry(tuple(f"198.51.100.{n}" for n in range(1, 61))),  # over 512 bytes: TC, then TCP
    "short.lab.example": Entry(_BOTH, ttl=1),
    "slow.lab.example": Entry(_BOTH, delay=0.25),
    "servfail.lab.example": Entry(rcode="SERVFAIL"),
    "silent.lab.example": Entry(silent=True),
    "virtual.lab.example": Entry((net.VIRTUAL4, net.VIRTUAL6)),
    "blackhole.lab.example": Entry((net.BLACKHOLE4,)),
    "reject.lab.example": Entry((net.REJECT4,)),
    "noroute.lab.example": Entry((net.NO_ROUTE4,)),
}

_REPO = Path(__file__).resolve().parent.parent


class Servers:
    """Starts every server in `lab.world`, waits until all listen, stops them on exit. A context manager.

    `names` adds to, or replaces in, what the DNS knows. `ca` is the certificate to trust: it is valid for
    every name and server address. `start_timeout` is generous for emulated CPUs.
    """

    def __init__(self, lab: net.Lab, names: Mapping[str, Entry] | None = None, *, start_timeout: float = 60.0) -> None:
        self.directory = lab.directory / "servers"
        self.ca = self.directory / "cert.pem"
        self._lab = lab
        self._names = {**NAMES, **(names or {})}
        self._timeout = start_timeout
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Servers:
        self.directory.mkdir(exist_ok=True)
        make_certificate(self.directory, self._names)
        config = self.directory / "config.json"
        config.write_text(json.dumps({"ipv6": self._lab.ipv6, "names": self._names}))
        # The child ends when its standard input does: it cannot outlive us, however we end.
        self._process = self._lab.world.popen(
            (sys.executable, "-m", "lab.serving", str(self.directory)),
            cwd=_REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.directory / "stderr").open("w"),
            text=True,
        )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], self._timeout)
        if readable and process.stdout.readline() == "ready\n":
            return
        why = (self.directory / "stderr").read_text().strip() or f"not ready after {self._timeout:.0f} s"
        raise LabError(f"the lab's servers did not start: {why.splitlines()[-1]}")

    def stop(self) -> None:
        """Ends the servers; their logs stay until the lab goes."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def log(self, name: str, event: str = "") -> list[dict[str, Any]]:
        """What the server `name` (a key of PORTS) wrote so far, oldest first; only `event` if given."""
        lines = (self.directory / f"{name}.jsonl").read_text().splitlines(keepends=True)
        # The last line may be half written.
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if not event or row["event"] == event]

    def wait(self, name: str, event: str, count: int, timeout: float = 10.0) -> list[dict[str, Any]]:
        """As `log`, once it has `count` lines: a client can be done before the server has noticed. Raises
        LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            rows = self.log(name, event)
            if len(rows) >= count:
                return rows
            if time.monotonic() > deadline:
                raise LabError(f"{name}: {len(rows)} x {event} in its log after {timeout} s, not {count}")
            time.sleep(0.02)


def make_certificate(directory: Path, names: Mapping[str, Entry]) -> None:
    """A self-signed P-256 certificate for all names and server addresses, two days long."""
    alternatives = [f"DNS:{name}" for name in sorted(names)]
    addresses = (*net.SERVERS4, *net.SERVERS6, net.VIRTUAL4, net.VIRTUAL6, "127.0.0.1", "::1")
    alternatives += [f"IP:{address}" for address in addresses]
    # fmt: off
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-days", "2", "-subj", "/CN=ebfw lab", "-addext", "subjectAltName=" + ",".join(alternatives),
            "-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    # fmt: on
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"openssl cannot make a certificate: {done.stderr.strip()}")
