"""Losses, features, and the log: counted exactly, bounded, not floodable."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator

import pytest

from exporter.health import MAX_CAUSES, Feature, Features, Losses, RateLimit, printable, start_log


def test_losses_from_several_threads_add_up() -> None:
    losses = Losses()

    def work() -> None:
        for _ in range(2300):
            losses.add("queue", "console_full")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses.add("ring", "full", 23)
    assert losses.snapshot() == {("queue", "console_full"): 9200, ("ring", "full"): 23}
    assert losses.total() == 9223


def test_totals_taken_over_never_fall() -> None:
    losses = Losses()
    for total in (5, 3, 7):
        losses.raise_to("ring", "full", total)
    assert losses.snapshot() == {("ring", "full"): 7}


def test_causes_are_bounded_and_none_is_lost() -> None:
    losses = Losses()
    for number in range(MAX_CAUSES + 50):
        losses.add("decode", str(number))
    assert len(losses.snapshot()) <= MAX_CAUSES + 8
    assert losses.total() == MAX_CAUSES + 50


def test_features() -> None:
    features = Features()
    features.set("uprobes", True, "ignored")
    features.set("sock_ops", False, "no handshake times")
    assert features.snapshot() == {
        "uprobes": Feature(True, ""),
        "sock_ops": Feature(False, "no handshake times"),
    }
    assert features.active("uprobes")
    assert not features.active("sock_ops")
    assert not features.active("never tried")


def record(text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("x", logging.WARNING, "", 0, text, args, None)


def test_same_text_once_a_period_with_the_count() -> None:
    now = 0.0
    limit = RateLimit(period=60, clock=lambda: now)
    assert limit.filter(record("lost %d%%", 5))
    for _ in range(22):
        assert not limit.filter(record("lost %d%%", 5))
    now = 61
    again = record("lost %d%%", 5)
    assert limit.filter(again)
    assert again.getMessage() == "lost 5% (22 more like this)"


def test_a_template_has_a_burst_and_the_tables_a_bound() -> None:
    now = 0.0
    limit = RateLimit(period=60, burst=10, limit=100, clock=lambda: now)
    assert sum(limit.filter(record("name %s", number)) for number in range(1000)) == 10
    for number in range(1000):
        limit.filter(record(f"template {number}"))
    assert len(limit._templates) <= 101
    assert len(limit._texts) <= 101


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raises = list(root.handlers), root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raises


@pytest.mark.usefixtures("_root_logger")
def test_log_lines_are_plain_and_cannot_be_forged() -> None:
    stream = io.StringIO()
    start_log("info", stream)
    logging.getLogger("a").info("started")
    logging.getLogger("a").debug("not shown")
    logging.getLogger("a").warning("name %s", "x\nebfw: all is well\x1b[2J")
    assert stream.getvalue() == "ebfw: started\nebfw: warning: name x\\x0aebfw: all is well\\x1b[2J\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain-name_1.example", "plain-name_1.example"),
        ("münchen.example", "münchen.example"),
        ("a b", "a\\x20b"),
        ("a\\b", "a\\\\b"),
        ("\x1b]0;t\x07\x9b", "\\x1b]0;t\\x07\\x9b"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\udcff", "\\udcff"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
