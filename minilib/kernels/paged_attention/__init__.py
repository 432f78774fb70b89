"""Attention whose keys and values lie in pages that a block table names."""

from minilib.kernels.paged_attention.attention import cost, paged_attention, reference

__all__ = ["cost", "paged_attention", "reference"]
