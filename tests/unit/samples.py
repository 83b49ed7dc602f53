"""Workloads and events that the tests of emit/ share."""

from __future__ import annotations

from exporter.events import Event, Exchange, Tls, Workload

WEB = Workload(
    1, "/kubepods/x", "pod", "web-0", "uid-1", "c" * 64, "containerd", "burstable",
    pod_name="web-0", namespace="shop", container_name="nginx",
)  # fmt: skip
SSHD = Workload(2, "/system.slice/ssh.service", "unit", "ssh.service", unit="ssh.service")
START = 1_700_000_000_000_000_000
EVENT = Event(
    "connect", START, WEB, 42, "curl", "tcp", "client", "10.0.0.9", 40000, "192.0.2.1",
    443, "internet", "example.com", "sni", "ok", 20_000_000, cookie=(1 << 63) + 1,
)  # fmt: skip
LOOKUP = EVENT._replace(
    kind="dns", domain="db.example.com", dst="10.0.0.53", port=53, transport="udp", status="NXDOMAIN",
    dns_type="A", duration=3_000_000, cookie=7,
)  # fmt: skip
FOUND = LOOKUP._replace(
    domain="example.com", status="NOERROR", answers=("192.0.2.1", "192.0.2.2"), time=START - 5_000_000
)
HELLO = EVENT._replace(
    kind="tls", status="", time=START + 20_000_000, duration=30_000_000,
    tls=Tls("1.3", "1.3", ("h2", "http/1.1"), "X25519MLKEM768", True, ja4="t13d1516h2_8daaf6152771_02713d6af862"),
)  # fmt: skip
EXCHANGE = Exchange("1.1", "https", 200, "", 4_000_000, 0, 5123, sequence=1)
REQUEST = EVENT._replace(
    kind="https", status="", name_source="host", method="GET", path="/v1/items/42?page=REDACTED",
    time=START + 50_000_000, duration=9_000_000, exchange=EXCHANGE,
)  # fmt: skip
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = PARENT[:-2] + "00"


def outcome(**changes: object) -> Event:
    """REQUEST with another exchange."""
    return REQUEST._replace(exchange=EXCHANGE._replace(**changes))  # type: ignore[arg-type]
