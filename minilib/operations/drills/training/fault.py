"""The faults of the training drills as data, drawn from a seed: what fails, on which rank, from which step on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

WORLD_SIZE = 4
STEPS = 14
SAVED_AT = 10  # steps after which every run saves a checkpoint

# kind → the least and the largest size, and what that is of
SIZES: Mapping[str, tuple[float, float, str]] = MappingProxyType(
    {
        "slow_rank": (20, 40, "ms of the processor added to each forward"),
        "slow_link": (4, 8, "ms that each message to the next rank takes"),
        "hung_rank": (0, 5, "number of the phase in which the rank stands still"),
        "mismatched_collective": (0, 1, "0: a broadcast that no other rank makes; 1: a barrier"),
        "wrong_shape": (2, 9, "elements where the other ranks have 1"),
        "desynchronised_replica": (1.1, 2.0, "factor of the learning rate, once"),
        "nan_from_one_rank": (0, 9, "number of the parameter whose gradient is NaN, once"),
        "flipped_bit": (0, 29, "number of the bit; 30 would show as NaN at once"),
        "memory_leak": (3, 8, "MiB that each step keeps"),
        "starved_loader": (20, 40, "ms that each step waits for data"),
        "full_disk": (0, 8, "KiB that the disk takes before it is full"),
        "lost_heartbeat": (0, 1, "0: the process is killed; 1: it is stopped"),
    }
)
KINDS = tuple(SIZES)


@dataclass(frozen=True)
class InjectedFault:
    """A fault to inject.

    Args:
        kind: one of KINDS.
        rank: which has it; of a link, the one that sends.
        step: at which it begins, from 0; a disk is full whenever the run saves.
        size: see SIZES.

    Raises:
        ValueError: if there is no such fault.
    """

    kind: str
    rank: int
    step: int
    size: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}; got {self.kind!r}")
        if not (0 <= self.rank < WORLD_SIZE and 0 <= self.step < STEPS):
            raise ValueError(f"rank is 0 … {WORLD_SIZE - 1} and step 0 … {STEPS - 1}; got {self}")

    @property
    def link(self) -> tuple[int, int]:
        """The way to the next rank of a ring."""
        return self.rank, (self.rank + 1) % WORLD_SIZE

    def whole(self, most: int) -> int:
        """The size as a number from 0 to `most`."""
        return min(most, int(self.size))


def fault_of_seed(seed: int) -> InjectedFault | None:
    """The fault of a seed; None for a healthy run. Of any 22 seeds in a row each kind has one, and 10 are healthy."""
    chance, slot = random.Random(seed), seed * 5 % 22
    if slot >= len(KINDS):
        return None
    return drawn_fault(KINDS[slot], chance)


def drawn_fault(kind: str, chance: random.Random) -> InjectedFault:
    """A fault of a kind, with a rank, a step and a size by chance."""
    least, most, what = SIZES[kind]
    size = chance.uniform(least, most) if not what.startswith(("number", "0:")) else chance.randint(int(least), int(most))
    return InjectedFault(kind, chance.randrange(WORLD_SIZE), chance.randrange(4, 8), size)
