"""A small HTTP/1.1 server on loopback: GET only, one task per connection, a timeout on every wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from minilib.classic.http.wire import HOST, MAX_BODY, MAX_HEAD, BadMessage, Request, Response, read_request

LINGER = 0.5  # seconds that a client has to read the last response before its connection is closed
log = logging.getLogger(__name__)


class HttpServer:
    """Listens on 127.0.0.1 and answers every request by calling a function.

    A request that cannot be answered gets a named error (400, 405, 408, 413, 431, 501), and so does one whose function
    raises (500; the log has the traceback).

    Args:
        answer: coroutine function, request → response.
        timeout: seconds that a client has to send a request, and to receive the response.

    Attributes:
        port: 0 before `start`.
        listening: whether connections are accepted.
    """

    def __init__(self, answer: Callable[[Request], Awaitable[Response]], timeout: float = 5.0) -> None:
        self.port, self.listening = 0, False
        self._answer, self._timeout = answer, timeout
        self._connections: dict[asyncio.Task, asyncio.StreamWriter] = {}
        self._answering: set[asyncio.Task] = set()

    async def start(self) -> int:
        """Listen on a free port, or after `kill` on the same one again; returns the port.

        Raises:
            OSError: if another process has taken the port.
            RuntimeError: if the server listens already.
        """
        if self.listening:
            raise RuntimeError(f"it listens on port {self.port} already")
        self._server = await asyncio.start_server(self._accept, HOST, self.port, limit=MAX_HEAD, backlog=1024)
        self.port, self.listening = self._server.sockets[0].getsockname()[1], True
        return self.port

    def kill(self) -> None:
        """Stop as a killed process does: every connection ends at once, whatever was going on in it."""
        self._stop_listening()
        for task, writer in self._connections.items():
            task.cancel()
            writer.transport.abort()

    async def close(self, grace: float = 1.0) -> None:
        """Stop listening, finish what is being answered within `grace` seconds, and end all connections."""
        self._stop_listening()
        for _ in range(3):  # turns of the event loop that it takes to accept a connection
            await asyncio.sleep(0)
        writers = [*self._connections.values()]
        for task in self._connections.keys() - self._answering:
            task.cancel()
        if self._answering:
            await asyncio.wait(self._answering, timeout=grace)
        self.kill()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    def check_invariants(self) -> None:
        """Whoever is being answered is connected."""
        assert self._answering <= self._connections.keys(), "a request is being answered without a connection"

    def _stop_listening(self) -> None:
        if self.listening:
            self.listening = False
            self._server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.listening:
            writer.transport.abort()
            return
        writer.transport.set_write_buffer_limits(0)  # drain() then waits until the kernel has everything
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._disconnect)

    def _disconnect(self, task: asyncio.Task) -> None:
        self._answering.discard(task)
        writer = self._connections.pop(task)  # has a name because Python 3.13 warns if it is collected unclosed
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection one after the other."""
        task, keep_alive = asyncio.current_task(), True
        with suppress(OSError):  # the client is gone, or too slow to receive its response
            while keep_alive:
                try:
                    request = await read_request(reader, self._timeout)
                except BadMessage as bad:
                    response, keep_alive = error(bad.status, str(bad)), False
                else:
                    if request is None:
                        return
                    self._answering.add(task)
                    response = await self._respond(request)
                    keep_alive = request.keep_alive and self.listening
                writer.write(response.encode(keep_alive))
                if writer.transport.get_write_buffer_size():  # the kernel has not taken everything at once
                    async with asyncio.timeout(self._timeout):
                        await writer.drain()
                self._answering.discard(task)
            writer.write_eof()
            async with asyncio.timeout(LINGER):  # to close with unread bytes would reset it and lose the response
                while await reader.read(MAX_BODY):
                    pass

    async def _respond(self, request: Request) -> Response:
        if request.method != "GET":  # a proxy must be able to send a request twice
            return error(405, f"only GET is answered, got {request.method}", {"Allow": "GET"})
        try:
            return await self._answer(request)
        except Exception:
            log.exception("no answer to %s", request.target)
            return error(500, "an internal error, which the log of this server describes")


def error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """A response that gives its reason in one line of text."""
    return Response(status, f"{reason}\n".encode(), {"Content-Type": "text/plain; charset=utf-8", **(headers or {})})
