"""Every family against transformers on the same random weights: logits, greedy tokens, and the way out and back."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minilib.model import weights
from minilib.model.config import ModelConfig, UnsupportedModel
from minilib.model.decoder import Decoder
from minilib.model.families import FAMILIES
from minilib.model.moe.config import MoEConfig
from minilib.model.stored.files import CheckpointError
from minilib.model.stored.layout import placements
from tests.model import oracle

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1000.0}
KINDS = {
    **{kind: (kind, {}) for kind in FAMILIES},
    **{f"{kind}, tied": (kind, {"tie_word_embeddings": True}) for kind in FAMILIES},
    "qwen2, one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2, as many kv heads": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "mistral, a window as long as the context": ("mistral", {"sliding_window": 512}),
    "mixtral, one expert a token": ("mixtral", {"num_experts_per_tok": 1}),
    "mixtral, every expert": ("mixtral", {"num_experts_per_tok": 6}),
    "mixtral, one expert": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen3_moe, normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe, odd sizes": ("qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12}),
}
TEXT = oracle.tokens(100)


def pair(kind, folder):
    """transformers' model, and ours read from what transformers wrote."""
    family, changes = KINDS[kind]
    theirs = oracle.of_family(family, **changes)
    theirs.save_pretrained(folder)
    return theirs, weights.load(folder)


def greedy(model, token_ids, count):
    for _ in range(count):
        token_ids = torch.cat((token_ids, oracle.logits(model, token_ids)[:, -1:].argmax(-1)), dim=1)
    return token_ids[:, -count:]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_are_those_of_transformers(kind, tmp_path):
    theirs, mine = pair(kind, tmp_path)
    expected = oracle.expected(theirs, TEXT)
    assert expected.std() > 0.5  # else closeness would mean nothing
    torch.testing.assert_close(oracle.logits(mine, TEXT), expected, rtol=0, atol=1e-4)
    start = oracle.tokens(7, seed=3)
    chosen = oracle.greedy(theirs, start, 32)
    if not mine.config.tie_embeddings:  # a tied model with random weights mostly repeats its last token
        assert chosen.unique().numel() > 4
    assert torch.equal(greedy(mine, start, 32), chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_from_what_save_wrote(kind, tmp_path):
    theirs, mine = pair(kind, tmp_path / "theirs")
    path = weights.save(mine, tmp_path / "mine", torch.float32)
    stored, before = load_file(path), load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[name], before[name]) for name in stored)
    again, report = AutoModelForCausalLM.from_pretrained(path.parent, output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected or of another shape
    again.set_attn_implementation("eager")
    torch.testing.assert_close(oracle.expected(again, TEXT), oracle.expected(theirs, TEXT), rtol=0, atol=1e-5)
    assert weights.load(path.parent).config == mine.config


@pytest.mark.parametrize(
    ("kind", "saved"), [(kind, "llama" if kind == "mistral" else kind) for kind in FAMILIES], ids=list(FAMILIES)
)
def test_a_family_is_written_as_itself_and_mistral_as_llama(kind, saved, tmp_path):
    _, mine = pair(kind, tmp_path)
    assert mine.config.to_hugging_face()["model_type"] == saved


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_stored_tensor_is_rounded_once_to_bf16(kind, tmp_path):
    oracle.of_family(kind).save_pretrained(tmp_path)
    mine = weights.load(tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in mine.state_dict().values()} == {torch.bfloat16}
    parameters, found = dict(mine.named_parameters()), {}
    for placement in placements(mine.config):
        found |= dict(placement.slices(parameters[placement.parameter]))
    stored = load_file(tmp_path / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name].bfloat16()) for name in stored)


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_counted_as_they_are(kind, tmp_path):
    theirs, mine = pair(kind, tmp_path)
    assert mine.config.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert mine.config.num_parameters == sum(parameter.numel() for parameter in mine.parameters())


def test_biases_start_at_zero_and_survive_the_way_out_and_back(tmp_path):
    model = Decoder(ModelConfig(97, 48, 80, 2, 6, 2, 16, 512, qkv_bias=True))
    assert all(not layer.qkv.bias.any() for layer in model.layers)
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv.bias.uniform_(-1, 1)
    weights.save(model, tmp_path, torch.float32)
    assert torch.equal(oracle.logits(weights.load(tmp_path), TEXT), oracle.logits(model, TEXT))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True, "qkv_bias": True},
        {"qkv_bias": True, "moe": MoEConfig(4, 2, 8)},
        {"moe": MoEConfig(4, 2, 8, normalize=False)},
        {"moe": MoEConfig(4, 2, 8, gate="sigmoid")},
        {"moe": MoEConfig(4, 2, 8, num_shared_experts=1)},
        {"moe": MoEConfig(4, 2, 8, routed_scaling_factor=2.5)},
        {"moe": MoEConfig(4, 2, 8, num_groups=2)},
        {"qk_norm": True, "moe": MoEConfig(4, 2, 8, capacity_factor=1.0)},
    ],
    ids=str,
)
def test_a_model_that_no_family_computes_is_not_written(changes, tmp_path):
    model = Decoder(ModelConfig(97, 48, 80, 2, 6, 2, 16, 512, **changes))
    with pytest.raises(UnsupportedModel, match="no supported family.*use Trainer.save"):
        weights.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_balanced_router_is_not_written(tmp_path):
    """Its bias decides who goes where, and the layout has no place for it."""
    model = Decoder(ModelConfig(97, 48, 80, 2, 6, 2, 16, 512, moe=MoEConfig(4, 2, 8)))
    model.layers[1].moe.router.bias[2] = 0.25
    with pytest.raises(CheckpointError, match="layers.1.moe.router.bias is not zero"):
        weights.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_missing_expert_is_named(kind, tmp_path):
    oracle.of_family(kind).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = max(name for name in stored if ".experts." in name)
    save_file({name: stored[name] for name in stored if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        weights.load(tmp_path)
