"""Latent attention in both forms against transformers' DeepseekV3 with the same weights, and what a step costs."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from minilib.model.latent_attention import LatentAttention, LatentCache, LatentConfig, decode_cost
from tests.model.random_weights import randomize

SHAPE = {"kv_lora_rank": 16, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
LATENT = LatentConfig(hidden_size=48, num_heads=4, **SHAPE)
ATOL = 2e-6  # in float32, of numbers around 1
V3 = LatentConfig(7168, 128, 512, 128, 64, 128, q_lora_rank=1536)
FORMS = pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
VARIANTS = pytest.mark.parametrize(
    ("q_lora_rank", "rope_interleave"), [(None, True), (24, True), (None, False), (24, False)]
)


def pair(q_lora_rank, rope_interleave, dtype=torch.float32):
    """transformers' module and ours on the same random weights, and transformers' rotations by positions."""
    shared = {"q_lora_rank": q_lora_rank, "rope_interleave": rope_interleave}
    config = DeepseekV3Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1, **SHAPE, **shared
    )
    config._attn_implementation = "eager"
    theirs = randomize(DeepseekV3Attention(config, 0).to(dtype), seed=1, norms=True).eval()
    ours = LatentAttention(LatentConfig(hidden_size=48, num_heads=4, **SHAPE, **shared)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, DeepseekV3RotaryEmbedding(config)


def inputs(tokens, batch=2, dtype=torch.float32):
    return torch.randn(batch, tokens, 48, generator=torch.Generator().manual_seed(tokens), dtype=dtype)


@torch.no_grad()
def expected(theirs, rotary, x, start=0, cache=None):
    """What transformers' module says of tokens behind `start` others that its cache holds."""
    positions = torch.arange(start, start + x.shape[1])[None]
    mask = torch.full((x.shape[1], start + x.shape[1]), -math.inf, dtype=x.dtype).triu(start + 1)
    return theirs(x, rotary(x, positions), mask[None, None], cache=cache)[0]


@FORMS
@VARIANTS
@torch.no_grad()
def test_a_prompt_and_every_step_behind_it(absorbed, q_lora_rank, rope_interleave):
    theirs, ours, rotary = pair(q_lora_rank, rope_interleave)
    cache, reference = LatentCache(), DynamicCache()
    for count in (11, 1, 1, 5, 1):
        x, start = inputs(count), cache.length
        found = ours(x, cache, absorbed)
        torch.testing.assert_close(found, expected(theirs, rotary, x, start, reference), rtol=0, atol=ATOL)
        layer = reference.layers[0]
        assert cache.state.shape == (2, start + count, 16 + 6)
        assert cache.nbytes == layer.keys.nbytes + layer.values.nbytes == 2 * (start + count) * 22 * 4
    kept = torch.cat((layer.keys, layer.values), dim=-1)[:, 0]
    torch.testing.assert_close(cache.state, kept, rtol=0, atol=ATOL)


@VARIANTS
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
@torch.no_grad()
def test_both_forms_are_one_function(q_lora_rank, rope_interleave, dtype, atol):
    """Also one after the other on one cache: a prompt expanded, then steps absorbed, as servers do."""
    ours = pair(q_lora_rank, rope_interleave, dtype)[1]
    x = inputs(20, dtype=dtype)
    whole = ours(x)
    torch.testing.assert_close(ours(x, absorbed=True), whole, rtol=0, atol=atol)
    cache = LatentCache()
    parts = [ours(x[:, :15], cache)] + [ours(x[:, at : at + 1], cache, absorbed=True) for at in range(15, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=atol)


@torch.no_grad()
def test_positions_and_their_pairing_matter():
    """Else the comparisons above would say nothing of them."""
    weights = pair(None, True)[1].state_dict()
    x, found = inputs(12), []
    for interleave, theta in ((True, 10_000.0), (False, 10_000.0), (True, 3.0)):
        shape = {"rope_interleave": interleave, "rope_theta": theta}
        module = LatentAttention(LatentConfig(hidden_size=48, num_heads=4, **SHAPE, **shape))
        module.load_state_dict(weights)
        found.append(module(x))
    assert min((found[0] - other).abs().max() for other in found[1:]) > 0.01


@pytest.mark.parametrize("absorbed", [False, True])
def test_gradients_reach_every_weight(absorbed):
    ours = pair(24, True)[1]
    ours(inputs(5), absorbed=absorbed).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())


class Counting(TorchFunctionMode):
    """Counts the FLOPs of products from the shapes of what goes in, and the numbers that they read or write.

    Attributes:
        weights: numbers of weights read.
        expanded: numbers of all heads' keys and values, written once and read once.
        read: what attention or a projection reads of tokens kept.
    """

    def __init__(self):
        super().__init__()
        self.flops, self.weights, self.expanded, self.read = 0, 0, 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.__name__ == "linear":
            x, weight = args[:2]
            self.flops += 2 * x.numel() * weight.shape[0]
            self.weights += weight.numel()
        elif func.__name__ in ("matmul", "__matmul__"):
            self.flops += 2 * out.numel() * args[0].shape[-1]
            self.weights += args[1].numel()
        elif func.__name__ == "scaled_dot_product_attention":
            q, k, v = args[:3]
            self.flops += 2 * q[..., 0].numel() * k.shape[-2] * (k.shape[-1] + v.shape[-1])
            self.read.append(k)
            if k.shape[1] > 1:  # else keys and values are the state itself
                self.expanded += 2 * (k.numel() + v.numel())
        elif func.__name__ == "split":
            self.read.append(args[0])
        return out


@FORMS
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize(("context", "batch"), [(1, 1), (2, 1), (9, 3), (64, 2)])
@torch.no_grad()
def test_a_step_costs_what_its_shapes_say(absorbed, q_lora_rank, context, batch):
    ours, cache = pair(q_lora_rank, True)[1], LatentCache()
    if context > 1:
        ours(inputs(context - 1, batch), cache)
    with Counting() as counted:
        ours(inputs(1, batch), cache, absorbed)
    state = cache.state.numel()
    kept = [read for read in counted.read if read.data_ptr() == cache.state.data_ptr()]
    assert [read.numel() for read in kept] == [state], "the state is read whole, and once"
    cost = decode_cost(ours.config, context, batch, absorbed, "fp32")
    assert cost.flops == counted.flops
    assert cost.bytes == 4 * (counted.weights + state + counted.expanded)


def test_a_decode_step_of_deepseek_v3():
    """8,192 tokens of context: expanding every one of them anew costs 104 times the FLOPs of the absorbed form."""
    expanded, absorbed = (decode_cost(V3, 8192, absorbed=form) for form in (False, True))
    weights = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 128 * 128 * 7168
    assert absorbed.flops == 2 * (weights + 512 * 128 * 256 + 8192 * 128 * (576 + 512))
    assert expanded.flops == 2 * (weights + 8192 * (512 * 128 * 256 + 128 * 320))
    assert absorbed.bytes == 2 * (weights + 512 * 128 * 256 + 8192 * 576)
    assert expanded.bytes - absorbed.bytes == 2 * 8192 * 2 * 128 * 320
    assert expanded.flops / absorbed.flops == pytest.approx(103.9, abs=0.05)
    assert expanded.bytes / absorbed.bytes == pytest.approx(4.50, abs=0.005)
    assert V3.cached_values == 576 and V3.expanded_values == 40_960


@pytest.mark.parametrize(
    "change", [{"kv_lora_rank": 0}, {"v_head_dim": 1.5}, {"qk_rope_head_dim": 5}, {"q_lora_rank": 0}]
)
def test_impossible_shapes_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        LatentConfig(**{"hidden_size": 48, "num_heads": 4, **SHAPE, **change})


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0)])
def test_a_step_has_a_context_and_a_batch(context, batch):
    with pytest.raises(ValueError, match="context ≥ 1 and batch ≥ 1"):
        decode_cost(LATENT, context, batch)
