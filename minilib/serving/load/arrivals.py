"""Who arrives when: the input of an open loop, drawn from a distribution or replayed from a trace.

    Poisson     independent users: gaps are exponential, their coefficient of variation (CV) is 1
    gamma       CV above 1: bursts and silence; below 1: more regular than chance; 0: a metronome
    replayed    what a real service saw

vLLM's benchmark states burstiness as the gamma distribution's shape, which is 1 / CV². It stretches its gaps so that
they add up to the wanted time; here they are as drawn, and the rate is that of the distribution.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minilib.serving.request import InvalidRequest, SamplingParams

TRACE_BLOCK = 512  # tokens of the prompt that one of a trace's hash_ids stands for


class InvalidTrace(ValueError):
    """A line of a trace cannot be replayed; the message says which and why."""


@dataclass(frozen=True)
class Arrival:
    """One request of a load.

    Args:
        due: when it arrives, in seconds.
        prompt_token_ids: its prompt.
        params: how to choose tokens and when to stop; of one sample, as latencies are a request's.
        options: more arguments of `Engine.add_request`.

    Raises:
        ValueError: if it is due before time 0, or asks for several samples.
    """

    due: float
    prompt_token_ids: Row[int]
    params: SamplingParams
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.due < float("inf"):
            raise ValueError(f"a request is due at a time ≥ 0, got {self.due!r}")
        if self.params.n != 1:
            raise InvalidRequest(f"a load measures requests of one sample, got n={self.params.n}; send n requests")


def poisson_times(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests arrive independently of each other.

    Args:
        count: requests.
        rate: requests a second, on average.
        seed: same seed, same times.

    Raises:
        ValueError: if there are fewer than 0 requests or the rate is not positive.
    """
    return gamma_times(count, rate, 1.0, seed)


def gamma_times(count: int, rate: float, cv: float, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests arrive whose gaps have a gamma distribution.

    Args:
        count: requests.
        rate: requests a second, on average.
        cv: coefficient of variation of the gaps, ≥ 0.
        seed: same seed, same times.

    Raises:
        ValueError: if an argument is out of range.
    """
    if count < 0 or not 0 < rate < float("inf") or not 0 <= cv < float("inf"):
        raise ValueError(f"count ≥ 0, rate > 0 and cv ≥ 0 are needed, got {count}, {rate} and {cv}")
    if cv == 0:
        gaps = np.full(count, 1 / rate)
    else:
        gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, count)
    return np.cumsum(gaps).tolist()


def random_arrivals(
    times: Row[float], prompt_lengths: Row[int], output_lengths: Row[int], vocab_size: int, seed: int = 0
) -> list[Arrival]:
    """Requests of random tokens that come at these times, all three rows of one length.

    Each generates exactly its output length, greedily: end tokens do not end it, and no two runs differ.
    """
    draws = np.random.default_rng(seed)
    return [
        Arrival(due, draws.integers(vocab_size, size=length).tolist(), _exactly(new))
        for due, length, new in zip(times, prompt_lengths, output_lengths, strict=True)
    ]


def read_trace(path: Path | str, vocab_size: int, speed: float = 1.0) -> list[Arrival]:
    """Replay a trace in the form that Mooncake publishes: a JSON object a line, with these fields.

        timestamp        milliseconds
        input_length     tokens of the prompt
        output_length    tokens to generate
        hash_ids         one id for each TRACE_BLOCK tokens of the prompt: same id, same tokens; may be left out

    Args:
        path: of the file.
        vocab_size: of the model; the tokens themselves are random, as no such trace tells them.
        speed: how many times faster than it was recorded.

    Raises:
        InvalidTrace: if a line is no such object.
        ValueError: if the speed is not positive.

    Source: Qin et al., "Mooncake", FAST 2025, and the traces that were released with it.
    """
    if not speed > 0:
        raise ValueError(f"speed must be > 0, got {speed!r}")
    arrivals = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            length, new = int(record["input_length"]), int(record["output_length"])
            ids = record.get("hash_ids") or [f"line {number}/{block}" for block in range(-(-length // TRACE_BLOCK))]
            prompt = [token for key in ids for token in _block(key, vocab_size)][:length]
            if len(prompt) != length or not length:
                raise ValueError(f"{len(ids)} blocks of {TRACE_BLOCK} are no prompt of {length} tokens")
            arrivals.append(Arrival(record["timestamp"] / 1000 / speed, prompt, _exactly(new)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidTrace(f"{Path(path).name}, line {number}: {type(error).__name__}: {error}") from error
    return arrivals


def _exactly(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)


def _block(key: object, vocab_size: int) -> list[int]:
    """The tokens that an id stands for."""
    return random.Random(str(key)).choices(range(vocab_size), k=TRACE_BLOCK)
