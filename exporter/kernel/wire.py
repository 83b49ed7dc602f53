"""bpf/wire.h in ctypes, and the constants of the kernel side. tests/unit/test_wire.py holds the two together.

Only what Python reads or writes field by field is mirrored; of struct socket and struct inspection, which only the
kernel reads, the size is.
"""

from __future__ import annotations

import ctypes as c
import struct
from typing import Final

LAYOUT_VERSION = 5
STRIPES = 4
NAME_SIZE = 256
NAME_FROM_SNI, NAME_FROM_HOST = 1, 2

MAP_IDS = (
    "settings",
    "sockets",
    "inspections",
    "scratch",
    "free_scratch",
    "flows",
    "traffic",
    "connections",
    "free_slots",
    "spare_slots",
    "names",
    "destinations",
    "excluded_names",
    "tallies",
    "scope",
    "records",
    "received",
    "tls_streams",
    "tls_calls",
    "executions",
    "http2",
    "frames_out",
    "frames_in",
    "frames_tls",
    "tls_http2",
    "accepting",
    "inbound",
)  # enum map_id, from 1

ROLES: Final = ("unknown", "client", "server")
SCOPES: Final = ("internet", "loopback", "private", "link_local")
FLOW_PEER, FLOW_INBOUND, FLOW_EXCLUDED, FLOW_OTHER = range(4)

# enum tally -> (stage, cause) of a loss, the kind of what `exclude` hid, or what was made
TALLIES = (
    ("ring", "full"),
    ("table", "flows_full"),
    ("table", "flows_overflow"),
    ("table", "names_full"),
    ("table", "sockets"),
    ("decode", "client_hello"),
    ("table", "scratch"),
    ("ring", "executions_full"),
    ("decode", "h2_frames"),
    ("filtered", "connect"),
    ("filtered", "close"),
    ("filtered", "tls"),
    ("made", "flows"),
)

RECORD_OPENED: Final = 1
RECORD_FAILED: Final = 2
RECORD_CLOSED: Final = 3
RECORD_DNS_QUERY: Final = 4
RECORD_DNS_ANSWER: Final = 5
RECORD_HELLO: Final = 6
RECORD_HEAD: Final = 7
RECORD_TLS_WRITE: Final = 8
RECORD_RESPONSE: Final = 9
RECORD_RECEIVED: Final = 10
RECORD_TLS_CLOSED: Final = 11
RECORD_SERVER_HELLO: Final = 12
RECORD_HANDSHAKE_END: Final = 13
RECORD_QUIC_INITIAL: Final = 14
RECORD_FRAMES_OUT: Final = 15
RECORD_FRAMES_IN: Final = 16

OUTCOMES: Final = ("", "ok", "refused", "timed_out", "cancelled", "unreachable", "denied", "reset")

RECORD_TRUNCATED: Final = 1
RECORD_PROXIED: Final = 2
RECORD_HEAD_END: Final = 4
RECORD_LAST_CHUNK: Final = 8
RECORD_ABANDONED: Final = 16
RECORD_CUT: Final = 32
KEY_SHARE_KEPT: Final = 128
RECORD_BROKEN: Final = 16
RECORD_REDIRECTED: Final = 64
RECORD_EXCLUDED: Final = 128

Address = c.c_uint8 * 16


class FlowKey(c.Structure):
    _fields_ = (
        ("cgroup", c.c_uint64),
        ("name", c.c_uint64),
        ("peer", Address),
        ("port", c.c_uint16),
        ("transport", c.c_uint8),
        ("role", c.c_uint8),
        ("scope", c.c_uint8),
        ("kind", c.c_uint8),
        ("redirected", c.c_uint8),
        ("pad", c.c_uint8),
    )


class FlowRow(c.Structure):
    _fields_ = (("slot", c.c_uint32), ("generation", c.c_uint32), ("since_ns", c.c_uint64))


class Traffic(c.Structure):
    _fields_ = (
        ("tx_bytes", c.c_uint64),
        ("tx_packets", c.c_uint64),
        ("rx_bytes", c.c_uint64),
        ("rx_packets", c.c_uint64),
        ("generation", c.c_uint32),
        ("taken", c.c_uint32),
    )


class Connections(c.Structure):
    _fields_ = (
        ("opened", c.c_uint64),
        ("closed", c.c_uint64),
        ("refused", c.c_uint64),
        ("timed_out", c.c_uint64),
        ("cancelled", c.c_uint64),
        ("unreachable", c.c_uint64),
        ("denied", c.c_uint64),
        ("retransmits", c.c_uint64),
    )


class NameKey(c.Structure):
    _fields_ = (("prefix_bits", c.c_uint32), ("reversed", c.c_uint8 * NAME_SIZE))


class AddressKey(c.Structure):
    _fields_ = (("prefix_bits", c.c_uint32), ("address", Address))


class Destination(c.Structure):
    _fields_ = (("scope", c.c_uint8), ("excluded", c.c_uint8), ("pad", c.c_uint16))


class Settings(c.Structure):
    _fields_ = (("slots", c.c_uint32), ("wakeup_bytes", c.c_uint32), ("zero", c.c_uint32), ("pad", c.c_uint32))


class Record(c.Structure):
    _fields_ = (
        ("time_ns", c.c_uint64),
        ("cgroup", c.c_uint64),
        ("cookie", c.c_uint64),
        ("name", c.c_uint64),
        ("local", Address),
        ("peer", Address),
        ("comm", Address),
        ("pid", c.c_uint32),
        ("local_port", c.c_uint16),
        ("peer_port", c.c_uint16),
        ("kind", c.c_uint8),
        ("transport", c.c_uint8),
        ("role", c.c_uint8),
        ("scope", c.c_uint8),
        ("outcome", c.c_uint8),
        ("flags", c.c_uint8),
        ("length", c.c_uint16),
        ("duration_ns", c.c_uint64),
        ("tx_bytes", c.c_uint64),
        ("rx_bytes", c.c_uint64),
        ("retransmits", c.c_uint32),
        ("rtt_us", c.c_uint32),
        ("offset", c.c_uint32),
        ("sequence", c.c_uint32),
    )


class Received(c.Structure):
    _fields_ = (("bytes", c.c_uint64), ("last_ns", c.c_uint64))


class Execution(c.Structure):
    _fields_ = (("time_ns", c.c_uint64), ("pid", c.c_uint32), ("pad", c.c_uint32))


STRUCTS: dict[str, type[c.Structure]] = {
    "flow_key": FlowKey,
    "flow_row": FlowRow,
    "traffic": Traffic,
    "connections": Connections,
    "name_key": NameKey,
    "address_key": AddressKey,
    "destination": Destination,
    "settings": Settings,
    "record": Record,
    "received": Received,
    "execution": Execution,
}

# For the hot path: one call for all fields, in the order of struct record.
RECORD: Final = struct.Struct("<QQQQ16s16s16sIHHBBBBBBHQQQIIII")
FLOW_KEY = struct.Struct("<QQ16sHBBBBBB")
FLOW_ROW = struct.Struct("<IIQ")
EXECUTION = struct.Struct("<QII")
assert RECORD.size == c.sizeof(Record)
assert FLOW_KEY.size == c.sizeof(FlowKey)
assert FLOW_ROW.size == c.sizeof(FlowRow)
assert EXECUTION.size == c.sizeof(Execution)

SOCKET_SIZE = 184
TLS_KEY_SIZE, TLS_STREAM_SIZE, TLS_CALL_SIZE = 16, 48, 48
INSPECTION_SIZE = 1244
SCRATCH_SIZE = 1704
HTTP2_SIZE = 128
ACCEPTING_SIZE, INBOUND_SIZE, INBOUND_CACHE = 8, 24, 64
