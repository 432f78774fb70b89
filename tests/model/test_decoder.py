import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.ops import causal_attention, rotate
from minilib.model.rope import Llama3Scaling, inverse_frequencies, rotation
from tests.model.oracle import LLAMA_31, logits, places, tokens
from tests.model.random_weights import randomize

CONFIG = ModelConfig(97, 48, 80, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, max_position=512)
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 32)


def decoder(**changes) -> Decoder:
    """With weights large enough that every part moves the logits."""
    return randomize(Decoder(ModelConfig(**{**CONFIG.__dict__, **changes})).eval(), seed=3, norms=True)


def flat_attention(layer, q, k, v):
    """Causal attention of one flat text (tokens, heads, head_dim), written out, keys and values repeated by hand."""
    repeat = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        keys, values = k[:, head // repeat], v[:, head // repeat]
        scores = q[:, head] @ keys.T / math.sqrt(q.shape[-1])
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out[:, head] = scores.masked_fill(later, -math.inf).softmax(-1) @ values
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_heads_are_heads_repeated(kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 6, 16, generator=generator)
    k, v = torch.randn(2, 2, 9, kv_heads, 16, generator=generator)
    expected = torch.stack([flat_attention(0, *text) for text in zip(q, k, v, strict=True)])
    torch.testing.assert_close(causal_attention(0, q, k, v), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_flat_tokens_give_the_logits_of_a_batch(qk_norm):
    model, text = decoder(qk_norm=qk_norm), tokens(30, batch=1)
    batch = logits(model, text)
    flat = model(text[0], places(text)[0], flat_attention)
    assert batch.shape == (1, 30, 97) and flat.shape == (30, 97)
    torch.testing.assert_close(flat, batch[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_causal_attention_of_flat_tokens_is_right_or_refused():
    model, text = decoder(num_kv_heads=6), tokens(30, batch=1)
    try:
        flat = model(text[0], places(text)[0], causal_attention)
    except ValueError:
        return
    torch.testing.assert_close(flat, logits(model, text)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_texts_share_one_flat_row():
    """What serving does: two texts back to back, each with its own positions."""
    model, first, second = decoder(), tokens(7, batch=1), tokens(11, batch=1, seed=5)

    def attention(layer, q, k, v):
        return torch.cat([flat_attention(layer, q[part], k[part], v[part]) for part in (slice(7), slice(7, 18))])

    row = model(torch.cat((first, second), 1)[0], torch.cat((places(first), places(second)), 1)[0], attention)
    torch.testing.assert_close(row[:7], logits(model, first)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(row[7:], logits(model, second)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_batch_has_empty_logits():
    model = Decoder(ModelConfig(97, 48, 80, 2, 6, 2, 8, 64, qk_norm=True))
    for shape in ((0, 8), (8, 0), (0,)):
        empty = torch.empty(shape, dtype=torch.int64)
        assert model(empty, empty, lambda layer, q, k, v: q).shape == (*shape, 97)


def test_only_the_logits_of_these_indices_are_computed():
    model, text = decoder(), tokens(20, batch=2)
    seen = []
    model.unembed.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    everything = logits(model, text).flatten(0, 1)
    indices = torch.tensor([39, 0, 19, 19])
    some = model(text, places(text), causal_attention, indices)
    torch.testing.assert_close(some, everything[indices], rtol=1e-5, atol=1e-5)
    assert seen == [(2, 20, 97), (4, 97)]
    assert model(text, places(text), causal_attention, indices[:0]).shape == (0, 97)


@torch.no_grad()
def test_attention_is_asked_once_a_layer_in_order_with_the_shapes_promised():
    model, text, asked = decoder(num_layers=3), tokens(5, batch=2), []

    def attention(layer, q, k, v):
        asked.append((layer, q.shape, k.shape, v.shape))
        return causal_attention(layer, q, k, v)

    model(text, places(text), attention)
    assert asked == [(layer, (2, 5, 6, 16), (2, 5, 2, 16), (2, 5, 2, 16)) for layer in range(3)]


@torch.no_grad()
def test_normalised_queries_and_keys_do_not_care_how_large_they_were():
    text = tokens(20)
    for qk_norm in (True, False):
        model = decoder(qk_norm=qk_norm, norm_eps=1e-12)
        assert (model.layers[0].q_norm is not None) == qk_norm
        before = logits(model, text)
        for layer in model.layers:
            layer.qkv.weight[: (6 + 2) * 16] *= 3  # queries and keys, not values
        assert torch.allclose(logits(model, text), before, atol=1e-4) == qk_norm


@torch.no_grad()
def test_qk_norm_is_an_rms_norm_over_each_head_before_the_turn():
    model, text, seen = decoder(qk_norm=True), tokens(6), []

    def attention(layer, q, k, v):
        seen.append((q, k))
        return causal_attention(layer, q, k, v)

    model(text, places(text), attention)
    layer = model.layers[0]
    x = model.embed(text)
    x = x * (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt() * layer.attention_norm.weight
    for rows, norm, found in ((slice(96), layer.q_norm, seen[0][0]), (slice(96, 128), layer.k_norm, seen[0][1])):
        heads = (x @ layer.qkv.weight[rows].T).unflatten(-1, (-1, 16))
        heads = heads * (heads.square().mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt() * norm.weight
        expected = rotate(heads, rotation(places(text), model.inv_freq, torch.float32))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama 3.1"])
def test_rotary_embedding_is_that_of_transformers(scaling):
    rope = LLAMA_31 if scaling else {"rope_type": "default", "rope_theta": 500.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, max_position_embeddings=512, rope_parameters=rope))
    mine = inverse_frequencies(16, 500.0, scaling)
    torch.testing.assert_close(mine, theirs.inv_freq, rtol=1e-6, atol=0)
    if scaling:
        plain = inverse_frequencies(16, 500.0)
        kept, divided = torch.isclose(mine, plain), torch.isclose(mine, plain / 8)
        assert kept.any() and divided.any() and not (kept | divided).all()  # all three cases are met

    positions = torch.tensor([[0, 1, 2, 31, 32, 33, 300, 511]])
    x = torch.randn(1, 8, 6, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = theirs(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, rotation(positions, mine, x.dtype)), expected, rtol=1e-4, atol=1e-4)


def test_only_the_distance_of_two_positions_matters():
    q, k = torch.randn(2, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = inverse_frequencies(16, 10_000.0).double()

    def likeness(at_q, at_k):
        turned = [rotate(x, rotation(torch.tensor(at), turns, x.dtype)) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    assert likeness(9, 4) == pytest.approx(likeness(405, 400).item(), abs=1e-9)
    assert likeness(9, 4) != pytest.approx(likeness(9, 5).item(), abs=1e-3)


def test_a_change_of_dtype_leaves_the_positions_alone():
    model = decoder().to(torch.bfloat16)
    found, _ = rotation(torch.tensor([509]), model.inv_freq, torch.bfloat16)
    expected, _ = rotation(torch.tensor([509]), inverse_frequencies(16, 10_000.0), torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("at", [0, 11, 19])
def test_a_later_token_changes_no_earlier_logit(at):
    model, text = decoder(), tokens(20)
    changed = text.clone()
    changed[:, at] = (text[:, at] + 1) % 97
    before, after = logits(model, text), logits(model, changed)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.isclose(before[:, at:], after[:, at:]).all(-1).any()  # and every later one hears of it


def test_texts_of_a_batch_do_not_hear_each_other():
    model, text = decoder(), tokens(20)
    together, alone = logits(model, text), logits(model, text[1:])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_weights_follow_from_the_seed_alone():
    first = Decoder(CONFIG).state_dict()
    torch.manual_seed(99)
    second, other = Decoder(CONFIG), Decoder(CONFIG)
    other.initialize(seed=1)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.state_dict().items())
    assert not torch.equal(other.embed.weight, second.embed.weight)
    other.initialize()
    assert torch.equal(other.embed.weight, second.embed.weight)


def test_what_writes_into_the_residual_stream_starts_smaller():
    model = Decoder(ModelConfig(**{**CONFIG.__dict__, "hidden_size": 128, "intermediate_size": 256, "num_layers": 8}))
    for layer in model.layers:
        for linear, std in ((layer.qkv, 0.02), (layer.gate_up, 0.02), (layer.project, 0.005), (layer.down, 0.005)):
            assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
        assert torch.equal(layer.attention_norm.weight, torch.ones(128))


def test_initialising_again_forgets_everything():
    model = decoder()
    model.initialize()
    fresh = Decoder(CONFIG).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_embeddings_are_one_tensor():
    tied, untied = decoder(tie_embeddings=True), decoder(tie_embeddings=False)
    assert tied.unembed.weight is tied.embed.weight
    assert untied.unembed.weight is not untied.embed.weight
    assert not any("inv_freq" in name for name in untied.state_dict())  # computed, so in no checkpoint


def test_double_precision_runs_and_single_is_close_to_it():
    model, text = decoder(), tokens(20)
    single = logits(model, text)
    double = logits(model.double(), text)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


def test_gradients_are_those_of_finite_differences():
    model, text = decoder(num_layers=1, qk_norm=True).double(), tokens(6, batch=1)

    def loss():
        out = model(text, places(text), causal_attention)
        return F.cross_entropy(out[:, :-1].flatten(0, 1), text[:, 1:].flatten())

    loss().backward()
    for parameter in model.parameters():
        assert isinstance(parameter, nn.Parameter)
        index = parameter.grad.abs().argmax()  # embeddings of tokens not seen have none
        flat = parameter.data.view(-1)
        kept, step = flat[index].item(), 1e-6
        with torch.no_grad():
            flat[index] = kept + step
            above = loss()
            flat[index] = kept - step
            below = loss()
            flat[index] = kept
        slope = ((above - below) / (2 * step)).item()
        assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-4)
