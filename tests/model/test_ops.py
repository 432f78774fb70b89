"""Who computes the decoder's small operations: chosen by the config, refused if unknown, plain torch on a CPU."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.ops import KernelOps, Ops, causal_attention, choose_ops, rotate
from tests.model.oracle import places, tokens

CONFIG = ModelConfig(97, 48, 80, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, max_position=512)


def outcome(config, precision=torch.float32):
    """Logits, loss and every parameter's gradient."""
    model, text = Decoder(config), tokens(12)
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        logits = model(text, places(text), causal_attention)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten())
    loss.backward()
    return [logits, loss, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_a_cpu_the_kernels_fall_back_and_agree(qk_norm, precision, tolerance):
    """Under autocast as well, where what the kernels are given must be brought to one dtype, or they refuse it."""
    config = replace(CONFIG, qk_norm=qk_norm)
    plain, kernels = (outcome(replace(config, kernels=name), precision) for name in ("torch", "triton"))
    for ours, expected in zip(kernels, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_stay_half(dtype):
    model, text = Decoder(replace(CONFIG, qk_norm=True, kernels="triton")).to(dtype), tokens(5)
    assert model(text, places(text), causal_attention).dtype == dtype


def test_plain_torch_is_torch():
    ops, x, residual, weight = choose_ops("torch"), *torch.randn(2, 3, 8), torch.randn(8)
    assert type(ops) is Ops
    y, h = ops.rms_norm(x, weight, residual, 0.1)
    assert torch.equal(h, x + residual) and torch.equal(y, F.rms_norm(h, (8,), weight, 0.1))
    assert torch.equal(ops.rms_norm(x, weight, None, 0.1), F.rms_norm(x, (8,), weight, 0.1))
    assert torch.equal(ops.swiglu(x), F.silu(x[:, :4]) * x[:, 4:])
    rope = (torch.randn(3, 1, 8), torch.randn(3, 1, 8))
    assert torch.equal(ops.rotary(x[:, None], rope), rotate(x[:, None], rope))


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match="kernels is one of torch, triton, interpreted; got 'cuda'"):
        replace(CONFIG, kernels="cuda")


def test_the_interpreter_must_have_been_switched_on():
    model, text = Decoder(replace(CONFIG, kernels="interpreted")), tokens(5)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        model(text, places(text), causal_attention)


def test_kernels_are_no_part_of_the_shape(tmp_path):
    config = replace(CONFIG, kernels="triton")
    assert config == CONFIG and hash(config) == hash(CONFIG)
    assert config.to_hugging_face() == CONFIG.to_hugging_face()
    weights.save(Decoder(config), tmp_path)
    assert weights.load(tmp_path).config.kernels == "torch"
    for kernels in ("torch", "triton"):
        loaded = weights.load(tmp_path, kernels=kernels)
        assert loaded.config == config and loaded.config.kernels == kernels
        assert isinstance(loaded.layers[0].ops, KernelOps) == (kernels == "triton")


def test_a_model_with_kernels_can_be_copied_and_sent():
    model, text = Decoder(replace(CONFIG, kernels="triton")), tokens(5)
    expected = model(text, places(text), causal_attention)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(text, places(text), causal_attention), expected)


def test_a_model_without_kernels_loads_no_triton():
    """Triton decides when it is imported whether it interprets: a notebook may still want to choose."""
    code = (
        "import sys; from minilib.model.config import ModelConfig; from minilib.model.decoder import Decoder; "
        "Decoder(ModelConfig(9, 4, 4, 1, 1, 1, 2, 8)); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
