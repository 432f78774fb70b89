"""A tiny decoder whose small operations are kernels in Triton's interpreter, against the same one in plain torch."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minilib.kernels.rowwise import rms_norm, rotary, swiglu
from minilib.kernels.workbench.dispatch import interpreted, launch
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import causal_attention
from tests.model.random_weights import randomize

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1, with which make test runs it")
CONFIG = ModelConfig(31, 24, 20, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=6, max_position=64)
TOLERANCE = 2e-5  # of 1 + |value|, in fp32


def weighty(config: ModelConfig) -> Decoder:
    """With weights large enough that every part moves the logits, the same for every choice of kernels."""
    return randomize(Decoder(config), seed=0, norms=True)


def outcome(config: ModelConfig, precision: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Logits, loss and every parameter's gradient; the last of a batch's logits are wanted alone."""
    model = weighty(config)
    text = torch.randint(config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(7).expand(2, 7) + torch.tensor([[0], [20]])
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        logits = model(text[:, :-1], positions, causal_attention)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())
    loss.backward()
    return {"logits": logits, "loss": loss} | {name: p.grad for name, p in model.named_parameters()}


def assert_agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("qk_norm", [True, False])
def test_logits_loss_and_gradients_are_those_of_plain_torch(qk_norm):
    config = replace(CONFIG, qk_norm=qk_norm)
    assert_agree(outcome(replace(config, kernels="interpreted")), outcome(config), TOLERANCE)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_experts_are_grouped_products_there_too(gate):
    """Some of the experts see tokens, the others none."""
    config = replace(CONFIG, moe=MoEConfig(24, 2, 12, num_shared_experts=1, gate=gate))
    found, expected = outcome(replace(config, kernels="interpreted")), outcome(config)
    idle = (expected["layers.0.moe.down.weight"].abs().sum((1, 2)) == 0).sum()
    assert 0 < idle < 24 and (found["layers.0.moe.down.weight"].abs().sum((1, 2)) == 0).sum() == idle
    assert_agree(found, expected, TOLERANCE)


def test_under_autocast_too():
    """Half of the operands are bf16 then; the interpreter cuts it off where torch rounds it."""
    config = replace(CONFIG, qk_norm=True)
    assert_agree(outcome(replace(config, kernels="interpreted"), torch.bfloat16), outcome(config, torch.bfloat16), 6e-2)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_small_operation_is_one_kernel_there_and_one_back(qk_norm, monkeypatch):
    launches = Counter()

    def counted(kernel, *arguments, **options):
        launches[kernel] += 1
        launch(kernel, *arguments, **options)

    for op in (rms_norm, rotary, swiglu):
        monkeypatch.setattr(op, "launch", counted)
    outcome(replace(CONFIG, qk_norm=qk_norm, kernels="interpreted"))
    layers, norms = CONFIG.num_layers, 4 if qk_norm else 2
    assert launches[rms_norm.forward] == launches[rms_norm.backward] == norms * layers + 1
    turns = 2 if qk_norm else 1  # queries and keys turn together if they are in one piece, there and back
    assert launches[rotary.turn] == 2 * turns * layers
    assert launches[swiglu.forward] == launches[swiglu.backward] == layers


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_attends_and_takes_its_loss_by_kernels(precision, monkeypatch):
    """Heads of 16, for which there is a kernel; attention and loss are the model's own choice."""
    config = replace(CONFIG, head_dim=16, qk_norm=True)
    found = {}
    for kernels in ("interpreted", "torch"):
        model = weighty(replace(config, kernels=kernels))
        text = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
        if kernels == "interpreted":  # nothing of plain torch's is left to call
            for name in ("scaled_dot_product_attention", "cross_entropy", "rms_norm", "silu"):
                monkeypatch.setattr(F, name, None)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = model.loss(text[:, :-1], torch.arange(19).expand(2, 19), text[:, 1:])
        loss.backward()
        monkeypatch.undo()
        found[kernels] = {"loss": loss} | {name: p.grad for name, p in model.named_parameters()}
    assert_agree(found["interpreted"], found["torch"], TOLERANCE if precision == torch.float32 else 6e-2)


@torch.no_grad()
def test_flat_tokens_as_in_serving():
    text = torch.randint(31, (7,), generator=torch.Generator().manual_seed(1))

    def attention(layer, q, k, v):
        return q + k + v

    plain, kernels = (
        weighty(replace(CONFIG, kernels=kernels))(text, torch.arange(7), attention, torch.tensor([6, 0]))
        for kernels in ("torch", "interpreted")
    )
    torch.testing.assert_close(kernels, plain, rtol=TOLERANCE, atol=TOLERANCE)
