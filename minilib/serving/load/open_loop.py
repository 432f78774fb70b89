"""The open loop: requests arrive when they are due, however busy the server is; the times of their tokens are noted.

`run_open_loop` steps an engine itself: a real one against a WallClock, or a simulated one against its VirtualClock.
`offer` is a client of an AsyncEngine: it notes the times at which a coroutine receives tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.asynchronous.errors import EngineDied, EngineStopped, QueueFull, RequestAborted
from minilib.serving.engine import Engine
from minilib.serving.load.arrivals import Arrival
from minilib.serving.load.clock import VirtualClock, WallClock
from minilib.serving.load.metrics import RequestTimes
from minilib.serving.request import InvalidRequest, TokenOutput

REFUSALS = (InvalidRequest, QueueFull, EngineStopped, RequestAborted, EngineDied)


def run_open_loop(engine: Engine, arrivals: Iterable[Arrival], clock: WallClock | VirtualClock) -> list[RequestTimes]:
    """Serve a load by stepping an engine until all of it is finished; requests join between two steps.

    Args:
        engine: the engine, with nothing unfinished.
        arrivals: the load, in any order; requests that are due at one time keep it.
        clock: what times are read from; the steps of a simulated engine advance its clock.

    Returns:
        The times of each request, in the order of `arrivals`.

    Raises:
        ValueError: if the engine has unfinished requests.
    """
    if engine.has_unfinished:
        raise ValueError("the engine has unfinished requests; step it until there are none, or give a new engine")
    load = list(arrivals)
    notes = [_Notes(arrival.due) for arrival in load]
    later = sorted(range(len(load)), key=lambda number: (load[number].due, number), reverse=True)
    try:
        while later or engine.has_unfinished:
            if not engine.has_unfinished:
                clock.wait_until(load[later[-1]].due)
            while later and load[later[-1]].due <= clock.now():
                number = later.pop()
                arrival = load[number]
                try:
                    engine.add_request(str(number), arrival.prompt_token_ids, arrival.params, **arrival.options)
                except InvalidRequest as error:
                    notes[number].end(clock.now(), str(error))
            outputs = engine.step()
            now = clock.now()
            for output in outputs:
                notes[int(output.request_id)].token(output, now)
    finally:
        for number in range(len(load)):
            engine.abort(str(number))
    return [note.times() for note in notes]


async def offer(served: AsyncEngine, arrivals: Iterable[Arrival], clock: WallClock | None = None) -> list[RequestTimes]:
    """Send a load to an engine, each request by a task of its own, and wait until all of it is finished.

    Args:
        served: the engine.
        arrivals: the load, in any order.
        clock: what times are read from; one that starts now if left out.

    Returns:
        The times of each request, in the order of `arrivals`; what was refused or aborted has an error.
    """
    clock = clock or WallClock()

    async def send(arrival: Arrival) -> RequestTimes:
        notes = _Notes(arrival.due)
        while (early := arrival.due - clock.now()) > 0:
            await asyncio.sleep(early)
        try:
            async for output in await served.submit(arrival.prompt_token_ids, arrival.params, **arrival.options):
                notes.token(output, clock.now())
        except REFUSALS as error:
            notes.end(clock.now(), f"{type(error).__name__}: {error}")
        return notes.times()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(arrival)) for arrival in arrivals]
    return [task.result() for task in tasks]


class _Notes:
    """What happened to one request so far."""

    def __init__(self, due: float) -> None:
        self.due = due
        self.token_times: list[float] = []
        self.ended: float | None = None
        self.error: str | None = None

    def token(self, output: TokenOutput, now: float) -> None:
        if output.token_id is not None:
            self.token_times.append(now)
        if output.finish_reason:
            self.end(now, output.error)

    def end(self, now: float, error: str | None) -> None:
        self.ended, self.error = now, error

    def times(self) -> RequestTimes:
        return RequestTimes(self.due, tuple(self.token_times), self.ended, self.error)
