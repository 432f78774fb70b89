"""The load of a drill: tenants that ask again and again, and someone who looks at /status meanwhile.

round 1   four tenants, one request after the other; of a slow tenant, huge prompts three at a time
quiet     a few looks at a server without a request
round 2   as round 1
quiet
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

from minilib.classic.http.wire import HOST
from minilib.operations.drills.serving.faults import TENANTS, ServerFault

MODEL = "drilled"
REQUESTS = 2  # of a tenant in a round
ROUNDS, QUIET_LOOKS = 2, 5
PAUSE = 0.01  # seconds between two looks


class DrillLoad:
    """Asks a server for completions, and looks at it.

    Args:
        port: of the server.
        fault: whose clients behave badly, if the fault is theirs.
        chance: draws prompts.

    Attributes:
        statuses: what was seen.
    """

    def __init__(self, port: int, fault: ServerFault | None, chance: random.Random) -> None:
        self._port, self._fault, self._chance = port, fault, chance
        self.statuses: list[dict[str, Any]] = []
        self._unread: list[socket.socket] = []
        self._left: list[asyncio.Future[None]] = []

    async def run(self) -> list[dict[str, Any]]:
        """All rounds; what was seen of them."""
        try:
            for _ in range(ROUNDS):
                await self._round()
                for _ in range(QUIET_LOOKS):
                    await self._look()
        finally:
            for connection in self._unread:
                connection.close()
            for task in self._left:
                task.cancel()
            await asyncio.gather(*self._left, return_exceptions=True)
        return self.statuses

    async def _round(self) -> None:
        fault = self._fault
        if fault is not None and fault.kind == "slow_client" and not self._unread:
            await self._ask_and_read_nothing(fault.who)
        patient = [tenant for tenant in TENANTS if not self._is_stuck(tenant)]
        working = [self._tenant(tenant) for tenant in patient]
        if fault is not None and fault.kind == "slow_tenant":
            working += [self._huge(fault) for _ in range(3)]
        stuck = [asyncio.ensure_future(self._tenant(tenant)) for tenant in TENANTS if tenant not in patient]
        work = asyncio.gather(*working)
        self._left += [work, *stuck]  # the last wait for a stream that does not end
        while not work.done():
            await self._look()
        await work

    def _is_stuck(self, tenant: str) -> bool:
        return self._fault is not None and (self._fault.kind, self._fault.who) == ("stuck_stream", tenant)

    async def _tenant(self, tenant: str) -> None:
        for _ in range(REQUESTS):
            await self._ask(tenant, self._chance.randint(20, 60), self._chance.randint(16, 32))

    async def _huge(self, fault: ServerFault) -> None:
        for _ in range(2):
            await self._ask(fault.who, fault.size, 2)

    async def _ask(self, tenant: str, prompt: int, count: int) -> None:
        """Ask, and read the stream to its end."""
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            writer.write(self._request(tenant, prompt, count))
            answer = await reader.read()
        finally:
            writer.close()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the drilled server answered {answer[:500]!r}")

    async def _ask_and_read_nothing(self, tenant: str) -> None:
        connection = socket.socket()
        self._unread.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((HOST, self._port))
        connection.sendall(self._request(tenant, 8, 400, logprobs=5, n=8))

    async def _look(self) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        self.statuses.append(json.loads(answer.partition(b"\r\n\r\n")[2]))
        await asyncio.sleep(PAUSE)

    def _request(self, tenant: str, prompt: int, count: int, **options: int) -> bytes:
        tokens = [self._chance.randrange(5, 2000) for _ in range(prompt)]
        asked = {
            "model": MODEL,
            "prompt": tokens,
            "max_tokens": count,
            "user": tenant,
            "stream": True,
            "ignore_eos": True,
            **options,
        }
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Content-Type: application/json\r\n\r\n" + body
