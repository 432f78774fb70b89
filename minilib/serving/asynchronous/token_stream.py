"""The way of tokens from the thread that steps the engine to the coroutine that waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from minilib.serving.request import TokenOutput


class Mailbox:
    """What came for one request and was not read; filled and read in one event loop, which may not be closed.

    Args:
        request_id: of the request.
        loop: the event loop of the coroutine that reads.

    Attributes:
        accepted: done when the engine has taken the request, or refused it.
        started_ns: when the first step began in which it ran, on the clock of `time.monotonic_ns`; None before.
    """

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id, self.loop = request_id, loop
        self.accepted: asyncio.Future[None] = loop.create_future()
        self.outputs: deque[TokenOutput] = deque()
        self.ended = False
        self.started_ns: int | None = None
        self.error: BaseException | None = None
        self._readers: list[asyncio.Future[None]] = []  # who waits for news; mostly one

    def accept(self) -> None:
        """The engine has the request."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def put(self, outputs: list[TokenOutput], ended: bool) -> None:
        """Outputs of one step; nothing comes after those that end the request."""
        self.outputs += outputs
        self.ended |= ended
        self._wake()

    def fail(self, error: BaseException) -> None:
        """The request was refused, or ends by this error after what has come."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self.ended, self.error = True, error
        self._wake()

    def _wake(self) -> None:
        for reader in self._readers:
            if not reader.done():  # as one that was cancelled is
                reader.set_result(None)
        self._readers.clear()

    async def wait(self) -> None:
        """Return as soon as there are outputs; without any at the end.

        Raises:
            BaseException: the error that the request ended by, once.
        """
        while not (self.outputs or self.ended):
            reader = self.loop.create_future()
            self._readers.append(reader)
            await reader
        if not self.outputs and self.error:
            error, self.error = self.error, None
            raise error


class TokenStream:
    """The outputs of one request, an async iterator; who stops listening early aborts the request.

    Listening ends with the last output, by `aclose`, when a task is cancelled that waits for the next output, and when
    nobody has the stream any more.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[Mailbox], None]) -> None:
        self.request_id = mailbox.request_id
        self._mailbox, self._abort = mailbox, abort
        self._listening = True

    @property
    def started_ns(self) -> int | None:
        """When the request's wait in the queue ended, on the clock of `time.monotonic_ns`; None before."""
        return self._mailbox.started_ns

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        """The next output.

        Raises:
            RequestAborted: if the engine stopped before the request was finished.
            EngineDied: if the thread that steps the engine died.
        """
        if not await self._wait():
            raise StopAsyncIteration
        return self._mailbox.outputs.popleft()

    async def get_many(self) -> list[TokenOutput]:
        """All outputs that have come, as soon as there is one; none at the end.

        Raises:
            RequestAborted, EngineDied: as reading one by one.
        """
        if not await self._wait():
            return []
        outputs = list(self._mailbox.outputs)
        self._mailbox.outputs.clear()
        return outputs

    async def _wait(self) -> bool:
        """Wait for outputs; False at the end."""
        if not self._listening:
            return False
        try:
            await self._mailbox.wait()
        except BaseException:
            self.close()
            raise
        self._listening = bool(self._mailbox.outputs)
        return self._listening

    def close(self) -> None:
        """Stop listening; a request that is not finished is aborted, and has freed its pages before the next step."""
        if self._listening:
            self._listening = False
            if not self._mailbox.ended:
                self._abort(self._mailbox)

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()

    def __del__(self) -> None:
        self.close()
