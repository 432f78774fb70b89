"""What one step of a decoder computes and reads, counted from its config: the one place that all prices of serving use.

    FLOPs     2 a weight and token in products; 4 · layers · heads · head_dim for each pair of a query and a key
    weights   read once, whatever the tokens; of experts those that tokens hit

The embedding is a lookup, so its matrix counts where it is multiplied, as unembedding: once for each row of logits.
"""

from __future__ import annotations

from minilib.model.config import ModelConfig


def product_flops(config: ModelConfig, tokens: int, rows: int) -> int:
    """FLOPs of products with the weights.

    Args:
        config: of the model.
        tokens: that go through its layers.
        rows: positions whose logits are needed.
    """
    return 2 * (_body(config) * tokens + _table(config) * rows)


def pair_flops(config: ModelConfig, pairs: int) -> int:
    """FLOPs of attention: scores and weighted sums of so many pairs of a query and a key, in all heads and layers."""
    return 4 * pairs * config.num_layers * config.num_heads * config.head_dim


def pairs_behind(start: int, tokens: int) -> int:
    """Pairs of a query and a key that it sees, in one head of one layer, for `tokens` tokens behind `start` others."""
    return tokens * start + tokens * (tokens + 1) // 2


def weights_read(config: ModelConfig, tokens: int, rows: int) -> float:
    """Weights that a step reads; arguments as in `product_flops`.

    A mixture of experts reads the experts that are expected to be hit if every token chooses them at random.
    """
    read = _body(config) + (_table(config) if rows else 0)
    if config.moe:
        experts, chosen = config.moe.num_experts, config.moe.top_k
        hit = experts * (1 - (1 - chosen / experts) ** tokens)
        idle = config.num_parameters - config.num_active_parameters
        read += idle * (hit - chosen) / (experts - chosen) if experts > chosen else 0
    return read


def _table(config: ModelConfig) -> int:
    """Weights of the unembedding."""
    return config.hidden_size * config.vocab_size


def _body(config: ModelConfig) -> int:
    """Weights that a token meets in the layers; those of norms take no products, and count for simplicity."""
    return config.num_active_parameters - _table(config) * (1 if config.tie_embeddings else 2)
