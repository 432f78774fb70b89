"""Two networks for the same instances: HTTP on loopback in real time, and calls that take a fixed time of any clock."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import Context

from minilib.classic.http.wire import Client, HttpServer, Response
from minilib.classic.observed_service.instance import CALL_TIMEOUT, Instance


class HttpNetwork:
    """Every instance is an HTTP server on 127.0.0.1 with a port of its own."""

    def __init__(self) -> None:
        self._servers: list[HttpServer] = []
        self._clients: dict[str, Client] = {}

    async def add(self, instance: Instance) -> None:
        """Start the server of an instance."""
        server = HttpServer(instance.respond, with_headers=True)
        self._servers.append(server)
        self._clients[instance.process] = Client(await server.start(), CALL_TIMEOUT)

    async def call(self, process: str, target: str, headers: Mapping[str, str]) -> Response:
        """The response over HTTP; OSError or HttpError if there is none."""
        return await self._clients[process].get(target, headers)

    async def close(self) -> None:
        """Close all connections, and stop all servers."""
        for client in self._clients.values():
            await client.close()
        for server in self._servers:
            await server.kill()


class DirectNetwork:
    """Calls the instances, each request in a context of its own, so that nothing but its headers reaches the callee.

    Args:
        latency: seconds that a message takes.
    """

    def __init__(self, latency: float = 0.0001) -> None:
        self.latency, self._instances = latency, {}

    async def add(self, instance: Instance) -> None:
        """Make an instance known."""
        self._instances[instance.process] = instance

    async def call(self, process: str, target: str, headers: Mapping[str, str]) -> Response:
        """The response of an instance; ConnectionError if there is no such instance."""
        await asyncio.sleep(self.latency)
        if process not in self._instances:
            raise ConnectionRefusedError(f"nothing listens as {process}")
        answer = self._instances[process].respond(target, dict(headers))
        response = await asyncio.get_running_loop().create_task(answer, context=Context())
        await asyncio.sleep(self.latency)
        return response

    async def close(self) -> None:
        """Forget the instances."""
        self._instances.clear()
