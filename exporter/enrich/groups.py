"""Peer groups: what a peer's name or address stands for in the user's own words (s3, stripe, partner-x).

In: a file that maps networks and domains to groups, and the name and address of a peer. Out: the group's name, "" for
none. Not its job: names of addresses (names.py), what a record says of a group (emit).

    groups:
      s3:
        domains: [s3.amazonaws.com]     # the domain and everything below it, as in `exclude`
        cidrs: [52.216.0.0/15]
        collapse: true                  # metrics show ~s3 in place of its names and addresses
      stripe:
        domains: [stripe.com]

The name decides before the address, since it is what the application asked for; of several domains, or networks, that
match, the longest. The file is looked at every few seconds and read by a thread of its own; a version with a mistake
in it changes nothing, and is told.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from exporter import document
from exporter.errors import SettingsError
from exporter.events import DNS, Event, Flow
from exporter.health import features
from exporter.settings import Network, domain, network

log = logging.getLogger(__name__)

GROUPS = 256  # values of one attribute of every metric
PATTERNS = 50_000  # all domains and networks: some 10 MB
_CACHED = 8192
_FEATURE = "peer_groups"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_new = tuple.__new__
_AT = Event._fields.index("group")


class Table:
    """The file, read: `of` finds the longest match. Immutable."""

    def __init__(
        self, domains: Mapping[str, str], networks: Mapping[Network, str], collapsed: frozenset[str] = frozenset()
    ) -> None:
        self._domains = dict(domains)
        self.collapsed = collapsed
        # By family: (bits to shift away, what remains of the address -> group), longest prefix first.
        self._networks: dict[int, list[tuple[int, dict[int, str]]]] = {4: [], 6: []}
        by_length: dict[tuple[int, int], dict[int, str]] = {}
        for net, group in networks.items():
            shift = net.max_prefixlen - net.prefixlen
            by_length.setdefault((net.version, shift), {})[int(net.network_address) >> shift] = group
        for (version, shift), found in sorted(by_length.items(), key=lambda item: item[0]):
            self._networks[version].append((shift, found))

    def __len__(self) -> int:
        return len(self._domains) + sum(len(found) for family in self._networks.values() for _, found in family)

    def of(self, name: str, address: str) -> str:
        """The group of a peer. `name` in lower case or "", `address` as text or ""."""
        if name and self._domains:
            rest = name
            while rest:
                group = self._domains.get(rest)
                if group is not None:
                    return group
                rest = rest.partition(".")[2]
        if not address:
            return ""
        version, family = (6, socket.AF_INET6) if ":" in address else (4, socket.AF_INET)
        if not self._networks[version]:
            return ""
        try:
            packed = int.from_bytes(socket.inet_pton(family, address), "big")
        except OSError:
            return ""
        for shift, found in self._networks[version]:
            group = found.get(packed >> shift)
            if group is not None:
                return group
        return ""


class _Stamp(NamedTuple):
    """Tells one version of the file from another: a mounted ConfigMap changes the inode, an editor the time."""

    inode: int
    size: int
    changed_ns: int


class PeerGroups:
    """The groups in force. `of`, `tag`, `tag_flow` and `poll` are for one thread, the pipeline's.

    Raises SettingsError where the file cannot be read at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._table = read(path)
        self._cache: dict[tuple[str, str], str] = {}
        self._reader: threading.Thread | None = None
        self._found: Table | SettingsError | None = None
        features.set(_FEATURE, True)
        log.info("peer groups: %d domains and networks from %s", len(self._table), path)

    def __len__(self) -> int:
        return len(self._table)

    def of(self, name: str, address: str) -> str:
        """The group of a peer, "" for none."""
        key = (name, address)
        group = self._cache.get(key)
        if group is None:
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            group = self._cache[key] = self._table.of(name, address)
        return group

    def tag(self, event: Event) -> Event:
        """The event with its peer's group. Of a lookup, the name that was asked for decides: its peer is only the
        resolver."""
        group = self.of(event.domain, "" if event.kind == DNS else event.dst)
        # A slice and a new tuple take a quarter of what _replace does.
        return _new(Event, (*event[:_AT], group, *event[_AT + 1 :])) if group else event

    def tag_flow(self, flow: Flow) -> Flow:
        """The flow with its peer's group."""
        group = self.of(flow.name, flow.peer)
        return flow._replace(group=group) if group else flow

    def counted(self, event: Event) -> Event:
        """The event as metrics are to see it: the same, but where its group is collapsed."""
        if event.group and event.group in self._table.collapsed:
            return event._replace(domain=f"~{event.group}")
        return event

    def counted_flow(self, flow: Flow) -> Flow:
        """As `counted`."""
        return flow._replace(name=f"~{flow.group}") if flow.group in self._table.collapsed else flow

    def poll(self) -> None:
        """Take over what a reader has brought; start one where the file is another. Costs one stat."""
        if self._found is not None:
            found, self._found = self._found, None
            if isinstance(found, SettingsError):
                features.set(_FEATURE, False, "the file has a mistake; the groups it had before stay in force")
                log.warning("peer groups: %s; the %d from before stay in force", found, len(self._table))
            else:
                self._table = found
                self._cache.clear()
                features.set(_FEATURE, True)
                log.info("peer groups: %d domains and networks read again from %s", len(found), self._path)
        if self._reader is not None and self._reader.is_alive():
            return
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            self._reader = threading.Thread(target=self._read, name="peer-groups", daemon=True)
            self._reader.start()

    def _read(self) -> None:
        try:
            self._found = read(self._path)
        except SettingsError as error:
            self._found = error


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def read(path: Path) -> Table:
    """Read the file. Raises SettingsError, which names what is wrong and where."""
    name = str(path)
    root = document.read(name, "the peer groups", "EBFW_PEER_GROUPS")
    domains: dict[str, str] = {}
    networks: dict[Network, str] = {}
    collapsed = set()
    top = document.mapping(name, root, "", ("groups",)) if root is not None else {}
    node = top.get("groups")
    groups = document.mapping(name, node, "groups", ()) if node is not None else {}
    if node is not None and len(groups) > GROUPS:
        raise document.fail(name, node, "groups", f"{len(groups)} groups; at most {GROUPS} are allowed")
    for group, value in groups.items():
        key = f"groups.{group}"
        if not _NAME.fullmatch(group):
            raise document.fail(name, value, key, "use letters, digits, dots, dashes and underscores, at most 63")
        members = document.mapping(name, value, key, ("domains", "cidrs", "collapse"))
        if (found := members.get("domains")) is not None:
            for suffix in document.items(name, found, f"{key}.domains", domain):
                if domains.setdefault(suffix, group) != group:
                    raise document.fail(name, found, f"{key}.domains", f"{suffix} is in {domains[suffix]} already")
        if (found := members.get("cidrs")) is not None:
            for net in document.items(name, found, f"{key}.cidrs", network):
                if networks.setdefault(net, group) != group:
                    raise document.fail(name, found, f"{key}.cidrs", f"{net} is in {networks[net]} already")
        if (found := members.get("collapse")) is not None and document.boolean(name, found, f"{key}.collapse"):
            collapsed.add(group)
        if len(domains) + len(networks) > PATTERNS:
            raise document.fail(name, value, key, f"more than {PATTERNS:,} domains and networks altogether")
    return Table(domains, networks, frozenset(collapsed))
