"""Names of addresses, as each workload asked for them: whose, how long, how many."""

from __future__ import annotations

import ipaddress
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.enrich import names as module
from exporter.enrich.names import NAMES_PER_ADDRESS, TTL_CAP, TTL_FLOOR, HiddenPlaces, Names, _Entry, key
from exporter.events import SECOND, Workload
from tests.unit.conftest import Lost

NOW = 1_700_000_000 * SECOND


def workload(cgroup_id: int, pod_uid: str = "", container_id: str = "") -> Workload:
    return Workload(cgroup_id, "/x", "pod", "x", pod_uid=pod_uid, container_id=container_id)


def test_the_containers_of_a_pod_share_and_others_do_not() -> None:
    assert key(workload(1, "uid", "c1")) == key(workload(2, "uid", "c2")) == "uid"
    assert key(workload(1, "", "c1")) == key(workload(2, "", "c1"))
    assert key(workload(1)) == 1
    names = Names()
    names.learn(key(workload(1, "uid")), "example.com", [("192.0.2.1", 300)], NOW)
    assert names.name(key(workload(2, "uid")), "192.0.2.1", NOW) == "example.com"
    assert names.name(key(workload(3)), "192.0.2.1", NOW) == ""
    assert names.name("uid", "192.0.2.2", NOW) == ""


def test_the_name_is_the_one_asked_for_without_its_case_and_final_dot() -> None:
    names = Names()
    names.learn(1, "eXaMPle.COM.", [("192.0.2.1", 300), ("2001:db8::1", 300)], NOW)
    assert names.name(1, "192.0.2.1", NOW) == names.name(1, "2001:db8::1", NOW) == "example.com"
    names.learn(1, ".", [("192.0.2.9", 300)], NOW)
    names.learn(1, "a" * 254, [("192.0.2.9", 300)], NOW)
    names.learn(2, "empty.example", [], NOW)
    assert names.name(1, "192.0.2.9", NOW) == ""
    assert len(names) == 2
    assert names.learned == 2


def test_a_ttl_has_a_floor_and_a_cap() -> None:
    names = Names()
    names.learn(1, "short", [("a", 0)], NOW)
    names.learn(1, "middle", [("b", 600)], NOW)
    names.learn(1, "long", [("c", 1 << 31)], NOW)
    for address, life in (("a", TTL_FLOOR), ("b", 600 * SECOND), ("c", TTL_CAP)):
        assert names.name(1, address, NOW + life - 1)
        assert names.name(1, address, NOW + life) == ""


def test_of_several_names_the_most_recent_that_still_lives() -> None:
    names = Names()
    names.learn(1, "old.example", [("a", 3000)], NOW)
    names.learn(1, "new.example", [("a", 60)], NOW + 1)
    assert names.name(1, "a", NOW + 2) == "new.example"
    assert names.name(1, "a", NOW + 100 * SECOND) == "old.example"
    names.learn(1, "old.example", [("a", 60)], NOW + 2)
    assert names.name(1, "a", NOW + 3) == "old.example"
    assert len(names) == 1
    for i in range(100):
        names.learn(1, f"{i}.example", [("a", 60)], NOW + 4)
    chain = []
    entry: _Entry | None = names._tables[1]["a"]
    while entry is not None:
        chain.append(entry[0])
        entry = entry[2]
    assert chain == [f"{i}.example" for i in range(99, 99 - NAMES_PER_ADDRESS, -1)]


def test_a_workload_that_learns_too_much_loses_its_own_oldest(lost: Lost) -> None:
    names = Names(per_workload=3, total=100)
    names.learn(2, "other", [("z", 300)], NOW)
    names.learn(1, "n", [(address, 300) for address in "abc"], NOW)
    names.learn(1, "n", [("a", 300)], NOW)  # a is young again
    names.learn(1, "n", [("d", 300)], NOW)
    assert [bool(names.name(1, address, NOW)) for address in "abcd"] == [True, False, True, True]
    assert names.name(2, "z", NOW) == "other"
    assert (lost("names", "addresses_full"), len(names)) == (1, 4)


def test_when_all_are_too_many_the_longest_silent_workload_loses_first(lost: Lost) -> None:
    names = Names(per_workload=3, total=5)
    names.learn(1, "n", [("a", 300), ("b", 300)], NOW)
    names.learn(2, "n", [("a", 300), ("b", 300)], NOW)
    names.learn(1, "n", [("b", 300)], NOW)
    names.learn(3, "n", [("a", 300), ("b", 300)], NOW)
    assert [names.name(owner, "a", NOW) for owner in (1, 2, 3)] == ["n", "", "n"]
    assert (lost("names", "addresses_full"), len(names)) == (1, 5)


def test_expiry_goes_in_slices_and_reaches_everything() -> None:
    names = Names()
    for owner in range(40):
        names.learn(owner, "n", [(f"{owner}.{i}", 60 if i % 2 else 3600) for i in range(100)], NOW)
    now = NOW + TTL_FLOOR
    names.expire(now)
    assert 500 <= names.expired <= 600, "one slice"
    names.expire(now + 1)
    assert names.expired <= 600, "not twice within a second"
    for i in range(1, 5):
        names.expire(now + i * SECOND)
    assert (names.expired, len(names)) == (2000, 2000)
    for i in range(5, 15):
        names.expire(NOW + TTL_CAP + i * SECOND)
    assert (names.expired, len(names), names._tables) == (4000, 0, {})


def test_a_clock_set_back_does_not_stop_the_sweep() -> None:
    names = Names()
    names.expire(NOW + 1000 * SECOND)
    names.learn(1, "n", [("a", 60)], NOW - 100 * SECOND)
    names.expire(NOW)
    assert len(names) == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from("xyz"),
            st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 4000)), max_size=4),
            st.integers(0, 100),
        ),
        max_size=60,
    )
)
def test_the_count_is_right_and_no_bound_is_passed(
    steps: list[tuple[int, str, list[tuple[str, int]], int]],
) -> None:
    names, now = Names(per_workload=4, total=9), NOW
    for owner, name, answers, seconds in steps:
        now += seconds * SECOND
        names.learn(owner, name, answers, now)
        names.expire(now)
        assert len(names) == sum(map(len, names._tables.values())) <= 9
        assert all(0 < len(table) <= 4 for table in names._tables.values())
        if answers and seconds:
            assert names.name(owner, answers[-1][0], now) == name


def test_a_look_up_is_cheap() -> None:
    names = Names()
    for owner in range(16):
        names.learn(owner, "example.com", [(f"192.0.{owner}.{i}", 300) for i in range(250)], NOW)
    best = min(timeit.repeat(lambda: names.name(9, "192.0.9.99", NOW), number=100_000, repeat=5)) / 100_000
    assert best < 1e-6


# --- whom `exclude` hides without a socket ----------------------------------------------------------------------------

HIDDEN = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "127.0.0.0/8", "::1/128", "fc00::/7")))


def test_d5_addresses_that_are_excluded() -> None:
    places = HiddenPlaces(HIDDEN, Names())
    who = workload(1)
    assert [host for host in ("10.1.2.3", "127.0.0.1", "::1", "fd00::9", "192.0.2.1", "2001:db8::1", "a.example", "")
            if places(who, host, NOW)] == ["10.1.2.3", "127.0.0.1", "::1", "fd00::9"]  # fmt: skip
    assert not HiddenPlaces((), Names())(who, "10.1.2.3", NOW)


def test_d5_names_that_led_to_excluded_addresses_only() -> None:
    names = Names()
    places = HiddenPlaces(HIDDEN, names)
    pod, other = workload(1, "uid", "c1"), workload(3)
    names.learn_for(pod, "in.example", [("10.0.0.1", 5), ("fd00::1", 5)], NOW)
    names.learn_for(pod, "both.example", [("10.0.0.1", 5), ("192.0.2.1", 5)], NOW)
    assert sorted(names.addresses("uid", "in.example", NOW)) == ["10.0.0.1", "fd00::1"]  # one has two names
    assert names.addresses("uid", "in.example", NOW + TTL_FLOOR) == []
    assert places(workload(2, "uid", "c2"), "in.example", NOW)
    assert not places(pod, "both.example", NOW)
    assert not places(other, "in.example", NOW)
    # A connection that is kept open uses a name long after its TTL; one that nobody uses is forgotten.
    later = NOW + 3000 * SECOND
    assert places(pod, "in.example", later)
    assert places(pod, "in.example", later + 3000 * SECOND)
    assert not places(pod, "in.example", later + 7000 * SECOND)
    # Looked up since it was asked for in vain.
    names.learn_for(pod, "in.example", [("10.0.0.1", 5)], later + 7005 * SECOND)
    assert places(pod, "in.example", later + 7011 * SECOND)


def test_d5_what_is_kept_of_hidden_places_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACES", 50)
    places = HiddenPlaces(HIDDEN, Names())
    for n in range(300):
        assert places(workload(n), "10.0.0.1", NOW)
    assert len(places._found) == 50
