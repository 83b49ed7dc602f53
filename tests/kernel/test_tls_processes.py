"""Programs that begin, and the TLS functions in them: found on every kernel, by each kind of uprobe, in time; and
nothing of what runs outside the subtree.

The client talks TLS to itself through memory: what counts is that it calls its library, a copy that nobody else has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter import decode
from exporter.kernel import bpf, wire
from exporter.kernel.tls_libraries import OPENSSL
from exporter.kernel.tls_processes import TlsProcesses
from lab import Cgroup
from lab.clients import private_libssl
from lab.servers import Servers

from .conftest import SLOW, Client, N, Tap, Watch

# N requests, each head in one write (SSL_write_ex), each answered; waits for a line before the first.
TALK = """
import ssl
near, far = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
near.check_hostname, near.verify_mode = False, ssl.CERT_NONE
far.load_cert_chain(A["cert"], A["key"])
a, b, c, d = (ssl.MemoryBIO() for _ in range(4))
client, server = near.wrap_bio(a, b), far.wrap_bio(c, d, server_side=True)
def move():
    c.write(b.read()); a.write(d.read())
for _ in range(6):
    for end in (client, server):
        try: end.do_handshake()
        except ssl.SSLWantReadError: pass
        move()
tell(shaken=1)
if A.get("wait", True): pause()
for n in range(A["count"]):
    client.write(b"GET /%s/%d HTTP/1.1\\r\\nHost: in.memory.example\\r\\n\\r\\n" % (A["tag"].encode(), n))
    move()
    assert b"GET" in server.read()
    server.write(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
    move()
    assert b"204" in client.read()
tell(done=1)
"""


class Private:
    """A libssl of one's own: its path, and what a client must be started with to use it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        found = private_libssl(folder)
        assert found is not None, "this Python has TLS built in"
        self.path, self.library = found.parent, found


@pytest.fixture
def private(tmp_path: Path) -> Private:
    return Private(tmp_path / "tls")


@pytest.fixture
def tls(tap: Tap, parent: Cgroup) -> Iterator[TlsProcesses]:
    """Discovery on the session's kernel side."""
    made = TlsProcesses(tap.kernel.programs, tap.kernel.executions, parent.path, everywhere=False)
    yield made
    made.close()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds * SLOW
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.01)


@pytest.fixture
def talk(start: Callable[..., Client], servers: Servers) -> Callable[..., Client]:
    """talk(a Private or a command, tag, **variables): a client that has begun TALK with its library."""

    def begin(way: Private | list[str], tag: str, **more: object) -> Client:
        through = way if isinstance(way, list) else ["env", f"LD_LIBRARY_PATH={way.path}"]
        files = {"cert": str(servers.directory / "cert.pem"), "key": str(servers.directory / "key.pem")}
        return start(TALK, through=through, tag=tag, **{"count": N, **files, **more})

    return begin


def written(watch: Watch, tag: str) -> list[str]:
    """Paths of the requests that were seen to be written, in order."""
    watch.pump()
    heads = [s.payload for s in watch.sightings if s.kind == decode.TLS_WRITE]
    return [path for head in heads if (path := head.split(b" ")[1].decode()).startswith(f"/{tag}/")]


def whole(tag: str) -> list[str]:
    return [f"/{tag}/{n}" for n in range(N)]


@pytest.mark.core
@pytest.mark.parametrize("multi", [True, False], ids=["as-the-kernel-can", "perf-events"])
def test_found_and_dropped(multi: bool, watch: Watch, tls: TlsProcesses, talk: Callable[..., Client], private: Private):
    """A library that nobody had mapped: its probes are there before the process has shaken hands, and N requests are
    N records; they go when it does."""
    tls.libraries._multi &= multi
    client = talk(private, "found")
    client.wait_for("shaken")
    until(lambda: tls.libraries.by_coverage()[OPENSSL] == 1)
    client.go()
    client.finish()
    watch.until(lambda w: len(written(w, "found")) == N)
    assert written(watch, "found") == whole("found")
    assert {s.pid for s in watch.sightings} == {client.pid}
    tls.tell((), [client.pid, client.pid, 0])
    until(lambda: tls._counts.total() == 3)
    assert tls.take_connections() == {OPENSSL: 2, "unknown": 1}
    assert tls.take_connections() == {}
    until(lambda: not len(tls.libraries), 20)


@pytest.mark.core
def test_outside_nothing(watch: Watch, tls: TlsProcesses, tap: Tap, talk: Callable[..., Client], private: Private):
    """The same file, probed for a process inside, called by one outside: not a record, and not an execution."""
    inside = talk(private, "inside")
    inside.wait_for("shaken")
    until(lambda: tls.libraries.by_coverage()[OPENSSL] == 1)
    with Cgroup("outside") as elsewhere:
        everything = Watch(tap, None)
        outside = talk(private, "outside", cgroup=elsewhere, wait=False)
        outside.finish()
        assert outside.pid not in tls._processes
        inside.go()
        inside.finish()
        everything.until(lambda w: len(written(w, "inside")) == N)
        assert not written(everything, "outside")
    watch.settle()


@pytest.mark.core
def test_executions(tap: Tap, cgroup: Cgroup) -> None:
    """N programs begin inside and N outside, and end at once: the ring tells of those inside, once each, in order."""
    tap.kernel.executions.drain()
    link = bpf.raw_tracepoint(tap.kernel.programs["exec"], "sched_process_exec")
    try:
        loop = "for n in $(seq %d); do /bin/true & echo $!; wait $!; done".replace("%d", str(N))
        before = time.monotonic_ns()
        done = cgroup.run(["sh", "-c", loop], capture_output=True, text=True, check=True)
        subprocess.run(["sh", "-c", loop], check=True, capture_output=True)
        after = time.monotonic_ns()
        records = [wire.EXECUTION.unpack(data) for data in tap.kernel.executions.drain()]
    finally:
        os.close(link)
    pids = [int(line) for line in done.stdout.split()]
    assert [pid for _, pid, _ in records if pid in pids] == pids
    assert all(before <= when <= after for when, _, _ in records)
    # the shell that enters the cgroup, the one it becomes, `seq`, and nobody else
    assert len(records) - N <= 3
    subprocess.run(["/bin/true"], check=True)
    assert not tap.kernel.executions.drain()


def test_a_library_that_is_replaced(
    watch: Watch, tls: TlsProcesses, talk: Callable[..., Client], private: Private
) -> None:
    """An upgrade: those who have the old file go on with it, new ones take the new, each is seen whole; and the
    probes of the old one go with its last user."""
    old = talk(private, "old")
    old.wait_for("shaken")
    until(lambda: tls.libraries.by_coverage()[OPENSSL] == 1)
    shutil.copy(private.library, private.library.with_suffix(".new"))
    os.rename(private.library.with_suffix(".new"), private.library)
    new = talk(private, "new")
    new.wait_for("shaken")
    until(lambda: tls.libraries.by_coverage()[OPENSSL] == 2)
    for client in (old, new):
        client.go()
    old.finish()
    new.wait_for("done")
    watch.until(lambda w: len(written(w, "old")) == len(written(w, "new")) == N)
    new.finish()
    until(lambda: not len(tls.libraries), 20)


@pytest.mark.core
def test_containers_of_one_image(
    watch: Watch, tls: TlsProcesses, talk: Callable[..., Client], private: Private
) -> None:
    """Two overlays over one layer, each in a mount namespace that the agent is not in: the kernel has one inode for
    the library of both, and each request is one record."""
    root = private.path.parent
    for name in ("upper", "view"):
        (root / name).mkdir()
    script = root / "enter"
    script.write_text(
        f"""#!/bin/sh
mount -t tmpfs none {root}/upper && mkdir {root}/upper/u {root}/upper/w &&
mount -t overlay overlay -o lowerdir={private.path},upperdir={root}/upper/u,workdir={root}/upper/w {root}/view || exit 9
LD_LIBRARY_PATH={root}/view exec "$@"
"""
    )
    script.chmod(0o755)
    through = ["unshare", "--mount", "--propagation", "private", str(script)]
    clients = [talk(through, tag) for tag in ("one", "two")]
    for client in clients:
        client.wait_for("shaken")
    until(lambda: all(tls._processes.get(c.pid) and tls._processes[c.pid].files for c in clients))
    assert tls.libraries.by_coverage()[OPENSSL] == 1
    for client in clients:
        client.go()
        client.finish()
    watch.until(lambda w: len(written(w, "one")) >= N and len(written(w, "two")) >= N)
    assert (written(watch, "one"), written(watch, "two")) == (whole("one"), whole("two"))


def test_many_at_once(
    watch: Watch, tls: TlsProcesses, cgroup: Cgroup, private: Private, talk: Callable[..., Client]
) -> None:
    """200 processes that begin at the same moment and have little time: all are looked at, none costs the thread its
    life, and afterwards nothing is remembered of them."""
    holder = talk(private, "held")
    holder.wait_for("shaken")
    until(lambda: tls.libraries.by_coverage()[OPENSSL] == 1)
    processes = [
        cgroup.popen(["sh", "-c", "sleep 0.3"], env={**os.environ, "LD_LIBRARY_PATH": str(private.path)})
        for _ in range(200)
    ]
    pids = {process.pid for process in processes}
    until(lambda: all(tls._processes.get(pid) for pid in pids))
    for process in processes:
        process.wait()
    until(lambda: all(tls._processes[pid].gone for pid in pids & tls._processes.keys()))
    assert threading.active_count() < 20
    holder.go()
    holder.finish()
    watch.until(lambda w: len(written(w, "held")) == N)
    until(lambda: not pids & tls._processes.keys(), 30)
