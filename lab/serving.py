"""The lab's servers themselves, all on one asyncio loop: HTTP, HTTPS, DNS, echo, sink, reset, proxy.

In: `python -m lab.serving DIRECTORY`, started by `servers.Servers` inside the `world` namespace, where
DIRECTORY has config.json and the certificate. Out: "ready" on standard output once all listen, then a file of
JSON lines per server in DIRECTORY (fields: see `servers`). Ends with its standard input. Not its job:
namespaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import json
import os
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TextIO, cast

from lab import net
from lab.dns import Entry, Reply, Zone, parse
from lab.servers import PORTS

_DATAGRAM_ADDRESSES = (*net.SERVERS4, net.RESOLVER4, *net.SERVERS6, net.RESOLVER6)
_HEAD_LIMIT = 64 * 1024  # of an HTTP request's head, in bytes


class _Log:
    """One server's file of JSON lines. A line is one write, so that a reader sees whole lines."""

    def __init__(self, directory: Path, name: str) -> None:
        self._fd = os.open(directory / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, event: str, peer: Any, **fields: Any) -> None:
        row = {"time": time.time(), "event": event, "peer": _plain(peer), **fields}
        os.write(self._fd, json.dumps(row).encode() + b"\n")


def _plain(address: Any) -> list[Any]:
    """[address, port] of a socket name, IPv4-mapped IPv6 as IPv4; asyncio has None for a peer that is
    gone."""
    if not address:
        return ["", 0]
    return [str(address[0]).removeprefix("::ffff:"), address[1]]


class _Connection:
    """A TCP connection that counts its payload and logs its beginning and end."""

    _numbers = itertools.count(1)

    def __init__(self, log: _Log, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.id = next(self._numbers)
        self.peer = writer.get_extra_info("peername")
        self.local = _plain(writer.get_extra_info("sockname"))
        self.rx = self.tx = 0
        self._log, self._reader, self._writer = log, reader, writer
        extra = {}
        if tls := writer.get_extra_info("ssl_object"):
            extra = {"sni": getattr(tls, "lab_sni", None) or "", "version": tls.version()}
        log("accepted", self.peer, id=self.id, local=self.local, **extra)

    async def read(self, most: int = 65536) -> bytes:
        data = await self._reader.read(most)
        self.rx += len(data)
        return data

    async def read_exactly(self, count: int) -> bytes:
        data = await self._reader.readexactly(count)
        self.rx += count
        return data

    async def read_until(self, mark: bytes) -> bytes:
        data = await self._reader.readuntil(mark)
        self.rx += len(data)
        return data

    async def write(self, data: bytes) -> None:
        self.tx += len(data)
        self._writer.write(data)
        await self._writer.drain()

    def write_eof(self) -> None:
        if self._writer.can_write_eof():
            self._writer.write_eof()

    def reset(self) -> None:
        """The next close sends RST instead of FIN."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def request(self, **fields: Any) -> None:
        self._log("request", self.peer, id=self.id, **fields)

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await self._writer.wait_closed()
        self._log("closed", self.peer, id=self.id, rx=self.rx, tx=self.tx)


Handler = Callable[[_Connection], Coroutine[Any, Any, None]]


class _Head:
    """The head of an HTTP/1.x request. Raises ValueError for anything else."""

    def __init__(self, raw: bytes) -> None:
        request, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.method, self.target, self.version = request.split(" ")
        if not self.version.startswith("HTTP/1."):
            raise ValueError(self.version)
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }

    @property
    def keep_alive(self) -> bool:
        token = self.headers.get("connection", "").lower()
        return token != "close" if self.version == "HTTP/1.1" else token == "keep-alive"


async def _read_body(connection: _Connection, head: _Head) -> int:
    """Reads and forgets the body; its length in bytes."""
    if head.headers.get("expect", "").lower() == "100-continue":
        await connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        total = 0
        while size := int((await connection.read_until(b"\r\n")).split(b";")[0], 16):
            await connection.read_exactly(size + 2)
            total += size
        while await connection.read_until(b"\r\n") != b"\r\n":
            pass
        return total
    length = int(head.headers.get("content-length", 0))
    left = length
    while left:
        data = await connection.read(min(left, 65536))
        if not data:
            raise ConnectionResetError("body cut short")
        left -= len(data)
    return length


async def _http(connection: _Connection) -> None:
    """GET /bytes/N, /status/N, /delay/MS, /close (no answer at all); anything else gets a short 200."""
    while True:
        try:
            head = _Head(await connection.read_until(b"\r\n\r\n"))
        except asyncio.IncompleteReadError:
            return
        received = await _read_body(connection, head)
        words = head.target.partition("?")[0].strip("/").split("/")
        number = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
        status, body = 200, b"this is the lab\n"
        if words[0] == "bytes":
            body = b"x" * number
        elif words[0] == "status" and 200 <= number < 600:
            status = number
        elif words[0] == "delay":
            await asyncio.sleep(number / 1000)
        elif words[0] == "close":
            status = 0
        connection.request(
            method=head.method,
            target=head.target,
            host=head.headers.get("host", ""),
            status=status,
            headers=head.headers,
            rx=received,
        )
        if not status:
            return
        keep = head.keep_alive
        bodiless = status in (204, 304)
        text = f"HTTP/1.1 {status} Lab\r\nServer: lab\r\nConnection: {'keep-alive' if keep else 'close'}\r\n"
        text += "\r\n" if bodiless else f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
        await connection.write(text.encode() + (b"" if bodiless or head.method == "HEAD" else body))
        if not keep:
            return


async def _echo(connection: _Connection) -> None:
    while data := await connection.read():
        await connection.write(data)


async def _sink(connection: _Connection) -> None:
    while await connection.read(1 << 20):
        pass


async def _reset(connection: _Connection) -> None:
    connection.reset()


def _make_proxy(zone: Zone) -> Handler:
    async def relay(source: Callable[[], Coroutine[Any, Any, bytes]], sink: Any, end: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            while data := await source():
                await sink(data)
            end()

    async def proxy(connection: _Connection) -> None:
        head = _Head(await connection.read_until(b"\r\n\r\n"))
        if head.method == "CONNECT":
            authority, path = head.target, ""
        elif head.target.startswith("http://"):
            authority, _, rest = head.target.removeprefix("http://").partition("/")
            path = "/" + rest
        else:
            authority, path = "", ""
        host, _, port = authority.rpartition(":") if _has_port(authority) else (authority, "", "80")
        host = host.strip("[]")
        writer = None
        with contextlib.suppress(OSError, IndexError, ValueError):
            address = host if _is_address(host) else zone.addresses(host)[0]
            reader, writer = await asyncio.open_connection(address, int(port))
        status = 200 if writer else 502
        connection.request(method=head.method, target=head.target, host=host, status=status, headers=head.headers, rx=0)
        if writer is None:
            await connection.write(b"HTTP/1.1 502 Lab\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        if path:
            lines = [f"{head.method} {path} {head.version}"]
            lines += [f"{k}: {v}" for k, v in head.headers.items() if not k.startswith(("proxy-", "connection"))]
            writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1"))
        else:
            await connection.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        up = asyncio.create_task(relay(connection.read, send, writer.write_eof))
        # With an absolute-form request the answer's end (connection: close) is the end.
        await relay(lambda: reader.read(65536), connection.write, connection.write_eof)
        if path:
            up.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await up
        writer.close()

    return proxy


def _has_port(authority: str) -> bool:
    return authority.rpartition(":")[2].isdecimal() and (authority.count(":") == 1 or "]:" in authority)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _make_dns_tcp(zone: Zone, log: _Log) -> Handler:
    async def dns(connection: _Connection) -> None:
        while True:
            try:
                (length,) = struct.unpack("!H", await connection.read_exactly(2))
                message = await connection.read_exactly(length)
            except asyncio.IncompleteReadError:
                return
            reply = _answer(zone, log, message, connection.peer, udp=False)
            if reply and reply.message:
                await asyncio.sleep(reply.delay)
                await connection.write(struct.pack("!H", len(reply.message)) + reply.message)

    return dns


def _answer(zone: Zone, log: _Log, message: bytes, peer: Any, *, udp: bool) -> Reply | None:
    try:
        asked = parse(message)
        reply = zone.answer(message, udp=udp)
    except (ValueError, KeyError) as error:
        log("malformed", peer, error=str(error), bytes=len(message))
        return None
    log(
        "query",
        peer,
        name=asked.name,
        type=asked.type,
        transport="udp" if udp else "tcp",
        rcode=reply.rcode,
        answers=reply.answers,
    )
    return reply


class _Datagrams(asyncio.DatagramProtocol):
    """One UDP socket on one address: a wildcard socket would answer from an address that nobody asked."""

    def __init__(self, log: _Log, answer: Callable[[bytes, Any], tuple[bytes | None, float]]) -> None:
        self._log, self._answer = log, answer
        self._transport: asyncio.DatagramTransport | None = None

    def itself(self) -> _Datagrams:
        """A protocol factory: this socket has one protocol."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own UDP transport is no subclass of DatagramTransport before Python 3.12.
        transport = cast(asyncio.DatagramTransport, transport)
        self._transport = transport
        self._local = _plain(transport.get_extra_info("sockname"))

    def datagram_received(self, data: bytes, peer: Any) -> None:
        assert self._transport is not None
        if self._local[1] != PORTS["dns"]:
            self._log("datagram", peer, bytes=len(data), local=self._local)
        answer, delay = self._answer(data, peer)
        if answer is None:
            return
        if delay:
            asyncio.get_running_loop().call_later(delay, self._transport.sendto, answer, peer)
        else:
            self._transport.sendto(answer, peer)


def _remember_sni(tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
    tls.lab_sni = name  # type: ignore[attr-defined]


async def _serve(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    zone = Zone({name: Entry(*fields) for name, fields in config["names"].items()})
    logs = {name: _Log(directory, name) for name in PORTS}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.sni_callback = _remember_sni
    loop = asyncio.get_running_loop()

    async def listen(name: str, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = _Connection(logs[name], reader, writer)
            # Clients of a test lab break off, reset and send rubbish; none of it is an error of ours.
            with contextlib.suppress(
                OSError, ssl.SSLError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                await handler(connection)
            await connection.close()

        address = ("::" if config["ipv6"] else "0.0.0.0", PORTS[name])
        family = socket.AF_INET6 if config["ipv6"] else socket.AF_INET
        raw = socket.create_server(address, family=family, backlog=4096, dualstack_ipv6=config["ipv6"])
        await asyncio.start_server(accept, sock=raw, ssl=tls, limit=_HEAD_LIMIT, backlog=4096)

    def answer_dns(data: bytes, peer: Any) -> tuple[bytes | None, float]:
        reply = _answer(zone, logs["dns"], data, peer, udp=True)
        return (reply.message, reply.delay) if reply else (None, 0.0)

    await listen("http", _http)
    await listen("https", _http, context)
    await listen("dns", _make_dns_tcp(zone, logs["dns"]))
    await listen("tcp_echo", _echo)
    await listen("tcp_sink", _sink)
    await listen("reset", _reset)
    await listen("proxy", _make_proxy(zone))
    for address in _DATAGRAM_ADDRESSES:
        if ":" in address and not config["ipv6"]:
            continue
        for name, answer in (
            ("dns", answer_dns),
            ("udp_echo", lambda data, peer: (data, 0.0)),
            ("udp_sink", lambda data, peer: (None, 0.0)),
        ):
            protocol = _Datagrams(logs[name], answer)
            await loop.create_datagram_endpoint(protocol.itself, local_addr=(address, PORTS[name]))

    print("ready", flush=True)
    await _until_end_of(sys.stdin)


async def _until_end_of(stream: TextIO) -> None:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, stream)
    await reader.read()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
