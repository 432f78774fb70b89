"""The faults of the training drills as data, drawn from a seed: what fails, on which rank, from which step on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

WORLD_SIZE = 4
STEPS = 14
SAVED_AT = 10  # steps after which every run saves a checkpoint


class SizeRange(NamedTuple):
    """How large a fault can be.

    Args:
        least, most: of the sizes.
        whole: whether a size is a whole number.
        what: it says.
    """

    least: float
    most: float
    whole: bool
    what: str


SIZES: Mapping[str, SizeRange] = MappingProxyType(
    {
        "slow_rank": SizeRange(20, 40, False, "ms of the processor added to each forward"),
        "slow_link": SizeRange(4, 8, False, "ms that each message to the next rank takes"),
        "hung_rank": SizeRange(0, 5, True, "the number of the phase in which the rank stands still"),
        "mismatched_collective": SizeRange(0, 1, True, "0: a broadcast that no other rank makes; 1: a barrier"),
        "wrong_shape": SizeRange(2, 9, True, "elements where the other ranks have 1"),
        "desynchronised_replica": SizeRange(1.1, 2.0, False, "factor of the learning rate, once"),
        "nan_from_one_rank": SizeRange(0, 9, True, "the number of the parameter whose gradient is NaN, once"),
        "flipped_bit": SizeRange(0, 29, True, "the number of the bit; 30 makes a weight so large that NaN follows"),
        "memory_leak": SizeRange(3, 8, False, "MiB that each step keeps"),
        "starved_loader": SizeRange(20, 40, False, "ms that each step waits for data"),
        "full_disk": SizeRange(0, 8, False, "KiB that the disk takes before it is full"),
        "lost_heartbeat": SizeRange(0, 1, True, "0: the process is killed; 1: it is stopped"),
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


def fault_of_seed(seed: int) -> InjectedFault | None:
    """The fault of a seed; None for a healthy run. Of any 22 seeds in a row each kind has one, and 10 are healthy."""
    chance, slot = random.Random(seed), seed * 5 % 22
    if slot >= len(KINDS):
        return None
    return drawn_fault(KINDS[slot], chance)


def drawn_fault(kind: str, chance: random.Random) -> InjectedFault:
    """A fault of a kind, with a rank, a step and a size by chance."""
    sizes = SIZES[kind]
    size = chance.randint(int(sizes.least), int(sizes.most)) if sizes.whole else chance.uniform(sizes.least, sizes.most)
    return InjectedFault(kind, chance.randrange(WORLD_SIZE), chance.randrange(4, 8), size)
