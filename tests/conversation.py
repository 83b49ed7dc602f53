"""HTTP/2 conversations of two `h2` endpoints in memory: what each says, in order."""

from __future__ import annotations

from typing import NamedTuple

import h2.config
import h2.connection
import h2.settings

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Request(NamedTuple):
    """What one request is to do."""

    method: str = "GET"
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    body: tuple[int, ...] = ()  # sizes of its DATA frames
    padding: int = 0
    interim: bool = False
    status: int = 200
    answer: tuple[int, ...] = ()
    trailers: tuple[tuple[str, str], ...] = ()
    reset: str = ""  # "client" or "server": after the response's headers
    push: bool = False


class Conversation:
    """A client and a server in memory. `said`: (by the client?, bytes), in order; a clock that ticks with each."""

    def __init__(self, table: int = 4096) -> None:
        config = h2.config.H2Configuration
        self.client = h2.connection.H2Connection(config(client_side=True, header_encoding="utf-8"))
        self.server = h2.connection.H2Connection(config(client_side=False, header_encoding="utf-8"))
        self.said: list[tuple[bool, bytes]] = []
        for end in (self.client, self.server):
            end.local_settings = h2.settings.Settings(
                client=end is self.client,
                initial_values={
                    h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30,
                    h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1000,
                },
            )
            end.initiate_connection()
            end.increment_flow_control_window(1 << 30)
        self.flush()
        if table != 4096:
            for end in (self.client, self.server):
                end.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: table})
            self.flush()

    def flush(self) -> None:
        while True:
            mine, theirs = self.client.data_to_send(), self.server.data_to_send()
            if mine:
                self.said.append((True, mine))
                self.server.receive_data(mine)
            if theirs:
                self.said.append((False, theirs))
                self.client.receive_data(theirs)
            if not mine and not theirs:
                return

    def ask(self, request: Request) -> int:
        """The request's headers and body; its stream."""
        stream = self.client.get_next_available_stream_id()
        head = [
            (":method", request.method),
            (":scheme", "http"),
            (":authority", "shop.example:8080"),
            (":path", request.path),
        ]
        self.client.send_headers(stream, [*head, *request.headers], end_stream=not request.body)
        for n, size in enumerate(request.body):
            last = n + 1 == len(request.body)
            self.client.send_data(stream, bytes(size), end_stream=last, pad_length=request.padding or None)
        self.flush()
        return stream

    def answer(self, stream: int, request: Request) -> None:
        if request.push:
            promised = self.server.get_next_available_stream_id()
            head = [(":method", "GET"), (":scheme", "http"), (":authority", "shop.example"), (":path", "/pushed")]
            self.server.push_stream(stream, promised, head)
            self.server.send_headers(promised, [(":status", "200"), ("x-pushed", "yes")], end_stream=True)
        if request.interim:
            self.server.send_headers(stream, [(":status", "103"), ("link", "</a>")])
        more = bool(request.answer or request.trailers or request.reset)
        head = [(":status", str(request.status)), ("server", "lab"), ("x-long", "v" * len(request.path))]
        self.server.send_headers(stream, head, end_stream=not more)
        if request.reset:
            self.flush()
            (self.client if request.reset == "client" else self.server).reset_stream(stream, 8)
            self.flush()
            return
        for n, size in enumerate(request.answer):
            last = n + 1 == len(request.answer) and not request.trailers
            self.server.send_data(stream, bytes(size), end_stream=last, pad_length=request.padding or None)
        if request.trailers:
            self.server.send_headers(stream, request.trailers, end_stream=True)
        self.flush()
