"""Trace context: the `traceparent` that an application sent (W3C Trace Context, level 1), read. Never injected.

Comes in: the header's text. Goes out: Context. Not its job: deciding what is kept (sampling.py).
"""

from __future__ import annotations

from typing import NamedTuple


class Context(NamedTuple):
    """A place in a trace (W3C Trace Context): `span_id` is a parent's or, in a log record, the span that it is
    about."""

    trace_id: bytes
    span_id: bytes
    flags: int

    @property
    def sampled(self) -> bool:
        return self.flags & 1 == 1


def context(traceparent: str) -> Context | None:
    """`version-trace_id-parent_id-flags`, as events.Exchange has it: valid or empty."""
    try:
        if not traceparent:
            return None
        trace_id, span_id = bytes.fromhex(traceparent[3:35]), bytes.fromhex(traceparent[36:52])
        return Context(trace_id, span_id, int(traceparent[53:55], 16))
    except ValueError:
        return None
