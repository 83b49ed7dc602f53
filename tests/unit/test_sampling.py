"""Which spans are kept: the application's decision, the sampler that is set, the budget (D10)."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from exporter import health
from exporter.emit.sampling import Budget, Request, Sampler
from exporter.emit.setup import Setup
from exporter.emit.spans import grave
from exporter.emit.trace_context import Context, context
from exporter.events import Event
from tests.unit.samples import EVENT, LOOKUP, PARENT, REQUEST, SSHD, UNSAMPLED, WEB, outcome


class Rig:
    def __init__(self, rate: int = 100) -> None:
        self.now = 10.0
        self.losses = health.Losses()
        self.budget = Budget(rate, self.losses, clock=lambda: self.now)

    def offer(self, event: Event) -> list[Request | Setup]:
        return self.budget.offer(Request(event), event.workload.cgroup_id, grave(event))

    def next(self) -> list[Request | Setup]:
        self.now += 1
        return self.budget.take()

    @property
    def lost(self) -> int:
        return self.losses.snapshot().get(("export", "budget"), 0)


def requests(items: list[Request | Setup]) -> list[Event]:
    return [item.event for item in items if isinstance(item, Request)]


def test_d10_the_budget_is_fair_and_keeps_what_is_grave_first() -> None:
    rig = Rig(100)
    for n in range(5000):
        assert rig.offer(REQUEST) == []
        if n < 10:
            rig.offer(REQUEST._replace(workload=SSHD))
            rig.offer(outcome(status=500))
            rig.offer(outcome(status=404))
    chosen = requests(rig.next())
    assert len(chosen) == 100
    assert Counter(event.exchange.status for event in chosen if event.exchange)[500] == 10
    assert Counter(event.workload for event in chosen)[SSHD] == 10
    assert rig.lost == 5000 + 30 - 100
    assert rig.budget.take() == []
    rig.offer(REQUEST)
    assert len(rig.budget.take(everything=True)) == 1


@pytest.mark.parametrize(
    ("event", "first"),
    [
        (outcome(status=500), True),
        (outcome(status=0, error="connection_reset"), True),
        (outcome(grpc_status=14), True),
        (EVENT._replace(status="denied"), True),
        (EVENT._replace(status="refused"), True),
        (LOOKUP._replace(status="SERVFAIL"), True),
        (outcome(status=404), False),
        (outcome(grpc_status=5), False),
        (outcome(status=200), False),
        (EVENT._replace(status="cancelled"), False),
    ],
)
def test_d10_what_is_kept_first(event: Event, first: bool) -> None:
    assert grave(event) is first


@pytest.mark.parametrize("asked", [False, True])
def test_d10_any_request_of_a_busy_workload_is_as_likely(asked: bool) -> None:
    """Not the first hundred of each second; nor where the budget is asked for a batch before anything is offered."""
    random.seed(10)
    rig = Rig(100)
    for first in range(0, 2000, 250):
        batch = [REQUEST._replace(time=n) for n in range(first, first + 250)]
        for event in [event for event in batch if not (asked and rig.budget.refuses(event.workload.cgroup_id))]:
            rig.offer(event)
    times = [event.time for event in requests(rig.next())]
    assert len(times) == len(set(times)) == 100
    assert sum(time >= 1000 for time in times) > 25
    assert rig.lost == 1900


def test_d10_a_place_that_was_drawn_is_lost_with_its_second() -> None:
    """It is asked in one second and offered in the next: a candidate of that one, and counted once."""
    rig = Rig(10)
    offered = 0
    for _ in range(50):
        if not rig.budget.refuses(WEB.cgroup_id):
            offered += 1
            if offered <= 10:
                rig.offer(REQUEST)
    rig.now += 1
    assert len(rig.offer(REQUEST)) == 10
    assert rig.lost == 50 - offered
    assert len(rig.next()) == 1
    assert rig.lost == 50 - offered


def test_d10_a_set_up_costs_as_many_spans_as_it_has() -> None:
    rig = Rig(5)
    for n in range(4):
        setup = Setup([LOOKUP, EVENT], n)
        rig.budget.offer(setup, WEB.cgroup_id, False)
    chosen = rig.next()
    assert sum(item.weight for item in chosen) == 3
    assert [item.kept for item in chosen if isinstance(item, Setup)] == [True]
    assert rig.lost == 9


def test_d10_memory_is_bounded_and_everything_is_accounted_for() -> None:
    rig = Rig(1_000_000)
    for n in range(10_000):
        rig.offer(REQUEST._replace(workload=WEB._replace(cgroup_id=n)))
    chosen = rig.next()
    assert len(chosen) == 4096
    assert rig.lost == 10_000 - 4096


def parent(traceparent: str) -> Context:
    found = context(traceparent)
    assert found is not None
    return found


@pytest.mark.parametrize("ratio", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("parent_based", [False, True])
def test_d10_an_application_that_does_not_sample_wins_over_everything(ratio: float | None, parent_based: bool) -> None:
    assert not Sampler(ratio, parent_based).keep(parent(UNSAMPLED))


def test_d10_samplers_do_what_the_specification_says() -> None:
    sampled = parent(PARENT)
    assert Sampler().keep(None)
    assert Sampler().keep(sampled)
    assert not Sampler(0.0).keep(sampled)  # always_off wins
    assert Sampler(0.0, True).keep(sampled)  # the parent decides
    assert not Sampler(0.0, True).keep(None)
    assert Sampler(0.0).never
    assert not Sampler(0.0, True).never
    kept = sum(Sampler(0.25).keep(None) for _ in range(4000))
    assert 800 < kept < 1200
    by_id = [Context(random.Random(n).randbytes(16), bytes(8), 1) for n in range(4000)]
    kept_ids = [found for found in by_id if Sampler(0.25).keep(found)]
    assert 800 < len(kept_ids) < 1200
    assert all(Sampler(0.5).keep(found) for found in kept_ids)  # the same decision everywhere: a trace is kept whole


@pytest.mark.parametrize("text", ["", "00-zz", "rubbish" * 10, "00-" + "g" * 32 + "-" + "0" * 16 + "-01"])
def test_a_context_that_is_none(text: str) -> None:
    assert context(text) is None
