"""A real OpenTelemetry Collector gets exactly what the known workload did, by every way that leads to it, and whatever
happens to the Collector, the agent goes on: nothing stalls, what is lost is counted, memory stays where it was.
"""

from __future__ import annotations

import contextlib
import platform
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pipeline import known
from tests.pipeline.collector import TOKEN, Collector
from tests.pipeline.conftest import Agent, Host, Samples, World, eventually
from tests.pipeline.otlp_receiver import Receiver

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]


def over(collector: Collector, protocol: str, port: str, scheme: str = "http", **more: str) -> dict[str, str]:
    """The variables that send a run to one of the Collector's receivers."""
    url = f"{scheme}://127.0.0.1:{collector.ports[port]}"
    wire = "grpc" if protocol == "grpc" else "http/protobuf"
    common = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": wire}
    return common | {f"OTEL_EXPORTER_OTLP_{key.upper()}": text for key, text in more.items()}


def ways(collector: Collector) -> dict[str, dict[str, str]]:
    c = collector.certificates
    certificates = {
        "certificate": str(c.ca),
        "client_certificate": str(c.client),
        "client_key": str(c.client_key),
    }
    # As the specification has it: a space in a value is %20.
    token = f"authorization=Bearer%20{TOKEN}"
    found = {}
    for protocol in ("grpc", "http"):
        found[protocol] = over(collector, protocol, protocol)
        found[f"{protocol}-tls-gzip"] = over(
            collector, protocol, f"tls_{protocol}", "https", certificate=str(c.ca), compression="gzip"
        )
        found[f"{protocol}-mutual"] = over(
            collector, protocol, f"remote_{protocol}", "https", headers=token, compression="gzip", **certificates
        )
        # What an administrator has set for every program of the host does not beat what is set for the exporter.
        found[f"{protocol}-mutual"]["REQUESTS_CA_BUNDLE"] = str(c.client)
    return found


WAYS = [f"{protocol}{how}" for protocol in ("grpc", "http") for how in ("", "-tls-gzip", "-mutual")]


class Run(NamedTuple):
    began: int
    ended: int
    pages: dict[str, Samples]  # by way: the agent's /metrics when all was sent
    logs: dict[str, str]


def start_all(host: Host, settings: dict[str, dict[str, str]]) -> dict[str, Agent]:
    """An agent for each entry, all on one cgroup, each with pins of its own; they see the same traffic. The first is
    waited for: where nothing is cached it compiles, which all at once would do several times as slowly."""
    agents: dict[str, Agent] = {}
    for name, variables in settings.items():
        pins = str(host.directory / f"pins-{name}")
        agents[name] = host.start(**{"EBFW_BPF_PIN_PATH": pins, **known.settings(name), **variables})
        if len(agents) == 1:
            agents[name].ready()
    for agent in agents.values():
        agent.ready()
    return agents


def stop_all(agents: Iterable[Agent]) -> None:
    """At the same time: each waits for its receiver as long as it may."""
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(Agent.stop, agents)) == {0}


@pytest.fixture(scope="module")
def run(world: World, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One agent for each way; they see the traffic once."""
    with Host(world, tmp_path_factory.mktemp("ways")) as host:
        agents = start_all(host, ways(collector))
        began = time.time_ns()
        known.traffic(world, host.shop)
        for way, agent in agents.items():
            eventually(lambda agent=agent: len(agent.lines) >= known.EVENTS)
            eventually(lambda way=way: len(collector.spans(way)) + len(collector.logs(way)) >= known.RECORDS, 30)
        ended = time.time_ns()
        pages = {way: agent.settled() if way == "grpc" else agent.metrics() for way, agent in agents.items()}
        stop_all(agents.values())
        yield Run(began, ended, pages, {way: agent.log for way, agent in agents.items()})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_brings_exactly_what_happened(run: Run, collector: Collector, way: str) -> None:
    spans, logs = collector.spans(way), collector.logs(way)
    assert known.spans(spans) == known.SPANS
    assert known.logs(logs) == known.LOGS
    assert len({span.span_id for span in spans}) == len(spans)
    shop = [point for point in collector.points(way) if point.resource["service.name"] == "shop"]
    assert known.metrics(shop) == known.METRICS
    assert not [row for row in run.pages[way].rows("ebfw_records_lost_total") if row.value]


@pytest.mark.parametrize("way", WAYS)
def test_resource(run: Run, collector: Collector, way: str) -> None:
    common = {
        "host.name": platform.node(),
        "k8s.node.name": f"node-{way}",
        "deployment.environment.name": way,
        "telemetry.distro.name": "ebfw",
    }
    for signal_ in (collector.spans(way), collector.logs(way), collector.points(way)):
        by_name = {item.resource["service.name"]: item.resource for item in signal_}
        resource = dict(by_name["shop"])
        version = resource.pop("telemetry.distro.version")
        assert resource == common | {
            "service.name": "shop",
            "service.instance.id": f"node-{way}.shop",
            "ebfw.workload.kind": "cgroup",
        }
        assert by_name.keys() <= {"shop", "ebfw"}
    # D17: the service's own keys describe the agent and nobody else.
    agent = by_name["ebfw"]
    assert agent["service.version"] == "9.9.9"
    assert agent["telemetry.distro.version"] == version


def test_requests_link_to_their_connection(run: Run, collector: Collector) -> None:
    """Each request is in a trace of its own, and each set-up in another: root, and a child that does not start before
    it (D7, D11)."""
    spans = {span.span_id: span for span in collector.spans("grpc")}
    roots = [span for span in spans.values() if span.name == "connection"]
    children = [span for span in spans.values() if span.parent_id]
    assert len({span.trace_id for span in roots}) == len(roots) == len(children)
    for child in children:
        parent = spans[child.parent_id]
        assert parent.trace_id == child.trace_id
        assert parent.start <= child.start <= child.end <= parent.end
    requests = [span for span in spans.values() if span.name.startswith("GET")]
    assert all(span.kind == 3 and span.attributes["http.response.status_code"] == 200 for span in requests)
    assert {link for span in requests for link in span.links} == {
        (span.trace_id, span.span_id) for span in roots if not span.failed
    }


def test_kernel_time(run: Run, collector: Collector) -> None:
    for way in WAYS:
        for span in collector.spans(way):
            assert run.began <= span.start <= span.end <= run.ended
        for log in collector.logs(way):
            assert run.began <= log.time <= run.ended


def test_all_ways_say_the_same(run: Run, collector: Collector) -> None:
    """Down to the attributes, but for what differs between two measurements."""
    measured = ("duration", "first_byte", "rtt", "received", "sent", "retransmits", "connection.id")

    def said(way: str) -> list[str]:
        rows = []
        for item in [*collector.spans(way), *collector.logs(way)]:
            attributes = {k: v for k, v in item.attributes.items() if not k.endswith(measured)}
            rows.append(f"{type(item).__name__} {item.name} {sorted(attributes.items())}")
        return sorted(rows)

    first = said(WAYS[0])
    assert len(first) == known.RECORDS
    for way in WAYS[1:]:
        assert said(way) == first


def test_units(run: Run, collector: Collector) -> None:
    points = collector.points("grpc")
    units = {point.name: point.unit for point in points}
    assert units["ebfw.network.io"] == "By"
    assert units["ebfw.tcp.connections"] == "{connection}"
    assert units["dns.lookup.duration"] == "s"
    kinds = {point.name: point.kind for point in points}
    assert (kinds["ebfw.network.io"], kinds["dns.lookup.duration"], kinds["ebfw.table.used"]) == (
        "sum",
        "histogram",
        "gauge",
    )
    assert all(point.start <= point.time for point in points)


def test_the_token_is_nowhere(run: Run, collector: Collector) -> None:
    assert all(TOKEN not in text for text in run.logs.values())
    assert all(TOKEN not in page.text for page in run.pages.values())
    for signal_ in ("traces", "metrics", "logs"):
        assert TOKEN not in (collector.directory / f"{signal_}.jsonl").read_text()


# --- what can go wrong ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Collector]:
    """A Collector that a test may stop, not yet started."""
    found = Collector(tmp_path)
    try:
        yield found
    finally:
        found.stop(signal.SIGKILL)


STALL = 4.0  # seconds until a line; a stalled agent would take as long as an export waits, and that again and again
# What is tried again is given up after a second, so that tests see it given up.
IMPATIENT = {"OTEL_EXPORTER_OTLP_TIMEOUT": "1000"}


def lost(page: Samples, *causes: str) -> int:
    """Spans and log records that did not reach a receiver (of metrics, points are counted apart)."""
    causes = causes or ("queue_full", "failed", "rejected", "encode", "shutdown", "budget")
    return sum(page.lost("export", cause) for cause in causes)


def taken(page: Samples) -> int:
    """Spans and log records that a receiver said it took."""
    return sum(page.total("ebfw_export_items_total", ebfw_signal=signal_) for signal_ in ("traces", "logs"))


def quiet(*agents: Agent) -> bool:
    """Whether nothing waits any more, nor is on its way: that takes at most IMPATIENT's second."""

    def state(agent: Agent) -> tuple[int, ...]:
        page = agent.metrics()
        signals = ("traces", "logs")
        waiting = [page.total("ebfw_export_queue", ebfw_signal=signal_) for signal_ in signals]
        return (sum(waiting), lost(page), *(page.total("ebfw_export_items_total", ebfw_signal=s) for s in signals))

    before = [state(agent) for agent in agents]
    time.sleep(2.5)
    return not any(waiting for waiting, *_ in before) and [state(agent) for agent in agents] == before


def arrived(collector: Collector, run: str) -> int:
    """Distinct spans and log records: what is sent again after an answer was lost arrives twice."""
    spans = {span.span_id for span in collector.spans(run)}
    logs = {(log.time, log.name, repr(sorted(log.attributes.items()))) for log in collector.logs(run)}
    return len(spans) + len(logs)


def beat(world: World, host: Host, agents: Sequence[Agent], number: int) -> float:
    """One request, and how long it took until its line stood on everybody's standard output, in seconds."""
    mark = f"/beat/{number}"
    world.curl(host.shop, f"http://{known.SERVER}{mark}")
    at = time.monotonic()
    eventually(lambda: all(mark in agent.output for agent in agents))
    return time.monotonic() - at


@contextlib.contextmanager
def unharmed(world: World, host: Host, *agents: Agent) -> Iterator[None]:
    """Inside, something happens to the receiver. Before and after, lines come as fast, and memory is what it was."""
    assert beat(world, host, agents, 1) < STALL
    before = [agent.memory() for agent in agents]
    yield
    assert max(beat(world, host, agents, number) for number in (2, 3, 4)) < STALL
    for agent, memory in zip(agents, before, strict=True):
        assert agent.memory() < memory + 16e6


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_collector_comes_later(host: Host, world: World, own: Collector, protocol: str) -> None:
    agent = host.start(**known.settings("late"), **over(own, protocol, protocol), **IMPATIENT).ready()
    known.traffic(world, host.shop)
    # All of the first round is given up before there is anybody to take it.
    eventually(lambda: lost(agent.metrics()) == known.RECORDS, 30)
    assert lost(agent.metrics(), "failed") == known.RECORDS
    own.start()
    known.traffic(world, host.shop)
    eventually(lambda: arrived(own, "late") + lost(agent.metrics()) >= 2 * known.RECORDS, 30)
    page = agent.metrics()
    assert agent.stop() == 0
    # Metrics are totals: what the Collector did not see of them, the next push told.
    shop = [point for point in own.points("late") if point.resource["service.name"] == "shop"]
    assert known.metrics(shop) == {word: 2 * number for word, number in known.METRICS.items()}
    assert arrived(own, "late") + lost(page) == 2 * known.RECORDS
    assert page.total("ebfw_export_items_total", ebfw_signal="traces") == len(own.spans("late"))
    assert page.total("ebfw_export_items_total", ebfw_signal="logs") == len(own.logs("late"))


def test_collector_restarts(host: Host, world: World, own: Collector) -> None:
    own.start()
    agent = host.start(**known.settings("restart"), **over(own, "grpc", "grpc")).ready()
    rounds = 4
    for number in range(rounds):
        known.traffic(world, host.shop)
        if number == 1:
            own.stop()
        if number == 2:
            own.start()
    eventually(lambda: arrived(own, "restart") + lost(agent.metrics()) >= rounds * known.RECORDS, 40)
    page = agent.metrics()
    # Within the exporter's patience of ten seconds the Collector was back: nothing is lost at all.
    assert lost(page) == 0
    assert agent.stop() == 0
    assert known.spans(own.spans("restart")) == known.times(known.SPANS, rounds)
    assert known.logs(own.logs("restart")) == known.times(known.LOGS, rounds)


def test_collector_hangs(host: Host, world: World, own: Collector) -> None:
    own.start()
    small = {"OTEL_BSP_MAX_QUEUE_SIZE": "64", "OTEL_BLRP_MAX_QUEUE_SIZE": "64"}
    agent = host.start(**known.settings("slow"), **over(own, "http", "http"), **IMPATIENT, **small).ready()
    rounds = 4
    with unharmed(world, host, agent):
        own.pause()
        for _ in range(rounds):
            known.traffic(world, host.shop)
        eventually(lambda: len(agent.lines) >= rounds * known.EVENTS)
        eventually(lambda: lost(agent.metrics(), "queue_full"))
        assert agent.metrics().total("ebfw_export_queue", ebfw_signal="traces") <= 64
    own.go_on()
    known.traffic(world, host.shop)
    eventually(lambda: quiet(agent))
    page = agent.metrics()
    assert agent.stop() == 0
    # What timed out may have been taken all the same: nothing is missing that is not counted.
    told = (rounds + 1) * known.RECORDS + 4 * known.BEAT
    assert told - arrived(own, "slow") <= lost(page)


WRONG = [
    ("token", "grpc"),
    ("token", "http"),
    ("no token", "http"),
    ("no certificate", "grpc"),
    ("no certificate", "http"),
    ("unknown authority", "http"),
    ("mixed up port", "grpc"),
    ("mixed up port", "http"),
]


def unwelcome(collector: Collector, wrong: str, protocol: str) -> dict[str, str]:
    """The variables of somebody who may not send, or sends to the wrong place."""
    c = collector.certificates
    if wrong == "token":
        return over(collector, protocol, f"token_{protocol}", headers="authorization=Bearer%20CanaryWrong8d2f")
    if wrong == "no token":
        return over(collector, protocol, f"token_{protocol}")
    if wrong == "no certificate":
        return over(
            collector, protocol, f"remote_{protocol}", "https", certificate=str(c.ca), headers="authorization=x"
        )
    if wrong == "unknown authority":
        return over(collector, protocol, f"tls_{protocol}", "https")
    return over(collector, protocol, "http" if protocol == "grpc" else "grpc")


def refused_as(wrong: str, protocol: str) -> str:
    return f"refused-{protocol}-{wrong.replace(' ', '-')}"


class Refused(NamedTuple):
    page: Samples  # when nothing waited any more
    log: str


def wrong_protocols(log: str) -> list[str]:
    """The signals whose protocol the log says to be wrong."""
    return re.findall(r"^ebfw: warning: OTLP (\w+): .* set OTEL_EXPORTER_OTLP_PROTOCOL=", log, re.MULTILINE)


@pytest.fixture(scope="module")
def refused(
    world: World, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Refused]]:
    """An agent for each of WRONG, at the same time: what takes long is to give up."""
    settings = {refused_as(*how): {**unwelcome(collector, *how), **IMPATIENT} for how in WRONG}
    with Host(world, tmp_path_factory.mktemp("refused")) as host:
        agents = start_all(host, settings)
        with unharmed(world, host, *agents.values()):
            known.traffic(world, host.shop)
            for agent in agents.values():
                eventually(lambda agent=agent: lost(agent.metrics(), "failed") >= known.RECORDS, 30)
        eventually(lambda: quiet(*agents.values()), 30)
        for how in WRONG:
            # What the other server says before it hangs up does not always arrive; of some pushes it does.
            if how[0] == "mixed up port":
                eventually(lambda how=how: wrong_protocols(agents[refused_as(*how)].log), 30)
        pages = {name: agent.metrics() for name, agent in agents.items()}
        stop_all(agents.values())
        yield {name: Refused(pages[name], agent.log) for name, agent in agents.items()}


@pytest.mark.parametrize(("wrong", "protocol"), WRONG)
def test_collector_refuses(refused: dict[str, Refused], collector: Collector, wrong: str, protocol: str) -> None:
    """Somebody who may not send: nothing arrives, every record is counted, and no secret is in the log."""
    name = refused_as(wrong, protocol)
    page, log = refused[name]
    assert lost(page) == lost(page, "failed") == known.RECORDS + 4 * known.BEAT
    assert page.total("ebfw_export_items_total") == 0
    assert arrived(collector, name) == 0
    assert not collector.points(name)
    assert "CanaryWrong8d2f" not in log


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_d19_a_mixed_up_port_gets_one_clear_sentence(refused: dict[str, Refused], protocol: str) -> None:
    # One for each signal: each may have an endpoint of its own.
    signals = wrong_protocols(refused[refused_as("mixed up port", protocol)].log)
    assert signals
    assert len(set(signals)) == len(signals)


def pushing(receiver: Receiver, protocol: str) -> dict[str, str]:
    """The variables that send a run to a receiver of ours."""
    grpc = protocol == "grpc"
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc if grpc else receiver.http,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if grpc else "http/protobuf",
    }


def came(receiver: Receiver) -> int:
    return len(list(receiver.spans())) + len(list(receiver.logs()))


def test_d19_what_a_partial_success_rejects_is_counted(host: Host, world: World) -> None:
    """Partial success: the receiver took a request but for some items, and says how many. No Collector does that by
    itself, so this receiver is ours."""
    with Receiver() as grpc, Receiver() as http:
        receivers = {"grpc": grpc, "http": http}
        grpc.reject = http.reject = 1
        agents = start_all(host, {protocol: pushing(found, protocol) for protocol, found in receivers.items()})
        known.traffic(world, host.shop)
        for receiver in receivers.values():
            eventually(lambda receiver=receiver: came(receiver) >= known.RECORDS)
        eventually(lambda: quiet(*agents.values()))
        for protocol, receiver in receivers.items():
            requests = len(receiver.of("traces")) + len(receiver.of("logs"))
            page = agents[protocol].metrics()
            assert lost(page) == lost(page, "rejected") == requests
            assert taken(page) == known.RECORDS - requests
            assert page.lost("export", "rejected_points") > 0
        stop_all(agents.values())
    for agent in agents.values():
        assert "refused by the test" in agent.log


# Lookups of distinct names of 250 bytes, which is what makes a span, and a log record, large.
_LONG = """
import socket, sys
for n in range(int(sys.argv[1])):
    labels = [f"{n:06d}".ljust(61, "x")] + ["y" * 61] * 3
    try:
        socket.getaddrinfo(".".join(labels)[:243] + ".test", 80, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        pass
"""


def test_d19_payloads_stay_below_what_a_collector_takes(host: Host, world: World, own: Collector) -> None:
    """A gRPC server takes 4 MiB unless it is told otherwise, and refuses more with an error that no retry helps. Here
    all of one batch would be more than that. (So much in the Collector of all tests would slow down each of them.)"""
    own.start()
    count = 6007
    room = {}
    for prefix in ("BSP", "BLRP"):
        room |= {f"OTEL_{prefix}_MAX_QUEUE_SIZE": "20000", f"OTEL_{prefix}_MAX_EXPORT_BATCH_SIZE": "20000"}
        room |= {f"OTEL_{prefix}_SCHEDULE_DELAY": "8000"}
    runs = {f"large-{protocol}": {**room, **over(own, protocol, protocol)} for protocol in ("grpc", "http")}
    agents = start_all(host, runs)
    world.python(host.shop, _LONG, str(count))
    for agent in agents.values():
        eventually(lambda agent=agent: len(agent.lines) >= count, 60)
    for run, agent in agents.items():
        # A record for each, and a set-up that failed: a span and its child. What was written is read once it is all.
        eventually(lambda agent=agent: taken(agent.metrics()) >= 3 * count, 60)
        eventually(lambda run=run: arrived(own, run) >= 3 * count, 60)
        assert lost(agent.metrics()) == 0
    stop_all(agents.values())
    for run in runs:
        assert len(own.logs(run)) == count
        lookups = [span for span in own.spans(run) if span.name.startswith("DNS lookup")]
        assert len(lookups) == count
        assert max(len(span.attributes["dns.question.name"]) for span in lookups) > 240


def test_d19_retry_after_is_honoured(host: Host, world: World) -> None:
    with Receiver() as grpc, Receiver() as http:
        receivers = {"grpc": grpc, "http": http}
        for receiver in receivers.values():
            receiver.refuse, receiver.retry_after = 2, 3
        agents = start_all(
            host,
            {
                protocol: {"OTEL_METRICS_EXPORTER": "none", **pushing(receiver, protocol)}
                for protocol, receiver in receivers.items()
            },
        )
        known.traffic(world, host.shop)
        refused: dict[str, float] = {}
        waited: dict[str, float] = {}

        def all_came() -> bool:
            now = time.monotonic()
            for protocol, receiver in receivers.items():
                if receiver.refused == 2:
                    refused.setdefault(protocol, now)
                if came(receiver) >= known.RECORDS:
                    waited.setdefault(protocol, now - refused[protocol])
            return len(waited) == len(receivers)

        eventually(all_came, 20)
        # Refused at about the same time, traces and logs; the wait began a moment before it was seen.
        assert all(2 < seconds < 5 for seconds in waited.values()), waited
        for agent in agents.values():
            assert lost(agent.metrics()) == 0
        stop_all(agents.values())
        for receiver in receivers.values():
            assert len(list(receiver.spans())) == known.SPANS.total()


def test_collector_dies_for_good(host: Host, world: World, own: Collector) -> None:
    own.start()
    agent = host.start(**known.settings("dead"), **over(own, "grpc", "grpc"), **IMPATIENT).ready()
    known.traffic(world, host.shop)
    eventually(lambda: arrived(own, "dead") == known.RECORDS)
    with unharmed(world, host, agent):
        # What a Collector took and had not written when it was killed is nobody's to count.
        eventually(lambda: arrived(own, "dead") == known.RECORDS + known.BEAT)
        own.stop(signal.SIGKILL)
        for _ in range(3):
            known.traffic(world, host.shop)
        eventually(lambda: lost(agent.metrics()) >= 3 * known.RECORDS, 40)
    eventually(lambda: quiet(agent))
    assert lost(agent.metrics()) == 3 * known.RECORDS + 3 * known.BEAT
    at = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - at < 10


def test_leaving_while_the_collector_hangs(host: Host, world: World, own: Collector) -> None:
    """The end of the agent does not wait for a receiver that never answers."""
    own.start()
    agent = host.start(**known.settings("leave"), **over(own, "grpc", "grpc")).ready()
    own.pause()
    known.traffic(world, host.shop)
    eventually(lambda: len(agent.lines) >= known.EVENTS)
    at = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - at < 12
