"""Matrix products: dense.py, and grouped.py for one product a group of rows."""

from minilib.kernels.matmul.dense import choose_tile, cost, matmul, reference, tile_traffic

__all__ = ["choose_tile", "cost", "matmul", "reference", "tile_traffic"]
