"""The one language model: a Llama-style decoder, with attention passed in.

    tokens ─ embed ─┬─ norm ─ qkv ─ rope ─ ATTENTION ─ project ─┬─ norm ─ SwiGLU ─┬─ … ─ norm ─ unembed ─ logits
                    └───────────────────────────────────────────┴─────────────────┘

Who calls the model says what attention is: over a whole batch of texts (training), or behind a contiguous or a paged KV
cache (serving). Everything else works on any leading shape: (batch, tokens) in training, a flat (tokens,) in serving.

Sources: Touvron et al. 2023 (Llama); Zhang and Sennrich 2019 (RMSNorm); Su et al. 2021 (rotary embeddings); Ainslie et
al. 2023 (grouped-query attention); Shazeer 2020 (SwiGLU); Qwen2 technical report 2024 (biases of queries, keys and
values); Qwen3 technical report 2025 (normalised queries and keys).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from minilib.model.config import ModelConfig
from minilib.model.moe import MoE, Router
from minilib.model.ops import Ops, choose_ops
from minilib.model.rope import inverse_frequencies, rotation


class Attention(Protocol):
    """What the decoder asks of attention: keep k and v if that is its job, and mix v by the scores of q and k."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """
        Args:
            layer: number of the layer that asks.
            q: (..., num_heads, head_dim), turned by position.
            k: (..., num_kv_heads, head_dim), turned by position.
            v: (..., num_kv_heads, head_dim).

        Returns:
            (..., num_heads, head_dim).
        """


class Decoder(nn.Module):
    """Token ids and positions in, logits out.

    Args:
        config: its shape.

    Cost: 2 FLOPs per active parameter and token (embedding table once), plus attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ops = choose_ops(config.kernels)
        self.layers = nn.ModuleList(Layer(config, index, self.ops) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, self.ops)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        self.reset_buffers()
        if not self.embed.weight.is_meta:  # on the meta device there is nothing to fill
            self.initialize()

    def reset_buffers(self) -> None:
        """Compute what follows from the config alone and is in no checkpoint."""
        self.register_buffer("inv_freq", self._inv_freq().to(self.embed.weight.device), persistent=False)

    def _inv_freq(self) -> Tensor:
        return inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def initialize(self, seed: int = 0) -> None:
        """Random weights, the same for the same seed; what writes into the residual stream starts smaller.

        Biases start at zero, the weights of norms at one.
        """
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        depth = math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = 0.02 / depth if name.endswith(("project.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        for module in self.modules():
            if isinstance(module, Router):
                nn.init.zeros_(module.bias)

    def _apply(self, fn, recurse=True):
        """Wherever the weights go and in whatever dtype: positions need float32."""
        self.ops.check_move(fn)  # before a part of it has gone
        super()._apply(fn, recurse)
        self.inv_freq = self._inv_freq().to(self.inv_freq.device)
        return self

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, logits_indices: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            token_ids: (...) int64.
            positions: (...) int64, each token's place in its own sequence.
            attention: see `Attention`; called once per layer, in order.
            logits_indices: indices into the flat tokens whose logits are computed; all if left out.

        Returns:
            Logits (..., vocab_size), or (len(logits_indices), vocab_size), in the weights' dtype.
        """
        x = self.through_layers(*self.inputs(token_ids, positions), attention)
        if logits_indices is not None:
            x = x.flatten(0, -2)[logits_indices]
        return self.logits(x)

    def loss(self, token_ids: Tensor, positions: Tensor, targets: Tensor, attention: Attention | None = None) -> Tensor:
        """Mean cross-entropy in nats of predicting targets (batch, tokens), each from its token and those before it.

        Args:
            token_ids, positions: see `forward`.
            targets: the token after each.
            attention: causal attention over each row if left out.
        """
        x = self.through_layers(*self.inputs(token_ids, positions), attention or self.ops.causal_attention)
        return self.ops.loss(self.norm(x), self.unembed.weight, targets)

    def inputs(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the first layer reads: the residual stream (..., hidden_size), and the rotations of the positions."""
        x, scaling = self.embed(token_ids), self.config.rope_scaling
        return x, rotation(positions, self.inv_freq, x.dtype, scaling.attention_factor if scaling else 1.0)

    def through_layers(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """The residual stream after the last layer, (..., hidden_size)."""
        for layer in self.layers:
            x = layer(x, rope, attention)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """(..., vocab_size) from the residual stream after the last layer."""
        return self.unembed(self.norm(x))


class Layer(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, ops: Ops) -> None:
        super().__init__()
        self.index, self.ops = index, ops
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, ops)
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, ops) if config.qk_norm else None
        self.project = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps, ops)
        self.moe = MoE(config.moe, config.hidden_size, ops) if config.moe else None
        if self.moe is None:
            self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
            self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))  # of more tokens than x has here, if ranks have a part of them each
        qkv = qkv.view(*qkv.shape[:-1], sum(self.heads), self.head_dim)
        if self.q_norm is None:
            qk, v = qkv.split_with_sizes((sum(self.heads[:2]), self.heads[2]), dim=-2)
            q, k = self.ops.rotary(qk, rope).split_with_sizes(self.heads[:2], dim=-2)
        else:
            q, k, v = qkv.split_with_sizes(self.heads, dim=-2)
            q, k = self.ops.rotary(self.q_norm(q), rope), self.ops.rotary(self.k_norm(k), rope)
        mixed = attention(self.index, q, k, v)
        normed, x = self.feed_forward_norm(self.project(mixed.flatten(-2)), residual=x)
        return self.ops.add(x, self.feed_forward(normed))

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU, or the experts in its place."""
        return self.down(self.ops.swiglu(self.gate_up(x))) if self.moe is None else self.moe(x)


class RMSNorm(nn.RMSNorm):
    """torch's weight and shape, computed by the model's `Ops`; with a residual, (norm of the sum, the sum)."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__(size, eps)
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.ops.rms_norm(x, self.weight, residual, self.eps)
