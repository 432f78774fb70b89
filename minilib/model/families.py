"""What a config.json of each family may say: fields that are read, fields with one value, fields that change nothing.

A field changes what a model computes, or it does not, and one that nobody here knows may do either. So every field
stands in one of four rows, and `check` goes through them all:

READ        the decoder follows it: sizes, eps, rotary embeddings; the families' own in `Family.fields`
ONE_VALUE   the decoder computes one value of it; any other is refused by name
INERT       training, generation and bookkeeping: no value of it moves a logit
unknown     refused by name, unless it is null, which says nothing

Which fields transformers reads while it computes these families is recorded in the tests and held against these rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind that this decoder does not compute; the message says what is in the way."""


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face.

    Args:
        architecture: the class in transformers.
        qk_norm: RMSNorm over each query and key head.
        qkv_bias: biases on the projections to queries, keys and values.
        moe: experts in place of every layer's feed-forward network.
        fields: what this family's config.json may say beside `READ`, with the values that transformers takes where
            the file is silent; REQUIRED for one that must be there.
        window: what transformers takes for sliding_window where the file is silent.
        window_has_switch: sliding_window counts only with use_sliding_window.
        experts: where a layer's router and experts are stored, and the names of gate, up and down projection there.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    moe: bool = False
    fields: Mapping[str, object] = field(default_factory=dict)
    window: int | None = None
    window_has_switch: bool = False
    experts: tuple[str, str, str, str] | None = None


REQUIRED = object()
_QWEN_EXPERTS = {"num_experts_per_tok": REQUIRED, "moe_intermediate_size": REQUIRED, "norm_topk_prob": False}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", fields={"num_key_value_heads": 8}, window=4096),
    "qwen2": Family(
        "Qwen2ForCausalLM", qkv_bias=True, fields={"num_key_value_heads": 32}, window=4096, window_has_switch=True
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        fields={"num_key_value_heads": 32, "head_dim": 128},
        window=4096,
        window_has_switch=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        moe=True,
        fields={"num_key_value_heads": 8, "rope_theta": 1e6, "num_experts_per_tok": REQUIRED},
        experts=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        moe=True,
        fields={"num_key_value_heads": 4, **_QWEN_EXPERTS},
        window=4096,
        window_has_switch=True,
        experts=("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
}
NUM_EXPERTS = ("num_local_experts", "num_experts")  # transformers writes and reads both names for the same number

READ = {
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("layer_types", "sliding_window", "use_sliding_window"),
}
ONE_VALUE = {  # the values that mean what this decoder computes; null is among them only where transformers agrees
    "add_cross_attention": (False, None),
    "attention_bias": (False, None),
    "decoder_sparse_step": (1,),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "mlp_only_layers": ([], None),
    "partial_rotary_factor": (1, None),
    "per_layer_config": ({}, None),
    "pruned_heads": ({}, None),
    "quantization_config": ({}, None),
    "routed_scaling_factor": (1, None),
    "use_mrope": (False, None),
}
INERT = {
    # who wrote the file, and with what
    *("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_flash_attn_2_enabled", "name_or_path"),
    *("_attn_implementation", "attn_implementation", "tie_encoder_decoder", "tf_legacy_loss"),
    *("transformers_version", "torch_dtype", "dtype", "torchscript", "transformers.js_config", "unsloth_fixed"),
    *("unsloth_version", "max_window_layers", "model_max_length", "tokenizer_class"),
    # what a call returns beside logits, and how it keeps keys and values
    *("return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "use_cache"),
    *("tie_last_hidden_states", "use_bfloat16", "chunk_size_feed_forward", "is_decoder", "pretraining_tp"),
    # training alone
    *("initializer_range", "attention_dropout", "router_aux_loss_coef", "router_jitter_noise", "use_return_dict"),
    *("gradient_checkpointing", "neftune_noise_alpha", "finetuning_task", "task_specific_params", "problem_type"),
    *("id2label", "label2id", "num_labels"),
    # tokens with a meaning, and how to choose the next one
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p", "max_length", "min_length", "max_new_tokens"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "repetition_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "output_scores"),
    *("return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty", "prefix"),
}


def family_of(config: Mapping) -> Family:
    """The family that config.json names.

    Raises:
        UnsupportedModel: for any other.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedModel(f"model_type {kind!r} is not supported; supported are: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def check(config: Mapping, family: Family) -> None:
    """Go through every field of a config.json.

    Raises:
        UnsupportedModel: for one that changes what is computed to what this decoder does not compute, and for one that
            nobody here knows.
    """
    if config.get("architectures") not in (None, [], [family.architecture]):
        raise UnsupportedModel(
            f"config.json's architectures is {config['architectures']!r}, and {config['model_type']} is computed here "
            f"as {family.architecture}"
        )
    _check_window(config, family)
    known = READ | INERT | family.fields.keys() | (set(NUM_EXPERTS) if family.moe else set())
    for name, value in config.items():
        if name in ONE_VALUE:
            if value not in ONE_VALUE[name]:
                raise UnsupportedModel(
                    f"config.json's {name} is {value!r}, and this decoder computes {ONE_VALUE[name][0]!r}"
                )
        elif name not in known and value is not None:
            raise UnsupportedModel(
                f"config.json's {name} is {value!r}, a field that is not known here for {config['model_type']} and may "
                f"change what the model computes; if it changes nothing, remove it from config.json"
            )


def _check_window(config: Mapping, family: Family) -> None:
    """Attention is to the whole context: a window must be off, or at least as long."""
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UnsupportedModel(f"config.json's layer_types is {kinds!r}, and this decoder computes 'full_attention'")
    switch = flag(config, "use_sliding_window", False)
    window = config.get("sliding_window", family.window)
    if window is None or (family.window_has_switch and not switch):
        return
    if whole_number(config, "sliding_window", window) < whole_number(config, "max_position_embeddings"):
        raise UnsupportedModel(
            f"config.json's sliding_window is {window} (use_sliding_window: {switch}), and this decoder attends to the "
            f"whole context; lower max_position_embeddings to {window} to use the model up to there"
        )


def _value(config: Mapping, name: str, default: object) -> object:
    value = config.get(name, default)
    if value is REQUIRED or (value is None and default is REQUIRED):
        raise UnsupportedModel(f"config.json does not say {name}")
    return value


def _unexpected(name: str, value: object, expected: str) -> UnsupportedModel:
    return UnsupportedModel(f"config.json's {name} is {value!r} ({type(value).__name__}), and {expected} is expected")


def whole_number(config: Mapping, name: str, default: object = REQUIRED) -> int:
    """A field that is a whole number of at least 1; null is the same as no field."""
    value = _value(config, name, default)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise _unexpected(name, value, "a whole number ≥ 1")
    return value


def number(config: Mapping, name: str, default: object = REQUIRED) -> float:
    """A field that is a finite number above zero; null is the same as no field."""
    value = _value(config, name, default)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise _unexpected(name, value, "a finite number > 0")
    return float(value)


def flag(config: Mapping, name: str, default: bool) -> bool:
    """A field that is true or false; null is the same as no field."""
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise _unexpected(name, value, "true or false")
    return default if value is None else value
