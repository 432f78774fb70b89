"""What a client asks for, and what comes back."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from minilib.mechanisms.basics.checks import is_whole, whole
from minilib.mechanisms.scheduling.task import InvalidTask, check_priority


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
        logprobs: log-probabilities of the chosen token and of so many of the likeliest ones come with each token; None
            computes none. They are the model's own: before temperature, top_k and top_p.

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
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("n", 1), ("top_k", 0)):
            value = whole(getattr(self, name))
            if value is None or value < least:
                raise InvalidRequest(f"{name} must be a whole number ≥ {least}, got {getattr(self, name)!r}")
            self._set(name, value)
        if self.seed is not None and not is_whole(self.seed):
            raise InvalidRequest(f"seed must be a whole number or None, got {self.seed!r}")
        if self.logprobs is not None:
            count = whole(self.logprobs)
            if count is None or count < 0:
                raise InvalidRequest(f"logprobs must be a whole number ≥ 0 or None, got {self.logprobs!r}")
            self._set("logprobs", count)
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
        if self.predicted_tokens is not None and not is_whole(self.predicted_tokens, 1):
            raise InvalidRequest(f"predicted_tokens must be a whole number ≥ 1, got {self.predicted_tokens!r}")
        if not isinstance(self.deadline, Real) or math.isnan(self.deadline):
            raise InvalidRequest(f"deadline must be a time on the engine's clock, got {self.deadline!r}")


class TokenOutput(NamedTuple):
    """One new token of one sample, or its end by an error; the engine returns these as they come.

    Args:
        request_id: the client's name for the request.
        sample: number of the sample, 0 … n−1.
        token_id: the new token; None if none could be chosen, which ends the sample with an error.
        text: what it adds to the text, without what may still become part of a stop string; empty without a tokenizer.
        finish_reason: "stop", "length" or "error" with the last output, None before.
        error: what went wrong, if finish_reason is "error".
        cached_tokens: of the prompt, those that were taken from kept pages when the request was first let in.
        logprob: of the new token, if the request asks for it.
        top_logprobs: pairs of a token and its log-probability, as many as the request asks for, the likeliest first.
    """

    request_id: str
    sample: int
    token_id: int | None
    text: str
    finish_reason: str | None
    error: str | None = None
    cached_tokens: int = 0
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
