"""The near side of the demo: a shop, its billing and its cron job, each in a cgroup of its own, politely
busy.

In: `python -m lab.workload ROLE --ca FILE --log FILE`, inside a cgroup and the lab's `pods` namespace. Out:
real traffic, a round every `--period` seconds until SIGTERM or `--rounds`, and a JSON line per step: role,
step, ok, expected (whether that is how it should end), note. `NAMES` is what the lab's DNS has to know for
it. Not its job: exact counts; the tests bring workloads of their own.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from lab import net
from lab.dns import Entry
from lab.servers import PORTS

NAMES: dict[str, Entry] = {
    "catalog.shop.example": Entry((net.SERVERS4[0], net.SERVERS6[0])),
    "img.cdn.example": Entry((net.SERVERS6[1],)),
    "pay.bank.example": Entry(cname="edge.bank.example"),
    "edge.bank.example": Entry((net.SERVERS4[2],)),
    "ledger.bank.example": Entry((net.VIRTUAL4,)),  # nobody has the address: `demo` makes a DNAT rule for it
    "old.bank.example": Entry((net.SERVERS4[3],)),
    "branch.bank.example": Entry((net.NO_ROUTE4,)),
    "metrics.ops.example": Entry((net.SERVERS4[4],)),
    "proxy.ops.example": Entry((net.SERVERS4[5],)),
    "backup.ops.example": Entry((net.BLACKHOLE4,)),
    "archive.ops.example": Entry(silent=True),
}
LEDGER = (net.VIRTUAL4, 80, net.SERVERS4[6], PORTS["http"])  # arguments of Lab.dnat

_TIMEOUT = 5.0


class Settings(NamedTuple):
    """What every step may need. `ca`: the certificate to trust."""

    ca: str
    ipv6: bool


class Step(NamedTuple):
    """`action` raises OSError when it fails; `fails`: that is what it is there for. Done in every `every`-th
    round."""

    name: str
    action: Callable[[Settings], None]
    fails: bool = False
    every: int = 1
    ipv6: bool = False


def _curl(*arguments: str) -> None:
    """Raises OSError with curl's own sentence. Where there is no curl, Python takes its place."""
    *_, url = arguments
    if shutil.which("curl") is None:
        _plain_get(url)
        return
    argv = [
        "curl",
        "--silent",
        "--show-error",
        "--max-time",
        str(_TIMEOUT),
        "--output",
        os.devnull,
        *arguments,
    ]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"curl: exit status {done.returncode}")


def _plain_get(url: str) -> None:
    host, _, path = url.removeprefix("http://").partition("/")
    if ":" in host or url.startswith("https://"):
        raise OSError("curl is not installed")
    with closing(http.client.HTTPConnection(host, timeout=_TIMEOUT)) as connection:
        connection.request("GET", "/" + path)
        connection.getresponse().read()


def _browse(settings: Settings) -> None:
    _curl(f"http://catalog.shop.example/items?page={random.randint(1, 9)}")


def _image(settings: Settings) -> None:
    _curl("--ipv6", f"http://img.cdn.example/bytes/{random.choice((20_000, 60_000, 200_000))}")


def _pay(settings: Settings) -> None:
    _curl("--cacert", settings.ca, "--data", "amount=23", "https://pay.bank.example/v1/charge")


def _settle(settings: Settings) -> None:
    """Two requests on one connection, from Python's own TLS."""
    context = ssl.create_default_context(cafile=settings.ca)
    host = "edge.bank.example"
    with closing(http.client.HTTPSConnection(host, timeout=_TIMEOUT, context=context)) as bank:
        for path in ("/v1/balance", "/v1/settlements?day=today"):
            bank.request("GET", path)
            bank.getresponse().read()


def _ledger(settings: Settings) -> None:
    _curl("http://ledger.bank.example/entries")


def _misspelt(settings: Settings) -> None:
    socket.getaddrinfo("ledgr.bank.example", 80)


def _old_bank(settings: Settings) -> None:
    socket.create_connection(("old.bank.example", 8443), timeout=_TIMEOUT).close()


def _branch(settings: Settings) -> None:
    socket.create_connection(("branch.bank.example", 443), timeout=_TIMEOUT).close()


def _metrics(settings: Settings) -> None:
    address = socket.gethostbyname("metrics.ops.example")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for line in (b"jobs.done:1|c", b"jobs.seconds:2.3|ms"):
            sender.sendto(line, (address, PORTS["udp_sink"]))


def _backup(settings: Settings) -> None:
    socket.create_connection(("backup.ops.example", 873), timeout=_TIMEOUT).close()


def _archive(settings: Settings) -> None:
    socket.getaddrinfo("archive.ops.example", 443)


def _through_proxy(settings: Settings) -> None:
    proxy = f"http://proxy.ops.example:{PORTS['proxy']}"
    _curl("--cacert", settings.ca, "--proxy", proxy, "https://pay.bank.example/v1/report")


ROLES: Mapping[str, tuple[Step, ...]] = {
    "shop": (
        Step("HTTP", _browse),
        Step("HTTP over IPv6", _image, ipv6=True),
        Step("HTTPS (curl)", _pay),
    ),
    "billing": (
        Step("HTTPS (Python)", _settle),
        Step("HTTP through DNAT", _ledger),
        Step("name that does not exist", _misspelt, fails=True, every=2),
        Step("connection refused", _old_bank, fails=True),
        Step("host unreachable", _branch, fails=True, every=3),
    ),
    "cron": (
        Step("UDP", _metrics),
        Step("HTTPS through a proxy", _through_proxy, every=2),
        Step("connection timed out", _backup, fails=True, every=2),
        Step("DNS that never answers", _archive, fails=True, every=3),
    ),
}


def run(role: str, settings: Settings, log: Path, *, period: float, rounds: int | None) -> None:
    """Steps through a role's rounds; `log` gets a JSON line per step."""
    with log.open("a", buffering=1) as out:
        for number in itertools.count() if rounds is None else range(rounds):
            due = [s for s in ROLES[role] if number % s.every == 0 and (settings.ipv6 or not s.ipv6)]
            began = time.monotonic()
            for step in due:
                note = ""
                try:
                    step.action(settings)
                except (OSError, http.client.HTTPException) as error:
                    note = str(error) or type(error).__name__
                row = {"role": role, "step": step.name, "ok": not note, "expected": bool(note) == step.fails}
                out.write(json.dumps({**row, "note": note}) + "\n")
                # Small, uneven pauses: the roles drift apart, and the output reads like traffic.
                time.sleep(period / (2 * len(due)) * random.uniform(0.5, 1.0))
            time.sleep(max(0.0, began + period - time.monotonic()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.workload", description="the demo's workload")
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--ca", required=True, help="certificate to trust")
    parser.add_argument("--log", required=True, type=Path, help="file for a JSON line per step")
    parser.add_argument("--no-ipv6", action="store_true")
    parser.add_argument("--period", type=float, default=2.0, help="seconds per round (2)")
    parser.add_argument("--rounds", type=int, help="end after so many (never)")
    given = parser.parse_args(arguments)
    run(given.role, Settings(given.ca, not given.no_ipv6), given.log, period=given.period, rounds=given.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
