"""Mixture of experts: a router sends each token to a few of many feed-forward networks, and weighs what comes back.

    x ─ Router ─► Routing ─┬─ permute ─► rows, expert by expert ─ EXCHANGE ─ experts ─► rows ─ combine ─┬─► y
     └─────────────────────┴──────────────── shared experts, for every token ───────────────────────────┘

`Routing` is data: which token goes to which expert, with what weight. As attention is, the exchange is passed in: on
one process rows stay where they are, between ranks they travel to their expert and back (parallel/expert_parallel.py).

Sources: Shazeer et al. 2017 (the layer); Fedus, Zoph and Shazeer 2021, "Switch Transformers" (capacity); Lepikhin et
al. 2020, "GShard" (drop by position: all first choices come before any second one); Riquelme et al. 2021, "V-MoE" (drop
by probability, for one choice a token; for several, pair by pair by the gate's scores over all experts, as DeepSpeed's
drop_policy "probs"; Megatron-LM's "probs" compares weights normalised over a token's choices, unless the softmax comes
before the choice); Zhou et al. 2022, "Expert Choice"; Gale et al. 2022, "MegaBlocks" (dropless); DeepSeek-AI 2024,
"DeepSeek-V3" (sigmoid gating, bias, groups, shared experts, routed scaling factor).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops

Experts = Callable[[Tensor, Tensor], Tensor]  # (rows sorted by expert, offsets) → a row for each


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert: one entry for each pair that is kept, sorted by expert.

    Args:
        tokens: (kept,) int64, the token of each pair.
        weights: (kept,) float32, what its expert's answer is multiplied by; differentiable.
        offsets: (num_experts,) int32, where each expert's pairs end.
        wanted: (num_experts,) int64, how many pairs each expert would have without a capacity: its load.
        scores: (tokens, num_experts) float32, what the router thinks of each pair, without bias; differentiable.
        logits: (tokens, num_experts) float32, before the gate; differentiable.
    """

    tokens: Tensor
    weights: Tensor
    offsets: Tensor
    wanted: Tensor
    scores: Tensor
    logits: Tensor

    @property
    def counts(self) -> Tensor:
        """(num_experts,) int64: pairs that each expert has."""
        return counts_of(self.offsets)

    @property
    def dropped(self) -> int:
        """Pairs that found no room."""
        return int(self.wanted.sum()) - len(self.tokens)

    def check_invariants(self) -> None:
        """Every pair is kept or dropped, none twice, and no expert has more than wanted it."""
        assert (self.counts >= 0).all() and (self.counts <= self.wanted).all(), "an expert has more than wanted it"
        experts = torch.repeat_interleave(self.counts)
        assert len(experts) == len(self.tokens) == len(self.weights), "offsets do not end with the pairs"
        pairs = torch.stack((self.tokens, experts)).T
        assert len(pairs.unique(dim=0)) == len(self.tokens), "a token is twice with one expert"


def counts_of(offsets: Tensor) -> Tensor:
    """(num_experts,) int64: rows of each expert, whose rows end at these offsets."""
    return offsets.diff(prepend=offsets.new_zeros(1)).long()


class Exchange(Protocol):
    """How rows reach their experts."""

    def __call__(self, rows: Tensor, offsets: Tensor, experts: Experts) -> Tensor:
        """
        Args:
            rows: (pairs, hidden_size), sorted by expert.
            offsets: (num_experts,) int32, where each expert's rows end.
            experts: of this process, to be called once, with the rows of those alone.

        Returns:
            (pairs, hidden_size): what each row's expert makes of it, in the order of rows.
        """


def stay(rows: Tensor, offsets: Tensor, experts: Experts) -> Tensor:
    """The exchange of one process, which has all experts."""
    return experts(rows, offsets)


class MoE(nn.Module):
    """The feed-forward network of a layer, as a router and experts: (..., hidden_size) → the same.

    Args:
        config: how many experts, and who goes where.
        hidden_size: width of the residual stream.
        ops: who computes.

    Cost: top_k + num_shared_experts times that of one expert, and 2 · hidden_size · num_experts FLOPs a token.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, ops: Ops) -> None:
        super().__init__()
        width = config.intermediate_size
        self.ops, self.exchange = ops, stay
        self.router = Router(config, hidden_size)
        self.gate_up = GroupedLinear(config.num_experts, hidden_size, 2 * width, ops)
        self.down = GroupedLinear(config.num_experts, width, hidden_size, ops)
        shared = config.num_shared_experts * width
        self.shared_gate_up = nn.Linear(hidden_size, 2 * shared, bias=False) if shared else None
        self.shared_down = nn.Linear(shared, hidden_size, bias=False) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        routing = self.router(flat)
        answers = self.exchange(flat[routing.tokens], routing.offsets, self.experts)
        mixed = combine(answers, routing, len(flat)).view(x.shape)
        if self.shared_gate_up is None:
            return mixed
        return mixed + self.shared_down(self.ops.swiglu(self.shared_gate_up(x)))

    def experts(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """SwiGLU networks, each for its own rows."""
        return self.down(self.ops.swiglu(self.gate_up(rows, offsets)), offsets)


class GroupedLinear(nn.Module):
    """A matrix for each expert, (num_experts, in_features, out_features), and no bias."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):  # which does not reach inside
            dtype = torch.get_autocast_dtype(rows.device.type)
        return self.ops.grouped_matmul(rows.to(dtype), self.weight.to(dtype), offsets)


class Router(nn.Module):
    """Who goes where: (tokens, hidden_size) → Routing. Computed in float32, also under autocast.

    Among equal scores the expert, and the token, with the lower number comes first.

    Attributes:
        bias: (num_experts,) added to scores when experts are chosen, not to weights; whoever balances sets it.
    """

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            return route(F.linear(x.to(wide), self.weight.to(wide)), self.bias, self.config)


def route(logits: Tensor, bias: Tensor, config: MoEConfig) -> Routing:
    """Gate, choose, weigh, and drop what finds no room.

    Suffixes name dimensions: T tokens, E experts, K choices of a token (top_k), C room of an expert (its capacity),
    P = T · K pairs of a token and an expert.

    Args:
        logits: (tokens, num_experts) float32 or float64.
        bias: (num_experts,) added to scores when experts are chosen.
        config: see `MoEConfig`.

    Cost: a sort of each token's scores, and one of all pairs by expert.
    """
    # 1. Gate: what the router thinks of each pair.
    scores_TE = logits.softmax(-1) if config.gate == "softmax" else logits.sigmoid()
    preference_TE = scores_TE.detach() + bias
    capacity = config.capacity(len(logits))
    if config.choice == "expert":
        return _experts_choose(logits, scores_TE, preference_TE, capacity, config.routed_scaling_factor)
    # 2. Choose: each token's experts, best first.
    experts_TK = choose_experts(preference_TE, config)
    # 3. Weigh: by scores, which the bias has not touched.
    weights_TK = scores_TE.gather(1, experts_TK)
    if config.normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    weights_TK = weights_TK * config.routed_scaling_factor
    # 4. Queue the pairs for room: all first choices before any second one, each in the order of tokens.
    tokens_P = torch.arange(len(logits), device=logits.device).repeat(config.top_k)
    experts_P, weights_P = experts_TK.T.flatten(), weights_TK.T.flatten()
    if config.drop == "probability":
        queue_P = scores_TE.gather(1, experts_TK).T.flatten().sort(descending=True, stable=True).indices
        tokens_P, experts_P, weights_P = tokens_P[queue_P], experts_P[queue_P], weights_P[queue_P]
    # 5. Sort by expert; the sort is stable, so each expert's pairs stay in the order of the queue.
    order_P = experts_P.sort(stable=True).indices
    wanted_E = torch.bincount(experts_P, minlength=config.num_experts)
    kept_E = wanted_E
    # 6. Drop the pairs whose place in their expert's queue lies beyond its room.
    if capacity is not None:
        first_E = wanted_E.cumsum(0) - wanted_E
        place_P = torch.arange(len(order_P), device=logits.device) - first_E[experts_P[order_P]]
        order_P = order_P[place_P < capacity]
        kept_E = wanted_E.clamp_max(capacity)
    return Routing(tokens_P[order_P], weights_P[order_P], kept_E.cumsum(0).int(), wanted_E, scores_TE, logits)


def _experts_choose(logits: Tensor, scores_TE: Tensor, preference_TE: Tensor, capacity: int, scale: float) -> Routing:
    """Each expert takes the tokens that it prefers, as many as it has room for; suffixes as in `route`."""
    tokens_CE = preference_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
    room, num_experts = tokens_CE.shape
    tokens_P = tokens_CE.T.flatten()
    experts_P = torch.arange(num_experts, device=logits.device).repeat_interleave(room)
    weights_P = scores_TE[tokens_P, experts_P] * scale
    wanted_E = torch.full((num_experts,), room, dtype=torch.int64, device=logits.device)
    return Routing(tokens_P, weights_P, wanted_E.cumsum(0).int(), wanted_E, scores_TE, logits)


def choose_experts(preference: Tensor, config: MoEConfig) -> Tensor:
    """Each token's top_k experts, best first, out of its top_groups groups: (tokens, num_experts) → (tokens, top_k).

    A group is worth the sum of its two best experts. Source: DeepSeek-V3, section 2.1.2.
    """
    if config.num_groups > 1:
        groups = preference.unflatten(1, (config.num_groups, -1))
        worth = groups.sort(descending=True).values[..., :2].sum(-1)
        out = worth.sort(descending=True, stable=True).indices[:, config.top_groups :]
        preference = groups.scatter(1, out[..., None].expand(-1, -1, groups.shape[-1]), -math.inf).flatten(1)
    return preference.sort(descending=True, stable=True).indices[:, : config.top_k]


def combine(answers: Tensor, routing: Routing, num_tokens: int) -> Tensor:
    """Each token's weighted sum of its experts' answers, (num_tokens, hidden_size); zero for a token without one."""
    weighted = answers * routing.weights[:, None].to(answers.dtype)
    return weighted.new_zeros(num_tokens, answers.shape[1]).index_add(0, routing.tokens, weighted)
