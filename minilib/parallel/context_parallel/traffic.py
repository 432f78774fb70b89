"""Bytes that one rank sends for one layer of context parallelism, in closed form."""

from __future__ import annotations


def ring_bytes(kv_values: int, world_size: int, itemsize: int = 2, sum_itemsize: int = 4) -> tuple[int, int]:
    """Ring attention: keys and values go n - 1 times each way, the sums of their gradients n times.

    Args:
        kv_values: numbers in one rank's keys and values, 2 · batch · tokens of a rank · num_kv_heads · head_dim.
        world_size: ranks, n.
        itemsize: bytes of a key.
        sum_itemsize: bytes of the sum of a key's gradients: 4, or 8 for float64.

    Returns:
        Bytes of forward and of backward.
    """
    keys = (world_size - 1) * kv_values * itemsize
    return keys, keys + (world_size * kv_values * sum_itemsize if world_size > 1 else 0)


def ulysses_bytes(q_values: int, kv_values: int, kv_heads: int, world_size: int, itemsize: int = 2) -> tuple[int, int]:
    """Ulysses: queries, keys, values and the result, (n-1)/n of each; keys of few heads once for each rank.

    Args:
        q_values: numbers in one rank's queries.
        kv_values: as in `ring_bytes`.
        kv_heads: heads of keys and values.
        world_size: ranks, n.
        itemsize: bytes of a value.

    Returns:
        Bytes of forward and of backward, which are as many.
    """
    values = 2 * q_values + kv_values * max(1, world_size // kv_heads)
    sent = values * (world_size - 1) // world_size * itemsize
    return sent, sent
