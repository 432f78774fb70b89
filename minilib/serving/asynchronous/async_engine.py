"""The engine behind asyncio: many coroutines submit requests, and one thread steps.

    coroutines                                  the stepping thread, alone with the engine
    submit ── add ──→ ┐                     ┌─→ adds and aborts what was asked since the last step
    TokenStream       ├─ inbox ─────────────┘   steps
      ← outputs ──────│──────────────────────── hands out what the step made, once for each event loop
      close ─ abort ─→┘                         waits for the inbox where nothing is unfinished

The thread calls the engine and nobody else does, so the engine needs no lock; a step never waits for a coroutine, and
an event loop never waits for a step.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Row
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from functools import cached_property, partial

from minilib.mechanisms.basics.checks import is_whole
from minilib.serving.asynchronous.counted_steps import CountedSteps
from minilib.serving.asynchronous.errors import NEW_ENGINE, EngineDied, EngineStopped, QueueFull, RequestAborted
from minilib.serving.asynchronous.status import EngineStatus, ModelDescription, State
from minilib.serving.asynchronous.token_stream import Mailbox, TokenStream
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams, TokenOutput


class AsyncEngine:
    """Serves requests from coroutines of any number of event loops, until it is drained or shut down.

    Use it as an async context manager: its end shuts the engine down.

    Args:
        engine: the engine, which belongs to the stepping thread from now on.
        max_waiting: most requests that have been submitted and have never run; one more is refused. A request that had
            to give way does not count: it has run.

    Raises:
        ValueError: if max_waiting is below 1, or the engine is serving requests already.
    """

    def __init__(self, engine: Engine, max_waiting: int = 1024) -> None:
        if not is_whole(max_waiting, 1):
            raise ValueError(f"max_waiting must be a whole number ≥ 1, got {max_waiting!r}")
        self.engine, self.max_waiting = engine, max_waiting
        self._steps = CountedSteps(engine)
        self._mailboxes: dict[str, Mailbox] = {}  # of the requests that the engine has; the thread's own
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # of the thread; __del__ may put
        self._lock = threading.Lock()  # of the four that follow
        self._waiting: set[Mailbox] = set()  # of requests that have never run
        self._taking, self._stopping = True, False
        self._death: BaseException | None = None
        self._numbers = itertools.count()
        self._done: Future[None] = Future()  # by the end of the thread
        self._done.set_running_or_notify_cancel()  # so that who waits for it and is cancelled does not cancel it
        self._thread = threading.Thread(target=self._run, name="engine steps", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # Python must not take a daemon's ground away while it computes

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    @property
    def num_waiting(self) -> int:
        """Requests that have been submitted and have never run."""
        return len(self._waiting)

    @cached_property
    def description(self) -> ModelDescription:
        """What the model and its engine are. Cost: all weights are read, the first time."""
        return self._steps.description()

    def status(self) -> EngineStatus:
        """The newest that is known, without waiting for a step."""
        state: State = "ready" if self._taking else "stopped" if self._stopping or self._done.done() else "draining"
        pages = self.engine.cache.pool.num_frames
        return EngineStatus(state, num_waiting=self.num_waiting, num_pages=pages, **self._steps.counts()._asdict())

    async def submit(
        self,
        prompt_token_ids: Row[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: object,
    ) -> TokenStream:
        """Queue a request; returns as soon as the engine has taken it, between two steps.

        Args:
            prompt_token_ids: at least one token; a list, an array or a tensor.
            params: how to choose tokens and when to stop; the defaults of `SamplingParams` if left out.
            request_id: the client's name for it, not one of an unfinished request; a new one if left out.
            options: more arguments of `Engine.add_request`.

        Returns:
            Its outputs. A sample that nothing can be chosen for, or whose step raises, ends by an output with an error.

        Raises:
            QueueFull: if max_waiting requests wait.
            EngineStopped: if the engine takes no more requests.
            InvalidRequest: if it cannot be served; the engine goes on serving the others.
            RequestAborted, EngineDied: if the engine stopped before it took the request.
        """
        with self._lock:
            if not self._taking:
                raise EngineStopped(self._why_stopped()) from self._death
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(len(self._waiting))
            name = f"request-{next(self._numbers)}" if request_id is None else request_id
            mailbox = Mailbox(name, asyncio.get_running_loop())
            self._waiting.add(mailbox)
            self._inbox.put(partial(self._add, mailbox, prompt_token_ids, params, options))
        stream = TokenStream(mailbox, self._abort)
        try:
            await mailbox.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those submitted, and end the thread.

        Args:
            timeout: seconds after which the rest is aborted, and its streams raise `RequestAborted`; None to wait for
                all of them.
        """
        self._close(stopping=False)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wrap_future(self._done)
        except TimeoutError:
            await self.shutdown()
        self._thread.join()

    async def shutdown(self) -> None:
        """Take no more requests, abort all of them after the step that runs, and end the thread."""
        self._close(stopping=True)
        await asyncio.wrap_future(self._done)
        self._thread.join()

    def stop(self) -> None:
        """`shutdown` where no event loop runs: it waits for the step that runs."""
        self._close(stopping=True)
        self._thread.join()

    def check_invariants(self) -> None:
        """What must hold between steps, as the stepping thread sees it; waits for the step that runs."""
        checked: Future[None] = Future()
        self._inbox.put(partial(_settle, checked, self._check))
        wait((checked, self._done), return_when=FIRST_COMPLETED)
        self._check() if self._done.done() else checked.result()

    # What the stepping thread does

    def _run(self) -> None:
        death = None
        try:
            while self._attend():
                self._hand_out(self._steps.step())
        except BaseException as error:  # also a panic of somebody's compiled code
            death = error
        finally:
            self._end(death)
            atexit.unregister(self.stop)
            self._done.set_result(None)

    def _attend(self) -> bool:
        """Do what was asked since the last step, and wait where there is nothing to compute; False at the end."""
        while not self._stopping:
            idle = not self.engine.has_unfinished
            if idle and not self._taking and self._inbox.empty():
                return False
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            command()
        return False

    def _add(self, mailbox: Mailbox, prompt: Row[int], params: SamplingParams | None, options: dict) -> None:
        try:
            self._steps.add(mailbox.request_id, prompt, params, options)
        except Exception as error:  # InvalidRequest, or whatever a wrong argument raises: the others go on
            with self._lock:
                self._waiting.discard(mailbox)
            self._post([(mailbox.loop, partial(mailbox.fail, error))])
        else:
            self._mailboxes[mailbox.request_id] = mailbox
            self._post([(mailbox.loop, mailbox.accept)])

    def _drop(self, mailbox: Mailbox) -> None:
        with self._lock:
            self._waiting.discard(mailbox)
        if self._mailboxes.get(mailbox.request_id) is mailbox:
            del self._mailboxes[mailbox.request_id]
            self._steps.abort(mailbox.request_id)

    def _hand_out(self, made: dict[str, list[TokenOutput]]) -> None:
        """Send the outputs of a step to whoever waits for them, and note who has run."""
        if started := self._steps.started(made):
            for request_id in started:
                self._mailboxes[request_id].started_ns = self._steps.began_ns
            with self._lock:
                self._waiting.difference_update(self._mailboxes[request_id] for request_id in started)
        calls = []
        for request_id, of_request in made.items():
            ended, mailbox = request_id not in self.engine.requests, self._mailboxes[request_id]
            calls.append((mailbox.loop, partial(mailbox.put, of_request, ended)))
            if ended:
                del self._mailboxes[request_id]
        self._post(calls)

    def _post(self, calls: Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], None]]]) -> None:
        """Have functions called in their event loops; requests from a loop that is closed are aborted."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        for loop, call in calls:
            by_loop.setdefault(loop, []).append(call)
        for loop, of_loop in by_loop.items():
            try:
                loop.call_soon_threadsafe(_call_all, of_loop)
            except RuntimeError:  # closed
                for mailbox in [mailbox for mailbox in self._mailboxes.values() if mailbox.loop is loop]:
                    self._drop(mailbox)

    def _end(self, death: BaseException | None) -> None:
        """Take no more requests, free those that there are, and tell who waits for them."""
        with self._lock:
            self._taking, self._death = False, death
            left = {*self._waiting, *self._mailboxes.values()}
            self._waiting.clear()
        for request_id in self._mailboxes:
            with suppress(Exception):  # a broken engine may fail at this, too
                self._steps.abort(request_id)
        self._mailboxes.clear()
        self._post([(mailbox.loop, partial(mailbox.fail, self._abortion(death))) for mailbox in left])

    # What both sides do

    def _abort(self, mailbox: Mailbox) -> None:
        self._inbox.put(partial(self._drop, mailbox))

    def _close(self, stopping: bool) -> None:
        with self._lock:
            self._taking = False
            self._stopping |= stopping
        self._inbox.put(_nothing)  # wakes the thread

    def _why_stopped(self) -> str:
        return f"the engine {_died_of(self._death) if self._death else 'is stopping or has stopped'}; " + NEW_ENGINE

    @staticmethod
    def _abortion(death: BaseException | None) -> RuntimeError:
        """What a stream raises if the end of the thread cut its request short: a new one, as each gets a traceback."""
        if death is None:
            return RequestAborted("the engine stopped before this request was finished; " + NEW_ENGINE)
        error = EngineDied(f"the engine {_died_of(death)}; " + NEW_ENGINE)
        error.__cause__ = death
        return error

    def _check(self) -> None:
        self._steps.check_invariants()
        assert self._mailboxes.keys() == self.engine.requests.keys(), "a request has nobody who waits, or the reverse"
        assert len(self._waiting) <= self.max_waiting, "more requests wait than may"
        running = {sequence.request_id for sequence in self.engine.scheduler.running}
        assert running.isdisjoint(mailbox.request_id for mailbox in self._waiting), (
            "a running request counts as waiting"
        )


def _died_of(death: BaseException) -> str:
    return f"died of {type(death).__name__}: {death}"


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _nothing() -> None:
    pass


def _settle(future: Future[None], check: Callable[[], None]) -> None:
    try:
        check()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
