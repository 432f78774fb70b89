"""The layer against transformers' and against one that sends every token through every expert; the decoder with it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe import MoE
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import Ops
from tests.model.oracle import logits, places, tokens
from tests.model.random_weights import randomize
from tests.model.test_decoder import flat_attention

HIDDEN, WIDTH, EXPERTS = 24, 20, 8


def layer(hidden=HIDDEN, seed=0, **config) -> MoE:
    """With a bias on every expert, weights large enough that every part matters, and its routings checked."""
    torch.manual_seed(seed)
    moe = MoE(MoEConfig(**{"num_experts": EXPERTS, "top_k": 2, "intermediate_size": WIDTH, **config}), hidden, Ops())
    moe.router.bias.uniform_(-0.1, 0.1)
    moe.router.register_forward_hook(lambda router, given, routing: routing.check_invariants())
    return moe


def batch(*shape, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# transformers


def mixtral(top_k):
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": top_k, "intermediate_size": WIDTH}
    return MixtralSparseMoeBlock(MixtralConfig(hidden_size=HIDDEN, **sizes)), {"top_k": top_k}


def qwen3(top_k, normalize):
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": top_k, "moe_intermediate_size": WIDTH}
    config = Qwen3MoeConfig(hidden_size=HIDDEN, norm_topk_prob=normalize, **sizes)
    return Qwen3MoeSparseMoeBlock(config), {"top_k": top_k, "normalize": normalize}


def deepseek(top_k, groups, top_groups, shared, scale=1.0):
    sizes = {"n_routed_experts": EXPERTS, "num_experts_per_tok": top_k, "moe_intermediate_size": WIDTH}
    groups = {"n_group": groups, "topk_group": top_groups}
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_shared_experts=shared, norm_topk_prob=True, routed_scaling_factor=scale, **sizes, **groups
    )
    ours = {"num_groups": groups["n_group"], "top_groups": top_groups, "num_shared_experts": shared}
    ours["routed_scaling_factor"] = scale
    return DeepseekV3MoE(config), {"top_k": top_k, "gate": "sigmoid", **ours}


def copied(theirs: nn.Module, **config) -> MoE:
    """Ours with transformers' weights, which keeps matrices the other way round."""
    ours = layer(**config)
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        ours.router.bias.copy_(getattr(theirs.gate, "e_score_correction_bias", torch.zeros(EXPERTS)))
        ours.gate_up.weight.copy_(theirs.experts.gate_up_proj.mT)
        ours.down.weight.copy_(theirs.experts.down_proj.mT)
        if hasattr(theirs, "shared_experts"):
            shared = theirs.shared_experts
            ours.shared_gate_up.weight.copy_(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)))
            ours.shared_down.weight.copy_(shared.down_proj.weight)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "args"),
    [(mixtral, (2,)), (mixtral, (1,)), (qwen3, (3, True)), (qwen3, (3, False)), (qwen3, (EXPERTS, False))]
    + [(deepseek, (2, 1, 1, 1)), (deepseek, (3, 4, 2, 2)), (deepseek, (2, 2, 1, 1))]
    + [(deepseek, (3, 4, 2, 1, 2.5)), (deepseek, (1, 1, 1, 1, 0.5))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_outputs_and_gradients_are_those_of_transformers(make, args, dtype):
    theirs, config = make(*args)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        for bias in theirs.buffers():  # DeepSeek's; what it changes is tested beside this file
            bias.uniform_(-0.2, 0.2, generator=generator)
    theirs, ours = theirs.to(dtype), copied(theirs, **config).to(dtype)
    x, way = batch(3, 17, HIDDEN, dtype=dtype), batch(3, 17, HIDDEN, seed=5, dtype=dtype)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = theirs(x), ours(y)
    close = {"rtol": 1e-4, "atol": 1e-5}  # they compute weights in float32, also in float64
    torch.testing.assert_close(found, expected, **close)
    (expected * way).sum().backward()
    (found * way).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, **close)
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, **close)
    torch.testing.assert_close(ours.gate_up.weight.grad, theirs.experts.gate_up_proj.grad.mT, **close)
    torch.testing.assert_close(ours.down.weight.grad, theirs.experts.down_proj.grad.mT, **close)


# Every token through every expert


def dense(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Weights of zero where a token is not with an expert; who is kept comes from the router, weights do not."""
    config, scores = moe.router.config, x @ moe.router.weight.T
    scores = scores.softmax(-1) if config.gate == "softmax" else scores.sigmoid()
    with torch.no_grad():
        routing = moe.router(x)
        kept = torch.zeros_like(scores)
        kept[routing.tokens, torch.repeat_interleave(routing.counts)] = 1
    weights = scores * kept
    if config.normalize and config.choice == "token":
        chosen = torch.zeros_like(scores).scatter(1, (scores + moe.router.bias).topk(config.top_k).indices, 1.0)
        weights = weights / (scores * chosen).sum(-1, keepdim=True)
    gates, ups = torch.einsum("th,ehw->etw", x, moe.gate_up.weight).chunk(2, -1)
    answers = torch.einsum("etw,ewh->eth", F.silu(gates) * ups, moe.down.weight)
    mixed = torch.einsum("te,eth->th", weights, answers)
    if moe.shared_gate_up is not None:
        gate, up = moe.shared_gate_up(x).chunk(2, -1)
        mixed = mixed + moe.shared_down(F.silu(gate) * up)
    return mixed


KINDS = {
    "softmax": {},
    "switch": {"top_k": 1, "normalize": False},
    "sigmoid and shared experts": {"gate": "sigmoid", "top_k": 3, "num_shared_experts": 2},
    "all experts": {"top_k": EXPERTS},
    "one expert": {"num_experts": 1, "top_k": 1},
    "drop by position": {"capacity_factor": 0.5},
    "drop by probability": {"capacity_factor": 0.5, "drop": "probability", "normalize": False},
    "experts choose": {"choice": "expert", "capacity_factor": 1.0, "num_shared_experts": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_a_dense_mixture(kind):
    moe, x = layer(**KINDS[kind]).double(), batch(19, HIDDEN, dtype=torch.float64)
    way, results = batch(19, HIDDEN, seed=5, dtype=torch.float64), []
    for compute in (moe, lambda x: dense(moe, x)):
        moe.zero_grad()
        given = x.clone().requires_grad_()
        out = compute(given)
        (out * way).sum().backward()
        results.append([out.detach(), given.grad, *(parameter.grad for parameter in moe.parameters())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    if kind.startswith("drop"):
        assert moe.router(x).dropped > 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid and shared experts", "drop by position", "experts choose"])
def test_gradients_are_those_of_finite_differences(kind):
    moe = layer(hidden=4, **{**KINDS[kind], "num_experts": 3, "intermediate_size": 2}).double()
    moe.router._forward_hooks.clear()
    names = [name for name, _ in moe.named_parameters()]
    x = batch(4, 4, dtype=torch.float64).requires_grad_()

    def out(x, *parameters):
        return functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(out, (x, *moe.parameters()))


def test_leading_dimensions_do_not_matter():
    moe, x = layer(num_shared_experts=1), batch(2, 3, 5, HIDDEN)
    torch.testing.assert_close(moe(x), moe(x.view(30, HIDDEN)).view(x.shape))
    torch.testing.assert_close(moe(x.transpose(0, 2)), moe(x).transpose(0, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_no_token_has_gradients_of_zero(kind):
    moe, x = layer(**KINDS[kind]), torch.zeros(2, 0, HIDDEN, requires_grad=True)
    out = moe(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(not parameter.grad.any() for parameter in moe.parameters()) and x.grad.shape == x.shape


# Identity


def sent_back(rows, offsets, experts):
    """An exchange whose experts change nothing."""
    return rows


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_identity_experts_give_back_what_came(gate):
    x = batch(50, HIDDEN)
    for top_k in (1, 2, 3, EXPERTS):
        moe = layer(top_k=top_k, gate=gate)
        moe.exchange = sent_back
        torch.testing.assert_close(moe(x), x, rtol=1e-6, atol=1e-6)
        assert top_k > 1 or torch.equal(moe(x), x)  # a single weight is exactly one
        nn.init.zeros_(moe.router.weight)
        assert top_k > 2 or torch.equal(moe(x), x)  # and so are two halves


def test_a_token_without_an_expert_is_zero_and_the_others_come_back():
    x = batch(50, HIDDEN)
    for drop in ("position", "probability"):
        moe = layer(top_k=1, capacity_factor=0.5, drop=drop)
        moe.exchange = sent_back
        kept = torch.zeros(50, dtype=torch.bool).index_fill(0, moe.router(x).tokens, True)
        assert 0 < kept.sum() < 50
        assert torch.equal(moe(x), x * kept[:, None])


def test_without_normalisation_weights_are_scores():
    moe, x = layer(top_k=EXPERTS, normalize=False), batch(50, HIDDEN)
    moe.exchange = sent_back
    torch.testing.assert_close(moe(x), x, rtol=1e-6, atol=1e-6)  # a softmax sums to one
    moe = layer(top_k=EXPERTS, normalize=False, gate="sigmoid")
    moe.exchange = sent_back
    torch.testing.assert_close(moe(x), x * moe.router(x).scores.sum(-1, keepdim=True))


# Precision


def test_under_autocast_the_same_tokens_go_the_same_way():
    moe, x = layer(num_shared_experts=1), batch(60, HIDDEN)
    seen = []
    moe.router.register_forward_hook(lambda router, given, routing: seen.append(routing))
    exact = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = moe(x)
        moe(x.bfloat16())
    assert torch.equal(seen[0].logits, seen[1].logits) and torch.equal(seen[0].tokens, seen[1].tokens)
    assert all(routing.scores.dtype == routing.weights.dtype == torch.float32 for routing in seen)
    assert 0 < (rough - exact).norm() / exact.norm() < 0.02
    rough.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


def test_half_precision_is_routed_in_single():
    moe = layer().bfloat16()
    found = moe.router(batch(60, HIDDEN).bfloat16())
    assert found.logits.dtype == torch.float32 and moe(batch(60, HIDDEN).bfloat16()).dtype == torch.bfloat16


# The decoder

MIXTURE = MoEConfig(6, 2, 24, num_shared_experts=1, gate="sigmoid")
CONFIG = ModelConfig(97, 48, 80, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, max_position=64, moe=MIXTURE)


def decoder(**changes) -> Decoder:
    """In float64: rounding decides no choice."""
    return randomize(Decoder(ModelConfig(**{**CONFIG.__dict__, **changes})).eval().double(), seed=3)


@pytest.mark.parametrize("at", [0, 11, 19])
def test_a_later_token_changes_no_earlier_logit(at):
    model, text = decoder(), tokens(20)
    changed = text.clone()
    changed[:, at] = (text[:, at] + 1) % 97
    before, after = logits(model, text), logits(model, changed)
    torch.testing.assert_close(before[:, :at], after[:, :at], rtol=0, atol=1e-12)
    assert not torch.isclose(before[:, at:], after[:, at:]).all(-1).any()


def test_flat_tokens_and_texts_alone_give_the_logits_of_a_batch():
    model, text = decoder(), tokens(20, batch=2)
    together = logits(model, text)
    for row, expected in zip(text, together, strict=True):
        with torch.no_grad():
            flat = model(row, places(row), flat_attention)
        torch.testing.assert_close(flat, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [MIXTURE, MoEConfig(4, 4, 8), MoEConfig(5, 1, 7), None], ids=str)
def test_parameters_are_counted(moe, tied):
    config = ModelConfig(**{**CONFIG.__dict__, "moe": moe, "tie_embeddings": tied, "qk_norm": tied})
    model = Decoder(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    asleep = 0
    for module in model.modules():
        if isinstance(module, MoE):
            one = module.gate_up.weight[0].numel() + module.down.weight[0].numel()
            asleep += one * (moe.num_experts - moe.top_k)
    assert config.num_active_parameters == config.num_parameters - asleep
    assert (asleep == 0) == (moe is None or moe.top_k == moe.num_experts)


def test_initialising_again_forgets_everything():
    """Biases that balancing has moved, too."""
    fresh, model = Decoder(CONFIG).state_dict(), decoder().float()
    for each in model.layers:
        each.moe.router.bias.fill_(0.5)
    model.initialize()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(name.endswith("router.bias") for name in fresh) == 2


def test_what_writes_into_the_residual_stream_starts_smaller():
    model = Decoder(ModelConfig(**{**CONFIG.__dict__, "num_layers": 8, "moe": MoEConfig(4, 2, 256, 1)}))
    for each in model.layers:
        small, other = (each.moe.down, each.moe.shared_down), (each.moe.gate_up, each.moe.shared_gate_up)
        assert all(linear.weight.std().item() == pytest.approx(0.005, rel=0.05) for linear in small)
        assert all(linear.weight.std().item() == pytest.approx(0.02, rel=0.05) for linear in other)


def test_it_is_built_on_the_meta_device_and_filled_later():
    with torch.device("meta"):
        model = Decoder(CONFIG)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu").initialize()
    model.load_state_dict(decoder().state_dict())
