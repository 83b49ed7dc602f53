"""Redaction: canaries go in wherever a secret can stand, and none comes out. Precision and recall of the
guess at what is random are held to figures, so that a change of the heuristic shows."""

from __future__ import annotations

import random
import re
import string
import uuid
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.emit.redact import REDACTED, Options, redact, secret, target
from exporter.events import HTTP, Event, Workload
from exporter.settings import Settings

CANARY = "tGz8Kq3vXw1LmPz7Rb2YcN5d"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"
OPTIONS = Options(paths=True, headers=True)
WORKLOAD = Workload(1, "/a", "unit", "a.service")


def event(path: str = "", headers: tuple[tuple[str, str], ...] = (), domain: str = "a.example") -> Event:
    return Event(
        HTTP, 1, WORKLOAD, 1, "curl", "tcp", "client", "192.0.2.1", 1, "192.0.2.2", 80, "internet", domain,
        "host", "", method="GET", path=path, headers=headers,
    )  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "*",
        "",
        "/api/v1/users/123/orders",
        "/how-to-install-python-on-debian-12",
        "/the-quick-brown-fox-jumps-over-the-lazy-dog.html",
        "/orders/123e4567-e89b-12d3-a456-426614174000",
        "/orders/order-123E4567-E89B-12D3-A456-426614174000.json",
        "/apis/apps/v1/namespaces/default/pods/my-app-7d9f8b6c5d-x2x4z",
        "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        "/debian/pool/main/o/openssl/libssl3_3.0.19-1~deb12u2_amd64.deb",
        "/packages/numpy-1.26.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "/logs/20240101T120000Z/20240101120000123456",
        "/v2/library/x/blobs/sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "/@scope/package",
        "/%E4%BD%A0%E5%A5%BD",
        "/getUserByEmailAddressAndTenant",
        "/api/webhooks/config/events",
        "http://a.example/b",
        "a.example:443",
    ],
)
def test_what_is_plain_stays_and_is_not_copied(path: str) -> None:
    given_event = event(path)
    assert redact(given_event, OPTIONS) is given_event


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/a?token=x&page=2", "/a?token=REDACTED&page=REDACTED"),
        ("/a?x=1;y=2", "/a?x=REDACTED"),
        ("/a?x=b=c&&d=", "/a?x=REDACTED&&d="),
        ("/a?wsdl", "/a?wsdl"),
        ("/a?hunter2", "/a?REDACTED"),
        ("/a?", "/a?"),
        (f"/a?{CANARY}=1", "/a?REDACTED=REDACTED"),
        ("/a?b#access_token=x", "/a?b#REDACTED"),
        ("http://u:p@a.example/b?c=d", "http://REDACTED@a.example/b?c=REDACTED"),
        ("http://u:p@b@a.example", "http://REDACTED@a.example"),
        ("u:p@a.example:443", "REDACTED@a.example:443"),
        ("/proxy/http://u:p@a.example/b", "/proxy/http://REDACTED@a.example/b"),
        ("/proxy/http%3A%2F%2Fu%3Ap%40a.example", "/proxy/REDACTED"),
        ("/proxy/http%253A%252F%252Fu%253Ap%2540a.example", "/proxy/REDACTED"),
        (f"/x/{CANARY}/y", "/x/REDACTED/y"),
        (f"/x/{JWT}", "/x/REDACTED"),
        ("/x/eyJhbGciOi", "/x/REDACTED"),
        ("/bot123456:AAF-x/sendMessage", "/botREDACTED/sendMessage"),
        ("/file/bot123456:AA/photos/file_1.jpg", "/file/botREDACTED/photos/file_1.jpg"),
        ("/bot123456%3AAA/getMe", "/botREDACTED/getMe"),
        ("/services/T0ABCDEF1/B0ABCDEF2/abcDEF123456", "/services/T0ABCDEF1/REDACTED/REDACTED"),
        ("/api/webhooks/123456789012345678/aBc-123_x", "/api/webhooks/123456789012345678/REDACTED"),
        ("/hooks/catch/123/o1a2b3c/", "/hooks/catch/123/REDACTED/"),
        (
            "/webhookb2/123e4567-e89b-12d3-a456-426614174000@x/IncomingWebhook/y",
            "/webhookb2/REDACTED/IncomingWebhook/y",
        ),
        ("/a;jsessionid=12AB/b", "/a;jsessionid=REDACTED/b"),
        ("/a/token=abc/b=c", "/a/token=REDACTED/b=c"),
        ("/u/ghp_abcdefgh1", "/u/REDACTED"),
        ("/u/AKIAABCDEFGHIJKLMNOP", "/u/REDACTED"),
        ("/git/0123456789abcdef0123456789abcdef01234567", "/git/REDACTED"),
        (f"/f/{CANARY}.json", "/f/REDACTED"),
    ],
)
def test_what_goes(path: str, shown: str) -> None:
    assert redact(event(path), OPTIONS).path == shown


def test_the_allow_list_is_by_key_and_the_rest_still_goes() -> None:
    options = Options.of(Settings(query_values=frozenset({"page"})))
    assert redact(event("/a?Page=2&q=x&pa%67e=3"), options).path == "/a?Page=2&q=REDACTED&pa%67e=REDACTED"


def test_inspect_settings_drop_path_and_headers() -> None:
    shown = redact(event("/a?b=c", (("Accept", "*/*"),)), Options.of(Settings(inspect_paths=False)))
    assert (shown.path, shown.headers) == ("", ())
    shown = redact(event("/a", (("Accept", "*/*"),)), Options.of(Settings(inspect_headers=True)))
    assert (shown.path, shown.headers) == ("/a", (("Accept", "*/*"),))


def test_user_info_never_is_part_of_a_name() -> None:
    assert redact(event(domain="u:p@a.example"), OPTIONS).domain == "a.example"


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "proxy-authorization",
        "COOKIE",
        "Set-Cookie",
        "X-Api-Key",
        "X-Amz-Security-Token",
        "X-Vault-Token",
        "Client-Secret",
        "X-Password",
        "X-CSRF",
    ],
)
def test_headers_that_carry_credentials_always_go(name: str) -> None:
    options = Options(headers=True, query_values=frozenset({"a"}))
    assert redact(event(headers=((name, "a=x"),)), options).headers == ((name, REDACTED),)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("Accept", "text/html,application/xhtml+xml;q=0.9", None),
        ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)", None),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
        ("Content-Type", "application/vnd.oci.image.manifest.v1+json", None),
        ("Referer", "https://u:p@a.example/b?c=d", "https://REDACTED@a.example/b?c=REDACTED"),
        ("X-Custom", f"Bearer {CANARY}", "Bearer REDACTED"),
        ("X-Custom", f'v="{JWT}", w', 'v="REDACTED", w'),
        ("Link", "</a?b=c>; rel=next", "</a?b=REDACTED>; rel=next"),
    ],
)
def test_other_headers_are_looked_through(name: str, value: str, shown: str | None) -> None:
    assert redact(event(headers=((name, value),)), OPTIONS).headers == ((name, shown or value),)


_ALNUM = string.ascii_letters + string.digits
_PLACES = (
    "/a?k={}",
    "/a?k=1&k={}&z",
    "/a?k=x;{}",
    "/a#{}",
    "http://{}@a.example/",
    "http://u:{}@a.example/b",
    "//u:{}@a.example/b",
    "u:{}@a.example:1",
    "/x;p={}",
    "/x/secret={}",
    "/bot1:{}/x",
    "/hooks/x/A1{}",
    "/j/eyJhbGci{}",
    "/t/glpat-12345678{}",
)


@given(st.sampled_from(_PLACES), st.text(_ALNUM, min_size=6, max_size=40))
def test_no_canary_survives_where_the_place_gives_it_away(place: str, text: str) -> None:
    canary = f"{text}Q9Zx"
    assert canary not in target(place.format(canary), OPTIONS)
    shown = redact(event(place.format(canary), (("Referer", place.format(canary)),)), OPTIONS)
    assert canary not in repr(shown)


@given(st.integers(0, 2**192 - 1), st.sampled_from(["{}", "pre-{}", "{}.json", "a.{}.b", "v:{}", "k={}"]))
def test_no_long_hex_segment_survives(number: int, form: str) -> None:
    text = f"{number | 1 << 191:048x}"
    for shape in (form.format(text), quote(form.format(text), safe="")):
        assert text not in target(f"/x/{shape}/y", OPTIONS)


@given(st.text(max_size=200))
def test_any_text_is_no_error_and_redacting_twice_changes_nothing_back(text: str) -> None:
    once = target(text, OPTIONS)
    target(once, OPTIONS)
    redact(event("/" + text, ((text, text),)), OPTIONS)
    assert target("/a?k=" + text.replace("&", "").replace("#", ""), OPTIONS) in ("/a?k=", "/a?k=REDACTED")


@pytest.mark.parametrize(
    ("alphabet", "length", "at_least"),
    [
        (string.ascii_letters + string.digits, 20, 0.99),
        (string.hexdigits[:16], 20, 0.98),
        (string.ascii_lowercase + string.digits, 20, 0.98),
        (string.ascii_uppercase + "234567", 20, 0.95),
        (string.ascii_letters + string.digits + "-_", 22, 0.88),
        (string.ascii_letters + string.digits + "-_", 43, 0.98),
        (string.ascii_lowercase, 24, 0.92),
    ],
)
def test_recall(alphabet: str, length: int, at_least: float) -> None:
    source = random.Random(23)
    found = sum(secret("".join(source.choices(alphabet, k=length))) for _ in range(1000))
    assert found / 1000 >= at_least


def test_precision_on_slugs() -> None:
    words = re.findall(
        r"\w+",
        """account backup cluster delivery endpoint function gateway history invoice journal kitchen library
        message network object payment quality report service traffic update version warehouse example""",
    )
    source = random.Random(23)
    slugs = [
        source.choice("-_.").join([*source.sample(words, source.randint(3, 7)), str(source.randint(0, 9999))])
        for _ in range(1000)
    ]
    camel = ["".join(word.title() for word in source.sample(words, 5)) for _ in range(1000)]
    plain = ["".join(source.sample(words, 4)) for _ in range(1000)]
    ids = [str(uuid.UUID(int=source.getrandbits(128))) for _ in range(1000)]
    for sort in (slugs, camel, plain, ids):
        assert sum(map(secret, sort)) == 0
