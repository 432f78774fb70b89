"""An engine in a process of its own, with the coroutines of `AsyncEngine`: an event loop never waits for a step.

    this process, one event loop             the engine's process, one thread (engine_loop.py)
    submit ── add ──→ ┐                  ┌─→ adds and aborts what was asked since the last step
    TokenStream       ├── a socket ──────┤   steps
      ← outputs ──────┘                  └── sends what the step made, in one message
      close ─ drop ─→

A process that crashes, or makes no step for too long, ends its requests by name and is started again, after a pause
that grows; after too many crashes the engine has stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import Callable
from collections.abc import Sequence as Row
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from minilib.mechanisms.basics.checks import is_whole
from minilib.ranks.launch.pickling import dumps
from minilib.serving.asynchronous.errors import (
    NEW_ENGINE,
    EngineDied,
    EngineNotReady,
    EngineStopped,
    QueueFull,
    RequestAborted,
)
from minilib.serving.asynchronous.status import Counts, EngineStatus, ModelDescription, State
from minilib.serving.asynchronous.token_stream import Mailbox, TokenStream
from minilib.serving.engine_process.messages import RemoteTraceback, unpacked_error
from minilib.serving.engine_process.open_requests import OpenRequests
from minilib.serving.engine_process.process import EngineProcess
from minilib.serving.engine_process.supervision import Crashes, Supervision
from minilib.serving.request import SamplingParams, token_ids_of

if TYPE_CHECKING:
    from minilib.serving.engine import Engine

_LOOKS = 4  # within the time that a step may take


class RemoteEngine:
    """Serves requests from coroutines of one event loop, until it is drained or shut down.

    Use it as an async context manager: its start waits for the model, its end shuts the engine down.

    Args:
        make_engine: makes the engine, in its process; a function, also one of a notebook, or a `CheckpointEngine`.
        max_waiting: as in `AsyncEngine`.
        supervision: limits of the process.

    Raises:
        ValueError: if max_waiting is below 1.
        Exception: of whatever kind a function that does not pickle chooses.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], max_waiting: int = 1024, supervision: Supervision | None = None
    ) -> None:
        if not is_whole(max_waiting, 1):
            raise ValueError(f"max_waiting must be a whole number ≥ 1, got {max_waiting!r}")
        self.max_waiting, self.supervision = max_waiting, supervision or Supervision()
        self._factory = dumps(make_engine)
        self._state: State = "starting"
        self._why_stopped = "is stopping or has stopped"
        self._described: ModelDescription | None = None
        self._requests = OpenRequests()
        self._checks: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self._counts = self._earlier = Counts()  # of this process, and of those before it
        self._restarts, self._ready_at, self._time_to_start = 0, 0.0, 0.0
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RemoteEngine:
        try:
            await self.start()
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def start(self) -> None:
        """Start the process and wait for its engine; requests are refused until then.

        Raises:
            Exception: what make_engine raised, with its traceback as the cause.
            EngineDied: if the process crashed, or was too slow.
            EngineStopped: if the engine was shut down meanwhile.
        """
        if self._supervisor is None:
            self._loop = asyncio.get_running_loop()
            self._started = self._loop.create_future()
            self._supervisor = self._loop.create_task(self._supervise())
        await asyncio.shield(self._started)

    @property
    def num_waiting(self) -> int:
        """Requests that have been submitted and have never run."""
        return len(self._requests.waiting)

    @property
    def description(self) -> ModelDescription:
        """What the model and its engine are.

        Raises:
            EngineStopped: before the first start.
        """
        if self._described is None:
            raise self._refusal()
        return self._described

    def status(self) -> EngineStatus:
        """The newest that the process has told; numbers since the start do not fall when it starts again."""
        counts, pages = self._counts.after(self._earlier), self._described.num_pages if self._described else 0
        waiting, restarts = self.num_waiting, self._restarts
        return EngineStatus(self._state, num_waiting=waiting, num_pages=pages, restarts=restarts, **counts._asdict())

    async def submit(
        self,
        prompt_token_ids: Row[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: object,
    ) -> TokenStream:
        """See `AsyncEngine.submit`.

        Raises:
            EngineNotReady: while the process starts, or starts again.
            EngineDied: if it died before it took the request.
            QueueFull, EngineStopped, InvalidRequest, RequestAborted: as there.
            RuntimeError: in another event loop than the one it was started in.
        """
        if self._state != "ready":
            raise self._refusal()
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("a RemoteEngine serves the event loop that it was started in; start one in each loop")
        if self.num_waiting >= self.max_waiting:
            raise QueueFull(self.num_waiting)
        prompt = token_ids_of(prompt_token_ids, self.description.vocab_size, "prompt")
        number = next(self._numbers)
        name = f"request-{number}" if request_id is None else request_id
        payload = pickle.dumps((name, prompt, params, options))
        mailbox = self._requests.add(number, name)
        self._process.send("add", number, payload)
        stream = TokenStream(mailbox, partial(self._abort, number))
        try:
            await mailbox.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those submitted, and end the process; see `AsyncEngine.drain`."""
        if self._state == "ready":
            self._state, self._why_stopped = "draining", "is draining"
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._requests.all_ended()
        await self.shutdown()

    async def shutdown(self) -> None:
        """Take no more requests, abort all of them after the step that runs, and end the process."""
        if self._state != "stopped":
            self._state, self._why_stopped = "stopped", "is stopping or has stopped"
        self._fail_all(lambda: RequestAborted(f"the engine stopped before this request was finished; {NEW_ENGINE}"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    async def check_invariants(self) -> None:
        """What must hold between steps, here and in the process; waits for the step that runs."""
        self._requests.check_invariants()
        assert self.num_waiting <= self.max_waiting, "more requests wait than may"
        if self._state in ("ready", "draining"):
            number = next(self._numbers)
            self._checks[number] = self._loop.create_future()
            self._process.send("check", number)
            await self._checks[number]

    # The process

    async def _supervise(self) -> None:
        """Run one process after another, until there are too many crashes, or this task is cancelled."""
        crashes = Crashes(self.supervision)
        error: Exception = EngineStopped("the engine was shut down before it was ready")
        try:
            while True:
                error = await self._run_process()
                pause = crashes.pause(self._loop.time())
                if pause is None or self._state in ("starting", "draining"):
                    return
                self._state, self._restarts = "restarting", self._restarts + 1
                self._ready_at = self._loop.time() + pause + self._time_to_start
                self._lose_process(error)
                await asyncio.sleep(pause)
        finally:
            if self._state != "stopped":
                self._state, self._why_stopped = "stopped", f"has stopped: {error}"
            self._lose_process(error)
            if not self._started.done():
                self._started.set_exception(error)
                self._started.exception()  # whoever waits gets it, and it is no fault if nobody does

    async def _run_process(self) -> Exception:
        """Start a process and receive from it until it ends; what it ended by."""
        process, begin = EngineProcess(self._factory, self._receive), self._loop.time()
        try:
            await process.start()
        except OSError as error:
            return error
        try:
            limit = self.supervision.start_timeout
            await asyncio.wait((process.ready, process.lost), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if process.ready.done():
                self._described, self._process = process.ready.result(), process
                self._state, self._time_to_start = "ready", self._loop.time() - begin
                if not self._started.done():
                    self._started.set_result(None)
                await self._watch(process)
            elif not process.lost.done():
                await process.kill(f"its engine was not ready after {limit:g} s")
            return _death(*await process.cause())
        except Exception as error:  # of make_engine
            return error
        finally:
            await process.close(self.supervision.step_timeout)

    async def _watch(self, process: EngineProcess) -> None:
        """Return when the process has ended, and end it if it makes no step where it should.

        Looks without news are counted, not seconds: where this process was stopped itself, no time has passed.
        """
        limit, silent = self.supervision.step_timeout, 0
        while not process.lost.done():
            heard = process.heard
            await asyncio.wait((process.lost,), timeout=limit / _LOOKS)
            silent = silent + 1 if (self._requests or self._checks) and process.heard == heard else 0
            if silent == _LOOKS:
                await process.kill(f"it made no step for {limit:g} s")
                return

    def _lose_process(self, error: Exception) -> None:
        """End what the process had to do, and keep what it has counted."""
        cause = error.__cause__
        self._fail_all(lambda: _with_cause(EngineDied(f"the engine's process died: {error}; {NEW_ENGINE}"), cause))
        self._earlier, self._counts = self._counts.after(self._earlier), Counts()

    # What happens to requests

    def _receive(self, kind: str, *content) -> None:
        if kind == "step":
            counts, began_ns, started, made = content
            self._counts = Counts(*counts)
            self._requests.started(started, began_ns)
            self._requests.hand_out(made)
        elif content[0] in self._checks:
            check = self._checks.pop(content[0])
            check.set_result(None) if kind == "checked" else check.set_exception(unpacked_error(*content[1:]))
        else:
            self._requests.answer(*content)

    def _abort(self, number: int, _: Mailbox) -> None:
        """Called by a stream that nobody reads any more, also from another thread when it is collected as garbage."""
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._drop(number)
        else:
            with suppress(RuntimeError):  # the loop is closed, and with it the process
                self._loop.call_soon_threadsafe(self._drop, number)

    def _drop(self, number: int) -> None:
        if self._requests.forget(number):
            self._process.send("drop", number)

    def _fail_all(self, make_error: Callable[[], Exception]) -> None:
        """End what is open by an error, each by one of its own, as each gets a traceback."""
        self._requests.fail_all(make_error)
        for number in list(self._checks):
            self._checks.pop(number).set_exception(make_error())

    def _refusal(self) -> EngineStopped:
        """Why no request is taken now."""
        if self._state == "starting":
            return EngineNotReady("the engine is loading its model; send the request later, or to another engine", 1.0)
        if self._state == "restarting":
            left = max(self._ready_at - self._loop.time(), 0.1)
            return EngineNotReady(
                f"the engine's process crashed and is being started again; send the request in {left:.1f} s", left
            )
        return EngineStopped(f"the engine {self._why_stopped}; {NEW_ENGINE}")


def _death(cause: str, trace: str) -> EngineDied:
    return _with_cause(EngineDied(cause), RemoteTraceback(trace) if trace else None)


def _with_cause(error: EngineDied, cause: BaseException | None) -> EngineDied:
    error.__cause__ = cause
    return error
