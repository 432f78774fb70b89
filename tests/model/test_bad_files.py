"""Files as people really have them: not fetched, cut, empty, of another version, or not what the index says."""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minilib.model import tokenizer, weights
from minilib.model.stored.files import CheckpointError, read_json
from tests.model import oracle

TEXT = oracle.tokens(30)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
HEAD, TABLE, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
WHOLE = tokenizer.train(["def f(x):\n    return x\n"] * 9, 270)


@pytest.fixture
def folder(tmp_path):
    """A Llama checkpoint of several shards."""
    oracle.llama().save_pretrained(tmp_path, max_shard_size="20KB")
    WHOLE.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def write_index(folder, **content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def rewrite(path, change):
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(stored)
    save_file(stored, path)


# Git LFS


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "a shard", "model.safetensors"])
def test_a_pointer_in_place_of_a_file_is_named(name, folder):
    path = min(folder.glob("model-*.safetensors")) if name == "a shard" else folder / name
    path.write_bytes(POINTER)
    with pytest.raises(
        CheckpointError, match=rf"{path.name} is a Git LFS pointer of {len(POINTER)} bytes.*git lfs pull"
    ):
        weights.load(folder)


def test_a_pointer_in_place_of_the_tokenizer_or_the_generation_config_is_named(folder):
    for name, read in (("tokenizer.json", tokenizer.load), ("generation_config.json", weights.eos_token_ids)):
        (folder / name).write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
            read(folder)


# JSON


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON: .*it has 0 bytes, download it anew"),
        (b'{"model_type": "lla', "is not JSON: .*it has 19 bytes"),
        ('{"model_type": "llama"}'.encode("utf-16"), "is not JSON in UTF-8.*save it as UTF-8"),
        ('{"model_type": "é"}'.encode("latin-1"), "is not JSON in UTF-8.*save it as UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"null", "holds no JSON object, but NoneType"),
        (b'"llama"', "holds no JSON object, but str"),
    ],
)
def test_what_is_no_json_object_is_named(content, said, folder):
    (folder / "config.json").write_bytes(content)
    for read in (weights.load, weights.eos_token_ids):
        with pytest.raises(CheckpointError, match=f"config.json {said}"):
            read(folder)


def test_a_byte_order_mark_is_no_obstacle(folder):
    path = folder / "config.json"
    content = read_json(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_json(path) == content
    weights.load(folder)


# The index


@pytest.mark.parametrize(
    "weight_map", [None, [], ["model.safetensors"], 3, "model.safetensors", {NORM: 3}, {NORM: None}]
)
def test_a_weight_map_that_is_none_is_named(weight_map, folder):
    write_index(folder, weight_map=weight_map)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json has a weight_map that does not lead from"):
        weights.load(folder)


def test_a_stale_copy_in_another_shard_does_not_count(folder):
    weight_map = index_of(folder)["weight_map"]
    expected = oracle.logits(weights.load(folder), TEXT)
    others = sorted({*weight_map.values()} - {weight_map[NORM]})
    assert min(others) < weight_map[NORM] or weight_map[NORM] < max(others)
    for other in others:  # those read before it, and those read after it
        rewrite(folder / other, lambda stored: stored.update({NORM: torch.zeros(48)}))
    assert torch.equal(oracle.logits(weights.load(folder), TEXT), expected)


def test_a_tensor_that_is_not_in_the_shard_that_the_index_names_is_named(folder):
    weight_map = index_of(folder)["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[NORM])
    write_index(folder, weight_map={**weight_map, NORM: other})
    with pytest.raises(CheckpointError, match=f"index.json says that {other} holds tensor {NORM}, and it does not"):
        weights.load(folder)


def test_a_tensor_that_the_index_does_not_know_is_a_tensor_too_many(folder):
    """transformers would load it, so the model computes something else."""
    shard = index_of(folder)["weight_map"][NORM]
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder / shard, lambda stored: stored.update({bias: torch.ones(48)}))
    with pytest.raises(CheckpointError, match=f"tensor {bias} has no place"):
        weights.load(folder)


# Tensors


def test_a_tied_model_may_store_the_output_projection_alone(tmp_path):
    oracle.llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda stored: stored.update({HEAD: stored.pop(TABLE)}))
    theirs, mine = AutoModelForCausalLM.from_pretrained(tmp_path), weights.load(tmp_path)
    assert mine.unembed.weight is mine.embed.weight
    torch.testing.assert_close(oracle.logits(mine, TEXT), oracle.expected(theirs, TEXT), rtol=0, atol=1e-4)


def test_a_tied_model_that_stores_neither_is_refused_by_name(tmp_path):
    oracle.llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda stored: stored.pop(TABLE))
    with pytest.raises(CheckpointError, match=f"tensor {TABLE} is missing"):
        weights.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.down_proj.weight"])
def test_quantized_weights_are_refused_by_name(name, dtype, tmp_path):
    oracle.llama().save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda stored: stored.update({name: stored[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} is stored as .*quantized.*F64, F32, F16, BF16"):
        weights.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_that_counts_by_itself_loads(dtype, tmp_path):
    oracle.llama().to(dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[NORM].dtype == dtype
    assert torch.equal(weights.load(tmp_path).norm.weight, stored[NORM].float())


# tokenizer.json

PANICS = {  # tokenizers 0.22 does not raise here, but panics
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]},
}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "tokenizer.json is not JSON.*it has 0 bytes, download it anew"),
        (WHOLE.to_str()[:500], "tokenizer.json is not JSON.*it has 500 bytes"),
        ("[]", "tokenizer.json holds no JSON object"),
        ("{}", "cannot read tokenizer.json of broken"),
        (json.dumps({**json.loads(WHOLE.to_str()), "version": "9.0"}), "tokenizers .* cannot read .*'9.0'.*install"),
        (json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}), "cannot read"),
        (json.dumps(PANICS), "cannot read tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(content, said, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        tokenizer.load(folder)


def test_an_interrupt_while_a_tokenizer_is_read_stays_an_interrupt(folder, monkeypatch):
    class Interrupted:
        def from_file(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.load(folder)
