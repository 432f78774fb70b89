"""What is measured, and how a worker's answer becomes a rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minilib.serving.load.request_lengths import long_tailed

SEQUENCES, LENGTH = 32, 640  # what every engine has room for: requests at once, and tokens of the longest
PROMPT, NEW, LONG_PROMPT = 128, 64, 512
GAP = 0.02  # seconds between two arrivals


@dataclass(frozen=True)
class Case:
    """One trace of requests and what its rate counts.

    Args:
        name: for people.
        unit: "decoded tokens/s" from when every request has its first token; "prompt tokens/s" until the first token;
            "output tokens/s" from the beginning to the end.
        requests: [arrival in seconds, prompt, number of new tokens], by arrival.
    """

    name: str
    unit: str
    requests: list

    def rate(self, times: list[list[float]]) -> float:
        """What `unit` says, from the seconds at which each request's tokens came."""
        if self.unit == "prompt tokens/s":
            return sum(len(prompt) for _, prompt, _ in self.requests) / max(row[0] for row in times)
        end = max(row[-1] for row in times)
        if self.unit == "output tokens/s":
            return sum(map(len, times)) / end
        begin = max(row[0] for row in times)
        return sum(when > begin for row in times for when in row) / (end - begin)


def cases(vocabulary: int, batches: tuple[int, ...] = (1, 8, 32), new: int = NEW) -> list[Case]:
    """Decoding at each batch, a long prompt, and requests of mixed lengths that arrive one by one."""
    random = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return random.integers(vocabulary, size=length).tolist()

    made = [Case(f"decode, B = {batch}", "decoded tokens/s", [[0.0, prompt(PROMPT), new] for _ in range(batch)])
            for batch in batches]  # fmt: skip
    made.append(Case(f"prompt of {LONG_PROMPT}", "prompt tokens/s", [[0.0, prompt(LONG_PROMPT), 1]]))
    lengths = long_tailed(SEQUENCES, mean=100, longest=LENGTH - 128, seed=2)
    mixed = [[GAP * place, prompt(1 + length // 2), 1 + length - length // 2] for place, length in enumerate(lengths)]
    made.append(Case("mixed lengths, with arrivals", "output tokens/s", mixed))
    return made
