"""A backend that streams, counts what it sees, and fails on demand.

    GET /stream?n=5&gap=0.01&size=16        5 chunks of 16 bytes, one every 10 ms

    and in addition  status=503             another status (with Retry-After if it is 503 or 429)
                     die=accept             closes the connection before it has read the request: nothing was read
                     die=read               reads the whole request, then closes the connection
                     die=3                  resets the connection after 3 chunks
                     length=1               Content-Length instead of chunks
                     wait=0.1               seconds before the head
                     type=text/plain        Content-Type, text/event-stream if not given

Parameters can also be set for all requests (`defaults`), so that the same request can meet backends that behave
differently.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from urllib.parse import parse_qsl

import h11

from minilib.classic.gateway.connection import HttpConnection, WatchedProtocol, listen
from minilib.classic.http.wire import HOST, connections_end


class StreamingBackend:
    """Listens on a free port of this machine.

    Args:
        **defaults: parameters of requests that do not set them.

    Attributes:
        counts: requests by method ("GET"), connections ("connections"), requests answered to the end ("complete"), and
            those whose client left ("left"); chunks sent ("chunks"); checks of health ("checks").
        heads: headers of each request, in order.
        healthy: what GET /health says.
    """

    def __init__(self, **defaults: object) -> None:
        self.defaults = {name: str(value) for name, value in defaults.items()}
        self.counts, self.heads, self.healthy, self.port = Counter(), [], True, 0
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task, HttpConnection] = {}

    async def start(self) -> int:
        """Listen; after `kill` on the same port again."""
        self._server = await listen(self._serve, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def kill(self) -> None:
        """As a killed process: no connection survives."""
        if self._server:
            self._server.close()
            self._server = None
        for task, connection in self._connections.items():
            connection.abort()
            task.cancel()
        await connections_end(self._connections)

    @property
    def requests(self) -> int:
        """Requests seen, other than checks."""
        return sum(self.counts[method] for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: WatchedProtocol
    ) -> None:
        task, client = asyncio.current_task(), HttpConnection(reader, writer, h11.SERVER, 65536)
        self._connections[task] = client
        self.counts["connections"] += 1
        try:
            with suppress(asyncio.CancelledError, OSError, h11.RemoteProtocolError):
                while await self._serve_next(client, protocol, task):
                    protocol.left = None
        finally:
            protocol.left = None
            del self._connections[task]
            client.abort()

    async def _serve_next(self, client: HttpConnection, protocol: WatchedProtocol, task: asyncio.Task) -> bool:
        if self.defaults.get("die") == "accept":
            await client.wait()
            self.counts["accepted"] += 1
            return False
        request = await client.receive()
        if client.wire.they_are_waiting_for_100_continue:
            await client.send(h11.InformationalResponse(status_code=100, headers=[]))
        body = 0
        while isinstance(event := await client.receive(), h11.Data):
            body += len(event.data)
        path, _, query = request.target.decode("ascii").partition("?")
        if path == "/health":
            self.counts["checks"] += 1
            await self._say(client, 200 if self.healthy else 503, b"")
            return client.is_reusable()
        said = {**self.defaults, **dict(parse_qsl(query))}
        self.counts[request.method.decode("ascii")] += 1
        self.counts["body"] += body
        self.heads.append(list(request.headers))
        if said.get("die") == "read":
            return False
        protocol.left = task.cancel
        try:
            await self._stream(client, request, said)
            self.counts["complete"] += 1
        except (asyncio.CancelledError, OSError):
            self.counts["left"] += 1
            raise
        return client.is_reusable()

    async def _stream(self, client: HttpConnection, request: h11.Request, said: dict[str, str]) -> None:
        n, gap, size = int(said.get("n", 3)), float(said.get("gap", 0)), int(said.get("size", 16))
        status, die = int(said.get("status", 200)), said.get("die")
        await asyncio.sleep(float(said.get("wait", 0)))
        if status != 200:
            await self._say(client, status, b"no\n")
            return
        headers = [(b"content-type", said.get("type", "text/event-stream").encode()), (b"x-backend", str(self.port))]
        headers += [(b"content-length", str(n * size))] if "length" in said else []
        headers += [(b"x-accel-buffering", said["accel"])] if "accel" in said else []
        await client.send(h11.Response(status_code=200, headers=headers))
        for number in range(n if request.method != b"HEAD" else 0):
            if die == str(number):
                client.abort(reset=True)
                raise ConnectionAbortedError("on demand")
            self.counts["chunks"] += 1
            await client.send(h11.Data(data=(b"%d" % number).rjust(size - 1, b".") + b"\n"))
            await asyncio.sleep(gap)
        await client.send(h11.EndOfMessage())

    async def _say(self, client: HttpConnection, status: int, body: bytes) -> None:
        headers = [(b"content-length", b"%d" % len(body))]
        headers += [(b"retry-after", b"1")] if status in (429, 503) else []
        await client.send(h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
