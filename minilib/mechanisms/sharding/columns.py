"""Columns: which contiguous ranges of a table's columns, or rows, each shard has, all shards as many.

    12 columns on 3 shards              │ 0 – 3 │ 4 – 7 │ 8 – 11 │
    2 columns on 4 shards, as copies    │ 0 │ 0 │ 1 │ 1 │

The columns are those of a table in a database (classic/scatter_gather.py), or heads and columns of a layer's matrices
(parallel/tensor_parallel/layout.py). Rows that shards cannot have as many each of are cut by slicing.py.

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
        raise DoesNotDivide(
            f"{num_columns} {name} cannot be dealt to {num_shards} shards; make it {wanted} of {num_shards}"
        )
    each = num_shards // num_columns
    return [range(shard // each, shard // each + 1) for shard in range(num_shards)]


def num_copies(ranges: Sequence[range]) -> int:
    """Shards that have the same columns, of those that `column_ranges` made."""
    return sum(columns == ranges[0] for columns in ranges)
