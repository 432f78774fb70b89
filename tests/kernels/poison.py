"""Fill what torch allocates without a value with NaN, so that what a kernel forgets to write cannot pass."""

from __future__ import annotations

from contextlib import contextmanager

import torch


@contextmanager
def poisoned_outputs():
    """Inside the block `torch.empty` gives NaN (the largest value for integers)."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # an oracle's cuBLAS may be as it likes
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
