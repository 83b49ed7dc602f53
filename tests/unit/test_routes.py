"""Templates of paths: what is a word, what is an id, how many words, what the user said, what is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.emit import routes
from exporter.emit.routes import CAP, HOSTS, PLACES, TEMPLATES, Routes, placeholder
from exporter.events import Event, Workload

SSHD = Workload(7, "/system.slice/ssh.service", "unit", "ssh.service")


def event(path: str, host: str = "api.example.com") -> Event:
    return Event(
        "http", 1, SSHD, 1, "curl", "tcp", "client", "192.0.2.9", 40000, "192.0.2.1", 80, "internet", host, "host", "",
        method="GET", path=path,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("segment", "stands"),
    [
        *[(word, "") for word in (
            "users", "v1", "v1beta1", "v2.1", "oauth2", "s3", "index.html", "list-all_things", "@scope", "sha256",
            "$batch", "Users", "", "ipv4", "x509", "2fa",
        )],
        *[(number, "{id}") for number in ("1", "42", "-7", "1.5", "1,5", "12345678901234567890123")],
        ("6f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f", "{uuid}"),
        ("6F1C2D3E4A5B6C7D8E9F0A1B2C3D4E5F", "{uuid}"),
        ("2026-11-23", "{date}"),
        ("2026-11", "{date}"),
        ("2026-11-23T04:05:06Z", "{date}"),
        ("deadbeef1", "{hex}"),
        ("0xabc123", "{hex}"),
        ("a1b2c3z4", "{id}"),
        ("john.doe@example.com", "{token}"),
        ("j@example.com", "{id}"),
        ("dXNlcjpwYXNzd29yZDE=", "{token}"),
        ("a%20b", "{token}"),
        ("caf\u00e9", "{token}"),
        ("REDACTED", "{token}"),
    ],
)  # fmt: skip
def test_words_and_ids(segment: str, stands: str) -> None:
    assert placeholder(segment) == stands


def test_ids_are_placeholders_at_once() -> None:
    made = Routes()
    assert made.of(event("/users/42/orders/2026-11-23?token=x#y")) == "/users/{id}/orders/{date}"
    assert made.of(event("http://api.example.com/users/43/orders/2026-11-23")) == "/users/{id}/orders/{date}"
    assert made.of(event("/")) == "/"
    assert made.of(event("/users/")) == "/users/"
    assert made.of(event("http://api.example.com")) == "/"
    assert [made.of(event(path)) for path in ("*", "example.com:443", "")] == ["", "", ""]


def test_d14_words_are_capped_for_each_place() -> None:
    made = Routes()
    names = [f"{letter}{letter}name" for letter in "abcdefghijklmnopqrstuvwxyz"]
    first = [made.of(event(f"/users/{name}/orders")) for name in names]
    assert first[:CAP] == [f"/users/{name}/orders" for name in names[:CAP]]
    assert set(first[CAP:]) == {"/users/{}/orders"}
    # For good, and for those that had been told apart; other places and hosts are their own.
    assert {made.of(event(f"/users/{name}/orders")) for name in names} == {"/users/{}/orders"}
    assert made.of(event("/users/42/orders")) == "/users/{id}/orders"
    assert made.of(event("/teams/aaname")) == "/teams/aaname"
    assert made.of(event("/users/aaname/orders", "other.example.com")) == "/users/aaname/orders"
    assert made.template(8, "api.example.com", "/users/aaname/orders") == "/users/aaname/orders"


def test_d14_templates_are_capped_for_each_host() -> None:
    made = Routes()
    letters = "abcdefghij"
    found = {made.of(event(f"/{a}/{b}/{c}")) for a in letters for b in letters for c in letters}
    assert len(found) == TEMPLATES + 1
    assert "" in found
    assert made.of(event("/a/a/a")) == "/a/a/a"


def test_configured_patterns_win_in_their_order() -> None:
    made = Routes(("/users/{name}/*", "/users/*/avatar", "/files/*/meta", "/"))
    assert made.of(event("/users/alice/orders/7")) == "/users/{name}/*"
    assert made.of(event("/users/alice")) == "/users/{name}/*"
    assert made.of(event("/files/x/meta")) == "/files/*/meta"
    assert made.of(event("/files/x/y/meta")) == "/files/x/y/meta"
    assert made.of(event("/")) == "/"


def test_d8_no_secret_in_a_template() -> None:
    made = Routes()
    for path in (
        "/hooks/Xy7Kd9Qw2Lm4",
        "/bot123456:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw/sendMessage",
        "/reset/qWmZxKvTbRnLpSgHfDjCyQaE",
        "/a;jsessionid=SECRETSECRET/b",
        "/x/token=hunter2hunter2",
    ):
        template = made.of(event(path))
        assert "{" in template, template
        for secret in ("Xy7", "AAH", "qWmZ", "SECRET", "hunter"):
            assert secret not in template


def test_depth_is_bounded() -> None:
    assert Routes().of(event("/" + "/".join("abcdefghijklmnopqrstuvwxyz"))) == "/a/b/c/d/e/f/g/h/i/j/k/l/*"
    assert len(Routes().of(event("/x" * 100_000))) < 100


def test_memory_is_bounded_and_expires() -> None:
    seconds = [0.0]
    made = Routes(clock=lambda: seconds[0])
    for host in range(HOSTS + 50):
        made.template(1, f"h{host}", "/a/b")
    assert len(made) == HOSTS
    assert made._places == 2 * HOSTS
    made = Routes(clock=lambda: seconds[0])
    letters = "abcdefghij"
    for host in range(40):
        for a in letters:
            for b in letters:
                made.template(1, f"h{host}", f"/{a}/{b}" + "/c" * 10)
    assert made._places <= PLACES
    assert 0 < len(made) < 40
    assert made._places == sum(host.root.below() for host in made._hosts.values())
    assert len(made._answers) <= 4096
    seconds[0] = 4000.0
    made.template(1, "h39", "/z")
    made.expire()
    assert len(made) == 1
    seconds[0] = 9000.0
    made.expire()
    assert (len(made), made._places, made._answers) == (0, 0, {})


@given(st.lists(st.text("/ab1{}%.;?#\u00e9-", max_size=12), max_size=60))
def test_any_path_has_one_answer(paths: list[str]) -> None:
    made = Routes(cap=2)
    for path in paths:
        first = made.of(event("/" + path))
        assert first == made.of(event("/" + path))
        assert first == "" or first.startswith("/")
        assert "?" not in first
    assert made._places == sum(host.root.below() for host in made._hosts.values())
    assert all(len(host.templates) <= routes.TEMPLATES for host in made._hosts.values())
