"""Which part of each of a decoder's parameters a rank has: columns or rows of a matrix, heads, tokens.

    embed, unembed   (vocab_size, hidden_size)     by tokens, padded with tokens that do not exist
    qkv              (q + k + v heads, hidden)     by heads: of every group of columns a part, so that a rank has whole
    gate_up          (gate + up, hidden)           heads, and a gate with each up
    project, down    (hidden, heads or width)      by what goes in, as it comes out of qkv and gate_up
    norms                                          a replica on every rank

With fewer heads of keys and values than ranks, each is on several ranks, next to the heads of queries that it serves.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.mechanisms.sharding.columns import column_ranges, num_copies
from minilib.mechanisms.sharding.slicing import slices
from minilib.model.config import ModelConfig


class CannotBeCut(ValueError):
    """A model that tensor parallelism does not apply to, or no longer; the message says why."""


class Group(NamedTuple):
    """Columns that belong together, such as all heads' keys.

    Args:
        size: columns of all ranks, those that several ranks have counted once, without padding.
        ranges: columns of each rank; beyond `size` lies padding.
    """

    size: int
    ranges: Sequence[range]

    @property
    def copies(self) -> int:
        """Ranks that have the same columns."""
        return num_copies(self.ranges)


@dataclass(frozen=True)
class Cut:
    """How ranks share one parameter.

    Args:
        dim: along which it is cut.
        groups: of columns (dim 1) or rows (dim 0), one after the other; a rank has a part of each.
    """

    dim: int
    groups: tuple[Group, ...]

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part, a copy, with zeros for padding."""
        parts = [
            _padded(columns, group.ranges[rank], self.dim)
            for group, columns in zip(self.groups, whole.split([g.size for g in self.groups], self.dim), strict=True)
        ]
        return torch.cat(parts, self.dim)

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter, from every rank's part: the inverse of `take`."""
        shape = list(parts[0].shape)
        shape[self.dim] = sum(group.size for group in self.groups)
        whole = parts[0].new_empty(shape)
        of_groups = whole.split([group.size for group in self.groups], self.dim)
        for rank, part in enumerate(parts):
            for group, columns, mine in zip(self.groups, of_groups, self.split(part), strict=True):
                columns = columns.narrow(self.dim, *_within(group.ranges[rank], group.size))
                columns.copy_(mine.narrow(self.dim, 0, columns.shape[self.dim]))
        return whole

    def split(self, part: Tensor) -> tuple[Tensor, ...]:
        """A rank's part of every group: views."""
        return part.split([len(group.ranges[0]) for group in self.groups], self.dim)


def cuts(config: ModelConfig, shapes: Mapping[str, Sequence[int]], world_size: int) -> dict[str, Cut]:
    """How each parameter of a decoder is cut.

    Args:
        config: of the whole decoder.
        shapes: of its parameters, by name.
        world_size: ranks.

    Raises:
        CannotBeCut: for a mixture of experts.
        DoesNotDivide: if a rank cannot have as many heads, or columns of gate and up, as every other.
    """
    if config.moe is not None:
        raise CannotBeCut("tensor parallelism cuts dense layers, and this model has a mixture of experts")
    q = column_ranges(config.num_heads, world_size, "num_heads")
    kv = column_ranges(config.num_kv_heads, world_size, "num_kv_heads", copies=True)
    columns = column_ranges(config.intermediate_size, world_size, "values of intermediate_size")
    width = Group(config.intermediate_size, columns)
    tokens = Group(config.vocab_size, [range(*part) for part in slices(config.vocab_size, world_size)])
    heads = tuple(_of_heads(ranges, config.head_dim) for ranges in (q, kv, kv))
    known = {
        "embed": Cut(0, (tokens,)),
        "unembed": Cut(0, (tokens,)),
        "qkv": Cut(0, heads),
        "project": Cut(1, heads[:1]),
        "gate_up": Cut(0, (width, width)),
        "down": Cut(1, (width,)),
    }
    return {name: known.get(name.split(".")[-2]) or _replica(shape[0], world_size) for name, shape in shapes.items()}


def config_of_rank(config: ModelConfig, world_size: int) -> ModelConfig:
    """The shape of what one rank computes: its heads, and its part of the feed-forward layer."""
    return replace(
        config,
        num_heads=config.num_heads // world_size,
        num_kv_heads=max(1, config.num_kv_heads // world_size),
        intermediate_size=config.intermediate_size // world_size,
    )


def _replica(size: int, world_size: int) -> Cut:
    return Cut(0, (Group(size, [range(size)] * world_size),))


def _of_heads(ranges: Sequence[range], head_dim: int) -> Group:
    columns = [range(head_dim * heads.start, head_dim * heads.stop) for heads in ranges]
    return Group(columns[-1].stop, columns)


def _padded(columns: Tensor, part: range, dim: int) -> Tensor:
    there = columns.narrow(dim, *_within(part, columns.shape[dim]))
    missing = len(part) - there.shape[dim]
    return F.pad(there, (0, 0) * (columns.dim() - 1 - dim) + (0, missing)) if missing else there


def _within(part: range, size: int) -> tuple[int, int]:
    """Start and length of what of a range is no padding."""
    start = min(part.start, size)
    return start, min(part.stop, size) - start
