"""Connections of uvicorn, with what it leaves open: a limit on the time of headers, and an end without waiting."""

from __future__ import annotations

import asyncio
import socket
from asyncio import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minilib.serving.server.errors import ApiError
from minilib.serving.server.running import ABORT

SEND_BUFFER = 2**18  # bytes; the system's own limit is megabytes for each client that does not read


def connection_type(header_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol for `uvicorn.Config(http=…)`.

    A connection on which a request has begun and whose headers have not come in time is closed, as is one that never
    began a request in that time; between two requests `timeout_keep_alive` holds.

    Args:
        header_seconds: most seconds.
    """

    class Connection(HttpToolsProtocol):
        """One connection."""

        _headers_due: TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            self._expect_headers()

        def connection_lost(self, error: Exception | None) -> None:
            self._headers_came()
            super().connection_lost(error)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {ABORT: self.transport.abort}
            self._headers_came()
            self._expect_headers()

        def on_headers_complete(self) -> None:
            self._headers_came()
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            body = ApiError(400, msg, "invalid_http").body
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
            self.transport.close()

        def _expect_headers(self) -> None:
            self._headers_due = self.loop.call_later(header_seconds, self.transport.abort)

        def _headers_came(self) -> None:
            if self._headers_due is not None:
                self._headers_due.cancel()

    return Connection
