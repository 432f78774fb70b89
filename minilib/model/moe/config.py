"""The shape of a mixture of experts, as a frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class MoEConfig:
    """How many experts a layer has, and how tokens and experts find each other.

    Args:
        num_experts: experts a layer.
        top_k: experts a token.
        intermediate_size: width of one expert.
        num_shared_experts: further experts that see every token, computed as one.
        gate: "softmax" over experts, or a "sigmoid" for each.
        normalize: make a token's top_k weights sum to 1, as Mixtral and DeepSeek-V3 do and Switch does not.
        routed_scaling_factor: what those weights are multiplied by then; 2.5 in DeepSeek-V3.
        choice: "token": tokens choose experts. "expert": each expert takes as many tokens as its capacity; a token
            may have any number of experts, and sees who comes after it, so it is no choice for generating text.
        num_groups: groups of neighbouring experts, such as those of one host.
        top_groups: groups out of which a token chooses its experts.
        capacity_factor: room of each expert, as a multiple of its even share of the pairs; None for room for all.
        drop: who finds no room in a full expert: by "position", later choices and tokens; by "probability", the pairs
            whose score, of the gate over all experts, is lowest; weights stay normalised as they were before.

    Raises:
        ValueError: if these do not fit together.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int = 0
    gate: str = "softmax"
    normalize: bool = True
    routed_scaling_factor: float = 1.0
    choice: str = "token"
    num_groups: int = 1
    top_groups: int = 1
    capacity_factor: float | None = None
    drop: str = "position"

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "intermediate_size", "num_groups", "top_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")
        if not isinstance(self.num_shared_experts, int) or self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be a whole number ≥ 0, got {self.num_shared_experts!r}")
        kinds = {"gate": ("softmax", "sigmoid"), "choice": ("token", "expert"), "drop": ("position", "probability")}
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.num_experts % self.num_groups or self.top_groups > self.num_groups:
            raise ValueError(
                f"num_groups divides num_experts and top_groups is at most num_groups; got {self.num_experts} experts, "
                f"{self.num_groups} groups, {self.top_groups} of them"
            )
        room = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > room:
            raise ValueError(f"top_k is at most the {room} experts that a token may choose from, got {self.top_k}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor is positive, or None for room for all; got {self.capacity_factor!r}")
        if self.choice == "expert" and (self.capacity_factor is None or self.num_groups > 1):
            raise ValueError("choice='expert' needs a capacity_factor, and knows no groups")
        if not 0 < self.routed_scaling_factor < math.inf:
            raise ValueError(f"routed_scaling_factor is positive and finite; got {self.routed_scaling_factor!r}")

    def capacity(self, num_tokens: int) -> int | None:
        """Pairs that one expert has room for, of a batch of this many tokens; None for as many as come.

        Source: Fedus, Zoph and Shazeer 2021, "Switch Transformers", equation 3, for top_k experts a token and rounded
        up; no expert needs room for more than all tokens.
        """
        if self.capacity_factor is None:
            return None
        factor = Fraction(str(self.capacity_factor))  # for in floating point 1.1 · 100 is above 110
        share = factor * num_tokens * self.top_k / self.num_experts
        return min(num_tokens, math.ceil(share))
