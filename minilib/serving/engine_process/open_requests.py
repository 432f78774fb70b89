"""Requests that another process serves, and who waits for them here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Row

from minilib.serving.asynchronous.token_stream import Mailbox
from minilib.serving.engine_process.messages import unpacked_error
from minilib.serving.request import TokenOutput


class OpenRequests:
    """Mailboxes by the number of their request; all of one event loop.

    Attributes:
        waiting: numbers of those that have never run.
    """

    def __init__(self) -> None:
        self.waiting: set[int] = set()
        self._mailboxes: dict[int, Mailbox] = {}
        self._ended = asyncio.Event()

    def __len__(self) -> int:
        return len(self._mailboxes)

    def add(self, number: int, request_id: str) -> Mailbox:
        """A request that the process has not taken yet."""
        mailbox = self._mailboxes[number] = Mailbox(request_id, asyncio.get_running_loop())
        self.waiting.add(number)
        return mailbox

    def answer(self, number: int, *error) -> None:
        """The process has taken a request, or refused it by this error, packed."""
        if mailbox := self._mailboxes.get(number):
            if error:
                self.forget(number)
                mailbox.fail(unpacked_error(*error))
            else:
                mailbox.accept()

    def started(self, numbers: Row[int], began_ns: int) -> None:
        """Requests ran for the first time, in a step that began then."""
        self.waiting.difference_update(numbers)
        for number in numbers:
            if mailbox := self._mailboxes.get(number):
                mailbox.started_ns = began_ns

    def hand_out(self, made: Row[tuple[int, bool, list[tuple]]]) -> None:
        """Give the outputs of a step to whoever waits for them; those that nobody waits for are lost."""
        for number, ended, outputs in made:
            if mailbox := self._mailboxes.get(number):
                mailbox.put([TokenOutput(mailbox.request_id, *fields) for fields in outputs], ended)
                if ended:
                    self.forget(number)

    def forget(self, number: int) -> bool:
        """A request has ended, or nobody waits for it; False if it had already."""
        self.waiting.discard(number)
        known = self._mailboxes.pop(number, None) is not None
        if not self._mailboxes:
            self._ended.set()
        return known

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """End each by an error of its own."""
        for number, mailbox in list(self._mailboxes.items()):
            self.forget(number)
            mailbox.fail(make_error())

    async def all_ended(self) -> None:
        """Return when none is open."""
        while self._mailboxes:
            self._ended.clear()
            await self._ended.wait()

    def check_invariants(self) -> None:
        """Who waits is open."""
        assert self.waiting <= self._mailboxes.keys(), "a request that is gone counts as waiting"
