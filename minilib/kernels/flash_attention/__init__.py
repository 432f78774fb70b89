"""Attention in tiles with an online softmax, forward and backward."""

from minilib.kernels.flash_attention.attention import cost, flash_attention, materialised_cost, reference
from minilib.kernels.flash_attention.merging import merge
from minilib.kernels.flash_attention.tiles import HEAD_DIMS

__all__ = ["HEAD_DIMS", "cost", "flash_attention", "materialised_cost", "merge", "reference"]
