"""What a token's state costs, against the bytes of transformers' own caches after tiny random models have run."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from minilib.numbers.token_state import FULL, LATENT, SLIDING, LayerState, TokenState, UnknownState

SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT_SIZES = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 6,
}
INDEXER = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2, "mlp_layer_types": ["dense"] * 6}
MIXED = [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL]
# name → model_type, and the fields beside the sizes, as a config.json has them
KINDS = {
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "multi-head, heads not said": ("llama", {"num_key_value_heads": None}),
    "grouped-query": ("llama", {}),
    "multi-query": ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "mixtral": ("mixtral", {"num_local_experts": 2, "sliding_window": None}),
    "qwen3": ("qwen3", {"head_dim": 8, "sliding_window": None}),
    "all slide": ("mistral", {"sliding_window": 9}),
    "window as good as none": ("mistral", {"sliding_window": 64}),
    "later layers slide": ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 4}),
    "window not used": ("qwen2", {"sliding_window": 9, "use_sliding_window": False, "max_window_layers": 4}),
    "every second layer slides": ("gemma2", {"sliding_window": 9, "head_dim": 6}),
    "five of six slide": ("gemma3_text", {"sliding_window": 9, "head_dim": 6}),
    "gpt-oss": (
        "gpt_oss",
        {"sliding_window": 9, "head_dim": 6, "layer_types": [SLIDING, FULL] * 3, "num_local_experts": 4},
    ),
    "gemma 4, global layers of their own": (
        "gemma4_text",
        {
            **{"sliding_window": 9, "head_dim": 6, "global_head_dim": 12, "num_global_key_value_heads": 1},
            **{"attention_k_eq_v": True, "layer_types": MIXED, "hidden_size_per_layer_input": 0},
            **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 31},
        },
    ),
    "gemma 4, layers that share": (
        "gemma4_text",
        {
            **{"sliding_window": 9, "head_dim": 6, "global_head_dim": 12, "layer_types": MIXED},
            **{"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 31, "hidden_size_per_layer_input": 4},
        },
    ),
    "latent, DeepSeek-V2": ("deepseek_v2", LATENT_SIZES),
    "latent, DeepSeek-V3": ("deepseek_v3", LATENT_SIZES),
    "latent with an indexer": ("deepseek_v32", {**LATENT_SIZES, **INDEXER}),
    "latent with shared indexers": (
        "glm_moe_dsa",
        {**LATENT_SIZES, **INDEXER, "indexer_types": ["full", "full", "shared", "shared", "full", "shared"]},
    ),
}


@functools.cache
def model_named(name):
    return model_of(*KINDS[name])


def model_of(kind, fields):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def cache_after(model, cache, length):
    """The cache behind a text of this length, of which the last half is decoded token by token."""
    ids = torch.randint(31, (1, length), generator=torch.Generator().manual_seed(1))
    first = length - length // 2
    for piece in (ids[:, :first], *ids[:, first:].split(1, dim=1)):
        if piece.numel():
            model(piece, cache=cache, use_cache=True)
    return cache


def tensors(layer):
    names = ("keys", "values", "indexer_keys")
    return [kept for name in names if (kept := getattr(layer, name, None)) is not None]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [1, 8, 9, 10, 30])
def test_bytes_are_those_of_transformers_caches(name, length):
    """A static cache has the slots that it needs in the end, of which a window takes no more than it sees. The dynamic
    one drops the token that falls out of the window one step earlier, as the next query will not see it."""
    kind, fields = KINDS[name]
    state, model = TokenState.from_config({**SIZES, **fields, "model_type": kind}), model_named(name)
    static = cache_after(model, StaticCache(config=model.config, max_cache_len=length), length)
    assert sum(kept.nbytes for layer in static.layers for kept in tensors(layer)) == state.nbytes(length)
    dynamic = cache_after(model, DynamicCache(config=model.config), length)
    dropped = sum(layer.values for layer in state.layers if layer.most_tokens and length >= layer.most_tokens)
    held = sum(kept.nbytes for layer in dynamic.layers for kept in tensors(layer))
    assert held == state.nbytes(length) - 2 * dropped


@pytest.mark.parametrize("name", KINDS)
def test_a_config_as_transformers_writes_it_reads_the_same(name):
    kind, fields = KINDS[name]
    state = TokenState.from_config({**SIZES, **fields, "model_type": kind})
    written = model_named(name).config.to_dict()
    assert TokenState.from_config(written) == TokenState.from_config({"text_config": written}) == state


def test_mimo_as_it_is_published():
    """Its window is written as the tokens before the newest, and its sliding layers have heads of their own."""
    fields = {"head_dim": 8, "v_head_dim": 6, "sliding_window": 9, "sliding_window_size": 9, **EXPERTS}
    published = {
        **{"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
        **{"swa_head_dim": 8, "swa_v_head_dim": 6},
    }
    state = TokenState.from_config({**SIZES, **fields, **published, "model_type": "mimo_v2_flash"})
    model = model_of("mimo_v2_flash", {**fields, "mlp_layer_types": ["dense"] * 6})
    for length in (9, 10, 11, 30):
        static = cache_after(model, StaticCache(config=model.config, max_cache_len=length), length)
        assert sum(kept.nbytes for layer in static.layers for kept in tensors(layer)) == state.nbytes(length)


def test_a_window_ends_the_growth_of_its_layers():
    state = TokenState((LayerState(FULL, 10), LayerState(SLIDING, 4, 3), LayerState(LATENT, 1)))
    assert [state.values(length) for length in range(6)] == [0, 15, 30, 45, 56, 67]
    assert [state.bytes_per_token(length) for length in range(5)] == [30, 30, 30, 22, 22]
    assert state.nbytes(5, itemsize=1) == 67


def test_sinks_are_kept_beside_the_window():
    config = {**SIZES, "model_type": "mistral", "sliding_window": 9}
    plain, with_sinks = TokenState.from_config(config), TokenState.from_config(config, num_sinks=4)
    assert [with_sinks.values(length) for length in (8, 13, 30)] == [plain.values(8), *[6 * 24 * 13] * 2]
    assert TokenState.from_config({**SIZES, "model_type": "llama"}, num_sinks=4).values(30) == 6 * 24 * 30
    for wrong in (-1, 1.5, None):
        with pytest.raises(ValueError, match="num_sinks counts tokens"):
            TokenState.from_config(config, wrong)


def test_sequences_that_fit():
    state = TokenState((LayerState(FULL, 10),))
    assert [state.sequences_that_fit(free, 5) for free in (-7, 0, 99, 100, 199, 1000)] == [0, 0, 0, 1, 1, 10]
    with pytest.raises(ValueError, match="at least 1 token"):
        state.sequences_that_fit(100, 0)
    with pytest.raises(ValueError, match="0 tokens or more"):
        state.values(-1)


LLAMA = {**SIZES, "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type=None"),
        ({**LLAMA, "model_type": "deepseek_v4"}, "model_type='deepseek_v4'; known: deepseek_v2"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({**LLAMA, "num_key_value_heads": 2.0}, "num_key_value_heads must be a whole number"),
        ({**LLAMA, "num_attention_heads": None, "num_key_value_heads": None}, "num_attention_heads must be"),
        ({**LLAMA, "head_dim": -4}, "head_dim must be"),
        ({**LLAMA, "model_type": "gpt_oss", "sliding_window": 4}, "layer_types is missing"),
        (
            {**LLAMA, "model_type": "gpt_oss", "sliding_window": 4, "layer_types": [FULL, "linear_attention"] * 3},
            "layer_types holds linear_attention",
        ),
        (
            {**LLAMA, "model_type": "gpt_oss", "sliding_window": 4, "layer_types": [FULL]},
            "num_hidden_layers is 6, and 1 layers are described",
        ),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 0}, "sliding_window must be"),
        ({**LLAMA, "model_type": "deepseek_v3"}, "kv_lora_rank must be"),
        (
            {**LLAMA, **LATENT_SIZES, "model_type": "glm_moe_dsa", "indexer_types": ["full"]},
            "num_hidden_layers is 6, and indexer_types describes 1",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(config, message):
    with pytest.raises(UnknownState, match=message):
        TokenState.from_config(config)
