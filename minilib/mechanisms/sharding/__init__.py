"""Sharding: partitioners.py assigns keys to shards, slicing.py cuts one row of elements, columns.py a table's columns."""

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
