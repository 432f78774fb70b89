"""What a token's state costs: numbers that a decoder keeps for each token, read from a published config.json.

    kind of layer       numbers kept a token                                       of how many tokens
    full attention      num_key_value_heads · (width of a key + width of a value)  all
    sliding window      the same                                                   sinks and the latest `sliding_window`
    latent attention    kv_lora_rank + qk_rope_head_dim, and an indexer's key      all

Multi-head attention has as many key-value heads as query heads, multi-query attention has one, grouped-query attention
some number between them.

Sources: Shazeer 2019 (multi-query); Ainslie et al. 2023 (grouped-query); DeepSeek-AI 2024, "DeepSeek-V2", section 2.1
(latent); DeepSeek-AI 2025, "DeepSeek-V3.2" (indexer). What fields mean is what transformers 5.24 does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FULL, SLIDING, LATENT = "full_attention", "sliding_attention", "latent_attention"

# model_type → which layers slide: none, those that layer_types names, all, or every layer but each n-th
_PATTERNS: dict[str, str | int] = {
    **dict.fromkeys(("llama", "gemma", "mixtral", "minimax_m2"), "none"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "from max_window_layers"),
    "mistral": "all",
    "gemma2": 2,
    "gemma3_text": 6,
    **dict.fromkeys(("gemma4_text", "gpt_oss"), "layer_types"),
    "mimo_v2_flash": "hybrid_layer_pattern",
}
_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa")


class UnknownState(ValueError):
    """The config.json describes state that is not known here, or lacks a field; the message says which."""


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps.

    Args:
        kind: FULL, SLIDING or LATENT.
        values: numbers a token.
        most_tokens: of how many tokens at most; None for all.
    """

    kind: str
    values: int
    most_tokens: int | None = None

    def tokens(self, length: int) -> int:
        """Tokens kept of a sequence of this length."""
        return length if self.most_tokens is None else min(length, self.most_tokens)


@dataclass(frozen=True)
class TokenState:
    """What all layers of a decoder keep.

    Args:
        layers: one entry for each layer that keeps state of its own.
    """

    layers: tuple[LayerState, ...]

    @classmethod
    def from_config(cls, config: Mapping, num_sinks: int = 0) -> TokenState:
        """Read the content of a config.json, or of its text_config.

        Args:
            config: the mapping.
            num_sinks: first tokens that sliding layers keep beside their window. No published config has such a field:
                the sinks of gpt-oss and MiMo are a learnt number a head, and take no cache.

        Raises:
            UnknownState: for a model_type whose state is not known here, or if a field is missing or no count.
        """
        config = config.get("text_config", config)
        if not isinstance(num_sinks, int) or num_sinks < 0:
            raise ValueError(f"num_sinks counts tokens, got {num_sinks!r}")
        kind = config.get("model_type")
        if kind not in _PATTERNS and kind not in _LATENT:
            known = ", ".join(sorted((*_PATTERNS, *_LATENT)))
            raise UnknownState(f"nothing is known here of the state of model_type={kind!r}; known: {known}")
        return cls(_latent_layers(config) if kind in _LATENT else _layers(config, _PATTERNS[kind], num_sinks))

    def values(self, length: int) -> int:
        """Numbers kept of one sequence of so many tokens."""
        if length < 0:
            raise ValueError(f"a sequence has 0 tokens or more, got {length}")
        return sum(layer.values * layer.tokens(length) for layer in self.layers)

    def nbytes(self, length: int, itemsize: float = 2) -> float:
        """Bytes kept of one sequence of so many tokens.

        Args:
            length: tokens.
            itemsize: bytes a number; 2 for bf16.
        """
        return self.values(length) * itemsize

    def bytes_per_token(self, length: int = 0, itemsize: float = 2) -> float:
        """Bytes that the token behind so many others adds: fewer once windows are full."""
        return (self.values(length + 1) - self.values(length)) * itemsize

    def sequences_that_fit(self, free_bytes: float, length: int, itemsize: float = 2) -> int:
        """Sequences of so many tokens whose state fits into this memory; 0 if there is none to spare.

        Raises:
            ValueError: if length is below 1.
        """
        if length < 1:
            raise ValueError(f"a sequence that takes memory has at least 1 token, got {length}")
        return max(0, int(free_bytes // self.nbytes(length, itemsize)))


def _layers(config: Mapping, pattern: str | int, num_sinks: int) -> tuple[LayerState, ...]:
    """Layers that keep keys and values of their heads."""
    count = _count(config, "num_hidden_layers")
    slides = _slides(config, pattern, count)
    if len(slides) != count:
        raise UnknownState(f"num_hidden_layers is {count}, and {len(slides)} layers are described")
    own = count - config.get("num_kv_shared_layers", 0)  # the last ones read what layers before them keep
    window = _window(config) + num_sinks if any(slides) else None
    overrides = {int(layer): fields for layer, fields in (config.get("per_layer_config") or {}).items()}
    if config["model_type"] == "gemma4_text" and not overrides:
        _count(config, "global_head_dim")  # transformers' default would be wider than a head
    layers = []
    for layer, slide in enumerate(slides[:own]):
        fields = {**config, **overrides.get(layer, {})}
        values = _sliding_values(fields) if slide else _full_values(fields)
        layers.append(LayerState(SLIDING, values, window) if slide else LayerState(FULL, values))
    return tuple(layers)


def _slides(config: Mapping, pattern: str | int, count: int) -> list[bool]:
    """Whether each layer slides."""
    named = config.get("layer_types")
    if pattern == "none" or config.get("sliding_window") is None:
        return [False] * count
    if pattern == "hybrid_layer_pattern":
        return [bool(entry) for entry in config["hybrid_layer_pattern"]]
    if named is not None:
        if unknown := set(named) - {FULL, SLIDING}:
            raise UnknownState(f"layer_types holds {', '.join(sorted(unknown))}, whose state is not known here")
        return [name == SLIDING for name in named]
    if pattern == "all":
        return [True] * count
    if pattern == "from max_window_layers":
        first = _count(config, "max_window_layers") if config.get("use_sliding_window") else count
        return [layer >= first for layer in range(count)]
    if isinstance(pattern, int):
        period = config.get("sliding_window_pattern", pattern)
        return [(layer + 1) % period != 0 for layer in range(count)]
    raise UnknownState("layer_types is missing, which says which layers slide")


def _window(config: Mapping) -> int:
    """Tokens that a layer with a sliding window sees, the newest included."""
    if config["model_type"] == "mimo_v2_flash" and config.get("sliding_window_size") is not None:
        return _count(config, "sliding_window_size") + 1  # MiMo's code counts the tokens before the newest
    return _count(config, "sliding_window")


def _full_values(config: Mapping) -> int:
    """Numbers a token in a layer with full attention."""
    heads = config.get("attention_k_eq_v", True) and config.get("num_global_key_value_heads") or _heads(config)
    key = config.get("global_head_dim") or _head_dim(config)
    return heads * (key + (config.get("v_head_dim") or key))


def _sliding_values(config: Mapping) -> int:
    """Numbers a token in a layer with a sliding window."""
    key = config.get("swa_head_dim") or _head_dim(config)
    value = config.get("swa_v_head_dim") or config.get("v_head_dim") or key
    return (config.get("swa_num_key_value_heads") or _heads(config)) * (key + value)


def _latent_layers(config: Mapping) -> tuple[LayerState, ...]:
    """Layers that keep one latent vector and one turned key; some, the key by which an indexer finds a token, too."""
    values = _count(config, "kv_lora_rank") + _count(config, "qk_rope_head_dim")
    count = _count(config, "num_hidden_layers")
    indexers = config.get("indexer_types") or ["full"] * count  # "shared": reads what a layer before it found
    index = config.get("index_head_dim") or 0
    if len(indexers) != count:
        raise UnknownState(f"num_hidden_layers is {count}, and indexer_types describes {len(indexers)}")
    return tuple(LayerState(LATENT, values + (index if kind == "full" else 0)) for kind in indexers)


def _heads(config: Mapping) -> int:
    """Key-value heads; as many as query heads where the config does not say."""
    return _count(config, "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads")


def _head_dim(config: Mapping) -> int:
    if config.get("head_dim") is not None:
        return _count(config, "head_dim")
    return _count(config, "hidden_size") // _count(config, "num_attention_heads")


def _count(config: Mapping, name: str) -> int:
    """A field that counts something."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UnknownState(f"{name} must be a whole number ≥ 1 in this config.json, got {value!r}")
    return value
