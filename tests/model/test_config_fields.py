"""Every field of a config.json is followed, changes nothing, or is refused by name; what transformers reads decides."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from minilib.model import families
from minilib.model.config import ModelConfig, UnsupportedModel
from minilib.model.families import FAMILIES
from tests.model import oracle

# Published models, with the values that their config.json has beside the defaults of transformers' classes
LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_31 = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {**LLAMA_31_ROPE, "rope_theta": 5e5},
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
QWEN25 = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_window": 131072,
}
QWEN3 = {
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SMALL_QWEN3 = {**QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072}
MISTRAL = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": None}
PUBLISHED = {
    "Llama-2-7b": ("llama", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pretraining_tp": 1}),
    "Llama-3.1-8B": ("llama", LLAMA_31),
    "Llama-3.2-1B": (
        "llama",
        {**LLAMA_31, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
        | {"rope_parameters": {**LLAMA_31_ROPE, "factor": 32.0, "rope_theta": 5e5}, "tie_word_embeddings": True},
    ),
    "Qwen2.5-7B": ("qwen2", QWEN25),
    "Qwen2.5-7B, a context of 131,072": (
        "qwen2",
        {**QWEN25, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    ),
    "DeepSeek-R1-Distill-Qwen-7B": ("qwen2", {**QWEN25, "use_mrope": False, "rms_norm_eps": 1e-6}),
    "Qwen3-8B": ("qwen3", QWEN3),
    "Qwen3-0.6B": ("qwen3", {**SMALL_QWEN3, "num_attention_heads": 16, "tie_word_embeddings": True}),
    "Mistral-7B-v0.3": ("mistral", {**MISTRAL, "vocab_size": 32768}),
    "Mistral-7B-v0.1, up to its window": (
        "mistral",
        {**MISTRAL, "sliding_window": 4096} | {"max_position_embeddings": 4096},
    ),
    "Mixtral-8x7B-v0.1": ("mixtral", {"max_position_embeddings": 32768, "router_aux_loss_coef": 0.02}),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"num_hidden_layers": 48, "max_position_embeddings": 40960, "norm_topk_prob": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}


def as_transformers_4(content: dict) -> dict:
    """As older versions wrote it: another place for the rotary embeddings, another name for the dtype."""
    content = {**content, "torch_dtype": "bfloat16"}
    rope = content.pop("rope_parameters")
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    del content["dtype"]
    return {**content, "rope_theta": rope["rope_theta"], "rope_scaling": scaling if len(scaling) > 1 else None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(name):
    kind, values = PUBLISHED[name]
    theirs = CONFIG_MAPPING[kind](**values, architectures=[FAMILIES[kind].architecture], dtype="bfloat16")
    whole = json.loads(theirs.to_json_string(use_diff=False))
    config = ModelConfig.from_hugging_face(whole)
    assert ModelConfig.from_hugging_face(json.loads(theirs.to_json_string(use_diff=True)) | whole) == config
    assert ModelConfig.from_hugging_face(as_transformers_4(whole)) == config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    sizes = (config.head_dim, config.num_kv_heads, config.max_position, config.rope_theta)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    theta = theirs.rope_parameters["rope_theta"]
    assert sizes == (head_dim, theirs.num_key_value_heads, theirs.max_position_embeddings, theta)


def test_mistral_with_a_window_shorter_than_its_context_is_refused():
    theirs = CONFIG_MAPPING["mistral"](**{**MISTRAL, "sliding_window": 4096})
    with pytest.raises(UnsupportedModel, match="sliding_window is 4096.*lower max_position_embeddings to 4096"):
        ModelConfig.from_hugging_face(theirs.to_dict())


# Where the file is silent

SILENT = {
    "vocab_size": 97,
    "hidden_size": 4096,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_config_does_not_say_is_what_transformers_takes(kind):
    content = {**SILENT, **EXPERTS.get(kind, {})}
    theirs = CONFIG_MAPPING[kind](**content)
    mine = ModelConfig.from_hugging_face({"model_type": kind, **content})
    assert mine.num_kv_heads == theirs.num_key_value_heads
    assert mine.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 64)
    assert mine.rope_theta == theirs.rope_parameters["rope_theta"]
    assert mine.tie_embeddings == theirs.tie_word_embeddings
    if kind == "qwen3_moe":
        assert mine.moe.normalize == theirs.norm_topk_prob
    if kind == "qwen3":
        assert mine.head_dim == 128


@pytest.mark.parametrize("kind", ["mistral"])
def test_a_window_that_the_config_does_not_name_is_the_classs_own(kind):
    assert CONFIG_MAPPING[kind](**SILENT).sliding_window == 4096
    with pytest.raises(UnsupportedModel, match="sliding_window is 4096"):
        ModelConfig.from_hugging_face({"model_type": kind, **SILENT, "max_position_embeddings": 8192})


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("name", ["num_local_experts", "num_experts"])
def test_transformers_has_two_names_for_the_number_of_experts(kind, name):
    content = {"model_type": kind, **SILENT, **EXPERTS[kind], "num_local_experts": None, "num_experts": None, name: 6}
    assert ModelConfig.from_hugging_face(content).moe.num_experts == 6
    for other in (None, 5):
        both = {**content, name: 6 if other else None, "num_experts" if "local" in name else "num_local_experts": other}
        with pytest.raises(UnsupportedModel, match="num_local_experts and num_experts are"):
            ModelConfig.from_hugging_face(both)


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_mixture_without_a_size_is_refused_by_name(kind):
    for name in EXPERTS[kind].keys() - {"num_local_experts", "num_experts"}:
        content = {"model_type": kind, **SILENT, **EXPERTS[kind]}
        del content[name]
        with pytest.raises(UnsupportedModel, match=f"does not say {name}"):
            ModelConfig.from_hugging_face(content)


# Fields that transformers reads


@pytest.fixture
def recorded(monkeypatch):
    """Names of the fields that are read of any config of transformers from here on."""
    names, plain = set(), PretrainedConfig.__getattribute__

    def get(config, name):
        names.add(name)
        return plain(config, name)

    monkeypatch.setattr(PretrainedConfig, "__getattribute__", get)
    return names


# Inert fields that transformers reads while it computes, with values other than their defaults where one runs
READ_AND_INERT = {
    "_attn_implementation": "sdpa",
    "_name_or_path": "elsewhere",
    "name_or_path": "elsewhere",
    "dtype": "float32",  # that of the weights in memory, which `weights.load` is told by its caller
    "gradient_checkpointing": True,
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "pad_token_id": 3,
    "return_dict": True,  # without, a tuple comes back, and transformers' own head fails on it
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "use_cache": False,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_inert_field_is_not_read_or_moves_no_logit(kind, recorded):
    def logits(**changes):
        torch.manual_seed(0)
        model = oracle.of_family(kind, **changes)
        return model(oracle.tokens(20)).logits

    before = logits()
    config = CONFIG_MAPPING[kind](**{**oracle.SMALL, **oracle.FAMILIES[kind]})
    recorded.clear()
    AutoModel.from_config(config).eval()(oracle.tokens(20))
    read = families.INERT & recorded
    assert len(recorded) > 30 and len(read) > 4
    assert read <= READ_AND_INERT.keys()
    for name in read:
        changed = {"experts_implementation": "eager"} | {name: READ_AND_INERT[name]}
        torch.testing.assert_close(logits(**changed), before, rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_model_that_attends_both_ways_is_refused():
    text = oracle.tokens(20)
    both_ways = oracle.of_family("llama", is_causal=False)
    assert (oracle.expected(both_ways, text) - oracle.expected(oracle.of_family("llama"), text)).abs().max() > 0.1
    for value in (False, None):
        content = {**both_ways.config.to_dict(), "is_causal": value}
        with pytest.raises(UnsupportedModel, match=f"is_causal is {value}, and this decoder computes True"):
            ModelConfig.from_hugging_face(content)
    assert ModelConfig.from_hugging_face({**content, "is_causal": True})


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"attention_chunk_size": 128}, "attention_chunk_size is 128, a field that is not known here"),
        ("llama", {"use_alibi": False}, "use_alibi is False.*if it changes nothing, remove it from config.json"),
        ("llama", {"num_local_experts": 4}, "num_local_experts is 4, a field that is not known here for llama"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*LlamaForCausalLM"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ("llama", {"hidden_act": None}, "hidden_act is None, and this decoder computes 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"sliding_window": 100}, "sliding_window is 100"),
        ("llama", {"sliding_window": "100"}, r"sliding_window is '100' \(str\), and a whole number"),
        ("llama", {"rms_norm_eps": "1e-6"}, r"rms_norm_eps is '1e-6' \(str\), and a finite number > 0"),
        ("llama", {"hidden_size": 48.0}, r"hidden_size is 48.0 \(float\), and a whole number"),
        ("llama", {"vocab_size": True}, "vocab_size is True"),
        ("llama", {"num_key_value_heads": "2"}, r"num_key_value_heads is '2' \(str\)"),
        ("llama", {"tie_word_embeddings": "false"}, r"tie_word_embeddings is 'false' \(str\), and true or false"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ("mixtral", {"sliding_window": 100}, "sliding_window is 100"),
        ("mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5, and this decoder computes 1"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False, a field that is not known here for mixtral"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 100},
            r"100 \(use_sliding_window: True\)",
        ),
        ("qwen2", {"use_sliding_window": "yes"}, r"use_sliding_window is 'yes' \(str\)"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*'full_attention'"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, and this decoder computes False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], and this decoder computes \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, and this decoder computes 1"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 100}, "sliding_window is 100"),
        ("qwen3_moe", {"norm_topk_prob": 1}, r"norm_topk_prob is 1 \(int\), and true or false is expected"),
    ],
)
def test_what_is_not_computed_or_not_known_is_refused_by_name(kind, changes, named):
    config = CONFIG_MAPPING[kind](**{**oracle.SMALL, **oracle.FAMILIES[kind]}).to_dict()
    ModelConfig.from_hugging_face(config)
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.from_hugging_face({**config, **changes})


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_field_that_says_nothing_or_trains_or_keeps_books_passes(kind):
    config = CONFIG_MAPPING[kind](**{**oracle.SMALL, **oracle.FAMILIES[kind]}).to_dict()
    expected = ModelConfig.from_hugging_face(config)
    more = {"a_field_of_tomorrow": None, "unsloth_version": "2026.1", "torch_dtype": "float16", "temperature": 0.6}
    assert ModelConfig.from_hugging_face({**config, **more}) == expected
    assert ModelConfig.from_hugging_face({**config, "sliding_window": 512}) == expected


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "phi3", "olmo2", "deepseek_v3", "qwen2_moe", "llama4_text"])
def test_every_other_family_is_refused_by_its_name(kind):
    with pytest.raises(UnsupportedModel, match=f"'{kind}' is not supported; supported are: llama, mistral, qwen2"):
        ModelConfig.from_hugging_face(CONFIG_MAPPING[kind]().to_dict())
