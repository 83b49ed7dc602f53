"""Workloads that tell their own telemetry are not told twice (D12)."""

from __future__ import annotations

import pytest

from exporter.emit.instrumented import ADD, SECONDS, Instrumented
from exporter.events import Event, Flow
from tests.unit.samples import EVENT, REQUEST, SSHD, WEB, outcome

POST = REQUEST._replace(method="POST")
TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
LOGS = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"


@pytest.mark.parametrize(
    ("event", "traces", "metrics"),
    [
        (POST._replace(path="/v1/traces"), True, False),
        (POST._replace(path="/v1/metrics"), False, True),
        (POST._replace(path="/v1/logs"), False, False),
        (REQUEST._replace(path="/v1/traces"), False, False),  # GET: somebody's own API
        (POST._replace(path="/v1/traces/7"), False, False),
        (POST._replace(path=TRACES), True, False),
        (POST._replace(path=METRICS), False, True),
        (POST._replace(path=LOGS), False, False),
        (EVENT._replace(port=4317), True, True),
        (EVENT._replace(port=4318, filtered=True), True, True),
        (EVENT._replace(port=443), False, False),
    ],
)
def test_d12_who_sends_otlp(event: Event, traces: bool, metrics: bool) -> None:
    seen, add = Instrumented(), Instrumented(ADD)
    seen.observe(event)
    add.observe(event)
    assert (seen.traces(WEB), seen.metrics(WEB)) == (traces, metrics)
    assert (add.traces(WEB), add.metrics(WEB)) == (False, False)
    assert not seen.traces(SSHD)


def test_d12_collectors_make_no_spans_whatever_is_set() -> None:
    for mode in ("skip", ADD):
        seen = Instrumented(mode)
        seen.flow(Flow(WEB, "server", "tcp", "", 4317, "private", "", "address"))
        seen.observe(REQUEST._replace(workload=SSHD, comm="otelcol-contrib"))
        assert seen.traces(WEB)
        assert seen.collector(WEB)
        assert seen.traces(SSHD)
        seen.flow(Flow(WEB._replace(cgroup_id=9), "server", "tcp", "", 8080, "private", "", "address"))
        assert not seen.traces(WEB._replace(cgroup_id=9))


def test_d12_our_own_traffic_is_never_told() -> None:
    seen = Instrumented(pid=4711)
    assert seen.own(EVENT._replace(pid=4711))
    assert seen.own(outcome(status=200)._replace(pid=0))  # the same socket, told from where nobody's process is known
    assert not seen.own(EVENT._replace(cookie=5))
    assert not seen.own(EVENT._replace(cookie=0, pid=0))


def test_d12_it_is_forgotten_in_time_and_bounded() -> None:
    now = [0.0]
    seen = Instrumented(clock=lambda: now[0])
    seen.observe(POST._replace(path="/v1/traces"))
    now[0] = SECONDS - 1
    assert seen.traces(WEB)
    now[0] = SECONDS + 1
    assert not seen.traces(WEB)
    for n in range(10_000):
        seen.observe(POST._replace(path="/v1/traces", workload=WEB._replace(cgroup_id=n + 1)))
        seen.own(EVENT._replace(pid=seen._pid, cookie=n + 1))
    assert len(seen) == 4096
    assert len(seen._own) == 4096


def test_d12_a_connection_to_an_excluded_collector_is_for_us_alone() -> None:
    seen = Instrumented()
    hidden = EVENT._replace(port=4317, filtered=True)
    assert seen.take([hidden, EVENT, EVENT._replace(filtered=True)]) == [EVENT, EVENT._replace(filtered=True)]
    assert seen.traces(WEB)
