"""The backends of a gateway: which there are, their health, their loads, and the connections kept to each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11

from minilib.classic.gateway.connection import HttpConnection
from minilib.classic.gateway.pool import BackendPool
from minilib.classic.gateway.rules import CheckRule, GatewayLimits
from minilib.mechanisms.balancing import Dispatcher, HealthRule, Policy


class Backends:
    """Backends that come, drain and go while requests flow.

    Args:
        policy: target i is the i-th backend; a policy made for a number of targets must be made for all that come.
        limits: of connections.
        checks: active checks; None for none.
        health: thresholds.
        window: requests between two calls of policy.observe.

    Attributes:
        dispatcher: loads and health.
        pools: connections, by backend.
    """

    def __init__(
        self,
        policy: Policy,
        limits: GatewayLimits,
        checks: CheckRule | None = None,
        health: HealthRule | None = None,
        window: int = 64,
    ) -> None:
        self.dispatcher, self.pools = Dispatcher(policy, 0, window, health), list[BackendPool]()
        self._limits, self._rule, self._is_open = limits, checks, False
        self._checking: dict[int, asyncio.Task] = {}
        self._removed: set[int] = set()

    def add(self, host: str, port: int) -> int:
        """One more backend; returns its number, which no other backend will ever have."""
        target = self.dispatcher.add()
        self.pools.append(BackendPool(host, port, self._limits))
        self._begin_checks(target)
        return target

    def drain(self, target: int) -> None:
        """No new requests for this backend; those that it has go on."""
        self.dispatcher.health[target].draining = True
        self.pools[target].close_idle()

    def restore(self, target: int) -> None:
        """Requests for this backend again; ValueError if it was removed."""
        if target in self._removed:
            raise ValueError(f"backend {target} was removed; add it again, and it gets another number")
        self.dispatcher.health[target].draining = False

    async def drained(self, target: int, within: float) -> bool:
        """Wait until a backend has no request; False if it still has one after `within` seconds."""
        return await becomes(lambda: self.dispatcher.in_flight[target] == 0, within)

    async def remove(self, target: int, within: float) -> bool:
        """Drain a backend and give it up for ever; False if it had requests after `within` seconds, which go on."""
        self.drain(target)
        self._removed.add(target)
        if target in self._checking:
            self._checking.pop(target).cancel()
        finished = await self.drained(target, within)
        self.pools[target].close_idle(for_ever=True)
        return finished

    def loads(self) -> list[float]:
        """Requests in flight at each backend, math.inf for one that takes none."""
        return self.dispatcher.loads(asyncio.get_running_loop().time())

    def open(self) -> None:
        """Begin the checks."""
        self._is_open = True
        for target in range(len(self.pools)):
            self._begin_checks(target)

    async def close(self) -> None:
        """End the checks and close what is idle."""
        self._is_open = False
        checking, self._checking = list(self._checking.values()), {}
        for task in checking:
            task.cancel()
        await asyncio.gather(*checking, return_exceptions=True)
        for pool in self.pools:
            pool.close_idle()

    def check_invariants(self) -> None:
        """The books are in order, and only backends that are there are checked."""
        self.dispatcher.check_invariants()
        for pool in self.pools:
            pool.check_invariants()
        assert not self._removed & self._checking.keys(), "a removed backend is checked"

    def _begin_checks(self, target: int) -> None:
        if self._is_open and self._rule is not None and target not in self._removed:
            self._checking[target] = asyncio.create_task(self._check(target, self._rule))

    async def _check(self, target: int, rule: CheckRule) -> None:
        """Ask again and again."""
        while True:
            self.dispatcher.health[target].checked(await self._passes(self.pools[target], rule))
            await asyncio.sleep(rule.every)

    async def _passes(self, pool: BackendPool, rule: CheckRule) -> bool:
        """Whether one check passes, on a connection of its own: a kept one would not show that none is accepted."""
        connection: HttpConnection | None = None
        host = [(b"host", f"{pool.host}:{pool.port}".encode()), (b"connection", b"close")]
        try:
            async with asyncio.timeout(rule.within):
                connection = await pool.connect()
                await connection.send(h11.Request(method="GET", target=rule.path, headers=host), h11.EndOfMessage())
                while isinstance(event := await connection.receive(), h11.InformationalResponse):
                    pass
            return 200 <= event.status_code < 300
        except (OSError, h11.RemoteProtocolError):  # TimeoutError is an OSError
            return False
        finally:
            if connection is not None:
                connection.abort()


async def becomes(condition: Callable[[], bool], within: float) -> bool:
    """Wait until something is so; False if it is not within so many seconds."""
    end = asyncio.get_running_loop().time() + within
    while not condition():
        if asyncio.get_running_loop().time() >= end:
            return False
        await asyncio.sleep(0.005)
    return True
