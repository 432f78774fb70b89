"""Sequential bandwidth of main memory and the caches before it. Bytes are useful ones: read once, written once."""

from __future__ import annotations

from pathlib import Path

from minilib.numbers.measure import measure

WORKING_SET = 256 * 2**20  # bytes; several times the largest last-level cache that a share of a server gets


def copy_bandwidth(nbytes: int = WORKING_SET, budget: float = 0.6) -> float:
    """Bytes per second of ``b.copy_(a)``, read plus written, over buffers already touched."""
    import torch

    a = torch.ones(nbytes // 2 // 4)
    b = torch.zeros_like(a)
    return 2 * a.nbytes / measure(lambda: b.copy_(a), budget=budget).seconds


def read_bandwidth(nbytes: int = WORKING_SET, budget: float = 0.6) -> float:
    """Bytes per second of ``a.sum()``, the plainest operation that reads everything and writes nothing."""
    import torch

    a = torch.ones(nbytes // 4)
    return a.nbytes / measure(lambda: a.sum(), budget=budget).seconds


def first_touch_bandwidth(nbytes: int = WORKING_SET) -> float:
    """Bytes per second at which one thread writes memory that is yet to be mapped: one page fault per page.

    Private memory, as an allocator gets it: pages that processes could share are dearer.
    """
    import mmap
    import statistics
    import time

    import numpy as np

    def seconds() -> float:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages = np.frombuffer(memory, dtype=np.uint8)
        started = time.perf_counter()
        pages.fill(1)
        return time.perf_counter() - started

    return nbytes / statistics.median(seconds() for _ in range(3))


def cache_sizes() -> dict[str, int]:
    """Bytes of each data cache of the first core by level, such as {"L1": 49152}; empty where Linux does not say."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() == "Instruction":
            continue
        kib = (index / "size").read_text().strip().removesuffix("K")
        sizes["L" + (index / "level").read_text().strip()] = int(kib) * 1024
    return sizes
