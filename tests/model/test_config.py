import pytest

from minilib.model.config import ModelConfig, UnsupportedModel
from minilib.model.decoder import Decoder
from minilib.model.rope import Llama3Scaling

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "max_position": 64,
}
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
STRETCH = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "attention_bias": False,
    "max_position_embeddings": 131072,
}
LLAMA = {**COMMON, "model_type": "llama", "rms_norm_eps": 1e-5, "mlp_bias": False, "pretraining_tp": 1}
LLAMA_4 = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": STRETCH}  # as transformers 4 wrote it
LLAMA_5 = {**LLAMA, "rope_parameters": {**STRETCH, "rope_theta": 500000.0}}  # as transformers 5 does
QWEN3 = {
    **COMMON,
    "model_type": "qwen3",
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
}
QWEN3_4 = {**QWEN3, "rope_theta": 1000000, "rope_scaling": None}
QWEN3_5 = {**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}}


@pytest.mark.parametrize("bad", [0, -1, 2.0, "4", None])
@pytest.mark.parametrize("name", SHAPE)
def test_every_size_is_a_whole_number_of_at_least_one(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be a whole number ≥ 1, got {bad!r}"):
        ModelConfig(**{**SHAPE, name: bad})


def test_sizes_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads.*got 4 and 3"):
        ModelConfig(**{**SHAPE, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="head_dim must be even.*got 5"):
        ModelConfig(**{**SHAPE, "head_dim": 5})


@pytest.mark.parametrize("config", [LLAMA_4, LLAMA_5], ids=["transformers 4", "transformers 5"])
def test_llama_reads_from_both_layouts(config):
    assert ModelConfig.from_hugging_face(config) == ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,  # left out of the file: hidden size over heads
        max_position=131072,
        rope_theta=500000.0,
        rope_scaling=SCALING,
        norm_eps=1e-5,
        qk_norm=False,
        tie_embeddings=False,  # transformers' default for Llama
    )


@pytest.mark.parametrize("config", [QWEN3_4, QWEN3_5], ids=["transformers 4", "transformers 5"])
def test_qwen3_reads_from_both_layouts(config):
    assert ModelConfig.from_hugging_face(config) == ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=131072,
        rope_theta=1000000.0,
        rope_scaling=None,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=True,
    )


def test_the_oldest_llama_has_no_key_value_heads_no_theta_and_calls_the_rope_type_type():
    old = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    config = ModelConfig.from_hugging_face({**old, "rope_scaling": None})
    assert (config.num_kv_heads, config.rope_theta, config.rope_scaling) == (32, 10_000.0, None)
    renamed = {"type": "llama3", **{key: value for key, value in STRETCH.items() if key != "rope_type"}}
    assert ModelConfig.from_hugging_face({**old, "rope_scaling": renamed}).rope_scaling == SCALING


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "'gemma2'.*llama, mistral, qwen2, qwen3, mixtral, qwen3_moe"),
        ({"model_type": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.from_hugging_face({**LLAMA, **changes})


@pytest.mark.parametrize(
    "lost", ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
)
def test_a_config_without_a_size_is_refused_by_name(lost):
    with pytest.raises(ValueError, match=f"(?s)config.*{lost}|{lost}.*config"):
        ModelConfig.from_hugging_face({name: value for name, value in LLAMA.items() if name != lost})


def test_a_rope_scaling_without_a_factor_is_refused_by_name():
    with pytest.raises(ValueError, match="low_freq_factor"):
        ModelConfig.from_hugging_face({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"tie_embeddings": False, "norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": SCALING},
        {"qk_norm": True, "head_dim": 10},
        {"qk_norm": True, "tie_embeddings": False, "rope_scaling": SCALING},
    ],
)
def test_a_config_survives_the_way_out_and_back(changes):
    config = ModelConfig(**{**SHAPE, **changes})
    written = config.to_hugging_face()
    assert ModelConfig.from_hugging_face(written) == config
    four = {name: value for name, value in written.items() if name != "rope_parameters"}
    five = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    assert ModelConfig.from_hugging_face(four) == config == ModelConfig.from_hugging_face(five)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_counted_as_they_are(tied, qk_norm):
    config = ModelConfig(**SHAPE, qk_norm=qk_norm, tie_embeddings=tied)
    assert config.num_parameters == sum(parameter.numel() for parameter in Decoder(config).parameters())


def test_llama_3_2_has_as_many_parameters_as_its_model_card_says():
    config = ModelConfig.from_hugging_face({**LLAMA_4, "tie_word_embeddings": True})
    assert config.num_parameters == 1_235_814_400  # meta-llama/Llama-3.2-1B


def test_a_token_leaves_a_key_and_a_value_per_layer_and_kv_head():
    config = ModelConfig(**SHAPE)
    assert config.kv_values_per_token == 72  # (key + value) · 3 layers · 2 heads · 6 numbers
    assert ModelConfig.from_hugging_face(QWEN3_4).kv_values_per_token == 2 * 16 * 8 * 128
