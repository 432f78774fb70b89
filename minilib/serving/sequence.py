"""What the engine keeps about a request while it serves it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from minilib.mechanisms.paging import PageTable
from minilib.mechanisms.scheduling import Task
from minilib.serving.cache.sequences import flat_rows
from minilib.serving.request import SamplingParams, SchedulingParams

# Units of work of one token; a generated one costs more, as in price lists and in Sheng et al. 2024, arXiv:2401.00588.
PROMPT_UNITS, OUTPUT_UNITS = 1, 2


class Status(Enum):
    """Where a sequence is. Pages are held in ARRIVING and RUNNING (by the fast pool) and SWAPPED (by the slow one)."""

    WAITING = "waiting"
    ARRIVING = "arriving"  # its keys and values come from another process, see serving/disaggregation/
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence(Task):
    """One sample of one request while the engine serves it: a task for the scheduling policy.

    Args:
        request_id: the client's name for the request.
        sample: number of the sample.
        token_ids: the prompt's tokens, then those generated.
        num_prompt_tokens: how many of them are the prompt's.
        params: how to choose and when to stop.
        table: which pages hold its keys and values.
        num_computed_tokens: tokens whose keys and values are in those pages.
        num_charged_tokens: tokens of the prompt that the policy knows to be computed; if they are lost and computed
            once more, that is no service.
        status: where it is.
        seed: the request's, or one drawn for it.
        num_cached_tokens: those that were taken from kept pages when it was first let in; None before.
        num_overtaken: sequences that came later and were let in before it.
        stored: up to where its pages are kept, a position in the index of the prefix cache; None while it has no pages.
    """

    request_id: str
    sample: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    table: PageTable
    num_computed_tokens: int = 0
    num_charged_tokens: int = 0
    status: Status = Status.WAITING
    seed: int | None = None
    num_cached_tokens: int | None = None
    stored: Any = None
    num_overtaken: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is None:
            self.seed = random.randrange(2**63) if self.params.seed is None else self.params.seed

    @classmethod
    def of(
        cls,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        scheduling: SchedulingParams,
        table: PageTable,
        arrival: float,
    ) -> Sequence:
        """The first sample of a new request, which stands for all of them until their first token is chosen.

        Raises:
            InvalidTask: if its deadline has passed.
        """
        tokens = scheduling.predicted_tokens or params.max_tokens
        return cls(
            request_id,
            0,
            prompt,
            len(prompt),
            params,
            table,
            key=request_id,
            arrival=arrival,
            tenant=scheduling.tenant,
            priority=scheduling.priority,
            predicted=PROMPT_UNITS * len(prompt) + OUTPUT_UNITS * tokens,
            deadline=scheduling.deadline,
        )

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache: a whole prompt at first, one while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def samples_due(self) -> range:
        """The samples that this sequence stands for: all of them until their first token is chosen, then its own."""
        return range(self.sample, self.sample + 1) if self.num_output_tokens else range(self.params.n)

    def chance(self, sample: int) -> float:
        """The number in [0, 1) that chooses the next token of a sample: a function of the seed and the place alone."""
        return random.Random(f"{self.seed}/{sample}/{self.num_output_tokens}").random()

    def fork(self, sample: int) -> Sequence:
        """Another sample that has computed the same tokens and shares their pages."""
        return replace(self, sample=sample, token_ids=list(self.token_ids), table=self.table.fork(), num_overtaken=0)


def flat_batch(work: list[tuple[Sequence, int]]) -> tuple[list[int], list[int], list[int]]:
    """One step as the model takes it: tokens of all sequences, one sequence after another.

    Args:
        work: sequences, and how many of their tokens the step computes.

    Returns:
        Token ids, their positions, and which of them is the last one of a sequence that the step brings up to date.
    """
    firsts = [sequence.num_computed_tokens for sequence, _ in work]
    rows = [s.token_ids[first : first + count] for first, (s, count) in zip(firsts, work, strict=True)]
    tokens, positions, ends = flat_rows(rows, firsts)
    caught_up = [count == sequence.num_uncomputed_tokens for sequence, count in work]
    return tokens, positions, [end - 1 for end, done in zip(ends, caught_up, strict=True) if done]
