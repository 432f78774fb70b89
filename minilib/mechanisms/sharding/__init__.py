"""Sharding: partitioners.py assigns keys to shards, slicing.py cuts a row of elements, columns.py those of a table."""

from minilib.mechanisms.sharding.partitioners import (
    ConsistentHashPartitioner,
    HashPartitioner,
    Key,
    Partitioner,
    RangePartitioner,
    UnusableKey,
    imbalance,
    loads,
    stable_hash,
)

__all__ = [
    "ConsistentHashPartitioner",
    "HashPartitioner",
    "Key",
    "Partitioner",
    "RangePartitioner",
    "UnusableKey",
    "imbalance",
    "loads",
    "stable_hash",
]
