"""The shape of a model to be trained, as far as a price needs it: parameters, FLOPs, and values kept for backward.

Wider than `ModelConfig`, since published runs trained what the decoder here is not: ungated feed-forward layers, latent
attention, dense layers before layers of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minilib.mechanisms.basics.checks import check_whole
from minilib.model.config import ModelConfig


@dataclass(frozen=True)
class TrainedShape:
    """One model.

    Args:
        layers: of attention and feed-forward each.
        hidden: width of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: width of a query's and a key's head.
        ffn: width of a dense feed-forward layer.
        vocab: tokens that it knows.
        gated: SwiGLU, of three matrices; otherwise two.
        tied: one table for the embedding and the output.
        v_head_dim: width of a value's head; head_dim if left out.
        q_rank, kv_rank, rope_dim: of latent attention; 0 without it.
        experts, top_k, expert_ffn: of a layer of experts, gated ones; 0 for a dense model.
        shared_ffn: width of the experts that see every token.
        dense_layers: layers before those with experts.
        predicted_tokens: further tokens that a layer of its own each predicts (multi-token prediction).

    Raises:
        ValueError: if a size is no whole number, or they contradict each other.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    v_head_dim: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    predicted_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab"):
            check_whole(name, getattr(self, name), 1)
        for name in ("v_head_dim", "q_rank", "kv_rank", "rope_dim", "experts", "top_k", "expert_ffn", "shared_ffn",
                     "dense_layers", "predicted_tokens"):  # fmt: skip
            check_whole(name, getattr(self, name))
        for wrong, why in self._contradictions():
            if wrong:
                raise ValueError(why)

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        heads, experts = f"{self.heads} heads of queries", self.experts
        yield self.heads % self.kv_heads > 0, f"{heads} cannot share {self.kv_heads} of keys: one divides the other"
        beside = self.q_rank or self.rope_dim
        yield not self.kv_rank and beside > 0, "q_rank and rope_dim are 0 without a kv_rank"
        yield self.rope_dim > self.head_dim, f"rope_dim ≤ head_dim, got {self.rope_dim} and {self.head_dim}"
        of_experts = self.top_k or self.expert_ffn or self.shared_ffn or self.dense_layers
        yield not experts and of_experts > 0, "top_k, expert_ffn, shared_ffn and dense_layers are 0 without experts"
        yield (
            experts > 0 and not (1 <= self.top_k <= experts and self.expert_ffn >= 1),
            f"experts need 1 ≤ top_k ≤ {experts} and expert_ffn ≥ 1, got {self.top_k} and {self.expert_ffn}",
        )
        yield self.dense_layers > self.layers, f"{self.dense_layers} dense layers of {self.layers}"

    @classmethod
    def of(cls, config: ModelConfig) -> TrainedShape:
        """The shape of this library's decoder."""
        moe = config.moe
        experts = {} if moe is None else {
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "expert_ffn": moe.intermediate_size,
            "shared_ffn": moe.intermediate_size * moe.num_shared_experts,
        }  # fmt: skip
        return cls(
            config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.intermediate_size, config.vocab_size, tied=config.tie_embeddings, **experts,
        )  # fmt: skip

    @property
    def value_dim(self) -> int:
        """Width of a value's head."""
        return self.v_head_dim or self.head_dim

    @property
    def expert_layers(self) -> int:
        """Layers with experts, those that predict further tokens included."""
        return self.layers - self.dense_layers + self.predicted_tokens if self.experts else 0

    @property
    def attention_parameters(self) -> int:
        """Of one layer's attention."""
        out = self.heads * self.value_dim * self.hidden
        if not self.kv_rank:
            return self.hidden * (self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.value_dim)) + out
        rank = self.q_rank or self.hidden
        q = (self.hidden * rank if self.q_rank else 0) + rank * self.heads * self.head_dim
        kv = self.heads * (self.head_dim - self.rope_dim + self.value_dim)
        return q + self.hidden * (self.kv_rank + self.rope_dim) + self.kv_rank * kv + out

    @property
    def dense_parameters(self) -> int:
        """Of one dense feed-forward layer."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert."""
        return 3 * self.hidden * self.expert_ffn

    @property
    def beside_experts(self) -> int:
        """Of a layer of experts what every token meets: the router and the shared experts."""
        return self.hidden * (self.experts + 3 * self.shared_ffn)

    @property
    def parameters(self) -> int:
        """All, without the vectors of norms and biases, which are a ten-thousandth."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return tables + self._layers_with(self.experts) + 2 * self.hidden**2 * self.predicted_tokens

    @property
    def matrix_parameters(self) -> int:
        """Those that a token is multiplied with: of the experts top_k, of the tables the output alone, once for each
        token that is predicted."""
        heads = self.vocab * self.hidden * (1 + self.predicted_tokens)
        return heads + self._layers_with(self.top_k) + 2 * self.hidden**2 * self.predicted_tokens

    def flops_per_token(self, sequence: int, causal: bool = True) -> float:
        """FLOPs of forward and backward of one token: 6 for each matrix parameter, and the scores and their sums.

        Args:
            sequence: tokens that see each other.
            causal: count the half of the pairs that is visible. Whoever counts all publishes more FLOP/s.

        Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B, which counts all pairs.

        Raises:
            ValueError: if there is no such sequence.
        """
        return 6 * self.matrix_parameters + 3 * self.attention_flops(sequence, causal) * self.all_layers

    def attention_flops(self, sequence: int, causal: bool = True) -> float:
        """FLOPs of forward of one token's scores and their sum of values, in one layer."""
        check_whole("sequence", sequence, 1)
        seen = sequence / 2 if causal else sequence
        return 2 * self.heads * (self.head_dim + self.value_dim) * seen

    @property
    def all_layers(self) -> int:
        """Layers, those that predict further tokens included."""
        return self.layers + self.predicted_tokens

    def _layers_with(self, experts: int) -> int:
        """Parameters of all layers if a layer of experts has so many."""
        mixtures = self.expert_layers
        return (
            self.all_layers * self.attention_parameters
            + (self.all_layers - mixtures) * self.dense_parameters
            + mixtures * (self.beside_experts + experts * self.expert_parameters)
        )
