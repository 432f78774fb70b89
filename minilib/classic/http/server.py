"""A small HTTP/1.1 server on loopback: GET only, a task for each connection, every wait with its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from minilib.classic.http.connection import HOST, Connection
from minilib.classic.http.wire import BadMessage, Request, Response, take_request

LINGER = 0.5  # seconds that a client has to read why its request was refused
log = logging.getLogger(__name__)


class HttpServer:
    """Listens on 127.0.0.1 and has every request answered by a function.

    Whatever is wrong with a request is answered (400, 405, 408, 413, 431, 501), and so is an error of the function
    (500, and the log says which).

    Args:
        answer: request → answer.
        timeout: seconds that a client may take to send a request, and to read an answer; idle ones are closed then.

    Attributes:
        port: where it listens; 0 before it was started.
    """

    def __init__(self, answer: Callable[[Request], Awaitable[Response]], timeout: float = 5.0) -> None:
        self.port = 0
        self._answer, self._timeout = answer, timeout
        self._server: asyncio.Server | None = None
        self._tasks: dict[Connection, asyncio.Task] = {}
        self._answering: set[Connection] = set()
        self._open: set[Connection] = set()

    @property
    def listening(self) -> bool:
        """Whether it takes connections."""
        return self._server is not None

    async def start(self) -> int:
        """Listen: on any free port, or again on the one that it had.

        Returns:
            The port.

        Raises:
            OSError: if somebody else has that port by now.
            RuntimeError: if it listens already.
        """
        if self.listening:
            raise RuntimeError(f"it listens on port {self.port} already")
        factory, loop = lambda: Connection(self._made, self._open.discard), asyncio.get_running_loop()
        self._server = await loop.create_server(factory, HOST, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    def kill(self) -> None:
        """Stop as a process does that is killed: connections are reset, whatever was going on in them."""
        self._stop_listening()
        for task in self._tasks.values():
            task.cancel()
        for connection in [*self._open]:
            connection.reset()

    async def close(self, grace: float = 1.0) -> None:
        """Stop listening, answer what is being answered, drop everything else, and leave nothing behind.

        Args:
            grace: seconds that answers may still take.
        """
        server = self._server
        self._stop_listening()
        for _ in range(3):  # a connection that is being accepted needs three turns of the loop to be made
            await asyncio.sleep(0)
        for connection, task in self._tasks.items():
            if connection not in self._answering:
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace)
        self.kill()
        while self._tasks:
            await asyncio.wait(self._tasks.values())
        for connection in [*self._open]:
            await connection.wait_gone()
        if server is not None:
            await server.wait_closed()

    def check_invariants(self) -> None:
        """Whoever is answered is connected, and has a task."""
        assert self._answering <= self._tasks.keys(), "somebody is answered by nobody"

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _made(self, connection: Connection) -> None:
        self._open.add(connection)
        if not self.listening:
            connection.reset()
            return
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._tasks[connection] = task
        task.add_done_callback(lambda _: self._tasks.pop(connection))

    async def _serve(self, connection: Connection) -> None:
        """Answer one request after the other."""
        try:
            while (request := await self._next(connection)) is not None:
                self._answering.add(connection)
                response = await self._respond(request)
                keep_alive = request.keep_alive and self.listening
                await connection.send(response.encode(keep_alive), self._timeout)
                self._answering.discard(connection)
                if not keep_alive:
                    await connection.linger(LINGER)
                    break
            connection.close()
        except OSError:  # gone, or too slow to read its answer
            connection.reset()
        except asyncio.CancelledError:
            connection.close()
            raise
        finally:
            self._answering.discard(connection)

    async def _next(self, connection: Connection) -> Request | None:
        """The next request, or None if there is none; one that is refused has been answered."""
        try:
            return await connection.receive(take_request, self._timeout)
        except BadMessage as bad:
            refusal = error(bad.status, str(bad))
        except (TimeoutError, ConnectionError) as never:
            if not connection.pending:  # nobody asked for anything
                return None
            late = isinstance(never, TimeoutError)
            refusal = error(408, f"a request has {self._timeout} s to come") if late else error(400, str(never))
        await connection.send(refusal.encode(keep_alive=False), self._timeout)
        await connection.linger(LINGER)
        return None

    async def _respond(self, request: Request) -> Response:
        if request.method != "GET":  # what may be sent twice without harm, and so to another backend
            return error(405, f"only GET is answered, got {request.method}", {"Allow": "GET"})
        try:
            return await self._answer(request)
        except Exception:
            log.exception("no answer to %s", request.target)
            return error(500, "an error of this server, which its log tells")


def error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says in one line of text what is wrong."""
    return Response(status, f"{reason}\n".encode(), {"Content-Type": "text/plain; charset=utf-8", **(headers or {})})
