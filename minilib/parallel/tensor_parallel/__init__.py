"""Tensor parallelism: layout.py says who has what, stream.py what ranks exchange, tensor_parallel.py cuts a model."""

from minilib.parallel.tensor_parallel.layout import CannotBeCut
from minilib.parallel.tensor_parallel.tensor_parallel import TensorParallel

__all__ = ["CannotBeCut", "TensorParallel"]
