"""Columns: which contiguous ranges of a table's columns, or rows, each shard has, all shards as many.

    12 columns on 3 shards              │ 0 – 3 │ 4 – 7 │ 8 – 11 │
    2 columns on 4 shards, as copies    │ 0 │ 0 │ 1 │ 1 │
    groups of 8, 4 and 4, on 2 shards   │ 0 – 3, 8 – 9, 12 – 13 │ 4 – 7, 10 – 11, 14 – 15 │

A shard that has a part of every group has side by side what is used together: the columns of one query in a database
(classic/scatter_gather.py); a head's queries, keys and values, or gate and up, in a layer (parallel/tensor_parallel).

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (columns, then rows, of a layer's matrices).
"""

from __future__ import annotations

from collections.abc import Sequence


class DoesNotDivide(ValueError):
    """Columns of which shards cannot have as many each; the message says which columns, and how many there are."""


def column_ranges(num_columns: int, num_shards: int, name: str = "columns", *, copies: bool = False) -> list[range]:
    """Cut columns into one range a shard.

    Args:
        num_columns: 1 or more.
        num_shards: 1 or more.
        name: of the columns, for the error.
        copies: whether fewer columns than shards may be copied, each to as many neighbouring shards.

    Returns:
        The columns of each shard.

    Raises:
        DoesNotDivide: if num_columns is no multiple of num_shards, nor, with copies, the other way round.
        ValueError: if a number is too small.
    """
    if num_columns < 1 or num_shards < 1:
        raise ValueError(f"{name} and shards are 1 or more, got {num_columns!r} and {num_shards!r}")
    if num_columns % num_shards == 0:
        size = num_columns // num_shards
        return [range(shard * size, (shard + 1) * size) for shard in range(num_shards)]
    if not copies or num_shards % num_columns:
        wanted = "a multiple or a divisor" if copies else "a multiple"
        raise DoesNotDivide(f"{num_columns} {name} cannot be dealt to {num_shards} shards; make it {wanted} of that")
    each = num_shards // num_columns
    return [range(shard // each, shard // each + 1) for shard in range(num_shards)]


def num_copies(ranges: Sequence[range]) -> int:
    """Shards that have the same columns, of those that `column_ranges` made."""
    return sum(columns == ranges[0] for columns in ranges)


def side_by_side(groups: Sequence[Sequence[range]], sizes: Sequence[int], shard: int) -> list[range]:
    """A shard's part of every group, in a table whose groups lie one after the other.

    Args:
        groups: of each group the ranges of all shards, counted from the group's first column.
        sizes: columns of each group.
        shard: whose.
    """
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        range(start + each[shard].start, start + each[shard].stop) for start, each in zip(starts, groups, strict=True)
    ]
