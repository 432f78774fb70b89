"""Connections to one backend, kept open after a response for the next request."""

from __future__ import annotations

import asyncio
from collections import deque

import h11

from minilib.classic.gateway.connection import HttpConnection
from minilib.classic.gateway.rules import CHUNK, GatewayLimits


class BackendPool:
    """Opens connections to a backend and keeps those that are idle, the newest of them in use first.

    Args:
        host, port: of the backend.
        limits: of time and number.

    Attributes:
        opened: connections opened so far.
    """

    def __init__(self, host: str, port: int, limits: GatewayLimits) -> None:
        self.host, self.port, self.opened = host, port, 0
        self._limits, self._closed, self._idle = limits, False, deque[HttpConnection]()

    def take(self, now: float) -> HttpConnection | None:
        """An idle connection that is as it was left; None if there is none."""
        self._prune(now)
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def connect(self) -> HttpConnection:
        """A new connection; OSError, of which TimeoutError is one, if the backend does not accept it."""
        async with asyncio.timeout(self._limits.connect_within):
            reader, writer = await asyncio.open_connection(self.host, self.port, limit=CHUNK)
        self.opened += 1
        return HttpConnection(reader, writer, h11.CLIENT, self._limits.max_head)

    def give_back(self, connection: HttpConnection, now: float) -> None:
        """Keep a connection if it can serve another request, else close it."""
        if self._closed or len(self._idle) >= self._limits.max_idle or not connection.is_reusable():
            connection.abort()
            return
        connection.since = now
        self._idle.append(connection)
        self._prune(now)

    def close_idle(self, for_ever: bool = False) -> None:
        """Close what is idle; `for_ever` also what will be."""
        self._closed = self._closed or for_ever
        while self._idle:
            self._idle.pop().abort()

    def check_invariants(self) -> None:
        """No connection is idle twice, there are not too many, and none is idle in a closed pool."""
        assert len({id(connection) for connection in self._idle}) == len(self._idle) <= self._limits.max_idle
        assert not (self._closed and self._idle), "a closed pool has idle connections"

    def _prune(self, now: float) -> None:
        """Close what was idle for long: the backend may close it at any moment, with a request on it."""
        while self._idle and now - self._idle[0].since > self._limits.kept_within:
            self._idle.popleft().abort()
