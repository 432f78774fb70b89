"""Steps of an engine in which a request that makes the model raise ends alone.

A step that raises does not say whose fault it was, and costs no request a token: the engine computes anew what ran. So
the requests that ran in it, the suspects, are tried again one after another:

    step raises       a, b, c ran: all are suspects, and wait
    a joins           the step makes a token of a: a is cleared
    b joins           the step raises, and b alone was not cleared: b ends with an error; a and c are still suspects
    a joins, c joins  both are cleared, and the engine is as wide as before

A failure that does not repeat ends no request; a model that always raises ends them all, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from minilib.serving.engine import Engine
from minilib.serving.request import TokenOutput


class FaultIsolation:
    """The steps of one engine.

    Args:
        engine: the engine; requests are added to it and aborted directly.

    Attributes:
        suspects: requests that ran in a step that raised, and have made no token since.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.suspects: set[str] = set()
        self._cleared: set[str] = set()  # made a token since a step raised
        self._idle_steps = 0  # in a row without a batch, while there are suspects

    def step(self) -> list[TokenOutput]:
        """What `Engine.step` returns; where the model raises, the end of the request that makes it so, or nothing.

        Raises:
            Exception: from the engine, if no request ran in the step that raised.
        """
        try:
            with self._narrowed():
                outputs = self.engine.step()
        except Exception as error:
            if not self.engine.failed_batch:
                raise
            return self._suspect(error)
        if self.suspects:
            self._clear({output.request_id for output in outputs})
        return outputs

    def check_invariants(self) -> None:
        """Without suspects nobody is remembered."""
        assert self.suspects or not (self._cleared or self._idle_steps), "requests were cleared of nothing"

    @contextmanager
    def _narrowed(self) -> Iterator[None]:
        """While there are suspects, at most one request that is not cleared runs."""
        scheduler = self.engine.scheduler
        most = scheduler.max_sequences
        if self.suspects:
            occupied = sum(len(sequence.samples_due) for sequence in scheduler.running)
            joining = all(sequence.request_id in self._cleared for sequence in scheduler.running)
            scheduler.max_sequences = min(most, occupied + joining + self._idle_steps)
        try:
            yield
        finally:
            scheduler.max_sequences = most

    def _suspect(self, error: Exception) -> list[TokenOutput]:
        """Note who ran in a step that raised; end the one request that can be the reason, if it was a suspect."""
        batch = self.engine.failed_batch
        joined = batch - self._cleared
        ended: list[TokenOutput] = []
        if len(joined) == 1 and joined <= self.suspects:
            (culprit,) = joined
            ended = self.engine.fail(culprit, f"its step raised {type(error).__name__}: {error}")
        self.suspects |= batch
        self._idle_steps = 0
        self._forget(set())
        return ended

    def _clear(self, made_tokens: set[str]) -> None:
        """Note who made a token in a step that did not raise."""
        self._idle_steps = 0 if self.engine.scheduler.running or made_tokens else self._idle_steps + 1
        self._forget((self._cleared | made_tokens) & self.engine.requests.keys())

    def _forget(self, cleared: set[str]) -> None:
        """Set who is cleared; those and the requests that are gone are no suspects."""
        self.suspects = (self.suspects & self.engine.requests.keys()) - cleared
        self._cleared = cleared if self.suspects else set()
        self._idle_steps = self._idle_steps if self.suspects else 0
