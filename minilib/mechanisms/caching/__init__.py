"""Caching: a bounded cache, the policies that choose what leaves it, and the optimum to hold them against."""

from minilib.mechanisms.caching.cache import Cache, DoesNotFit, EntryInUse, EntryTooLarge, NoRoom
from minilib.mechanisms.caching.eviction import Clock, EvictionPolicy, Fifo, Lfu, Lru, NothingToEvict
from minilib.mechanisms.caching.hits import belady_hits, count_hits
from minilib.mechanisms.caching.scan_resistant import S3Fifo, Sieve

__all__ = [
    "Cache",
    "Clock",
    "DoesNotFit",
    "EntryInUse",
    "EntryTooLarge",
    "EvictionPolicy",
    "Fifo",
    "Lfu",
    "Lru",
    "NoRoom",
    "NothingToEvict",
    "S3Fifo",
    "Sieve",
    "belady_hits",
    "count_hits",
]
