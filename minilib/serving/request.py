"""What a client asks for, what the engine keeps about it, and what comes back."""

from __future__ import annotations

import math
import operator
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from numbers import Real
from typing import Any

from minilib.mechanisms.paging import PageTable
from minilib.mechanisms.scheduling import Task
from minilib.mechanisms.scheduling.task import InvalidTask, check_priority
from minilib.serving.cache.sequences import flat_rows

# Units of work of one token; a generated one costs more, as in price lists and in Sheng et al. 2024, arXiv:2401.00588.
PROMPT_UNITS, OUTPUT_UNITS = 1, 2


class InvalidRequest(ValueError):
    """The request cannot be served; the message says what came, what was expected and how to mend it."""


def token_ids_of(values: Iterable[int], vocab_size: int, name: str) -> list[int]:
    """Token ids as Python's whole numbers, from a list, an array or a tensor of them.

    Raises:
        InvalidRequest: if one is no token id of the model; `name` says what they were given as.
    """
    try:
        tokens = values.tolist() if hasattr(values, "tolist") else list(values)
    except TypeError as error:  # a number, None
        raise InvalidRequest(f"{name} is a row of token ids, got {values!r}") from error
    if not isinstance(tokens, list):
        raise InvalidRequest(f"{name} is a row of token ids, got the number {tokens!r}")
    found = [whole(token) for token in tokens]
    wrong = [given for given, token in zip(tokens, found, strict=True) if token is None or not 0 <= token < vocab_size]
    if wrong:
        raise InvalidRequest(f"{name} holds {wrong[0]!r}, and the model knows token ids 0 … {vocab_size - 1}")
    return found


def whole(value: object) -> int | None:
    """A whole number of Python, numpy or torch as Python's; None for anything else, True and False too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


class Status(Enum):
    """Where a sequence is. Pages are held in RUNNING (by the fast pool) and SWAPPED (by the slow one) only."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 is greedy.
        top_k: choose among so many likeliest tokens; 0 is all.
        top_p: choose among the likeliest tokens that together reach this probability, in (0, 1].
        seed: same seed, same tokens, whatever else is in the batch; None draws one.
        n: samples of the prompt; they share its pages.
        stop: a string, or several, that end the text; they are not part of it.
        stop_token_ids: tokens that end the sequence; they are part of it.
        ignore_eos: go on after the model's end token.
        cache_salt: kept pages are shared among requests with this salt alone, such as those of one tenant.

    Raises:
        InvalidRequest: if a value makes no sense.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("n", 1), ("top_k", 0)):
            value = whole(getattr(self, name))
            if value is None or value < least:
                raise InvalidRequest(f"{name} must be a whole number ≥ {least}, got {getattr(self, name)!r}")
            self._set(name, value)
        if self.seed is not None and whole(self.seed) is None:
            raise InvalidRequest(f"seed must be a whole number or None, got {self.seed!r}")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), Real):
                raise InvalidRequest(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 0 <= self.temperature <= sys.float_info.max:
            raise InvalidRequest(f"temperature must be a number ≥ 0 (0 is greedy), got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must be in (0, 1], 1 keeps every token; got {self.top_p!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, tuple | list) or not all(isinstance(text, str) for text in stop):
            raise InvalidRequest(f"stop is a string or a tuple of strings, got {self.stop!r}")
        if not all(stop):
            raise InvalidRequest("an empty stop string would end every text before it begins")
        self._set("stop", tuple(stop))
        if not isinstance(self.cache_salt, str):
            raise InvalidRequest(f"cache_salt is a string, got {self.cache_salt!r}")
        ids = self.stop_token_ids
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, tuple | list | set | frozenset):
            raise InvalidRequest(f"stop_token_ids is a tuple of token ids, got {self.stop_token_ids!r}")
        self._set("stop_token_ids", tuple(ids))

    def _set(self, name: str, value: object) -> None:
        """Keep what was given in one form; the instance is frozen for everybody else."""
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class SchedulingParams:
    """What a scheduling policy may look at; each policy looks at one of these and ignores the others.

    Args:
        priority: 0 is the most urgent.
        tenant: whose request it is.
        predicted_tokens: tokens that each sample will probably generate; max_tokens if left out.
        deadline: time on the engine's clock by which it should be finished; math.inf for none.

    Raises:
        InvalidRequest: if a value makes no sense.
    """

    priority: float = 0
    tenant: str = ""
    predicted_tokens: int | None = None
    deadline: float = math.inf

    def __post_init__(self) -> None:
        try:
            check_priority("a request", self.priority)
        except InvalidTask as error:
            raise InvalidRequest(str(error)) from error
        if not isinstance(self.tenant, str):
            raise InvalidRequest(f"tenant must be a string, got {self.tenant!r}")
        if self.predicted_tokens is not None and (whole(self.predicted_tokens) or 0) < 1:
            raise InvalidRequest(f"predicted_tokens must be a whole number ≥ 1, got {self.predicted_tokens!r}")
        if not isinstance(self.deadline, Real) or math.isnan(self.deadline):
            raise InvalidRequest(f"deadline must be a time on the engine's clock, got {self.deadline!r}")


@dataclass(frozen=True)
class TokenOutput:
    """One new token of one sample, or its end by an error; the engine returns these as they come.

    Args:
        request_id: the client's name for the request.
        sample: number of the sample, 0 … n−1.
        token_id: the new token; None if none could be chosen, which ends the sample with an error.
        text: what it adds to the text, without what may still become part of a stop string; empty without a tokenizer.
        finish_reason: "stop", "length" or "error" with the last output, None before.
        error: what went wrong, if finish_reason is "error".
        cached_tokens: of the prompt, those that were taken from kept pages when the request was first let in.
    """

    request_id: str
    sample: int
    token_id: int | None
    text: str
    finish_reason: str | None
    error: str | None = None
    cached_tokens: int = 0


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
