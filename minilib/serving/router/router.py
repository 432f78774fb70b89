"""The router: a gateway whose policy knows sessions and prefixes, and whose backends are replicas of one model.

    client ──► router ──► policy by (session, prompt, salt) ──► replica 0    ready
                 │                                         ├──► replica 1    draining: streams finish
                 │                                         └──► replica 2    refused: other weights
                 ├── /health  /ready  /metrics    answered here
                 └── everything else              passed through

Until the first byte of an answer has left, a request whose replica dies goes to another one: generating again harms
nobody. After that the client is told the truth: an error event in its stream, then the end of the connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid

from minilib.classic.gateway.gateway import Gateway
from minilib.classic.gateway.hooks import Ending, GatewayHooks
from minilib.classic.gateway.messages import GatewayError, GatewayRequest, Headers, Reply
from minilib.classic.gateway.rules import IDEMPOTENT, GatewayLimits, RetryRule
from minilib.classic.http.wire import HOST
from minilib.mechanisms.balancing import Policy, RetryBudget
from minilib.serving.router.discovery import Discover, ReplicaAddress
from minilib.serving.router.keys import routing_key
from minilib.serving.router.metrics import RouterMetrics
from minilib.serving.router.prefix_aware import PrefixAware, RoutingKey
from minilib.serving.router.watch import ReplicaWatch

log = logging.getLogger(__name__)
JSON = [(b"content-type", b"application/json")]
RETRIES = RetryRule(max_attempts=3, methods=IDEMPOTENT | {"POST"}, timeouts=False)


def openai_error(error: GatewayError) -> Reply:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return Reply(error.status, _error_body(str(error), kind, _code(error.status)), JSON)


class ReplicaRouter(GatewayHooks):
    """Serves OpenAI's protocol with replicas that serve it.

    Use it as an async context manager, or `start` and `stop` it.

    Args:
        discover: where replicas are, such as `in_list(urls)`.
        policy: its keys are `RoutingKey`s, its loads requests in flight; prefix-aware if left out.
        fingerprint: of the weights that replicas must have, see `ReplicaWatch`.
        every, within: seconds between two rounds of checks, and for one.
        api_key: that checks send; requests bring their own.
        limits, retries, budget: as of `Gateway`.

    Attributes:
        gateway: what forwards.
        watch: what looks after the replicas.
        metrics: what is counted.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        discover: Discover,
        policy: Policy | None = None,
        *,
        fingerprint: str | None = None,
        every: float = 0.5,
        within: float = 2.0,
        api_key: str | None = None,
        limits: GatewayLimits | None = None,
        retries: RetryRule = RETRIES,
        budget: RetryBudget | None = None,
    ) -> None:
        if not every > 0:
            raise ValueError(f"checks are made every so many seconds, above 0, got {every!r}")
        self.policy, self.every = PrefixAware() if policy is None else policy, every
        self.gateway = Gateway(
            self.policy,
            key_of=self._key_of,
            hooks=self,
            limits=limits,
            retries=retries,
            budget=budget,
            hold=1,  # a head without a token is no answer yet
            render_error=openai_error,
        )
        self.watch = ReplicaWatch(
            discover,
            add=self._add,
            allow=self._allow,
            lost=self._lost,
            remove=self._remove,
            fingerprint=fingerprint,
            within=within,
            api_key=api_key,
        )
        self.metrics = RouterMetrics(self.gateway.backends.dispatcher, self.policy)
        self._watching: asyncio.Task | None = None
        self._removing: set[asyncio.Task] = set()

    async def start(self, host: str = HOST, port: int = 0) -> int:
        """Check the replicas once, then listen; returns the port."""
        await self.watch.round()
        port = await self.gateway.start(host, port)
        self._watching = asyncio.create_task(self._watch())
        return port

    async def stop(self, within: float = 0.0) -> int:
        """Take no more requests, and end when all have ended or after some seconds; returns how many were cut."""
        tasks = [task for task in (self._watching, *self._removing) if task]
        cut = await self.gateway.stop(within)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return cut

    async def __aenter__(self) -> ReplicaRouter:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def check_invariants(self) -> None:
        """As the gateway's; and a replica that gets requests is ready."""
        self.gateway.check_invariants()
        allowed = {n for n, health in enumerate(self.gateway.backends.dispatcher.health) if not health.draining}
        assert allowed == {replica.target for replica in self.watch.ready}, f"{allowed} get requests"

    async def answer(self, request: GatewayRequest) -> Reply | None:
        """What the router answers itself."""
        path = request.target.partition("?")[0]
        if path == "/health":
            return Reply(200, b'{"status": "ok"}', JSON)
        if path == "/ready":
            return self._ready()
        if path == "/metrics":
            return Reply(200, *self.metrics.text())
        return None

    def dispatched(self, request: GatewayRequest, target: int) -> Headers:
        """A request has one id, however often it is sent."""
        self.metrics.dispatched(target, len(request.tried) > 1)
        if request.header(b"x-request-id"):
            return []
        return [(b"x-request-id", request.notes.setdefault("id", uuid.uuid4().hex.encode()))]

    def answered(self, request: GatewayRequest, target: int, status: int, headers: Headers) -> Headers:
        """Remember what kind of answer it is."""
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        request.notes["is_stream"] = kind.startswith(b"text/event-stream")
        return []

    def ended(self, request: GatewayRequest, target: int, ending: Ending) -> None:
        """Count; what was refused, or failed before its first byte, has left nothing at its replica."""
        self.metrics.ended(target, ending)
        if ending in (Ending.REFUSED, Ending.FAILED) and isinstance(self.policy, PrefixAware):
            self.policy.withdraw(target, request.notes["key"])

    def last_words(self, request: GatewayRequest, target: int) -> bytes:
        """An error event, behind the end of whatever event was cut."""
        if not request.notes.get("is_stream"):
            return b""
        reason = f"{self.metrics.name(target)} failed in the middle of this answer, which is not complete; ask again"
        return b"\n\ndata: " + _error_body(reason, "server_error", "replica_failed") + b"\n\n"

    def _key_of(self, request: GatewayRequest) -> RoutingKey:
        return request.notes.setdefault("key", routing_key(request))

    def _ready(self) -> Reply:
        """200 while a replica gets requests; why the others do not is said in any case."""
        listed = [
            {"replica": str(one.address), "state": one.state, "reason": one.reason}
            for one in self.watch.replicas.values()
        ]
        ready = bool(self.watch.ready)
        body = {"ready": ready, "model": str(self.watch.identity or "unknown"), "replicas": listed}
        return Reply(
            200 if ready else 503, json.dumps(body).encode(), JSON + ([] if ready else [(b"retry-after", b"1")])
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.every)
            try:
                await self.watch.round()
            except Exception:  # a router that looks after nobody any more would send requests to the dead
                log.exception("a round of checks failed")

    def _add(self, address: ReplicaAddress) -> int:
        target = self.gateway.backends.add(*address)
        self.metrics.added(target, address)
        self._allow(target, False)
        return target

    def _allow(self, target: int, allowed: bool) -> None:
        draining = self.gateway.backends.dispatcher.health[target].draining
        if allowed and draining:
            self.gateway.backends.restore(target)
        elif not allowed and not draining:
            self.gateway.backends.drain(target)

    def _lost(self, target: int) -> None:
        self.gateway.backends.dispatcher.health[target].succeeded()  # the next process owes nothing to this one's past
        if isinstance(self.policy, PrefixAware):
            self.policy.forget(target)

    def _remove(self, target: int) -> None:
        self._lost(target)
        self._allow(target, False)
        within = self.gateway.limits.stall_within
        task = asyncio.create_task(self.gateway.backends.remove(target, within))
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)


def _code(status: int) -> str:
    return {502: "replica_failed", 503: "no_replica", 504: "replica_too_slow"}.get(status, f"http_{status}")


def _error_body(message: str, kind: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
