"""The replicas of a router: discovered, checked, and told apart by the weights that they serve.

    discovered ──► unknown ── ready, and of the router's weights ──► ready ◄──► not ready, unreachable
                      │                                                │
                      └── other weights: refused by name               └── discovered no more: drains, then forgotten

Only a ready replica gets new requests. One that is not ready any more drains: it keeps the requests that it has. After
it was unreachable it is another process, which holds no prefix, and whose weights are looked at again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import NamedTuple

import h11

from minilib.serving.router.discovery import Discover, ReplicaAddress

MAX_ANSWER = 1 << 20  # bytes of an answer to a check
UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, h11.RemoteProtocolError)
log = logging.getLogger(__name__)


class ModelIdentity(NamedTuple):
    """What must be equal in all replicas behind one router: a client must not be able to tell them apart.

    Servers that tell no fingerprint have "", and are told apart by the rest alone.
    """

    model: str
    fingerprint: str
    max_model_len: int | None

    def __str__(self) -> str:
        return f"{self.model} {self.fingerprint} of {self.max_model_len} tokens"


@dataclass
class WatchedReplica:
    """A replica as its router sees it.

    Args:
        target: its number in the gateway.
        address: where it listens.
        identity: of its model; None while unknown.
        state: "unknown", "ready", "not ready", "unreachable", "refused".
        reason: why it is not ready.
        misses: checks in a row without an answer.
    """

    target: int
    address: ReplicaAddress
    identity: ModelIdentity | None = None
    state: str = "unknown"
    reason: str = "has not been checked yet"
    misses: int = 0


class ReplicaWatch:
    """Looks after replicas, round by round.

    Args:
        discover: where they are.
        fingerprint: of the weights that they must have; if left out, that of most of those that the first answers came
            from, the one discovered first if there are as many of another.
        within: seconds for a check.
        api_key: that checks send, where replicas ask for one.
        fall: checks in a row without an answer after which a replica is unreachable. Its requests tell sooner.
        add: address → number; a replica that takes no requests as yet.
        allow: number, whether it may have new requests.
        lost: number; the process that failed is gone, and so is what it held.
        remove: number; a replica that never comes back.

    Attributes:
        replicas: by address.
        identity: of the model; None before a replica has answered.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        discover: Discover,
        *,
        add: Callable[[ReplicaAddress], int],
        allow: Callable[[int, bool], None],
        lost: Callable[[int], None],
        remove: Callable[[int], None],
        fingerprint: str | None = None,
        within: float = 2.0,
        fall: int = 2,
        api_key: str | None = None,
    ) -> None:
        if not within > 0 or fall < 1:
            raise ValueError(f"within is above 0 seconds and fall 1 or more, got {within!r} and {fall!r}")
        self.discover, self.fingerprint, self.within, self.fall = discover, fingerprint, within, fall
        self._add, self._allow, self._lost, self._remove = add, allow, lost, remove
        self._headers = [("authorization", f"Bearer {api_key}")] if api_key else []
        self.replicas: dict[ReplicaAddress, WatchedReplica] = {}
        self.identity: ModelIdentity | None = None

    @property
    def ready(self) -> list[WatchedReplica]:
        """Replicas that get new requests."""
        return [replica for replica in self.replicas.values() if replica.state == "ready"]

    async def round(self) -> None:
        """Discover, check all replicas at once, and act on what they say."""
        await self._discover()
        replicas = list(self.replicas.values())
        found = await asyncio.gather(*(self._check(replica) for replica in replicas))
        for replica, (state, _, identity) in zip(replicas, found, strict=True):
            replica.misses = replica.misses + 1 if state == "unreachable" else 0
            replica.identity = identity or replica.identity
            if replica.misses == self.fall:
                self._lost(replica.target)
                replica.identity = None
        self._agree(replicas)
        for replica, (state, reason, _) in zip(replicas, found, strict=True):
            if 0 < replica.misses < self.fall and replica.state != "unknown":
                continue
            if refusal := self._refusal(replica.identity):
                state, reason = "refused", refusal
            if (state, reason) != (replica.state, replica.reason):
                log.log(
                    logging.ERROR if state == "refused" else logging.INFO, "%s %s %s", replica.address, state, reason
                )
            replica.state, replica.reason = state, reason
            self._allow(replica.target, state == "ready")

    async def _discover(self) -> None:
        try:
            async with asyncio.timeout(self.within):
                addresses = await self.discover()
        except (OSError, ValueError) as error:
            log.warning("replicas cannot be discovered, those that are known stay: %s", error)
            return
        for address in self.replicas.keys() - set(addresses):
            self._remove(self.replicas.pop(address).target)
        for address in addresses:
            if address not in self.replicas:
                self.replicas[address] = WatchedReplica(self._add(address), address)

    def _agree(self, replicas: list[WatchedReplica]) -> None:
        """Settle once which model it is that this router serves."""
        seen = Counter(replica.identity for replica in replicas if replica.identity)
        if self.fingerprint is not None:
            seen = Counter({one: count for one, count in seen.items() if one.fingerprint == self.fingerprint})
        if self.identity is None and seen:
            self.identity = seen.most_common(1)[0][0]

    def _refusal(self, identity: ModelIdentity | None) -> str:
        """Why a replica of this identity gets no requests; empty if it may have some."""
        if identity and self.fingerprint not in (None, identity.fingerprint):
            return f"serves {identity}, wanted is {self.fingerprint}"
        if identity and self.identity not in (None, identity):
            return f"serves {identity}, the others serve {self.identity}"
        return ""

    async def _check(self, replica: WatchedReplica) -> tuple[str, str, ModelIdentity | None]:
        """State, reason and identity as the replica says them."""
        try:
            async with asyncio.timeout(self.within):
                status, body = await get(replica.address, "/ready", self._headers)
                if status != 200:
                    return "not ready", f"{status}: {body[:200].decode('utf-8', 'replace')}", None
                return "ready", "", _identity(*await get(replica.address, "/v1/models", self._headers))
        except UNUSABLE as error:
            return "unreachable", f"{type(error).__name__}: {error}", None


async def get(address: ReplicaAddress, path: str, headers: Row[tuple[str, str]] = ()) -> tuple[int, bytes]:
    """Status and body of a GET on a connection of its own.

    Raises:
        OSError: if there is no connection, or it ends too early.
        h11.RemoteProtocolError: if the answer is no HTTP.
        ValueError: if it is too long.
    """
    reader, writer = await asyncio.open_connection(*address)
    try:
        wire, status, body = h11.Connection(h11.CLIENT), 0, b""
        sent = [("host", str(address).removeprefix("http://")), ("connection", "close"), *headers]
        head = h11.Request(method="GET", target=path, headers=sent)
        writer.write(wire.send(head) + wire.send(h11.EndOfMessage()))
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_ANSWER:
                    raise ValueError(f"{path} answers more than {MAX_ANSWER} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError(f"{path} was not answered")
    finally:
        writer.transport.abort()


def _identity(status: int, body: bytes) -> ModelIdentity:
    if status != 200:
        raise ValueError(f"/v1/models is answered with {status}")
    model = json.loads(body)["data"][0]
    return ModelIdentity(str(model["id"]), str(model.get("fingerprint", "")), model.get("max_model_len"))
