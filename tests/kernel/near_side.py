"""Not a test: the first lines of every client that a test starts inside the watched cgroup.

Arguments come as a line of JSON on standard input, in `A`; results go as JSON lines to standard output. The standard
library without site packages, so that it starts quickly on an emulated CPU.
"""
# ruff: noqa: F401  # the lines that follow use them

import errno
import json
import os
import select
import socket
import struct
import sys
import threading
import time

A = json.loads(sys.stdin.readline())
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


def tell(**said):
    print(json.dumps(said), flush=True)


def pause(**said):
    """Say something, and go on when told to."""
    tell(**said)
    sys.stdin.readline()


def make(address, kind=TCP):
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.settimeout(20)
    return sock


def dial(address, port, kind=TCP):
    sock = make(address, kind)
    if kind == TCP:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect((address, port))
    return sock


def read_to_end(sock):
    """Until the peer's FIN; bytes read."""
    size = 0
    while data := sock.recv(65536):
        size += len(data)
    return size


def finish(sock):
    """An orderly end in which all packets still belong to the socket: after close() the last ones would be TIME_WAIT's,
    which no socket is charged for."""
    sock.shutdown(socket.SHUT_WR)
    size = read_to_end(sock)
    sock.close()
    return size


def exactly(sock, size):
    """So many bytes of a stream."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError(len(data))
        data += more
    return data


def listen(address, port=0):
    sock = socket.create_server((address, port), family=make(address).family, backlog=4096)
    tell(port=sock.getsockname()[1])
    return sock
