"""Integer arithmetic that sizes everything: how many blocks, how large a tile."""

from __future__ import annotations


def ceil_div(amount: int, size: int) -> int:
    """How many pieces of `size` hold `amount`: 10 in pieces of 4 are 3, and 0 are 0.

    Raises:
        ZeroDivisionError: if size is 0.
    """
    return -(-amount // size)


def round_up(amount: int, multiple: int) -> int:
    """The smallest multiple that is no less than `amount`."""
    return ceil_div(amount, multiple) * multiple


def next_power_of_two(amount: int) -> int:
    """The smallest power of two that is no less than `amount`; 1 for 0 and below."""
    return 1 << max(0, amount - 1).bit_length()
