"""The agent and its commands when things are not as they should be: one clear sentence, no stall, no crash.

Settings and arguments themselves are in tests/unit/test_cli.py and test_settings.py; this is about what takes a
kernel, a process and a signal.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab.net import SERVERS4
from tests.pipeline.conftest import PROGRAMS, Agent, Host, World, bpftool, eventually
from tests.pipeline.otlp_receiver import Receiver

pytestmark = pytest.mark.kernel

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--")


def one_sentence(done: subprocess.CompletedProcess[str], status: int) -> str:
    """What it said: a line on standard error and no other, no traceback, with this exit status."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("ebfw: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("ebfw: ").strip()


# --- ebfw check -----------------------------------------------------------------------------------------------


def test_check(host: Host) -> None:
    done = host.ebfw("check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\nthe agent can run here\n")
    for fact in ("kernel", "cgroup2", "lockdown", "memlock"):
        assert re.search(rf"^  {fact} +\S", done.stdout, re.MULTILINE), fact
    assert str(host.cgroup.path) in done.stdout
    programs = ("connect4", "connect6", "sendmsg4", "sendmsg6", "sockops", "egress", "ingress", "release")
    for name in (*programs, "compile (bcc)", "maps", "tls uprobes", "root", "bpffs"):
        assert re.search(rf"^  {re.escape(name)} +(yes|no)\b", done.stdout, re.MULTILINE), name
    for name in ("egress", "ingress", "root", "maps"):
        assert re.search(rf"^  {name} +yes$", done.stdout, re.MULTILINE), name
    sizes = re.findall(r"^  (\S+) +([\d,]+) KiB", done.stdout, re.MULTILINE)
    assert {"flows", "traffic", "records", "total"} <= {name for name, _ in sizes}
    holds = dict(re.findall(r"^  (\S+) +[\d,]+ KiB *(.*)$", done.stdout, re.MULTILINE))
    shown = [holds[name] for name in ("records", "executions", "sockets", "http2", "free_slots")]
    assert shown == ["", "", "one a socket", "one a socket", "65,536 entries"]
    assert re.search(r"^  bpffs +yes \(.+\)$", done.stdout, re.MULTILINE)
    assert int(dict(sizes)["total"].replace(",", "")) <= 32 * 1024
    assert host.left_behind() == []


# --- not root -------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(host: Host) -> tuple[str, ...]:
    """The command that makes an ordinary user of what follows."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    if host.ebfw("version", command=NOBODY).returncode:
        pytest.skip("this checkout cannot be read by everybody")
    return NOBODY


@pytest.mark.parametrize("command", ["run", "detach"])
def test_not_root(host: Host, nobody: tuple[str, ...], command: str) -> None:
    arguments = [] if command == "run" else [command]
    text = one_sentence(host.ebfw(*arguments, command=nobody), 1)
    assert "needs root" in text
    assert "try: sudo ebfw" in text


def test_check_not_root(host: Host, nobody: tuple[str, ...]) -> None:
    """It is one of its answers, not a failure to answer."""
    done = host.ebfw("check", command=nobody)
    assert done.returncode == 1
    assert done.stderr == ""
    assert re.search(r"^  root +no +\S", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("\nthe agent cannot run here\n")


def test_root_without_capabilities(host: Host) -> None:
    """Root in a container that was given none: the agent names what it lacks, and check does not promise more."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    command = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--")
    text = one_sentence(host.ebfw(command=command, EBFW_METRICS_ADDR=""), 1)
    assert "CAP_SYS_ADMIN" in text
    done = host.ebfw("check", command=command)
    assert done.returncode == 1
    assert re.search(r"^  bpffs +no +.*CAP_SYS_ADMIN", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("\nthe agent cannot run here\n")


# --- what is in the way ---------------------------------------------------------------------------------------


def test_d9_taken_metrics_port(host: Host) -> None:
    """Said before anything is attached, with another port that may be free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = one_sentence(host.ebfw(EBFW_METRICS_ADDR=f"127.0.0.1:{port}"), 2)
    assert f"EBFW_METRICS_ADDR=127.0.0.1:{port}" in text
    assert "taken" in text
    assert re.search(rf"set EBFW_METRICS_ADDR=127\.0\.0\.1:({port + 1}|{port - 1}), or leave it empty", text)
    assert host.left_behind() == []


@pytest.mark.parametrize("path", ["missing", "no cgroup"])
def test_wrong_cgroup(host: Host, path: str) -> None:
    wrong = host.cgroup.path / "nowhere" if path == "missing" else host.directory
    text = one_sentence(host.ebfw(EBFW_CGROUP=str(wrong)), 2)
    assert str(wrong) in text
    assert "cgroup2" in text
    assert host.left_behind() == []


def test_pin_path_that_cannot_be(host: Host) -> None:
    file = host.directory / "file"
    file.write_text("")
    text = one_sentence(host.ebfw(EBFW_BPF_PIN_PATH=str(file / "pins"), EBFW_METRICS_ADDR=""), 1)
    assert "EBFW_BPF_PIN_PATH" in text


def test_pin_path_in_a_folder_that_does_not_exist(host: Host) -> None:
    """Nothing is made on the way there, so nothing is left behind."""
    missing = host.directory / "missing"
    text = one_sentence(host.ebfw(EBFW_BPF_PIN_PATH=str(missing / "pins"), EBFW_METRICS_ADDR=""), 1)
    assert f"{missing} does not exist" in text
    assert "EBFW_BPF_PIN_PATH" in text
    checked = host.ebfw("check", EBFW_BPF_PIN_PATH=str(missing / "pins"))
    assert checked.returncode == 1
    assert re.search(rf"^  bpffs +no +.*{missing} does not exist$", checked.stdout, re.MULTILINE)
    assert not missing.exists()


def test_a_policy_is_not_silently_ignored(host: Host) -> None:
    text = one_sentence(host.ebfw(EBFW_POLICY="/nonexistent"), 2)
    assert text == "EBFW_POLICY=/nonexistent: there is no such file"
    policy = host.directory / "policy.yaml"
    policy.write_text("")
    agent = host.start(EBFW_POLICY=str(policy)).ready()
    assert f"EBFW_POLICY={policy}: this version enforces no policy" in agent.log


def test_d20_an_inventory_that_cannot_be_kept_is_said_before_anything_is_attached(host: Host) -> None:
    missing = host.directory / "missing"
    text = one_sentence(host.ebfw(EBFW_INVENTORY=str(missing / "inventory.json")), 1)
    assert f"the folder {missing} does not exist" in text
    assert not missing.exists()
    theirs = host.directory / "theirs"
    theirs.write_text("theirs")
    text = one_sentence(host.ebfw(EBFW_INVENTORY=str(theirs)), 1)
    assert f"EBFW_INVENTORY={theirs}: " in text
    assert theirs.read_text() == "theirs"
    assert host.left_behind() == []


# --- who may read /metrics ------------------------------------------------------------------------------------


def test_d9_a_plain_start_listens_on_this_host_alone(host: Host, world: World) -> None:
    inside = ("nsenter", f"--net={world.lab.pods.path}", "--")  # where port 9090 is nobody else's
    agent = host.start(command=(*inside, "env", "-u", "EBFW_METRICS_ADDR"))
    eventually(lambda: "attached to" in agent.log, 60)
    assert "metrics at http://127.0.0.1:9090/metrics" in agent.log
    listening = subprocess.run((*inside, "ss", "-Hltn"), capture_output=True, text=True, check=True).stdout
    assert [line.split()[3] for line in listening.splitlines()] == ["127.0.0.1:9090"]
    assert agent.stop() == 0


def test_d9_tls_and_passwords_for_metrics(host: Host) -> None:
    cert, key, users = (host.directory / name for name in ("cert.pem", "key.pem", "users"))
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    users.write_text("prom:secret\n")
    users.chmod(0o600)
    agent = host.start(EBFW_METRICS_TLS_CERT=str(cert), EBFW_METRICS_TLS_KEY=str(key), EBFW_METRICS_USERS=str(users))
    eventually(lambda: "attached to" in agent.log, 60)
    found = re.search(r"metrics at https://(127\.0\.0\.1:\d+)/metrics", agent.log)
    assert found, agent.log
    context = ssl.create_default_context(cafile=str(cert))
    address = found[1]

    def get(path: str, authorization: str = "") -> int:
        connection = http.client.HTTPSConnection(address, timeout=10, context=context)
        connection.request("GET", path, headers={"Authorization": authorization} if authorization else {})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    right, wrong = (f"Basic {base64.b64encode(text).decode()}" for text in (b"prom:secret", b"prom:Secret"))
    assert (get("/metrics"), get("/metrics", wrong), get("/metrics", right)) == (401, 401, 200)
    assert (get("/healthz"), get("/readyz")) == (200, 200)
    plain = http.client.HTTPConnection(address, timeout=10)
    plain.request("GET", "/metrics", headers={"Authorization": right})
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.getresponse()
    assert agent.stop() == 0
    assert "secret" not in agent.log


@pytest.mark.parametrize("name", ["EBFW_METRICS_TLS_CERT", "EBFW_METRICS_USERS"])
def test_d9_a_file_that_is_missing_is_said(host: Host, name: str) -> None:
    text = one_sentence(host.ebfw(**{name: str(host.directory / "none")}), 2)
    assert str(host.directory / "none") in text
    assert host.left_behind() == []


# --- beside a running agent -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with Host(world, tmp_path_factory.mktemp("running")) as host:
        yield host.start().ready()


def test_is_on_the_cgroup_alone(running: Agent) -> None:
    """Eight programs, each on the configured cgroup, none above it."""
    rows = running.host.attached()
    assert len(rows) == PROGRAMS
    assert len({row["attach_type"] for row in rows}) == PROGRAMS
    above = bpftool("cgroup", "show", str(running.host.cgroup.path.parent))
    assert not {row["id"] for row in rows} & {row["id"] for row in above}


def test_check_beside_a_running_agent(running: Agent) -> None:
    before = running.host.attached()
    assert running.host.ebfw("check").returncode == 0
    assert running.host.attached() == before


def test_default_excludes(running: Agent, world: World) -> None:
    """Loopback is counted and not told."""
    code = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('127.0.0.1', 9)); print('sent')"
    assert world.python(running.host.shop, code) == "sent\n"

    def loopback() -> list[Any]:
        return running.metrics().rows("ebfw_network_io_bytes_total", ebfw_peer_scope="loopback")

    assert {row.labels["server_address"] for row in eventually(loopback)} == {"~excluded"}
    assert running.lines == []


# --- signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(host: Host, number: signal.Signals) -> None:
    agent = host.start().ready()
    began = time.monotonic()
    assert agent.stop(number) == 0
    assert time.monotonic() - began < 3
    assert "Traceback" not in agent.log
    assert host.left_behind() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_during_the_start(host: Host, number: signal.Signals, status: int) -> None:
    """While it compiles and attaches: it ends soon, and leaves nothing."""
    agent = host.start()
    eventually(lambda: host.pins.exists() and list(host.pins.glob("map_*")), 30)
    began = time.monotonic()
    assert agent.stop(number) == status
    assert time.monotonic() - began < 5
    eventually(lambda: not host.processes(), 1)
    assert "Traceback" not in agent.log
    assert host.left_behind() == []


# --- while it runs --------------------------------------------------------------------------------------------


def test_the_cgroup_goes(host: Host, world: World) -> None:
    """It says so once and lives on: /metrics has what there was, the exit is clean."""
    gone = host.cgroup.child("gone")
    inner = gone.child("inner")
    agent = host.start(EBFW_CGROUP=str(gone.path)).ready()
    world.curl(inner, f"http://{SERVERS4[6]}/gone")
    eventually(lambda: agent.metrics().rows("ebfw_tcp_connections_total", service_name="inner"))
    gone.remove()
    eventually(lambda: "is gone" in agent.log, 12)
    (line,) = [line for line in agent.log.splitlines() if "is gone" in line]
    assert str(gone.path) in line
    assert agent.metrics().rows("ebfw_tcp_connections_total", service_name="inner")
    assert not agent.ended()
    assert agent.stop() == 0
    assert "Traceback" not in agent.log


def test_readiness_and_output_none(host: Host, world: World) -> None:
    """/healthz answers from the first moment on, /readyz is 503 until the programs are attached; not a line is said."""
    agent = host.start(EBFW_OUTPUT="none")
    address = eventually(lambda: agent.address, 30)

    def status(path: str) -> int:
        connection = http.client.HTTPConnection(address, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status

    assert status("/healthz") == 200
    assert status("/readyz") == 503 or "attached to" in agent.log
    agent.ready()
    assert status("/readyz") == 200
    world.curl(host.shop, f"http://{SERVERS4[6]}/quiet")
    eventually(lambda: agent.metrics().total("ebfw_events_total", kind="close") == 1)
    assert agent.stop() == 0
    assert agent.output == ""


def test_no_metrics(host: Host, world: World) -> None:
    """An empty address is no server."""
    agent = host.start(EBFW_METRICS_ADDR="").ready()
    assert agent.address == ""
    world.curl(host.shop, f"http://{SERVERS4[6]}/unserved")
    eventually(lambda: "/unserved" in agent.output)
    listening = subprocess.run(("ss", "-Hltnp"), capture_output=True, text=True).stdout
    assert f"pid={agent.pid}," not in listening


def test_output_closed(host: Host, world: World) -> None:
    """`ebfw | head -1`: the reader goes, the agent says so once, counts the lines and goes on observing."""
    reading, writing = os.pipe()
    agent = host.start(stdout=writing)
    os.close(writing)
    agent.ready()
    world.curl(host.shop, f"http://{SERVERS4[6]}/head")
    assert os.read(reading, 65536)
    os.close(reading)
    for n in range(3):
        world.curl(host.shop, f"http://{SERVERS4[6]}/{n}")
    eventually(lambda: agent.metrics().lost("queue", "console_closed") > 0)
    eventually(lambda: agent.metrics().total("ebfw_events_total", kind="http") == 4)
    assert agent.log.count("standard output is gone") == 1
    assert agent.stop() == 0
    assert "Traceback" not in agent.log


def test_output_that_nobody_reads(host: Host, world: World) -> None:
    """A full pipe costs lines, which are counted; nothing else waits for it, the exit neither."""
    reading, writing = os.pipe()
    agent = host.start(stdout=writing)
    os.close(writing)
    agent.ready()
    try:
        world.curl(host.shop, "--parallel", "--parallel-max", "8", f"http://{SERVERS4[6]}/[1-400]/{'x' * 200}")
        eventually(lambda: agent.metrics().total("ebfw_events_total", kind="http") == 400)
        began = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - began < 4
    finally:
        os.close(reading)


def test_no_collector(host: Host, world: World) -> None:
    """Nobody listens at the OTLP endpoint: lines come at once, what was to be sent is counted, the exit is not
    held up for long."""
    agent = host.start(
        EBFW_LOGS="all",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="200",
        OTEL_BLRP_SCHEDULE_DELAY="200",
    ).ready()
    for n in range(3):
        began = time.monotonic()
        world.curl(host.shop, f"http://{SERVERS4[6]}/away/{n}")
        eventually(lambda n=n: f"/away/{n}" in agent.output)
        assert time.monotonic() - began < 3
    eventually(lambda: agent.metrics().lost("export", "failed") >= 9, 20)
    began = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - began < 8
    assert "Traceback" not in agent.log


def test_a_collector_that_hangs(host: Host, world: World) -> None:
    """It takes requests and never answers: the lines come, and the exit waits no longer than it says (5 s)."""
    with Receiver() as receiver:
        receiver.delay = 60
        agent = host.start(
            EBFW_LOGS="all", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http, OTEL_BLRP_SCHEDULE_DELAY="100"
        ).ready()
        world.curl(host.shop, f"http://{SERVERS4[6]}/hang/1")
        time.sleep(0.5)
        began = time.monotonic()
        world.curl(host.shop, f"http://{SERVERS4[6]}/hang/2")
        eventually(lambda: "/hang/2" in agent.output)
        assert time.monotonic() - began < 3
        began = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - began < 10
    assert "Traceback" not in agent.log
