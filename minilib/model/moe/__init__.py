"""The mixture-of-experts layer: router, dispatch, experts, combine."""

from minilib.model.moe.layer import Experts, MoE, Router, Routing, combine, counts_of, route

__all__ = ["Experts", "MoE", "Router", "Routing", "combine", "counts_of", "route"]
