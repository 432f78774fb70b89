"""A packed model computes what the model does, whichever way its rows go."""

import copy

import pytest
import torch
from torch import nn

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.cpu import packing
from minilib.serving.cpu.packing import FewCallsRMSNorm, PackedLinear, packed


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("plain_rows", [0, 3])
def test_product_of_any_number_of_rows(rows, plain_rows):
    linear = nn.Linear(24, 40, bias=False)
    layer = PackedLinear(linear)
    layer.plain_rows = plain_rows
    x = torch.randn(rows, 24)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_norm_of_small_and_large_rows(scale):
    norm = nn.RMSNorm(48, eps=1e-5)
    nn.init.normal_(norm.weight)
    x, residual = (scale * torch.randn(5, 48) for _ in "xr")
    with torch.inference_mode():
        torch.testing.assert_close(FewCallsRMSNorm(norm)(x), norm(x), rtol=1e-5, atol=1e-6)
        y, total = FewCallsRMSNorm(norm)(x, residual)
        torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
        torch.testing.assert_close(y, norm(x + residual), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_a_packed_decoder_has_the_decoders_logits_and_leaves_it_alone(qk_norm, tie):
    config = ModelConfig(64, 32, 48, 2, 4, 2, 8, max_position=64, qk_norm=qk_norm, tie_embeddings=tie)
    model = Decoder(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    before = copy.deepcopy(model.state_dict())
    twin = packed(model)
    tokens = torch.randint(64, (9,))
    attention = lambda layer, q, k, v: q * k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1)  # noqa: E731
    with torch.inference_mode():
        expected = model(tokens, torch.arange(9), attention)
        torch.testing.assert_close(twin(tokens, torch.arange(9), attention), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, (nn.Linear, nn.RMSNorm)) for module in twin.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_packed_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    assert packed(model) is model


@pytest.mark.parametrize("faster_up_to", [0, 1, 3, 4])
def test_few_rows_go_the_way_that_was_measured_to_be_faster(monkeypatch, faster_up_to):
    """Clocks that say plain weights win up to so many rows."""
    layers = [PackedLinear(nn.Linear(8, 8, bias=False))]

    def fastest(run, times=4):
        run()
        return 1.0 if not layers[0].plain_rows or layers[0].plain_rows > faster_up_to else 0.5

    monkeypatch.setattr(packing, "_fastest", fastest)
    assert packing._plain_rows(layers) == faster_up_to
