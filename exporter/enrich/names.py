"""Names that the kernel does not know: of addresses (from DNS answers) and of containers (from the engine).

In: DNS answers with the workload that received them; container ids. Out: the name which that workload asked
for, by address; the container's name. Not its job: reading DNS packets (decode), cgroup paths (cgroup_path.py),
asking anybody about an address: there is no reverse lookup, a name is only what the workload asked for.
"""

from __future__ import annotations

import heapq
import http.client
import ipaddress
import json
import os
import queue
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from exporter.events import SECOND, Workload
from exporter.health import losses

TTL_FLOOR = 60 * SECOND  # applications keep an address longer than a TTL of 0 or 5 s says
TTL_CAP = 3600 * SECOND
PER_WORKLOAD = 4_096
TOTAL = 65_536
NAMES_PER_ADDRESS = 4  # a CDN's address has many names; the newest that has not expired wins
SWEEP_EVERY = 1 * SECOND
PLACES, PLACE_SECONDS, RECHECK_SECONDS = 8_192, 3_600, 10
SWEEP_STEP = 1_024  # entries looked at per sweep; one table is never cut, so at most PER_WORKLOAD more

Key = str | int


# One name of an address, until when, and the next older: a chain, since most addresses have just one name.
# Plain tuples, which the garbage collector stops looking at; it never would with a named tuple.
_Entry: TypeAlias = "tuple[str, int, _Entry | None]"


def key(workload: Workload) -> Key:
    """Who shares DNS answers: the pod's containers, a container's nested cgroups, else one cgroup."""
    return workload.pod_uid or workload.container_id or workload.cgroup_id


class Names:
    """Address -> name, per workload, learned from the DNS answers that the workload received.

    All times are nanoseconds of one clock of the caller's choice, which is passed in. Bounded: PER_WORKLOAD
    addresses for each key and TOTAL altogether; past either, the oldest goes and is counted as lost.
    """

    def __init__(self, per_workload: int = PER_WORKLOAD, total: int = TOTAL) -> None:
        self._per_workload = per_workload
        self._total = total
        # Both levels are kept in the order of the last answer, so that the oldest is always the first.
        self._tables: dict[Key, dict[str, _Entry]] = {}
        self._size = 0
        self._sweep: list[Key] = []
        self._next_sweep = 0
        self.learned = 0  # answers taken
        self.expired = 0  # addresses dropped because their time was over

    def __len__(self) -> int:
        """How many addresses have a name, expired ones that no sweep has met yet included."""
        return self._size

    def learn(self, owner: Key, question_name: str, answers: Sequence[tuple[str, int]], now: int) -> None:
        """Take one DNS answer: `owner` is `key(workload)`, `answers` are (canonical address, TTL in seconds).

        The name is the one asked for, CNAMEs notwithstanding, in lower case (resolvers randomise case as a
        defence, draft-vixie-dnsext-dns0x20) and without the final dot.
        """
        name = question_name.rstrip(".").lower()
        if name and len(name) <= 253:
            self._learn(owner, name, answers, now)

    def _learn(self, owner: Key, name: str, answers: Sequence[tuple[str, int]], now: int) -> None:
        table = self._tables.get(owner)
        if table is not None and len(table) * 2 < self._per_workload:  # else the order matters: the oldest goes first
            for address, ttl in answers:
                lasts = TTL_FLOOR if ttl < 60 else TTL_CAP if ttl > 3600 else ttl * SECOND
                known = table.get(address)
                if known is None or known[0] != name or now + lasts - known[1] >= lasts // 8:
                    break
            else:  # learned a moment ago, and again: an eighth of its time is not worth the work
                return
        self._tables.pop(owner, None)
        if table is None:
            table = {}
        for address, ttl in answers:
            until = now + min(max(ttl * SECOND, TTL_FLOOR), TTL_CAP)
            old = table.pop(address, None)
            if old is None:
                self._size += 1
            table[address] = (name, until, _others(old, name, now, NAMES_PER_ADDRESS - 1))
            self.learned += 1
            if len(table) > self._per_workload:
                del table[next(iter(table))]
                self._size -= 1
                losses.add("names", "addresses_full")
        if table:
            self._tables[owner] = table
        while self._size > self._total:
            self._evict()

    def name(self, owner: Key, address: str, now: int) -> str:
        """The most recent unexpired name under which `owner` resolved `address`, or ''."""
        table = self._tables.get(owner)
        if table is None:
            return ""
        entry = table.get(address)
        while entry is not None:
            if entry[1] > now:
                return entry[0]
            entry = entry[2]
        return ""

    def addresses(self, owner: Key, name: str, now: int) -> list[str]:
        """To which `name` led `owner`, of what has not expired. It looks at all that the owner knows."""
        found = []
        for address, entry in self._tables.get(owner, {}).items():
            older: _Entry | None = entry
            while older is not None:
                if older[0] == name and older[1] > now:
                    found.append(address)
                    break
                older = older[2]
        return found

    def learn_for(self, who: Workload, name: str, answers: Sequence[tuple[str, int]], now: int) -> None:
        """`learn` for the workload's owner. `name`: in lower case and without a final dot, as parse_dns has it."""
        if name != ".":
            self._learn(key(who), name, answers, now)

    def name_for(self, who: Workload, address: str, now: int) -> str:
        """`name` for the workload's owner."""
        return self.name(key(who), address, now)

    def expire(self, now: int) -> None:
        """Drop what has expired, a slice at a time: call it as often as you like, it works once a second."""
        if now < self._next_sweep and self._next_sweep - now <= SWEEP_EVERY:  # else the clock was set back
            return
        self._next_sweep = now + SWEEP_EVERY
        seen = 0
        if not self._sweep:
            self._sweep = list(self._tables)
        while self._sweep and seen < SWEEP_STEP:
            owner = self._sweep.pop()
            table = self._tables.get(owner)
            if table is None:
                continue
            seen += len(table)
            dead = [address for address, entry in table.items() if _dead(entry, now)]
            for address in dead:
                del table[address]
            self._size -= len(dead)
            self.expired += len(dead)
            if not table:
                del self._tables[owner]

    def _evict(self) -> None:
        """Drop the oldest address of the workload that has been silent for longest."""
        owner = next(iter(self._tables))
        table = self._tables[owner]
        del table[next(iter(table))]
        if not table:
            del self._tables[owner]
        self._size -= 1
        losses.add("names", "addresses_full")


def _others(entry: _Entry | None, name: str, now: int, room: int) -> _Entry | None:
    """The chain without `name` and without what has expired, at most `room` long."""
    while entry is not None and room and (entry[0] == name or entry[1] <= now):
        entry = entry[2]
    if entry is None or not room:
        return None
    return entry[0], entry[1], _others(entry[2], name, now, room - 1)


def _dead(entry: _Entry | None, now: int) -> bool:
    while entry is not None:
        if entry[1] > now:
            return False
        entry = entry[2]
    return True


class HiddenNames:
    """Does `exclude.domainSuffixes` hide this name? Whole labels; a bounded cache."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        self._suffixes = tuple(suffix.strip(".").lower() for suffix in suffixes)
        self._cache: dict[str, bool] = {}

    def __call__(self, name: str) -> bool:
        hidden = self._cache.get(name)
        if hidden is None:
            if len(self._cache) >= 4096:
                self._cache.clear()
            hidden = any(name == suffix or name.endswith("." + suffix) for suffix in self._suffixes)
            self._cache[name] = hidden
        return hidden


class HiddenPlaces:
    """Does `exclude.cidrs` hide whom a request is for whose connection is not known? The kernel decides by a socket's
    peer; a request seen inside a TLS library may have none. Then it is an address itself, or a name that the workload
    looked up and that led to hidden addresses only (`names`). A connection may be used long after its name has expired:
    an answer is kept until it was not asked for for PLACE_SECONDS. Bounded by PLACES."""

    def __init__(self, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network], names: Names) -> None:
        self._networks, self._names = networks, names
        self._found: OrderedDict[tuple[Key, str], tuple[bool, int]] = OrderedDict()  # hidden, until when

    def __call__(self, who: Workload, host: str, now: int) -> bool:
        """`now`: ns, of the clock of `names`."""
        if not self._networks:
            return False
        place = key(who), host
        hidden, until = self._found.get(place, (False, 0))
        if until <= now:
            addresses = self._names.addresses(*place, now) or [host]
            hidden = all(map(self._hidden, addresses))
            self._found[place] = hidden, now + (PLACE_SECONDS if hidden else RECHECK_SECONDS) * SECOND
            self._found.move_to_end(place)
            if len(self._found) > PLACES:
                self._found.popitem(last=False)
        elif hidden:
            self._found[place] = hidden, now + PLACE_SECONDS * SECOND
        return hidden

    def _hidden(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:  # a name that nobody looked up
            return False
        return any(parsed in network for network in self._networks)


# --- containers -------------------------------------------------------------------------------------------

ENGINE_SOCKETS = ("/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock")
PENDING = 256
CACHED = 4_096
RESPONSE_LIMIT = 1 << 20
# The cgroup exists a moment before the engine can tell the name, and the engine holds the container's lock
# while it starts it.
RETRY_AFTER = (0.5, 2.0)

_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class ContainerInfo(NamedTuple):
    """What an engine says of a container: its name, its image and, where a kubelet made it through Docker, its pod."""

    name: str
    container_name: str = ""
    pod_name: str = ""
    namespace: str = ""
    image: str = ""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class ContainerNames:
    """Container id -> ContainerInfo, asked of the Docker or Podman socket by a thread of its own; read-only.

    `ask` and `answers` are for one thread (the pipeline's) and never block. No socket: nothing asked. Only
    the system's sockets are used: one that a user owns could answer whatever it likes. containerd and CRI-O
    speak gRPC and are not asked; Kubernetes names come from the API.
    """

    def __init__(self, sockets: Iterable[str] = ENGINE_SOCKETS, timeout: float = 0.5) -> None:
        self._sockets = tuple(sockets)
        self._timeout = timeout
        self._todo: queue.Queue[str | None] = queue.Queue(PENDING + 1)
        self._done: queue.SimpleQueue[tuple[str, ContainerInfo | None]] = queue.SimpleQueue()
        self._pending: set[str] = set()
        self._cache: dict[str, ContainerInfo] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self.dropped = 0  # questions not asked because PENDING others were
        self.failed = 0  # questions given up, after retries

    def ask(self, container_id: str) -> ContainerInfo | None:
        """What is known; if nothing is, None, and the answer will be among `answers()` later."""
        info = self._cache.get(container_id)
        if info is not None or container_id in self._pending or self._closed:
            return info
        if not _CONTAINER_ID.fullmatch(container_id) or not any(map(os.path.exists, self._sockets)):
            return None
        if len(self._pending) >= PENDING:
            self.dropped += 1
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="container-names", daemon=True)
            self._thread.start()
        self._pending.add(container_id)
        self._todo.put_nowait(container_id)
        return None

    def waiting(self, container_id: str) -> bool:
        """Whether an answer about it is still to come."""
        return container_id in self._pending

    def answers(self) -> list[tuple[str, ContainerInfo | None]]:
        """The answers since the last call; None where the engine does not know the container."""
        got = []
        while not self._done.empty():
            container_id, info = self._done.get_nowait()
            self._pending.discard(container_id)
            if info is None:
                self.failed += 1
            else:
                if len(self._cache) >= CACHED:
                    del self._cache[next(iter(self._cache))]
                self._cache[container_id] = info
            got.append((container_id, info))
        return got

    def close(self) -> None:
        """Stop the thread; waits for one request at most."""
        self._closed = True
        if self._thread is not None:
            self._todo.put(None)  # room is kept: _todo is one longer than _pending can be
            self._thread.join(timeout=4 * self._timeout + 1)

    def _run(self) -> None:
        retry: list[tuple[float, int, str]] = []
        while not self._closed:
            try:
                wait = max(0.0, retry[0][0] - time.monotonic()) if retry else None
                item = self._todo.get(timeout=wait)
                if item is None:
                    return
                attempt, container_id = 0, item
            except queue.Empty:
                _, attempt, container_id = heapq.heappop(retry)
            info = self._fetch(container_id)
            if info is None and attempt < len(RETRY_AFTER):
                heapq.heappush(retry, (time.monotonic() + RETRY_AFTER[attempt], attempt + 1, container_id))
            else:
                self._done.put((container_id, info))

    def _fetch(self, container_id: str) -> ContainerInfo | None:
        for path in self._sockets:
            if not os.path.exists(path):
                continue
            connection = _UnixConnection(path, self._timeout)
            try:
                connection.request("GET", f"/containers/{container_id}/json")
                response = connection.getresponse()
                body = response.read(RESPONSE_LIMIT)
                if response.status == 200:
                    return _info(json.loads(body))
            except (OSError, http.client.HTTPException, ValueError):
                continue
            finally:
                connection.close()
        return None


def _info(document: object) -> ContainerInfo | None:
    """Read an engine's answer to GET /containers/<id>/json (Docker Engine API; Podman's is compatible)."""
    if not isinstance(document, dict):
        return None
    name = _word(document.get("Name")).lstrip("/")
    config = document.get("Config")
    labels = config.get("Labels") if isinstance(config, dict) else None
    get: Callable[[str], object] = labels.get if isinstance(labels, dict) else (lambda _: "")
    info = ContainerInfo(
        name,
        _word(get("io.kubernetes.container.name")),
        _word(get("io.kubernetes.pod.name")),
        _word(get("io.kubernetes.pod.namespace")),
        _word(config.get("Image")) if isinstance(config, dict) else "",
    )
    return info if name else None


def _word(value: object) -> str:
    """A name fit to print, or ''."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 255 else ""
