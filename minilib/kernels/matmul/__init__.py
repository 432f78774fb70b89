"""Matrix products: dense.py, and grouped.py for one product a group of rows; both tile by tile (tiles.py)."""

from minilib.kernels.matmul.dense import cost, matmul, reference, tile_traffic
from minilib.kernels.matmul.tiles import choose_tile

__all__ = ["choose_tile", "cost", "matmul", "reference", "tile_traffic"]
