"""Which sequences of the corpus a step trains on, and which of them are this rank's.

    "windows"   batch_size windows at places drawn from (seed, step): any token may begin one
    "epoch"     windows side by side, each once an epoch in an order drawn from (seed, epoch); an epoch's last step
                may have fewer

Both are decided by the config and the step alone, so a run that goes on, on any number of ranks, trains on the same
sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minilib.mechanisms.sharding import RangePartitioner
from minilib.training.config import TrainConfig
from minilib.training.sampler import ShardedSampler


class Share(NamedTuple):
    """One rank's sequences of a step.

    Args:
        starts: where in the row of tokens each begins; perhaps none.
        total: sequences of all ranks.
    """

    starts: list[int]
    total: int

    def parts(self, count: int) -> list[list[int]]:
        """The share in `count` parts, whose sizes differ by at most 1; some are empty if there are too few."""
        partition = RangePartitioner.even(len(self.starts), count)
        return [self.starts[partition.span(number)] for number in range(count)]


class RandomWindows:
    """Windows at random places; rank r has every world_size-th of a batch, from the r-th on.

    Args:
        num_tokens: in the row.
        config: its context, batch_size and seed.
        rank, world_size: which share is drawn.
    """

    def __init__(self, num_tokens: int, config: TrainConfig, rank: int, world_size: int) -> None:
        self._places, self._config = num_tokens - config.context, config
        self._rank, self._world_size = rank, world_size

    def draw(self, step: int) -> Share:
        """This rank's sequences of a step; a negative one for validation."""
        generator = torch.Generator().manual_seed(1_000_003 * self._config.seed + step)
        starts = torch.randint(self._places, (self._config.batch_size,), generator=generator).tolist()
        return Share(starts[self._rank :: self._world_size], len(starts))

    def num_sequences(self, step: int) -> int:
        """Sequences of all ranks before a step."""
        return step * self._config.batch_size


class EpochWindows:
    """Windows side by side, as `ShardedSampler` deals them; tokens after the last whole one are left out.

    Args:
        num_tokens, config, rank, world_size: see `RandomWindows`.
    """

    def __init__(self, num_tokens: int, config: TrainConfig, rank: int, world_size: int) -> None:
        self._context, self._batch_size = config.context, config.batch_size
        windows = (num_tokens - 1) // config.context
        self._sampler = ShardedSampler(windows, world_size, rank, config.batch_size, seed=config.seed)
        self._steps = len(self._sampler)  # an epoch

    def draw(self, step: int) -> Share:
        """This rank's sequences of a step."""
        epoch, position = self._place(step)
        if (self._sampler.epoch, self._sampler.position) != (epoch, position):  # resumed, or interrupted and repeated
            self._sampler.load_state_dict(self._sampler.state_dict() | {"epoch": epoch, "position": position})
        total = min(self._batch_size, self._sampler.num_samples - position)
        return Share([self._context * window for window in self._sampler.next_batch()], total)

    def num_sequences(self, step: int) -> int:
        """Sequences of all ranks before a step."""
        epoch, position = self._place(step)
        return epoch * self._sampler.num_samples + position

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and how many of its sequences were dealt before it."""
        epoch, number = divmod(step, self._steps)
        return epoch, number * self._batch_size


def batches_of(num_tokens: int, config: TrainConfig, rank: int, world_size: int) -> RandomWindows | EpochWindows:
    """The batches that the config's sampling names."""
    kind = EpochWindows if config.sampling == "epoch" else RandomWindows
    return kind(num_tokens, config, rank, world_size)
