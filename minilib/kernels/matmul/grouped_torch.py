"""Grouped matrix product in plain torch: a product for each group that has rows, written where it belongs.

What everyone writes first picks each expert's rows out and puts its results back, x[index] @ weight[g] into out[index]:
copies that rows sorted by group make needless. And there autograd gets a gradient of all weights from every group,
nearly all zeros, and sums them up; here each group's is written once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def ends_of(offsets: Tensor, tokens: int) -> list[int]:
    """The row at which each group ends, as a list.

    Raises:
        ValueError: if they descend, or if one lies after the last row.
    """
    ends = offsets.tolist()
    for group, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        if not begin <= end <= tokens:
            got = f"offsets[{group}] is {end}, after {begin}: take .cumsum(0) of the groups' sizes"
            raise ValueError(f"offsets must climb from 0 to at most {tokens}, the rows of x; {got}")
    return ends


def multiply(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """(tokens, N): x_g weight[g] for each group g, and zeros in rows that belong to nobody."""
    out = torch.empty((len(x), weight.shape[2]), dtype=x.dtype, device=x.device)
    for group, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        if end > begin:
            _write_product(out[begin:end], x[begin:end], weight[group])
    out[ends[-1] if ends else 0 :] = 0
    return out


def reduce(x: Tensor, grad: Tensor, ends: list[int]) -> Tensor:
    """(groups, K, N): x_gᵀ grad_g for each group g, zeros for one without rows."""
    out = torch.empty((len(ends), x.shape[1], grad.shape[1]), dtype=x.dtype, device=x.device)
    for group, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        if end > begin:
            _write_product(out[group], x[begin:end].T, grad[begin:end])
        else:
            out[group] = 0
    return out


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left right, computed in fp32 (fp64 stays fp64) and rounded once."""
    wide = torch.promote_types(out.dtype, torch.float32)
    product = out if wide == out.dtype else torch.empty(out.shape, dtype=wide, device=out.device)
    torch.mm(left.to(wide), right.to(wide), out=product)  # autocast leaves alone what is given its `out`
    if product is not out:
        out.copy_(product)
