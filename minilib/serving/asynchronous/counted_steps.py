"""Steps of an engine whose requests fail alone, with what they did counted: shared by whoever steps in a loop."""

from __future__ import annotations

import time
from collections.abc import Collection
from collections.abc import Sequence as Row

from minilib.serving.asynchronous.fault_isolation import FaultIsolation
from minilib.serving.asynchronous.status import Counts, ModelDescription
from minilib.serving.cache.tiers import fingerprint
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams, TokenOutput


class CountedSteps:
    """The calls of an engine by the loop that steps it.

    Args:
        engine: the engine; nobody else calls it.

    Raises:
        ValueError: if the engine is serving requests already.

    Attributes:
        began_ns: when the newest step began, on the clock of `time.monotonic_ns`, which a machine's processes share.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.has_unfinished:
            raise ValueError("the engine has unfinished requests; step it until there are none, or give a new engine")
        self.engine = engine
        self._isolation = FaultIsolation(engine)
        self.began_ns = 0
        self._never_ran: dict[str, int] = {}  # request → tokens of its prompt
        self._unanswered: dict[str, int] = {}  # the same, of requests without an output
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = self._steps = 0

    def add(self, request_id: str, prompt: Row[int], params: SamplingParams | None, options: dict) -> None:
        """See `Engine.add_request`."""
        self.engine.add_request(request_id, prompt, params, **options)
        self._unanswered[request_id] = self.engine.requests[request_id][0].num_prompt_tokens
        self._never_ran[request_id] = self._unanswered[request_id]

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        self._unanswered.pop(request_id, None)
        self._never_ran.pop(request_id, None)
        self.engine.abort(request_id)

    def step(self) -> dict[str, list[TokenOutput]]:
        """See `FaultIsolation.step`; the outputs of each request."""
        self.began_ns = time.monotonic_ns()
        made: dict[str, list[TokenOutput]] = {}
        for output in self._isolation.step():
            made.setdefault(output.request_id, []).append(output)
            self._generated_tokens += output.token_id is not None
            if output.request_id in self._unanswered:
                self._prompt_tokens += self._unanswered.pop(output.request_id)
                self._cached_tokens += output.cached_tokens
        self._steps += 1
        return made

    def started(self, made: Collection[str]) -> list[str]:
        """Requests that ran for the first time in the step that made outputs of these; each is named once."""
        if not self._never_ran:
            return []
        ran = {*made, *(sequence.request_id for sequence in self.engine.scheduler.running)}
        first = [request_id for request_id in self._never_ran if request_id in ran]
        for request_id in first:
            del self._never_ran[request_id]
        return first

    def counts(self) -> Counts:
        """Cheap, and safe in another thread: numbers of a step that runs may be in it or not."""
        scheduler = self.engine.scheduler
        return Counts(
            len(scheduler.running),
            self.engine.cache.pool.num_free,
            self._prompt_tokens,
            self._cached_tokens,
            self._generated_tokens,
            scheduler.num_preemptions,
            self._steps,
        )

    def description(self) -> ModelDescription:
        """Of the engine's model. Cost: all weights are read."""
        engine = self.engine
        pages = engine.cache.page_size, engine.cache.pool.num_frames
        return ModelDescription(
            engine.max_length, engine.model.config.vocab_size, *pages, fingerprint=fingerprint(engine.model)
        )

    def check_invariants(self) -> None:
        """What must hold between steps."""
        self.engine.check_invariants()
        self._isolation.check_invariants()
        assert self._never_ran.keys() <= self.engine.requests.keys(), "a request that is gone counts as waiting"
        assert self._unanswered.keys() <= self.engine.requests.keys(), "a request that is gone waits for an answer"
        running = {sequence.request_id for sequence in self.engine.scheduler.running}
        assert running.isdisjoint(self._never_ran), "a running request counts as waiting"
