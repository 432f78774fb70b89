"""Checksums of what a rank holds: 64 bits of every byte, so that one flipped bit anywhere shows.

Bytes are compared, not values: the same NaN on all ranks is no difference, though NaN ≠ NaN, and 0.0 on one rank and
−0.0 on another is one, though 0.0 = −0.0. Replicas that have taken the same steps hold the same bytes.

Cost: one pass over the bytes, in the processor's caches and with no copy; tensors of a GPU are copied to the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minilib.ranks.collectives import Communicator

CHECKSUM_BYTES = 8


def content_checksum(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes, in the order of rows, with its dtype and shape; signed, as a torch.int64 has it.

    Cost: one pass over its bytes.
    """
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=CHECKSUM_BYTES)
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return int.from_bytes(digest.digest(), "little", signed=True)


def combined_checksum(checksums: Mapping[str, int]) -> int:
    """64 bits of several checksums with their names, in order of names."""
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for name, checksum in sorted(checksums.items()):
        digest.update(f"{name} {checksum} ".encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def told_checksums(mine: Sequence[int], comm: Communicator) -> list[list[int]]:
    """Every rank's checksums, as many on each. A collective.

    Cost: 8 bytes a checksum and rank.
    """
    everybody = torch.zeros(comm.world_size, len(mine), dtype=torch.int64, device=comm.device)
    if mine:
        everybody[comm.rank] = torch.tensor(mine, dtype=torch.int64)
        comm.all_gather(everybody)
    return everybody.tolist()
