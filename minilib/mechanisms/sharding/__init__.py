"""Sharding: partitioners.py assigns keys to shards, slicing.py cuts one row of elements into equal parts."""

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
