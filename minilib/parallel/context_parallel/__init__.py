"""Context parallelism: layout.py says who has which tokens, ring.py and ulysses.py exchange keys or heads."""

from minilib.parallel.context_parallel.context_parallel import METHODS, ContextParallel
from minilib.parallel.context_parallel.layout import LengthDoesNotDivide, TokenLayout
from minilib.parallel.context_parallel.ulysses import HeadsDoNotDivide

__all__ = ["METHODS", "ContextParallel", "HeadsDoNotDivide", "LengthDoesNotDivide", "TokenLayout"]
