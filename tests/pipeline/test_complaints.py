"""What users of other agents complain of, tried on this one: docs/complaints.md names these tests, and others.

Each test makes the situation of a complaint with real traffic, and looks at what an operator would see.
"""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest

from exporter.kernel.build import source_folder
from exporter.kernel.maps import SPARE_SLOTS
from lab.servers import PORTS
from tests.pipeline import known
from tests.pipeline.collector import Collector
from tests.pipeline.conftest import Agent, Host, Samples, World, eventually

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]


# Looks up names that differ each time, and connects to every address of the range, until told to stop.
_CHURN = """
import itertools, select, socket, sys
for n in itertools.count():
    if select.select([sys.stdin], [], [], 0)[0]:
        break
    name = f"n{n}.churn{n % 97}.example"
    try:
        socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(bytes(64), (f"198.51.100.{1 + n % 126}", 10000 + n % 3001))
    if n % 8 == 0:
        with socket.create_connection(("198.51.100.3", 80), 10) as s:
            s.sendall(f"GET /p/{n} HTTP/1.1\\r\\nHost: {name}\\r\\nConnection: close\\r\\n\\r\\n".encode())
            while s.recv(4096):
                pass
print(n)
"""


def churn(world: World, host: Host, seconds: float) -> int:
    """How many rounds were made."""
    process = world.popen(host.shop, _CHURN)
    assert process.stdin is not None
    time.sleep(seconds)
    out, _ = process.communicate("\n", timeout=30)
    return int(out)


def table(page: Samples, name: str) -> tuple[int, int]:
    return page.total("ebfw_table_used", ebfw_table=name), page.total("ebfw_table_size", ebfw_table=name)


def test_memory_stays_bounded_under_churn(host: Host, world: World, collector: Collector) -> None:
    """Complaints 1 and 5. Names and peers that never come back, a small table, a minute: every table has a size, what
    finds no room is counted, and memory does not grow any more once they are full."""
    settings = {**known.settings("churn"), "EBFW_FLOWS": "1024", "EBFW_OUTPUT": "none"}
    agent = host.start(**settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http).ready()
    rounds = churn(world, host, 25)
    full = agent.memory()
    rounds += churn(world, host, 35)
    assert rounds > 5000
    assert agent.memory() < full + 6e6
    assert agent.memory() < 130e6
    page = agent.settled()
    for name in ("flows", "names", "joins", "cgroups", "ring"):
        used, size = table(page, name)
        # Workloads' ~other rows have slots of their own, beside those that flows may have.
        assert used <= size + (SPARE_SLOTS if name == "flows" else 0), name
    assert page.total("ebfw_series") <= 50_000
    # What had no row of its own is still counted: the datagrams are all there, some of them under ~other.
    sent = page.total("ebfw_network_packets_total", network_transport="udp", network_io_direction="transmit")
    assert sent >= rounds
    assert page.total("ebfw_network_packets_total", server_address="~other", network_transport="udp") > 0
    names = {row.labels["dns_question_name"] for row in page.rows("dns_lookup_duration_seconds_count")}
    assert "~other" in names
    assert len(names) <= 201
    # A machine too slow for this many says so: each lookup is two records.
    assert page.total("dns_lookup_duration_seconds_count") + page.total("ebfw_records_lost_total") >= rounds
    assert page.total("ebfw_series_overflow_total") > 0


_CONNECTS = """
import socket, sys
for _ in range(int(sys.argv[3])):
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10):
        pass
print("done")
"""


def test_every_lost_record_is_counted(host: Host, world: World) -> None:
    """Complaint 6. The smallest ring, and nobody who reads it: what was told and what was lost is what happened, and
    the totals, which do not come through the ring, are right to the last connection."""
    count = 1500
    agent = host.start(EBFW_OUTPUT="json", EBFW_RING_BYTES=str(64 << 10)).ready()
    agent.process.send_signal(signal.SIGSTOP)
    try:
        world.python(host.shop, _CONNECTS, known.SERVER, str(PORTS["tcp_sink"]), str(count))
        # The last FIN comes from the server, a little later.
        eventually(lambda: len(world.servers.log("tcp_sink", "closed")) >= count)
    finally:
        agent.process.send_signal(signal.SIGCONT)
    page = agent.settled()
    lost = sum(int(row.value) for row in page.rows("ebfw_records_lost_total", ebfw_stage="ring"))
    assert lost > 0
    assert len(agent.events) + lost == 2 * count
    for state in ("opened", "closed"):
        assert page.total("ebfw_tcp_connections_total", ebfw_connection_state=state) == count


def test_an_agent_that_keeps_up_loses_nothing(host: Host, world: World) -> None:
    """Complaint 6, the other way round: the default ring, a storm of connections, and no loss at all."""
    count = 5000
    agent = host.start(EBFW_OUTPUT="json").ready()
    threads = [
        threading.Thread(
            target=world.python, args=(host.shop, _CONNECTS, known.SERVER, str(PORTS["tcp_sink"]), str(count // 2))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: len(agent.lines) >= 2 * count, 30)
    page = agent.metrics()
    assert len(agent.events) == 2 * count
    assert not [row for row in page.rows("ebfw_records_lost_total") if row.value]


def test_workloads_of_a_moment_keep_their_name(host: Host, world: World) -> None:
    """Complaint 12. Twenty-three cgroups, each with one connection, each gone as soon as its process is."""
    agent = host.start(EBFW_OUTPUT="json").ready()
    for number in range(23):
        short = host.cgroup.child(f"short{number}.service")
        world.python(short, _CONNECTS, known.SERVER, str(PORTS["tcp_sink"]), "1")
        short.remove()
    eventually(lambda: len(agent.lines) == 2 * 23)
    for event in agent.events:
        assert re.fullmatch(r"short\d+\.service", event["workload"]["name"]), event
    page = agent.settled()
    assert page.total("ebfw_attribution_total", result="miss") == 0
    for number in range(23):
        assert page.total("ebfw_tcp_connections_total", service_name=f"short{number}.service") == 2


def test_attribution_goes_on_over_a_restart(host: Host, world: World) -> None:
    """Complaint 13. Workloads that were there before the agent, and before its predecessor."""
    for _ in range(2):
        agent = host.start(EBFW_OUTPUT="json").ready()
        world.python(host.shop, _CONNECTS, known.SERVER, str(PORTS["tcp_sink"]), "3")
        eventually(lambda agent=agent: len(agent.lines) == 6)  # type: ignore[misc]
        assert {event["workload"]["name"] for event in agent.events} == {"shop"}
        assert agent.metrics().total("ebfw_attribution_total", result="miss") == 0
        agent.kill()


def test_an_unanswered_lookup_is_visible(host: Host, world: World, collector: Collector) -> None:
    """Complaint 15: as a line, in /metrics, and as a record with error.type."""
    run = "unanswered"
    agent = host.start(**known.settings(run), OTEL_EXPORTER_OTLP_ENDPOINT=collector.http).ready()
    code = "import socket, sys\ntry: socket.getaddrinfo(sys.argv[1], 80, socket.AF_INET)\nexcept OSError: pass"
    world.python(host.shop, code, "silent.lab.example")
    (event,) = eventually(lambda: [event for event in agent.events if event["kind"] == "dns"], 30)
    assert (event["domain"], event["status"].lower()) == ("silent.lab.example", "timeout")
    asked = {"dns_question_name": "silent.lab.example", "error_type": "timeout"}
    assert eventually(lambda: agent.metrics().total("dns_lookup_duration_seconds_count", **asked)) == 1
    (log,) = eventually(lambda: [log for log in collector.logs(run) if log.name == "ebfw.egress.dns"])
    assert log.attributes["error.type"] == "timeout"
    assert log.severity >= 13


def test_a_failed_connect_is_visible(host: Host, world: World, collector: Collector) -> None:
    """Complaint 16: refused, and never routed at all, by reason."""
    run = "failed"
    agent = host.start(**known.settings(run), OTEL_EXPORTER_OTLP_ENDPOINT=collector.http).ready()
    code = (
        "import socket, sys\nfor a in sys.argv[1:]:\n"
        "    try: socket.create_connection((a, 1), 10)\n    except OSError: pass"
    )
    world.python(host.shop, code, known.SERVER, "192.0.2.1")  # the second has no route
    eventually(lambda: len(agent.lines) == 2)
    page = agent.settled()
    reasons = {
        row.labels["error_type"]: int(row.value) for row in page.rows("ebfw_tcp_connection_failures_total") if row.value
    }
    assert reasons.pop("connection_refused") == 1
    ((unreachable, count),) = reasons.items()
    assert "unreachable" in unreachable
    assert count == 1
    logs = eventually(lambda: found if len(found := collector.logs(run)) == 2 else [])
    assert {log.attributes["error.type"] for log in logs} == {"connection_refused", unreachable}
    assert {log.severity for log in logs} == {13}


def test_requests_are_only_read(host: Host, world: World) -> None:
    """Complaint 10. What a server gets is byte for byte what it gets without the agent: nothing is injected, and a
    traceparent of the application's stays the only one."""
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    def headers(mark: str) -> dict[str, str]:
        for scheme in ("http", "https"):
            world.curl(host.shop, "-H", f"traceparent: {traceparent}", f"{scheme}://inside.lab.example/{mark}")
        rows = [row for name in ("http", "https") for row in world.servers.log(name, "request")]
        found = [row["headers"] for row in rows if row["target"] == f"/{mark}"]
        assert len(found) == 2
        assert found[0] == found[1]
        return dict(found[0])

    without = headers("without-agent")
    agent = host.start(EBFW_OUTPUT="json").ready()
    assert headers("with-agent") == without
    assert without["traceparent"] == traceparent
    eventually(lambda: "/with-agent" in agent.output)


def test_d12_silence_stays_silent(host: Host, world: World, collector: Collector) -> None:
    """The agent in the cgroup that it watches, as on a whole host, with nothing excluded: what it sends to the
    Collector is no line, no span and no record of its own."""
    config = host.directory / "all.yaml"
    config.write_text("exclude: {cidrs: [], domainSuffixes: []}\n")
    run = "silent"
    settings = {
        **known.settings(run),
        "EBFW_CONFIG": str(config),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    place = host.cgroup.child("agent.service")
    agent = Agent(host, len(host.agents), settings, command=place.command(["env"]))
    host.agents.append(agent)
    agent.ready()
    assert agent.pid in place.pids()
    pushes = len(collector.points(run, "ebfw.build.info"))
    eventually(lambda: len(collector.points(run, "ebfw.build.info")) >= pushes + 5, 60)
    assert agent.lines == []
    assert collector.spans(run) == []
    assert collector.logs(run) == []
    # It is not deaf: what somebody else in the same place does is told.
    world.curl(place, f"http://{known.SERVER}/somebody-else")
    eventually(lambda: "/somebody-else" in agent.output)


def test_no_kernel_headers_are_needed(host: Host) -> None:
    """Complaint 17. With nothing of the kernel's sources to be found, nor what a wheel brings, all programs compile and
    load."""
    hide = """
        for d in /lib/modules /usr/src; do [ ! -d "$d" ] || mount -t tmpfs none "$d"; done
        for f in "$0"/programs-*.json; do [ ! -f "$f" ] || mount --bind /dev/null "$f"; done
        exec "$@"
    """
    done = host.ebfw("check", command=("unshare", "--mount", "sh", "-c", hide, str(source_folder())))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^  compile \(bcc\) +yes$", done.stdout, re.MULTILINE)


def test_features_are_told(host: Host) -> None:
    """Complaint 18. What this kernel allows stands in /metrics, one series for each feature, as `ebfw check` has it."""
    page = host.start(EBFW_OUTPUT="none").ready().metrics()
    rows = {row.labels["ebfw_feature"]: row.value for row in page.rows("ebfw_feature")}
    assert rows.keys() >= {"egress", "ingress", "sockops"}
    assert set(rows.values()) <= {0, 1}
