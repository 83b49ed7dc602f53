"""D21: peer groups: what matches, what a mistake says, what a change of the file does, and where a group shows.

Excluded: the agent with a file (tests/pipeline/test_beyond.py).
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import health
from exporter.emit import semconv as c
from exporter.emit.console import JsonFormat, TextFormat
from exporter.emit.metrics import Metrics
from exporter.emit.resource import Resources
from exporter.emit.spans import step
from exporter.enrich import groups
from exporter.enrich.groups import PeerGroups, Table, read
from exporter.errors import SettingsError
from exporter.events import Counts, Event, Flow, Workload

UNIT = Workload(7, "/system.slice/shop.service", "unit", "shop.service", unit="shop.service")
CONNECT = Event(
    "connect", 10**18, UNIT, 42, "curl", "tcp", "client", "192.0.2.9", 40000, "52.216.1.1", 443,
    "internet", "files.s3.amazonaws.com", "sni", "ok", 20_000_000,
)  # fmt: skip
FILE = """
groups:
  s3:
    domains: ["*.s3.amazonaws.com"]
    cidrs: [52.216.0.0/15, 2600:1f00::/24]
    collapse: true
  aws:
    domains: [amazonaws.com]
    cidrs: [52.0.0.0/8]
  partner-x:
    cidrs: [203.0.113.7, "::ffff:198.51.100.0/120"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "groups.yaml"
    made.write_text(FILE)
    return made


@pytest.mark.parametrize(
    ("name", "address", "group"),
    [
        ("s3.amazonaws.com", "", "s3"),
        ("a.b.s3.amazonaws.com", "192.0.2.1", "s3"),
        ("ec2.amazonaws.com", "52.216.0.1", "aws"),  # the name decides before the address
        ("nots3.amazonaws.com", "", "aws"),
        ("notamazonaws.com", "", ""),
        ("com", "", ""),
        ("", "52.216.255.255", "s3"),
        ("", "52.217.255.255", "s3"),
        ("", "52.218.0.0", "aws"),
        ("example.com", "52.1.1.1", "aws"),
        ("", "203.0.113.7", "partner-x"),
        ("", "203.0.113.8", ""),
        ("", "198.51.100.200", "partner-x"),
        ("", "2600:1f00::1", "s3"),
        ("", "2600:2000::1", ""),
        ("52.216.0.1", "52.216.0.1", "s3"),  # no name known: the address stands in its place
        ("", "not an address", ""),
        ("", "", ""),
    ],
)
def test_d21_longest_match(path: Path, name: str, address: str, group: str) -> None:
    assert PeerGroups(path).of(name, address) == group


def test_d21_longest_match_is_what_a_search_of_all_finds() -> None:
    networks = {
        ipaddress.ip_network((int(ipaddress.ip_address("10.0.0.0")) >> bits << bits, 32 - bits)): f"g{bits}"
        for bits in range(25)
    }
    networks |= {ipaddress.ip_network("10.0.0.128/25"): "half", ipaddress.ip_network("::/0"): "six"}
    table = Table({}, networks)
    for text in ("10.0.0.1", "10.0.0.129", "10.0.1.1", "10.3.0.1", "11.0.0.1", "200.1.1.1", "::1"):
        address = ipaddress.ip_address(text)
        found = [net for net in networks if address.version == net.version and address in net]
        expected = networks[max(found, key=lambda net: net.prefixlen)] if found else ""
        assert table.of("", text) == expected, text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("groops: {}", ":1: groops: there is no such key; did you mean groups?"),
        ("groups:\n  s3:\n    cidr: []", ":3: groups.s3.cidr: there is no such key; did you mean cidrs?"),
        ("groups:\n  s3:\n    cidrs: [10.0.0.0/33]", ":3: groups.s3.cidrs[0]: '10.0.0.0/33': use a network"),
        ("groups:\n  s3:\n    domains: ['a*.com']", ":3: groups.s3.domains[0]: 'a*.com': use a domain"),
        ("groups:\n  s3:\n    domains: x.com", "groups.s3.domains: expected a list"),
        ("groups:\n  s3:\n    collapse: 3", "groups.s3.collapse: expected true or false"),
        ("groups:\n  a b:\n    cidrs: []", "groups.a b: use letters"),
        ("groups:\n  a: {domains: [x.com]}\n  b: {domains: [X.com.]}", "groups.b.domains: x.com is in a already"),
        ("groups:\n  a: {cidrs: [10.0.0.1/8]}\n  b: {cidrs: [10.0.0.0/8]}", "10.0.0.0/8 is in a already"),
        ("groups: [a]", "groups: expected a mapping"),
        ("groups:\n  a: {}\n  a: {}", "second time"),
        ("groups: {" + ", ".join(f"g{n}: {{}}" for n in range(257)) + "}", "at most 256"),
    ],
)
def test_d21_a_mistake_is_an_error_that_names_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)


def test_d21_too_many_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PATTERNS", 3)
    path = tmp_path / "g.yaml"
    path.write_text("groups: {a: {domains: [a.com, b.com], cidrs: [10.0.0.0/8, 11.0.0.0/8]}}")
    with pytest.raises(SettingsError, match="more than 3"):
        read(path)


def test_d21_no_file_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"EBFW_PEER_GROUPS=.*: cannot read the peer groups: No such file"):
        PeerGroups(tmp_path / "none.yaml")


def poll_until(made: PeerGroups, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        made.poll()
        time.sleep(0.005)


def test_d21_a_change_is_taken_over_and_a_mistake_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = PeerGroups(path)
    assert made.of("pay.stripe.com", "") == ""
    path.write_text(FILE + "  stripe:\n    domains: [stripe.com]\n")
    poll_until(made, lambda: made.of("pay.stripe.com", "") == "stripe")
    assert made.of("", "52.216.0.1") == "s3"

    path.write_text("groups:\n  stripe:\n    domain: [stripe.com]\n")
    poll_until(made, lambda: "did you mean domains?" in caplog.text)
    assert "the 8 from before stay in force" in caplog.text
    assert made.of("pay.stripe.com", "") == "stripe"
    assert not health.features.active("peer_groups")

    path.unlink()
    poll_until(made, lambda: "No such file" in caplog.text)
    assert made.of("pay.stripe.com", "") == "stripe"

    new = path.with_suffix(".new")
    new.write_text("groups: {other: {domains: [stripe.com]}}")
    os.replace(new, path)
    poll_until(made, lambda: made.of("pay.stripe.com", "") == "other")
    assert health.features.active("peer_groups")
    assert len(made) == 1


def test_d21_the_cache_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_CACHED", 100)
    made = PeerGroups(path)
    for n in range(1000):
        made.of(f"h{n}.s3.amazonaws.com", f"10.0.0.{n % 256}")
    assert len(made._cache) <= 100


def test_d21_a_lookup_is_grouped_by_the_name_alone(path: Path) -> None:
    """The peer of a DNS event is the resolver, which is not what the name stands for."""
    made = PeerGroups(path)
    lookup = CONNECT._replace(kind="dns", transport="udp", port=53)
    assert made.tag(lookup).group == "s3"
    assert made.tag(lookup._replace(domain="example.com")).group == ""
    assert made.tag(CONNECT._replace(domain="example.com")).group == "s3"


def test_d21_an_event_without_a_group_is_the_same_object(path: Path) -> None:
    event = CONNECT._replace(domain="example.com", dst="192.0.2.1")
    assert PeerGroups(path).tag(event) is event


def test_d21_the_group_is_on_spans_lines_and_metrics(path: Path) -> None:
    made = PeerGroups(path)
    event = made.tag(CONNECT._replace(domain="ec2.amazonaws.com"))
    assert event == CONNECT._replace(domain="ec2.amazonaws.com", group="aws")
    told = step(event)
    assert dict(told.attributes)["ebfw.peer.group"] == "aws"
    assert " group=aws" in TextFormat().line(event)
    assert json.loads(JsonFormat().line(event))["group"] == "aws"
    assert "group" not in json.loads(JsonFormat().line(CONNECT))

    metrics = Metrics(Resources("node1"))
    metrics.observe(made.counted(event))
    flow = Flow(UNIT, "client", "tcp", "52.1.1.1", 443, "internet", "52.1.1.1", "address")
    metrics.add(made.counted_flow(made.tag_flow(flow)), Counts(tx_bytes=5), 5)
    found = {
        metric: [dict(point.attributes) for _, point in points]
        for metric, points in metrics.snapshot().by_metric()
        if metric in (c.CONNECT_TIME, c.NETWORK_IO)
    }
    for metric in (c.CONNECT_TIME, c.NETWORK_IO):
        assert [attributes["ebfw.peer.group"] for attributes in found[metric]] == ["aws"]


def test_d21_a_collapsed_group_bounds_the_series(path: Path) -> None:
    """Ten thousand buckets are one series, and no byte is lost."""
    made = PeerGroups(path)
    metrics = Metrics(Resources("node1"))
    for n in range(10_000):
        flow = Flow(UNIT, "client", "tcp", "52.216.1.1", 443, "internet", f"b{n}.s3.amazonaws.com", "sni")
        metrics.add(made.counted_flow(made.tag_flow(flow)), Counts(tx_bytes=3), 5)
        metrics.observe(made.counted(made.tag(CONNECT._replace(domain=f"b{n}.s3.amazonaws.com"))))
    for metric, points in metrics.snapshot().by_metric():
        if metric is c.NETWORK_IO:
            ((_, point),) = points
            assert dict(point.attributes)["server.address"] == "~s3"
            assert point.value == 30_000
        elif metric is c.CONNECT_TIME:
            ((_, point),) = points
            assert sum(point.value[:-1]) == 10_000
    # Only metrics are collapsed: a line keeps its name.
    assert made.tag(CONNECT).domain == "files.s3.amazonaws.com"
