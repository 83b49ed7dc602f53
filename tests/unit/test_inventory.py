"""D20: the inventory: what becomes an entry and what does not, its bounds, its file, and how it is shown.

Excluded: the agent that fills it from the kernel (tests/pipeline/test_beyond.py).
"""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from exporter import __main__ as cli
from exporter import health
from exporter.emit import semconv as c
from exporter.emit.console import JsonFormat, TextFormat
from exporter.emit.logs import Notable, record
from exporter.enrich.identity import UNNAMED, Who, owner, who
from exporter.errors import InventoryError
from exporter.events import Counts, Event, Flow, Workload
from exporter.inventory import Inventory, book, report, watch
from exporter.inventory.book import OTHER, read, rows_of

SHOP = Workload(7, "/system.slice/shop.service", "unit", "shop.service", unit="shop.service")
CONTAINER = Workload(8, "/docker/x", "container", "ab" * 6, container_id="ab" * 32, runtime="docker")
WEB = Workload(
    9, "/kubepods/x", "pod", "web", pod_uid="u", container_id="cd" * 32,
    pod_name="web-7d9f8c6b5d-x2x9z", namespace="shop", container_name="nginx", image="registry/web:1",
)  # fmt: skip
SECOND = 1_000_000_000
T0 = 1_700_000_000


class World:
    """An inventory with a clock and workloads of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, 100.0
        self.known = {w.cgroup_id: w for w in (SHOP, CONTAINER, WEB)}
        self.inventory = self.open()
        self.news: list[Event] = []

    def open(self) -> Inventory:
        unknown = Workload(0, "", "unknown", "")
        return Inventory(
            self.path, "n1", lambda cgroup: self.known.get(cgroup, unknown), lambda: self.now, lambda: self.wall
        )

    @property
    def wall(self) -> int:
        return int((T0 - 100 + self.now) * SECOND)

    def event(self, kind: str = "connect", workload: Workload = SHOP, **changes: Any) -> Event:
        made = Event(
            kind, self.wall, workload, 42, "curl", "tcp", "client", "192.0.2.9", 40000, "192.0.2.1", 443,
            "internet", "192.0.2.1", "address", "ok", 20_000_000, cookie=5,
        )  # fmt: skip
        return made._replace(**changes)

    def observe(self, kind: str = "connect", **changes: Any) -> None:
        self.inventory.observe([self.event(kind, **changes)])

    def pass_time(self, seconds: float = 7.0) -> list[Event]:
        self.now += seconds
        found = self.inventory.due()
        self.news += found
        return found

    @property
    def pairs(self) -> dict[tuple[str, str, int, str], book.Row]:
        return {(str(row.who), *row.place): row for row in rows_of(self.inventory._book)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "state").mkdir()
    return World(tmp_path / "state" / "inventory.json")


def flow(**changes: Any) -> Flow:
    made = Flow(SHOP, "client", "tcp", "192.0.2.1", 443, "internet", "192.0.2.1", "address")
    return made._replace(**changes)


# --- what becomes an entry ------------------------------------------------------------------------------------


def test_d20_a_connection_is_entered_under_the_name_that_it_shows(world: World) -> None:
    for cookie in range(23):
        world.observe(cookie=cookie)
        world.observe("tls", cookie=cookie, domain="api.example.com", name_source="sni", status="")
        world.observe("close", cookie=cookie, domain="api.example.com", name_source="sni")
    world.pass_time()
    assert set(world.pairs) == {("shop.service", "api.example.com", 443, "tcp")}
    (row,) = world.pairs.values()
    assert (row.connections, row.evidence, row.executables) == (23, "sni", ("curl",))
    assert (row.first, row.last) == (T0, T0)
    (new,) = world.news
    assert (new.kind, new.domain, new.name_source, new.dst, new.port, new.comm) == (
        "new", "api.example.com", "sni", "192.0.2.1", 443, "curl",
    )  # fmt: skip


def test_d20_one_that_shows_none_is_entered_by_address_after_a_while(world: World) -> None:
    world.observe()
    assert world.pass_time(1) == []
    assert world.pairs == {}
    (new,) = world.pass_time(1.1)
    assert (new.domain, new.name_source) == ("192.0.2.1", "address")
    world.observe(cookie=6)
    world.observe("close", cookie=6)
    assert world.pass_time() == []
    (row,) = world.pairs.values()
    assert (row.connections, row.evidence) == (2, "address")


def test_d20_interleaved_connections_to_one_address_keep_their_names(world: World) -> None:
    for cookie in (1, 2, 3):
        world.observe(cookie=cookie)
    for cookie, name in ((3, "c.example"), (1, "a.example"), (2, "a.example")):
        world.observe("tls", cookie=cookie, domain=name, name_source="sni")
    world.pass_time()
    assert {key[1]: row.connections for key, row in world.pairs.items()} == {"a.example": 2, "c.example": 1}


@pytest.mark.parametrize(
    "changes",
    [{"status": "refused"}, {"status": "timed_out"}, {"role": "server"}, {"kind": "dns", "domain": "x"}],
)
def test_d20_what_is_no_destination(world: World, changes: dict[str, Any]) -> None:
    world.inventory.observe([world.event()._replace(**changes)])
    assert world.pass_time() == []
    assert world.pairs == {}


def test_d20_what_exclude_hides_is_not_entered_by_its_address(world: World) -> None:
    world.observe()
    world.inventory.hide([world.event("tls", domain="x.cluster.local", name_source="sni", filtered=True)])
    world.inventory.add(flow(), Counts(tx_bytes=100, opened=1), world.wall)
    assert world.pass_time() == []
    assert world.pairs == {}


def test_d20_bytes_are_the_counters(world: World) -> None:
    world.observe()
    world.inventory.add(flow(), Counts(tx_bytes=100, rx_bytes=60, opened=1), world.wall)  # before its name is known
    world.observe("tls", domain="api.example.com", name_source="sni")
    world.inventory.add(
        flow(name="api.example.com", name_source="sni"), Counts(tx_bytes=1000, rx_bytes=2000), world.wall
    )
    world.inventory.add(flow(), Counts(tx_bytes=7), world.wall)
    world.pass_time()
    ((key, row),) = world.pairs.items()
    assert key[1] == "api.example.com"
    assert (row.tx_bytes, row.rx_bytes, row.connections) == (1107, 2060, 1)


def test_d20_a_socket_older_than_the_agent_is_entered_by_its_bytes(world: World) -> None:
    world.inventory.add(flow(role="unknown"), Counts(tx_bytes=5, rx_bytes=6), world.wall)
    world.inventory.add(flow(role="unknown"), Counts(tx_bytes=5), world.wall)
    (new,) = world.pass_time()
    assert (new.domain, new.comm) == ("192.0.2.1", "")
    (row,) = world.pairs.values()
    assert (row.tx_bytes, row.rx_bytes, row.connections, row.executables) == (10, 6, 0, ())


@pytest.mark.parametrize(
    ("delta", "entered"),
    [
        (Counts(tx_bytes=180, refused=3, rx_bytes=120), False),
        (Counts(tx_bytes=60), False),  # a SYN without an answer
        (Counts(tx_bytes=180, refused=2, opened=1), True),
    ],
)
def test_d20_attempts_that_failed_are_no_destination(world: World, delta: Counts, entered: bool) -> None:
    world.inventory.add(flow(), delta, world.wall)
    assert bool(world.pass_time()) is entered


@pytest.mark.parametrize("changes", [{"role": "server"}, {"filtered": True}, {"other": True}, {"peer": ""}])
def test_d20_rows_without_a_peer_are_not_entered(world: World, changes: dict[str, Any]) -> None:
    world.inventory.add(flow(**changes), Counts(tx_bytes=5, rx_bytes=5, opened=1), world.wall)
    assert world.pass_time() == []


def test_d20_one_event_for_each_new_pair(world: World) -> None:
    for n in range(23):
        for _ in range(3):
            world.observe(cookie=n, dst=f"192.0.2.{n}", domain=f"192.0.2.{n}")
            world.observe("close", cookie=n, dst=f"192.0.2.{n}", domain=f"192.0.2.{n}")
    world.pass_time()
    assert len(world.news) == 23
    assert len({event.domain for event in world.news}) == 23


def test_d20_evidence_grows_and_executables_are_few(world: World) -> None:
    for n, (source, comm) in enumerate(
        [("dns", "a"), ("address", "b"), ("sni", "c"), ("host", "d"), ("dns", "e"), ("sni", "a")]
    ):
        world.observe(cookie=n, domain="x.example", name_source=source, comm=comm)
        world.pass_time()
    (row,) = world.pairs.values()
    assert (row.evidence, row.executables, row.connections) == ("host", ("a", "b", "c", "d"), 6)


# --- who ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pod", "name"),
    [
        ("web-7d9f8c6b5d-x2x9z", "web"),
        ("my-web-api-5bcd6f7894-bcdfg", "my-web-api"),
        ("fluentd-x2x9z", "fluentd"),
        ("backup-28476540-zzx7k", "backup"),
        ("postgres-0", "postgres"),
        ("postgres-12", "postgres"),
        ("debug", "debug"),
        ("my-debug-shell", "my-debug-shell"),
    ],
)
def test_d20_a_pod_is_its_owners(pod: str, name: str) -> None:
    assert owner(pod) == name


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        (SHOP, Who("unit", "", "shop.service", "")),
        (WEB, Who("pod", "shop", "web", "nginx")),
        (WEB._replace(pod_name=""), Who("pod", "shop", UNNAMED, "nginx")),
        (CONTAINER, Who("container", "", UNNAMED, "")),
        (CONTAINER._replace(name="db", container_name="db"), Who("container", "", "db", "")),
        (SHOP._replace(user_id=1000), Who("unit", "user-1000", "shop.service", "")),
        (Workload(1, "", "unknown", ""), Who("unknown", "", UNNAMED, "")),
    ],
)
def test_d20_no_id_is_part_of_who(workload: Workload, expected: Who) -> None:
    assert who(workload) == expected
    assert who(workload._replace(cgroup_id=99, container_id="f" * 64, pod_uid="other")) == expected


def test_d20_a_container_is_waited_for_until_it_has_its_name(world: World) -> None:
    world.observe(workload=CONTAINER)
    assert world.pass_time(2.5) == []
    world.known[8] = CONTAINER._replace(name="db", container_name="db", image="postgres:17")
    (new,) = world.pass_time(4.1)
    assert new.workload.name == "db"
    ((key, row),) = world.pairs.items()
    assert (key[0], row.image) == ("db", "postgres:17")


def test_d20_pods_of_one_owner_share_a_row(world: World) -> None:
    other = WEB._replace(cgroup_id=10, pod_name="web-7d9f8c6b5d-bcdfg", pod_uid="v")
    world.known[10] = other
    world.observe(workload=WEB, cookie=1)
    world.observe(workload=other, cookie=2)
    assert len(world.pass_time()) == 1
    ((key, row),) = world.pairs.items()
    assert (key[0], row.connections, row.image) == ("shop/web:nginx", 2, "registry/web:1")


# --- bounds ---------------------------------------------------------------------------------------------------


def test_d20_what_has_no_room_is_counted_and_shown_as_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PER_WORKLOAD", 10)
    before = health.losses.snapshot().get(("table", "inventory_full"), 0)
    for n in range(33):
        world.observe(cookie=n, domain=f"h{n}.example", name_source="dns")
        world.pass_time()
        world.inventory.add(flow(name=f"h{n}.example", name_source="dns"), Counts(tx_bytes=2, rx_bytes=1), world.wall)
    assert len(world.inventory) == 10
    assert len(world.news) == 10
    rest = world.pairs["shop.service", OTHER, 0, ""]
    assert (rest.connections, rest.tx_bytes, rest.rx_bytes) == (23, 46, 23)
    assert sum(row.connections for row in world.pairs.values()) == 33
    assert health.losses.snapshot()["table", "inventory_full"] == before + 23
    world.inventory.close()
    again = world.open()
    assert len(again) == 10


def test_d20_workloads_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WORKLOADS", 5)
    for n in range(20):
        workload = SHOP._replace(cgroup_id=100 + n, name=f"w{n}.service")
        world.known[100 + n] = workload
        world.observe(cookie=n, workload=workload)
        world.pass_time()
    assert len(world.inventory._book) == 6
    assert world.pairs[OTHER, OTHER, 0, ""].connections == 15


def test_d20_waiting_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_PENDING", 50)
    monkeypatch.setattr(watch, "_INDEXED", 50)
    for n in range(500):
        world.observe(cookie=n, dst=f"192.0.2.{n % 250}", domain=f"h{n}", name_source="dns")
        world.observe("tls", cookie=10_000 + n, dst=f"198.51.100.{n % 250}", domain=f"s{n}", name_source="sni")
        world.inventory.add(flow(peer=f"203.0.113.{n}", name=""), Counts(rx_bytes=1, tx_bytes=1), world.wall)
    inventory = world.inventory
    assert len(inventory._opening) <= 50
    assert len(inventory._flows) <= 50
    assert len(inventory._index) <= 50
    assert len(inventory._aliases) <= 50
    assert health.losses.snapshot()["table", "inventory_flows"] >= 450


def test_d20_what_was_not_seen_for_90_days_is_forgotten(world: World) -> None:
    world.observe(domain="old.example", name_source="dns")
    world.pass_time()
    world.now += 91 * 86_400
    world.observe(domain="young.example", name_source="dns", cookie=6)
    world.pass_time()
    world.inventory.close()
    assert {key[1] for key in world.pairs} == {"young.example"}
    assert len(world.inventory) == 1


# --- the file -------------------------------------------------------------------------------------------------


def fill(world: World) -> None:
    world.observe(domain="api.example.com", name_source="dns", group="partner-x")
    world.observe(workload=WEB, cookie=6, transport="udp", port=53, domain="192.0.2.53", dst="192.0.2.53")
    world.pass_time()
    world.inventory.add(flow(name="api.example.com", name_source="dns"), Counts(tx_bytes=10, rx_bytes=20), world.wall)


def test_d20_kept_over_restarts(world: World) -> None:
    fill(world)
    before = world.pairs
    world.inventory.close()
    assert stat.S_IMODE(os.stat(world.path).st_mode) == 0o600
    assert [entry.name for entry in world.path.parent.iterdir()] == ["inventory.json"]
    world.news.clear()
    world.inventory = world.open()
    assert world.pairs == before
    # The same unit and the same owner, started again: other cgroups, other ids.
    world.known[70] = SHOP._replace(cgroup_id=70)
    world.known[90] = WEB._replace(cgroup_id=90, pod_name="web-7d9f8c6b5d-bcdfg", pod_uid="v", container_id="f" * 64)
    world.observe(workload=world.known[70], domain="api.example.com", name_source="dns")
    world.observe(workload=world.known[90], cookie=6, transport="udp", port=53, domain="192.0.2.53", dst="192.0.2.53")
    world.pass_time()
    assert world.news == []
    assert [row.connections for row in world.pairs.values()] == [2, 2]


def test_d20_bytes_counted_before_a_crash_are_not_counted_again(world: World) -> None:
    """The kernel's totals live on; the first reading after the restart is of all that they ever held."""
    fill(world)
    world.inventory.close()
    old, world.now = world.wall - 50 * SECOND, world.now + 10
    world.inventory = world.open()
    world.inventory.add(flow(name="api.example.com", name_source="dns"), Counts(tx_bytes=10, rx_bytes=20), old, True)
    row = world.pairs["shop.service", "api.example.com", 443, "tcp"]
    assert (row.tx_bytes, row.rx_bytes) == (10, 20)
    world.inventory.add(flow(name="api.example.com", name_source="dns"), Counts(tx_bytes=1), world.wall, True)
    world.inventory.add(flow(name="api.example.com", name_source="dns"), Counts(tx_bytes=1), old)
    assert world.pairs["shop.service", "api.example.com", 443, "tcp"].tx_bytes == 12


def test_d20_saved_soon_after_something_new_and_else_once_a_minute(world: World) -> None:
    def saved() -> bool:
        world.inventory.save()
        if world.inventory._saver is not None:
            world.inventory._saver.join()
        return world.path.exists()

    assert not saved()
    world.observe()
    world.pass_time(2.1)
    assert not saved()
    world.now += 5
    assert saved()
    written = world.path.stat().st_mtime_ns
    world.observe(cookie=9)
    world.pass_time(30)
    saved()
    assert world.path.stat().st_mtime_ns == written
    world.now += 31
    saved()
    assert world.path.stat().st_mtime_ns > written


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b'{\n "format": "ebfw-', "damaged"),
        (b'{"format": "ebfw-inventory", "version": ' + b"[" * 100_000, "damaged"),
        (b'{"format": "ebfw-inventory", "version": 2}', "later version"),
        (b'{"format": "ebfw-inventory", "version": 1, "workloads": [{}]}', "damaged"),
        (
            b'{"format": "ebfw-inventory", "version": 1, "node": "n", "written": "2026-01-01T00:00:00+00:00", '
            b'"workloads": [{"kind": "unit", "name": "a", "destinations": '
            b'[{"name": "x", "port": -1, "transport": "tcp"}]}]}',
            "damaged",
        ),
        (b'{"format": "ebfw-inventory"\xff', "damaged"),
    ],
)
def test_d20_a_damaged_file_is_said_kept_aside_and_begun_anew(
    world: World, content: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.path.write_bytes(content)
    world.inventory = world.open()
    aside = world.path.with_name("inventory.json.unreadable")
    assert aside.read_bytes() == content
    assert says in caplog.text
    assert str(aside) in caplog.text
    fill(world)
    world.inventory.close()
    assert len(read(world.path).book) == 2


def test_d20_a_file_cut_off_anywhere_is_damaged_and_nothing_worse(world: World) -> None:
    fill(world)
    world.inventory.close()
    whole = world.path.read_bytes()
    cut = world.path.with_name("cut")
    for length in range(0, len(whole) - 2, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(InventoryError):
            read(cut)


def test_d20_a_write_that_fails_leaves_the_old_file_and_is_counted(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(world)
    world.inventory.close()
    whole = world.path.read_bytes()
    world.observe(domain="second.example", name_source="dns", cookie=77)
    world.pass_time()

    def full(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    world.inventory.close()
    assert world.path.read_bytes() == whole
    assert [entry.name for entry in world.path.parent.iterdir()] == ["inventory.json"]
    assert "No space left" in caplog.text
    assert health.losses.snapshot()["export", "inventory"] >= 1
    monkeypatch.undo()
    world.inventory.close()  # what changed is not forgotten
    assert len(read(world.path).book[who(SHOP)].places) == 2


@pytest.mark.parametrize(
    "content",
    [b"[]", b"[" * 100_000, b'{"format": "other", "version": 1}', b"\xff\xfe", b"root:x:0:0\n", b'{"format": "ebfw-x'],
)
def test_d20_a_file_of_somebody_elses_stays_where_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(content)
    with pytest.raises(InventoryError, match=rf"EBFW_INVENTORY={path}: .*no inventory of ebfw.*name another path"):
        World(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_d20_what_is_no_file_stays_too(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):  # nobody writes to the fifo: who opened it would wait
        with pytest.raises(InventoryError, match=f"{name}: .*no inventory of ebfw"):
            World(tmp_path / name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fifo", "folder"]


def test_d20_a_folder_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "nope", tmp_path / "file"):
        with pytest.raises(InventoryError, match=rf"EBFW_INVENTORY=.*the folder {folder} does not exist"):
            World(folder / "inventory.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_d20_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InventoryError, match=r"EBFW_INVENTORY=.*cannot write there: Permission denied"):
        World(tmp_path / "inventory.json")


# --- how it is told and shown ---------------------------------------------------------------------------------


def test_d20_the_event_in_text_json_and_logs(world: World) -> None:
    world.observe("tls", domain="api.example.com", name_source="sni")
    (new,) = world.pass_time()
    text = TextFormat().line(new)
    assert text.startswith("NEW      192.0.2.9 -> 192.0.2.1:443  unit=shop.service")
    assert "name=api.example.com via=sni" in text
    told = json.loads(JsonFormat().line(new))
    assert (told["kind"], told["domain"], told["port"]) == ("new", "api.example.com", 443)
    notable = Notable(inventory=True)
    note = notable.of(new)
    assert note is not None
    made = record(note)
    assert made.name == "ebfw.egress.destination.new" == c.EVENT_DESTINATION_NEW
    assert dict(made.attributes)["server.address"] == "api.example.com"
    assert made.body == "curl for the first time to api.example.com:443"
    # With an inventory the connection itself is not told as first seen as well.
    assert notable.of(world.event(domain="api.example.com", name_source="sni")) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_d20_the_table(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    fill(world)
    world.inventory.close()
    assert cli.main(["inventory", str(world.path)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert [(r["WORKLOAD"], r["IMAGE"], r["DESTINATION"], r["PORT"], r["EXECUTABLES"]) for r in rows] == [
        ("shop.service", "", "api.example.com", "443", "curl"),
        ("shop/web:nginx", "registry/web:1", "192.0.2.53", "53", "curl"),
    ]
    assert (rows[0]["SENT"], rows[0]["RECEIVED"], rows[0]["GROUP"]) == ("10", "20", "partner-x")
    assert rows[0]["FIRST SEEN"] == "2023-11-14T22:13:20Z"

    out = Terminal()
    report.show(world.path, "", False, None, out)
    first, *body = out.getvalue().splitlines()
    assert first.startswith("\x1b[1mWORKLOAD")
    plain = Terminal()
    report.show(world.path, "", False, False, plain)
    assert "\x1b" not in plain.getvalue()
    header, *body = plain.getvalue().splitlines()
    for column, value in (("DESTINATION", "api.example.com"), ("EXECUTABLES", "curl"), ("GROUP", "partner-x")):
        assert body[0][header.index(column) :].startswith(value), column
    assert body[-1].startswith("2 destinations of 2 workloads on n1")


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("shop.service", 1), ("shop/web", 1), ("web", 1), ("nginx", 1), ("shop*", 2), ("nobody", 0), ("", 2)],
)
def test_d20_one_workload(world: World, capsys: pytest.CaptureFixture[str], wanted: str, count: int) -> None:
    fill(world)
    world.inventory.close()
    assert cli.main(["inventory", "--json", "--workload", wanted, str(world.path)]) == 0
    assert len(json.loads(capsys.readouterr().out)["workloads"]) == count


def test_d20_json_is_the_files_form(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    fill(world)
    world.inventory.close()
    assert cli.main(["inventory", "--json", str(world.path)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(world.path.read_text())


def test_d20_diff(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fill(world)
    world.inventory.close()
    before = tmp_path / "before.json"
    before.write_bytes(world.path.read_bytes())
    assert cli.main(["inventory", "--exit-code", "--diff", str(before), str(world.path)]) == 0
    assert capsys.readouterr() == ("", f"ebfw: no differences between {before} and {world.path}\n")

    world.observe(domain="evil.example", name_source="sni", cookie=70, comm="nc")
    world.observe(domain="api.example.com", name_source="sni", cookie=71, comm="wget", group="partner-x")
    world.pass_time()
    del world.inventory._book[who(WEB)]
    world.inventory._changed = True
    world.inventory.close()
    assert cli.main(["inventory", "--diff", str(before), str(world.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:3] for line in lines] == [
        ["~", "shop.service", "api.example.com:443/tcp"],
        ["+", "shop.service", "evil.example:443/tcp"],
        ["-", "shop/web:nginx", "192.0.2.53:53/udp"],
    ]
    assert lines[0].split("\t")[3:] == ["evidence: dns -> sni", "executables: curl -> curl,wget"]
    assert cli.main(["inventory", "--exit-code", "--json", "--diff", str(before), str(world.path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {key: len(value) for key, value in found.items()} == {"added": 1, "gone": 1, "changed": 1}
    assert found["added"][0]["destination"]["executables"] == ["nc"]
    assert found["changed"][0]["changed"]["evidence"] == {"before": "dns", "after": "sni"}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["inventory", "NONE"], 1, "there is no inventory; start the agent with EBFW_INVENTORY="),
        (["inventory", "--diff", "NONE", "NONE"], 1, "there is no inventory"),
        (["inventory", "--exit-code"], 2, "--exit-code goes with --diff"),
        (["inventory", "x", "--diff", "a", "b"], 2, "--diff takes two files"),
    ],
)
def test_d20_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    assert cli.main([str(tmp_path / a) if a == "NONE" else a for a in arguments]) == status
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_d20_a_hostile_name_moves_no_cursor(world: World) -> None:
    world.observe(domain="x\x1b[2J\ty.example", name_source="sni", comm="a\tb")
    world.inventory.close()
    out = io.StringIO()
    report.show(world.path, "", False, None, out)
    (row,) = out.getvalue().splitlines()[1:]
    assert row.count("\t") == len(report._COLUMNS) - 1
    assert "\x1b" not in row


def test_d20_a_workload_that_is_not_there_is_said_beside_the_pipe(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(world)
    world.inventory.close()
    assert cli.main(["inventory", "--json", "--workload", "nobody", str(world.path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["workloads"] == []
    assert err == f"ebfw: no workload of {world.path} matches nobody\n"
    assert cli.main(["inventory", "--workload", "shop*", str(world.path)]) == 0
    assert capsys.readouterr().err == ""
