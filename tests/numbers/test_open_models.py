"""The table of open models: sourced, consistent with the library's own counts, and computed as it says."""

import tomllib

import pytest

from minilib.model.config import ModelConfig
from minilib.numbers.machine import Machine
from minilib.numbers.open_models import ITEMSIZE, OPEN_MODELS, OpenModel, open_models, state_table

MODELS = open_models()
H200 = 141e9


def test_there_are_enough_models_and_each_has_sources():
    content = tomllib.loads(OPEN_MODELS.read_text(encoding="utf-8"))
    assert len(MODELS) >= 12 and {model.year for model in MODELS.values()} >= {2023, 2024, 2025, 2026}
    assert content["read"].startswith("2026-")
    for name, model in MODELS.items():
        assert model.config_source.startswith("https://") and model.weight_bytes > 1e9
        counted = "counted from" in model.weights
        assert counted or "https://" in model.weights, f"{name}: where is the size of its weights from?"


@pytest.mark.parametrize(
    "name", [name for name, model in MODELS.items() if "counted from config.json" in model.weights]
)
def test_weights_counted_from_a_config_are_those_that_the_decoder_would_have(name):
    config = {"rms_norm_eps": 1e-6, **MODELS[name].config}
    counted = ModelConfig.from_hugging_face(config)
    assert MODELS[name].weight_bytes == 2 * counted.num_parameters
    assert MODELS[name].state.values(1) == counted.kv_values_per_token
    assert f"{counted.num_parameters:,} parameters" in MODELS[name].weights


@pytest.mark.parametrize(("name", "norms"), [("gemma-2b", 2), ("gemma-7b", 2), ("gemma-2-27b", 4)])
def test_weights_of_gemma_counted_by_hand(name, norms):
    c = MODELS[name].config
    heads = 2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]
    layer = c["hidden_size"] * (heads * c["head_dim"] + 3 * c["intermediate_size"] + norms)
    parameters = c["num_hidden_layers"] * layer + c["hidden_size"] * (c["vocab_size"] + 1)
    assert MODELS[name].weight_bytes == 2 * parameters
    assert f"{parameters:,} parameters" in MODELS[name].weights


# bytes of the first token, of one behind all windows, and of 8,192 tokens, by hand from the published fields
BY_HAND = {
    "gemma-7b": (28 * 2 * 16 * 256 * 2,) * 2,
    "gemma-2b": (18 * 2 * 1 * 256 * 2,) * 2,
    "gemma-2-27b": (46 * 2 * 16 * 128 * 2, 23 * 2 * 16 * 128 * 2),
    "llama-3_1-8b": (32 * 2 * 8 * 128 * 2,) * 2,
    "llama-3_1-70b": (80 * 2 * 8 * 128 * 2,) * 2,
    "gpt-oss-120b": (36 * 2 * 8 * 64 * 2, 18 * 2 * 8 * 64 * 2),
    "deepseek-v3": (61 * 576 * 2,) * 2,
    "kimi-k2": (61 * 576 * 2,) * 2,
    "mimo-v2-flash": (2 * (9 * 4 + 39 * 8) * 320, 2 * 9 * 4 * 320),
    "gemma-4-26b": (2 * (25 * 2 * 8 * 256 + 5 * 2 * 2 * 512), 2 * 5 * 2 * 2 * 512),
    "glm-5_2": (2 * (78 * 576 + 21 * 128),) * 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_bytes_of_a_token_by_hand(name):
    state = MODELS[name].state
    assert (state.bytes_per_token(0), state.bytes_per_token(8191)) == BY_HAND[name]


def test_tokens_beside_the_weights():
    for model in MODELS.values():
        count = model.gpus(H200)
        assert count * H200 > model.weight_bytes and (count == 1 or count // 2 * H200 <= model.weight_bytes)
        sequences, state = model.tokens_per_gpu(H200, 8192) * count / 8192, model.state.nbytes(8192, ITEMSIZE)
        assert sequences == int(sequences)
        assert sequences * state <= count * H200 - model.weight_bytes < (sequences + 1) * state
    llama = MODELS["llama-3_1-8b"]
    assert llama.tokens_per_gpu(H200, 1) == (141_000_000_000 - 16_060_522_496) // 131_072
    assert MODELS["llama-3_1-70b"].gpus(H200) == 2, "its weights alone are larger than one H200"
    with pytest.raises(ValueError, match="memory_bytes must be above 0"):
        llama.gpus(0)
    for length in (0, 131_073):
        with pytest.raises(ValueError, match="takes sequences of 1 to 131,072 tokens"):
            llama.tokens_per_gpu(H200, length)


def test_the_words_for_attention():
    assert MODELS["gemma-7b"].attention == "multi-head, 16 : 16"
    assert MODELS["gemma-2b"].attention == "multi-query, 8 : 1"
    assert MODELS["gpt-oss-20b"].attention == "grouped-query, 64 : 8, 12 of 24 layers slide"
    assert MODELS["glm-5_2"].attention == "latent"


def test_the_table_has_a_row_for_each_model():
    table = state_table()
    assert len(table.rows) == len(MODELS)
    assert dict(zip(table.columns, table.rows[3], strict=True)) == {
        "model": "Llama 3.1 8B",
        "year": "2024",
        "attention": "grouped-query, 32 : 8",
        "bytes, first token": "131,072",
        "bytes, token 8,192": "131,072",
        "8,192 tokens": "1.07 GB",
        "h200s": "1",
        "tokens per h200": "950,272",
    }
    long = [row[0] for row in state_table(131_072).rows]
    assert (
        long == [model.title for model in MODELS.values() if model.max_position >= 131_072] and "Gemma 7B" not in long
    )
    assert Machine.datasheet("h200").memory_bytes == H200
    assert isinstance(next(iter(MODELS.values())), OpenModel)
