"""Deal a corpus to data-parallel ranks: every sample to one rank once an epoch, resumable at another world size.

    order of the epoch    5 2 7 0 │ 4 1 6 3 │ 8 9              global batches of 4, the last one of 2
    3 ranks               0 0 1 2 │ 0 0 1 2 │ 0 1              ranks own contiguous ranges of a batch

What a step trains on does not depend on how many ranks share it, so a run that goes on with fewer or more ranks takes
the same steps. torch's DistributedSampler deals some samples twice when the numbers do not divide; this one deals
uneven shares instead, and the loss has to weigh them (see ShardedSampler).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral

import numpy as np

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.sharding import RangePartitioner


class NothingToDeal(ValueError):
    """An epoch would have no step."""


class OtherDeal(ValueError):
    """A saved position that means something else here; the message says what differs."""


class ShardedSampler:
    """One rank's share of the samples 0 to num_samples - 1, epoch after epoch.

    Ranks take the same number of steps. Their shares of a step differ by at most 1 sample, and where a batch has fewer
    samples than there are ranks, some are empty: a rank with an empty share still takes part in the step's
    collectives, with gradients of 0. So the mean of the ranks' mean losses is wrong. Divide each rank's summed loss by
    the tokens of the whole step (one all-reduce of a count), and sum gradients over ranks instead of averaging them.

    Args:
        num_samples: 1 or more.
        world_size: ranks.
        rank: this one.
        global_batch_size: samples a step, over all ranks.
        seed: with the epoch, decides the order; 0 to 2³² - 1.
        shuffle: False deals in the order of the numbers.
        drop_last: leave out the last batch of an epoch if it is not full.

    Attributes:
        epoch: the one being dealt, from 0.
        position: samples of this epoch dealt so far, over all ranks.

    Raises:
        NothingToDeal: if there is no sample, or drop_last leaves none.
        ValueError: if another number makes no sense.

    Cost: memory for the order of one epoch, 8 bytes a sample.
    """

    def __init__(
        self,
        num_samples: int,
        world_size: int,
        rank: int,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if num_samples < 1:
            raise NothingToDeal(f"num_samples must be at least 1, got {num_samples!r}; is the corpus empty?")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to world_size - 1, got rank {rank!r} of {world_size!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be 0 to 2**32 - 1, got {seed!r}")
        if drop_last and num_samples < global_batch_size:
            raise NothingToDeal(
                f"drop_last drops all: {num_samples} samples do not fill a batch of {global_batch_size}; "
                "make the batch smaller or keep the last one"
            )
        self.num_samples, self.world_size, self.rank = num_samples, world_size, rank
        self.global_batch_size, self.seed = global_batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self._start_epoch(0)

    def __len__(self) -> int:
        """Steps left in this epoch, the same on all ranks; at least 1."""
        left = self.num_samples - self.position
        return left // self.global_batch_size if self.drop_last else ceil_div(left, self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """What is left of this epoch, step by step; iterate again for the next epoch."""
        epoch = self.epoch
        while self.epoch == epoch:
            yield self.next_batch()

    def next_batch(self) -> list[int]:
        """This rank's samples of the next step, perhaps none. After an epoch's last step comes the next epoch."""
        batch = self._order[self.position : self.position + self.global_batch_size]
        self._go_to(self.position + len(batch))
        return batch[RangePartitioner.even(len(batch), self.world_size).span(self.rank)].tolist()

    def state_dict(self) -> dict[str, int | bool]:
        """Where the deal stands; the same on all ranks.

        It counts what was dealt. Whoever fetches batches ahead saves the state of the step that was trained.
        """
        identity = {name: getattr(self, name) for name in ("num_samples", "seed", "shuffle")}
        return identity | {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Go on where a deal stood, at any world size and any batch size.

        Raises:
            OtherDeal: if the state belongs to other samples or another order, or is no such state.
        """
        mine = self.state_dict()
        _check_kinds(state, mine)
        identity = [name for name in mine if name not in ("epoch", "position")]
        differ = [f"{name} was {state[name]!r}, now {mine[name]!r}" for name in identity if state[name] != mine[name]]
        if differ:
            raise OtherDeal(f"this position belongs to another deal: {'; '.join(differ)}")
        if not (state["epoch"] >= 0 and 0 <= state["position"] < self.num_samples):
            raise OtherDeal(
                f"epoch {state['epoch']} or position {state['position']} is not in a deal of {self.num_samples} samples"
            )
        self._start_epoch(int(state["epoch"]))
        self._go_to(int(state["position"]))

    def check_invariants(self) -> None:
        """An epoch deals every sample once, and has a step left."""
        assert np.array_equal(np.sort(self._order), np.arange(self.num_samples)), "not every sample once"
        assert 0 <= self.position < self.num_samples and len(self) > 0, "the epoch is over and the next not begun"

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        if self.shuffle:
            # RandomState and not Generator: NumPy promises that its numbers stay the same in every version
            self._order = np.random.RandomState([self.seed, epoch]).permutation(self.num_samples)
        else:
            self._order = np.arange(self.num_samples)

    def _go_to(self, position: int) -> None:
        """Stand at a position, or at the start of the next epoch if no step is left from there."""
        self.position = position
        if not len(self):
            self._start_epoch(self.epoch + 1)


def _check_kinds(state: object, mine: Mapping[str, int | bool]) -> None:
    """Raise OtherDeal unless a state has the keys of mine, with whole numbers where those are, and True or False."""
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise OtherDeal(f"a sampler's state is the dict that state_dict() gave, got {state!r}, a {kind}")
    if state.keys() != mine.keys():
        raise OtherDeal(f"a sampler's state has {sorted(mine)}, got {sorted(map(str, state))}")
    for name, value in mine.items():
        kind, said = (bool, "True or False") if isinstance(value, bool) else (Integral, "a whole number")
        found = state[name]
        if not isinstance(found, kind) or isinstance(found, bool) != isinstance(value, bool):
            raise OtherDeal(f"{name} of a sampler's state is {said}, got {found!r}, a {type(found).__name__}")
