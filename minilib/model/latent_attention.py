"""Multi-head latent attention: one small vector a token is kept, and every head's key and value follow from it.

    x ─┬─ queries ───────────────── q_nope, q_rope of each head
       ├─ down ── norm ── latent    (kv_lora_rank)        ┐ kept: kv_lora_rank + qk_rope_head_dim numbers a token
       └─ down ── turn ── rope key  (qk_rope_head_dim)    ┘
    latent ── up ── k_nope, v of each head;   key of a head = k_nope beside the rope key, which all heads share

Both forms compute the same function:

    expanded    keys and values of all heads are made from every latent vector kept; then attention as ever
    absorbed    q_nope · (W_k c) = (W_kᵀ q_nope) · c: the query goes through W_k and the result through W_v, and the
                latent vectors themselves are keys and values of one head that all query heads share

The first costs less while many tokens are computed, the second while one is, since nothing is made anew for the others.
Positions stay out of the latent part: a rotation between W_k and its transpose would differ from key to key, and could
not be absorbed.

Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1 and appendix C. Parameters are named as in transformers'
`DeepseekV3Attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilib.model.ops import rotate
from minilib.model.rope import inverse_frequencies, rotation
from minilib.numbers.price import BYTES, Cost


@dataclass(frozen=True)
class LatentConfig:
    """The shape of one layer of latent attention, with plain rotary embeddings: no YaRN.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        kv_lora_rank: numbers of the latent vector.
        qk_nope_head_dim: width of a head's key without position.
        qk_rope_head_dim: width of the key that is turned by position.
        v_head_dim: width of a head's value.
        q_lora_rank: width that queries are squeezed through; None for one projection.
        rope_theta: base of the rotary frequencies.
        rope_interleave: whether neighbours make the pairs that are turned, as in DeepSeek's checkpoints, or values half
            a head apart.

    Raises:
        ValueError: if a size is below 1, or qk_rope_head_dim odd.
    """

    hidden_size: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_theta: float = 10_000.0
    rope_interleave: bool = True

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        for name in (*sizes, *(("q_lora_rank",) if self.q_lora_rank is not None else ())):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, pairs of values are turned; got {self.qk_rope_head_dim}")

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def up_values(self) -> int:
        """Numbers of all heads' keys without position and values, of one token."""
        return self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def cached_values(self) -> int:
        """Numbers kept of one token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded_values(self) -> int:
        """Numbers of one token's keys and values, made for all heads."""
        return self.num_heads * (self.qk_head_dim + self.v_head_dim)


class LatentCache:
    """Latent vectors and turned keys of a batch of sequences of one length, side by side; grows with each step.

    Attributes:
        state: (batch, length, kv_lora_rank + qk_rope_head_dim), or None before the first step.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens kept of each sequence."""
        return 0 if self.state is None else self.state.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return 0 if self.state is None else self.state.nbytes

    def append(self, state: Tensor) -> Tensor:
        """Keep these tokens' state, (batch, tokens, values), and return that of all."""
        self.state = state if self.state is None else torch.cat((self.state, state), dim=1)
        return self.state


class LatentAttention(nn.Module):
    """One layer of latent attention, causal.

    Args:
        config: its shape.
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config, width = config, config.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.cached_values, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, config.up_values, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: LatentCache | None = None, absorbed: bool = False) -> Tensor:
        """
        Args:
            x: (batch, tokens, hidden_size), the tokens behind those that the cache holds.
            cache: keeps their state; without one, the tokens see each other alone.
            absorbed: which form; see the top of this file.

        Returns:
            (batch, tokens, hidden_size).
        """
        start = 0 if cache is None else cache.length
        rope = self._rope(start, x)
        q_nope, q_rope = self._queries(x, rope)
        state = self._state(x, rope)
        state = state if cache is None else cache.append(state)
        mask = torch.ones(x.shape[1], state.shape[1], dtype=torch.bool, device=x.device).tril(start)
        mixed = (self._absorbed if absorbed else self._expanded)(q_nope, q_rope, state, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _rope(self, start: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations of the new tokens' positions, (tokens, 1, qk_rope_head_dim) each."""
        inv_freq = inverse_frequencies(self.config.qk_rope_head_dim, self.config.rope_theta).to(x.device)
        return rotation(torch.arange(start, start + x.shape[1], device=x.device), inv_freq, x.dtype)

    def _turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Turn (batch, tokens, heads, qk_rope_head_dim) by position; pairs of neighbours come to lie half a head apart,
        in queries and keys alike, so that scores do not change."""
        if self.config.rope_interleave:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x, rope)

    def _queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(batch, num_heads, tokens, qk_nope_head_dim) and the same with qk_rope_head_dim, turned."""
        squeezed = self.config.q_lora_rank is not None
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if squeezed else self.q_proj(x)
        q = q.unflatten(-1, (self.config.num_heads, self.config.qk_head_dim))
        q_nope, q_rope = q.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        return q_nope.transpose(1, 2), self._turn(q_rope, rope).transpose(1, 2)

    def _state(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What is kept: the normalised latent vector beside the turned key, (batch, tokens, cached_values)."""
        parts = (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(parts, dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), self._turn(k_rope[:, :, None], rope)[:, :, 0]), dim=-1)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, state: Tensor, mask: Tensor) -> Tensor:
        """Attention over keys and values of all heads: (batch, num_heads, tokens, v_head_dim)."""
        config = self.config
        latent, k_rope = state.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        up = self.kv_b_proj(latent).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        k_nope, v = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, config.num_heads, -1, -1)), dim=-1)
        return self._attend(torch.cat((q_nope, q_rope), dim=-1), k, v, mask)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, state: Tensor, mask: Tensor) -> Tensor:
        """Attention over the state itself, one head that all queries share: (batch, num_heads, tokens, v_head_dim)."""
        config = self.config
        up = self.kv_b_proj.weight.unflatten(0, (config.num_heads, -1))  # (num_heads, nope + v, kv_lora_rank)
        up_k, up_v = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        q = torch.cat((q_nope @ up_k, q_rope), dim=-1)  # (batch, num_heads, tokens, cached_values)
        keys = state[:, None]
        mixed = self._attend(q, keys, keys[..., : config.kv_lora_rank], mask)
        return mixed @ up_v.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scale = self.config.qk_head_dim**-0.5
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def decode_cost(config: LatentConfig, context: int, batch: int = 1, absorbed: bool = True, dtype: str = "bf16") -> Cost:
    """What attention of one layer costs when every sequence of a batch computes one token.

    Counted are the products: the projections of the new token, the way through W_k and W_v (of every token kept if
    expanded, of the new token if absorbed), scores and mixing. Bytes are those of the weights, read once for the whole
    batch, of the state kept, read once, and, if expanded, of all heads' keys and values, written and read once.

    Args:
        config: the shape.
        context: tokens that the new one sees, itself included.
        batch: sequences.
        absorbed: which form.
        dtype: of weights and state, a key of `minilib.numbers.price.BYTES`.

    Raises:
        ValueError: if context or batch is below 1.
    """
    if context < 1 or batch < 1:
        raise ValueError(f"context ≥ 1 and batch ≥ 1 are needed, got {context} and {batch}")
    heads, rank, up = config.num_heads, config.kv_lora_rank, config.kv_lora_rank * config.up_values
    weights = _projections(config)
    if absorbed:
        token = weights + up + context * heads * (config.cached_values + rank)
        moved = context * config.cached_values
    else:
        token = weights + context * (up + config.expanded_values)
        moved = context * (config.cached_values + 2 * config.expanded_values)
    return Cost(flops=2 * batch * token, bytes=BYTES[dtype] * (weights + up + batch * moved), dtype=dtype)


def _projections(config: LatentConfig) -> int:
    """Weights that every token goes through once in both forms: to queries, to the state, and out."""
    width = config.num_heads * config.qk_head_dim
    rank = config.q_lora_rank
    queries = config.hidden_size * width if rank is None else rank * (config.hidden_size + width)
    return queries + config.hidden_size * (config.cached_values + config.num_heads * config.v_head_dim)
