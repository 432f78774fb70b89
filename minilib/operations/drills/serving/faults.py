"""Faults of a server as data, drawn from a seed, and how each gets into an engine or into its clients."""

from __future__ import annotations

import random
from dataclasses import dataclass

from minilib.serving.engine import Engine
from minilib.serving.request import TokenOutput

TENANTS = ("ann", "bob", "cid", "dee")
SERVER_FAULTS = ("slow_tenant", "leaking_pages", "stuck_stream", "slow_client")
REPLICA = "replica-0"


@dataclass(frozen=True)
class ServerFault:
    """A fault to inject.

    Args:
        kind: one of SERVER_FAULTS.
        who: the tenant; the replica, if it is the engine's.
        size: tokens of a huge prompt, pages that a request leaves behind, or tokens before a stream is stuck.
    """

    kind: str
    who: str
    size: int


def server_fault(seed: int) -> ServerFault | None:
    """The fault of a run: every third run is healthy, None."""
    if seed % 3 == 2:
        return None
    kind, chance = SERVER_FAULTS[(seed - seed // 3) % len(SERVER_FAULTS)], random.Random(seed)
    who = REPLICA if kind == "leaking_pages" else chance.choice(TENANTS)
    least, most = {"slow_tenant": (500, 700), "leaking_pages": (1, 3)}.get(kind, (2, 6))
    return ServerFault(kind, who, chance.randint(least, most))


def inject(fault: ServerFault | None, engine: Engine) -> None:
    """Break an engine, if it is the engine's fault."""
    if fault is not None and fault.kind == "leaking_pages":
        _leak(engine, fault.size)
    elif fault is not None and fault.kind == "stuck_stream":
        _lose_tokens(engine, fault)


def _leak(engine: Engine, pages: int) -> None:
    """Each request that ends leaves pages behind that are never free again."""
    step = engine.step

    def leaking() -> list[TokenOutput]:
        before = set(engine.requests)
        made = step()
        for _ in before - engine.requests.keys():
            for _ in range(min(pages, engine.cache.pool.num_free)):
                engine.cache.pool.allocate()
        return made

    engine.step = leaking


def _lose_tokens(engine: Engine, fault: ServerFault) -> None:
    """The first request of a tenant gets some tokens, and whatever comes then is lost on the way."""
    step = engine.step
    got: dict[str, int] = {}
    victim: list[str] = []

    def losing() -> list[TokenOutput]:
        if not victim:
            victim.extend(name for name, rows in engine.requests.items() if rows[0].tenant == fault.who)
        made = step()
        for output in made:
            got[output.request_id] = got.get(output.request_id, 0) + 1
        return [each for each in made if each.request_id not in victim[:1] or got[each.request_id] <= fault.size]

    engine.step = losing
