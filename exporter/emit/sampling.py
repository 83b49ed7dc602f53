"""Which spans are kept: what the application decided, the sampler that is set, else a budget (D10).

Comes in: candidates. Goes out: those that are exported. Not its job: making them. A trace that the application does
not sample has no span of ours, whatever went wrong: the log record says it, with the trace id.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from exporter import health
from exporter.emit.setup import Setup
from exporter.emit.trace_context import Context
from exporter.events import Event

_CANDIDATES: Final = 4096
_random: Final = random.random
_RATIO_BITS: Final = 1 << 64


class Request(NamedTuple):
    """A request that becomes a span. `context`: the trace it is in and its own id, where they are decided already."""

    event: Event
    setup: Setup | None = None
    context: Context | None = None

    @property
    def weight(self) -> int:
        return 1


class Sampler(NamedTuple):
    """`ratio`: the share of traces that is kept; None where no sampler is set, and the budget decides.
    `parent_based`: where the application has decided, that holds."""

    ratio: float | None = None
    parent_based: bool = False

    @property
    def never(self) -> bool:
        return self.ratio == 0 and not self.parent_based

    def keep(self, parent: Context | None) -> bool:
        """Whether a span may be made at all."""
        if parent is not None:
            if not parent.sampled:
                return False
            if self.parent_based or self.ratio is None:
                return True
            # As the SDKs do it: by the last 8 bytes of the trace id, so that a trace is kept whole.
            return int.from_bytes(parent.trace_id[8:], "big") < round(self.ratio * _RATIO_BITS)
        return self.ratio is None or random.random() < self.ratio


class Budget:
    """At most `rate` spans a second: what went wrong first, then shared fairly between workloads; the rest is
    counted.

    Candidates wait until their second is over: only then is it known who else wants a share. Of a workload that has
    more than it can get, any one is as likely to be kept as any other.
    """

    def __init__(self, rate: int, losses: health.Losses, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._losses, self._clock = rate, losses, clock
        self._lock = threading.Lock()
        self._second = int(clock())
        self._count = self._dropped = 0
        # cgroup id -> how many spans came, candidates; each workload may bring as many as the whole budget, twice
        self._grave: dict[int, _Share] = {}
        self._others: dict[int, _Share] = {}

    def offer(self, item: Request | Setup, cgroup_id: int, grave: bool) -> list[Request | Setup]:
        """Take a candidate; returns what was chosen of the second before, if that has just ended."""
        with self._lock:
            chosen = self._rotate() if int(self._clock()) != self._second else []
            group = self._grave if grave else self._others
            share = group.get(cgroup_id)
            if share is None:
                share = group[cgroup_id] = _Share()
            if share.drawn:
                place = share.drawn.pop()
            else:
                share.came += 1
                if len(share.items) < self._rate and self._count < _CANDIDATES:
                    share.items.append(item)
                    self._count += 1
                    return chosen
                place = int(_random() * share.came)
            self._dropped += item.weight
            if place < len(share.items):
                self._dropped += share.items[place].weight - item.weight
                share.items[place] = item
            return chosen

    def refuses(self, cgroup_id: int) -> bool:
        """Draw for a request that is not grave, before anything is made of it. One that is refused is counted; another
        takes the place that it drew with the next `offer` for this workload."""
        with self._lock:
            share = self._others.get(cgroup_id)
            if share is None or int(self._clock()) != self._second:
                return False
            if len(share.items) < self._rate and self._count < _CANDIDATES:
                return False
            share.came += 1
            place = int(_random() * share.came)
            if place < len(share.items):
                share.drawn.append(place)
                return False
            self._dropped += 1
            return True

    def take(self, everything: bool = False) -> list[Request | Setup]:
        """What was chosen of a second that is over; `everything` ends the running one too."""
        with self._lock:
            return self._rotate() if everything or int(self._clock()) != self._second else []

    def _rotate(self) -> list[Request | Setup]:
        chosen: list[Request | Setup] = []
        room = self._rate
        waiting = 0
        for group in (self._grave, self._others):
            waiting += sum(item.weight for share in group.values() for item in share.items)
            found = _fair([share.items for share in group.values()], room)
            room -= sum(item.weight for item in found)
            chosen += found
        for item in chosen:
            if isinstance(item, Setup):
                item.kept = True
        if dropped := self._dropped + waiting - (self._rate - room):
            self._losses.add("export", "budget", dropped)
        self._grave, self._others, self._count, self._dropped = {}, {}, 0, 0
        self._second = int(self._clock())
        return chosen


class _Share:
    __slots__ = ("came", "drawn", "items")

    def __init__(self) -> None:
        self.came = 0
        self.drawn: list[int] = []  # places of candidates that are still to be offered
        self.items: list[Request | Setup] = []


def _fair(shares: list[list[Request | Setup]], room: int) -> list[Request | Setup]:
    """Up to `room` spans, one item from each list in turn."""
    chosen: list[Request | Setup] = []
    turn = 0
    random.shuffle(shares)  # with more workloads than room, not always the same ones
    while shares and room > 0:
        shares = [share for share in shares if len(share) > turn]
        for share in shares:
            item = share[turn]
            if item.weight <= room:
                chosen.append(item)
                room -= item.weight
        turn += 1
    return chosen
