"""Connections of uvicorn, with what it leaves open.

* The head of a request has a limit in seconds and in bytes.
* A client of HTTP/1.0 (nginx's default towards its backends, ab) gets a body that ends with the connection, not chunks.
* An offer to upgrade (Java's client offers h2c with every request) is not taken, and the request is served as it is.
* What is no HTTP never lands in the middle of the response before it.
* A connection can be closed without waiting for what is not written.
"""

from __future__ import annotations

import asyncio
import socket
from asyncio import TimerHandle

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from minilib.serving.server.errors import ApiError
from minilib.serving.server.limits import Limits
from minilib.serving.server.running import ABORT

NO_HTTP = ApiError(400, "what came is no request of HTTP/1.1", "invalid_http")
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class _UntilClose(RequestResponseCycle):
    """A response of HTTP/1.0, whose body ends with the connection unless its length is told."""

    async def send(self, message) -> None:
        self.chunked_encoding, self.expected_content_length = False, len(message.get("body", b""))
        await super().send(message)


def connection_type(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol for `uvicorn.Config(http=…)`.

    A connection on which a request has begun and whose head has not come in time is closed, as is one that never
    began a request in that time; between two requests `timeout_keep_alive` holds.

    Args:
        limits: of the server.
    """

    too_large = ApiError(431, f"the head of a request has at most {limits.header_bytes} bytes", "head_too_large")

    class Connection(HttpToolsProtocol):
        """One connection."""

        _head_due: TimerHandle | None = None
        _head_bytes = 0  # of a head that has not come whole

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_bytes)
            self._expect_head()

        def connection_lost(self, error: Exception | None) -> None:
            self._head_came()
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                head, self.parser = self._head_without_upgrade(), httptools.HttpRequestParser(self)
                self.data_received(head + data[upgrade.args[0] :])
            except httptools.HttpParserError as error:
                wrong = error.__context__  # what a method below has raised, if one has
                self._refuse(wrong if isinstance(wrong, ApiError) else NO_HTTP)
            else:
                self._head_bytes += len(data) if self._head_due else 0
                if self._head_bytes > limits.header_bytes:
                    self._refuse(too_large)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {ABORT: self.transport.abort}
            self._head_came()
            self._expect_head()

        def on_headers_complete(self) -> None:
            self._head_came()
            if sum(len(name) + len(value) for name, value in self.headers) > limits.header_bytes:
                raise too_large
            if not self.parser.should_upgrade():
                super().on_headers_complete()
                if self.parser.get_http_version() == "1.0":
                    self.cycle.__class__ = _UntilClose  # made by uvicorn, and not at work yet

        def on_message_complete(self) -> None:
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def _refuse(self, error: ApiError) -> None:
            """Say what is wrong and close; behind requests that are not answered yet, close when they are."""
            self._head_came()
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                if not cycle.more_body:
                    cycle.keep_alive = False
                    return
                if self.pipeline or cycle.response_started:
                    self.transport.abort()
                    return
            kind, body = b"content-type: application/json", error.body
            status = b"HTTP/1.1 %d %s" % (error.status, REASONS[error.status])
            head = b"\r\n".join((status, kind, b"content-length: %d" % len(body), b"connection: close", b"", b""))
            self.transport.write(head + body)
            self.transport.close()

        def _head_without_upgrade(self) -> bytes:
            """The head that has come, without the offer to speak another protocol behind it."""
            version = self.parser.get_http_version().encode()
            lines = [b" ".join((self.parser.get_method(), self.url, b"HTTP/" + version))]
            lines += [name + b": " + value for name, value in self.headers if name not in (b"connection", b"upgrade")]
            return b"\r\n".join((*lines, b"", b""))

        def _expect_head(self) -> None:
            self._head_bytes = 0
            self._head_due = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def _head_came(self) -> None:
            if self._head_due is not None:
                self._head_due.cancel()
                self._head_due = None

    return Connection
