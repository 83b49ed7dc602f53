"""bpf/wire.h against exporter/kernel/wire.py: the C compiler judges sizes, offsets and numbers."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import pytest

from exporter.kernel import wire

BPF = Path(__file__).parents[2] / "bpf"
HEADER = (BPF / "wire.h").read_text()
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)

# Python knows these by their bytes or their size only.
UNMIRRORED = {
    "accepting",
    "inbound",
    "name",
    "socket",
    "inspection",
    "tls_key",
    "tls_stream",
    "tls_call",
    "frames",
    "http2",
    "walk",
}

TALLY_NAMES = {
    ("ring", "full"): "LOST_RING_FULL",
    ("table", "flows_full"): "LOST_FLOW_TABLE",
    ("table", "flows_overflow"): "LOST_FLOW_OVERFLOW",
    ("table", "names_full"): "LOST_NAME_TABLE",
    ("table", "sockets"): "LOST_SOCKET",
    ("decode", "client_hello"): "LOST_HELLO",
    ("table", "scratch"): "LOST_SCRATCH",
    ("ring", "executions_full"): "LOST_EXECUTION",
    ("decode", "h2_frames"): "LOST_FRAMES",
    ("filtered", "connect"): "FILTERED_CONNECT",
    ("filtered", "close"): "FILTERED_CLOSE",
    ("filtered", "tls"): "FILTERED_TLS",
    ("made", "flows"): "FLOWS_MADE",
}


def members(enum: str) -> list[str]:
    body = re.search(rf"^enum {enum} \{{(.*?)\}}", CODE, re.S | re.M)
    assert body, enum
    return [part.split("=")[0].strip() for part in body[1].split(",") if part.strip()]


def layout(name: str, kind: type[ctypes.Structure]) -> list[str]:
    """What must hold for C's `struct name` to be `kind`."""
    claims = [f"sizeof(struct {name}) == {ctypes.sizeof(kind)}"]
    for field, *_ in kind._fields_:
        at = getattr(kind, field)
        claims.append(f"offsetof(struct {name}, {field}) == {at.offset}")
        claims.append(f"sizeof(((struct {name} *)0)->{field}) == {at.size}")
    return claims


def numbers() -> dict[str, int]:
    """Every enumerator and constant that crosses, as Python has it."""
    named = {name: getattr(wire, name) for name in re.findall(r"\b(?:RECORD|FLOW)_[A-Z_]+\b", CODE)}
    named |= {name: getattr(wire, name) for name in ("LAYOUT_VERSION", "STRIPES", "NAME_SIZE", "KEY_SHARE_KEPT")}
    named |= {f"MAP_{name.upper()}": i for i, name in enumerate(wire.MAP_IDS, 1)}
    named |= {f"ROLE_{name.upper()}": i for i, name in enumerate(wire.ROLES)}
    named |= {f"SCOPE_{name.upper()}": i for i, name in enumerate(wire.SCOPES)}
    named |= {f"OUTCOME_{name.upper() or 'NONE'}": i for i, name in enumerate(wire.OUTCOMES)}
    named |= {TALLY_NAMES[cause]: i for i, cause in enumerate(wire.TALLIES)}
    named["TALLIES"] = len(wire.TALLIES)
    return named


def claims() -> list[str]:
    every = [claim for name, kind in wire.STRUCTS.items() for claim in layout(name, kind)]
    every += [f"{name} == {value}" for name, value in numbers().items()]
    every += [
        f"sizeof(struct socket) == {wire.SOCKET_SIZE}",
        f"sizeof(struct inspection) == {wire.INSPECTION_SIZE}",
        f"sizeof(struct tls_key) == {wire.TLS_KEY_SIZE}",
        f"sizeof(struct tls_stream) == {wire.TLS_STREAM_SIZE}",
        f"sizeof(struct tls_call) == {wire.TLS_CALL_SIZE}",
        f"sizeof(union scratch) == {wire.SCRATCH_SIZE}",
        f"sizeof(struct http2) == {wire.HTTP2_SIZE}",
        f"sizeof(struct accepting) == {wire.ACCEPTING_SIZE}",
        f"sizeof(struct inbound) == {wire.INBOUND_SIZE}",
        f"INBOUND_CACHE == {wire.INBOUND_CACHE}",
        f"sizeof(struct name) == {wire.NAME_SIZE}",
        f"sizeof(struct record) == {wire.RECORD.size}",
        f"sizeof(struct flow_key) == {wire.FLOW_KEY.size}",
        f"sizeof(struct flow_row) == {wire.FLOW_ROW.size}",
    ]
    return every


def complaints(header: str, claims: list[str]) -> str:
    lines = "".join(f'_Static_assert({claim}, "{claim}");\n' for claim in claims)
    source = f"#include <linux/types.h>\n#include <stddef.h>\n{header}\n{lines}"
    ran = subprocess.run(
        ["cc", "-std=gnu11", "-Werror", "-fsyntax-only", "-x", "c", "-"],
        input=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode in (0, 1), ran.stderr
    return ran.stderr if ran.returncode else ""


def test_the_two_sides_agree() -> None:
    assert complaints(HEADER, claims()) == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\t__u32 slot;\n\t__u32 generation; /*", "\t__u32 generation;\n\t__u32 slot; /*"),
        ("\t__u64 tx_packets;\n", ""),
        ("\t__u16 port;", "\t__u32 port;"),
        ("\tLOST_SOCKET,", ""),
        ("SCOPE_LOOPBACK, SCOPE_PRIVATE", "SCOPE_PRIVATE, SCOPE_LOOPBACK"),
        ("#define STRIPES 4", "#define STRIPES 8"),
        ("\t__u64 began_ns;", ""),
    ],
)  # fmt: skip
def test_a_change_on_one_side_is_seen(old: str, new: str) -> None:
    assert HEADER.count(old) == 1, old
    assert "static assertion failed" in complaints(HEADER.replace(old, new), claims())


def test_all_that_crosses_is_held_together() -> None:
    assert set(re.findall(r"^struct (\w+) \{", CODE, re.M)) == set(wire.STRUCTS) | UNMIRRORED
    known = numbers()
    for enum in ("map_id", "role", "scope", "flow_kind", "tally", "record_kind", "outcome"):
        assert set(members(enum)) <= set(known), enum
    assert set(re.findall(r"^enum (\w+) \{", CODE, re.M)) == {
        "map_id", "role", "scope", "flow_kind", "tally", "record_kind", "outcome",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(wire.STRUCTS))
def test_padding_is_explicit(name: str) -> None:
    """A hole holds whatever the stack held; in a key it makes two of one."""
    kind = wire.STRUCTS[name]
    assert sum(getattr(kind, field).size for field, *_ in kind._fields_) == ctypes.sizeof(kind)


@pytest.mark.parametrize(
    ("packed", "kind"),
    [(wire.RECORD, wire.Record), (wire.FLOW_KEY, wire.FlowKey), (wire.FLOW_ROW, wire.FlowRow)],
)
def test_the_fast_way_reads_the_same_fields(packed: struct.Struct, kind: type[ctypes.Structure]) -> None:
    raw = bytes(range(1, packed.size + 1))
    slow = kind.from_buffer_copy(raw)
    values = [getattr(slow, field) for field, *_ in kind._fields_]
    assert packed.unpack(raw) == tuple(v if isinstance(v, int) else bytes(v) for v in values)
