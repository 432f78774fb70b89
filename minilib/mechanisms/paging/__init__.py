"""Paging: frames, page tables, copy-on-write."""

from minilib.mechanisms.paging.page_table import Copy, Fault, FramePool, OutOfFrames, PageTable

__all__ = ["Copy", "Fault", "FramePool", "OutOfFrames", "PageTable"]
