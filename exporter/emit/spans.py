"""Spans: an event as a plain value that says what a span will say.

Comes in: events.Event, redacted. Goes out: Span, or None where the event is no span. Not its job: ids, budget
and encoding (otlp.py). A request is not a span yet: without its answer it has no end (logs.py tells it).

Names, kinds and attributes follow the conventions 1.44: `socket connect {address}:{port}` and `DNS lookup
{name}`, both INTERNAL; error.type is the same on span and metric; status stays unset on success.
"""

from __future__ import annotations

from typing import NamedTuple

from exporter.emit import semconv as c
from exporter.events import ADDRESS, CANCELLED, CONNECT, DNS, HTTP, HTTPS, OK, SERVER, Event

Value = str | int | float | tuple[str, ...]
Attributes = tuple[tuple[str, Value], ...]


class Span(NamedTuple):
    """`failed`: the status is Error. `error` may be set without it: a lost Happy-Eyeballs race is cancelled,
    and not a failure."""

    name: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: Attributes


def error_type(event: Event) -> str:
    """error.type of the event, "" where nothing went wrong."""
    if event.kind == DNS:
        return c.dns_error(event.status)
    if not event.status or event.status == OK:
        return ""
    return c.CONNECT_ERRORS.get(event.status, event.status)


def failed(event: Event) -> bool:
    """True where the event is a failure in rates: neither cancelled nor a step of a search list is (D3)."""
    return event.status != CANCELLED and not event.search_expansion and error_type(event) != ""


def told(event: Event) -> bool:
    """Whether the event may become a span or log record at all: what a workload started and `exclude` did not
    hide (D2, D5)."""
    return event.role != SERVER and not event.filtered


def is_span(event: Event) -> bool:
    return (event.kind == DNS or (event.kind == CONNECT and event.transport == "tcp")) and told(event)


def span(event: Event) -> Span | None:
    """The event as a span; None for what is none."""
    if not is_span(event):
        return None
    end = event.time + (event.duration or 0)
    found = [*where(event)]
    if event.kind == DNS:
        name = f"DNS lookup {event.domain}"
        found += dns(event)
    else:
        host = f"[{event.dst}]" if ":" in event.dst else event.dst
        name = f"socket connect {host}:{event.port}"
    if error := error_type(event):
        found.append((c.ERROR_TYPE, error))
    return Span(name, event.time, end, failed(event), tuple(found))


def where(event: Event) -> list[tuple[str, Value]]:
    """Who talks to whom: the attributes that spans and log records share. Unknown ones are left out."""
    server = event.dst if event.kind == DNS else event.domain or event.dst
    source = "" if event.kind == DNS else event.name_source or ADDRESS
    pairs: tuple[tuple[str, Value], ...] = (
        (c.SERVER_ADDRESS, server),
        (c.SERVER_PORT, event.port),
        (c.PEER_ADDRESS, event.dst),
        (c.PEER_PORT, event.port if event.dst else 0),
        (c.LOCAL_ADDRESS, event.src),
        (c.LOCAL_PORT, event.src_port),
        (c.TRANSPORT, event.transport),
        (c.NETWORK_TYPE, ("ipv6" if ":" in event.dst else "ipv4") if event.dst else ""),
        (c.PEER_NAME_SOURCE, source),
        (c.PEER_SCOPE, event.scope),
        (c.ROLE, event.role),
        (c.PEER_GROUP, event.group),
        (c.PROCESS_PID, event.pid),
        (c.PROCESS_EXECUTABLE, event.comm),
        (c.PROXY, event.proxy if event.kind in (HTTP, HTTPS) else ""),
    )
    return [(key, value) for key, value in pairs if value]


def dns(event: Event) -> list[tuple[str, Value]]:
    pairs: tuple[tuple[str, Value], ...] = (
        (c.DNS_QUESTION_NAME, event.domain),
        (c.DNS_QUESTION_TYPE, event.dns_type),
        (c.DNS_RCODE, event.status if event.status.lower() != "timeout" else ""),
        (c.DNS_ANSWERS, event.answers),
        (c.DNS_SEARCH_EXPANSION, event.search_expansion),
    )
    return [(key, value) for key, value in pairs if value]
