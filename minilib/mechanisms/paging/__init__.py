"""Paging: frames, page tables, copy-on-write."""

from minilib.mechanisms.paging.page_table import Copy, Fault, OutOfPages, PagePool, PageTable

__all__ = ["Copy", "Fault", "OutOfPages", "PagePool", "PageTable"]
