"""A packed model computes what the model did, holds its weights once, and leaves nobody with stale ones."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.files import CheckpointError
from minilib.serving.cpu.machine_code import WIDTH
from minilib.serving.cpu.packing import PackedLinear, PackedMatrix, PackedModel, pack
from minilib.serving.llm import LLM
from tests.serving.test_detokenizer import TRAINED


@pytest.mark.parametrize("outputs, depth", [(1, 1), (40, 24), (32, 7), (97, 130)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_of_any_number_of_rows(outputs, depth, bias):
    linear = nn.Linear(depth, outputs, bias=bias)
    layer = PackedLinear(PackedMatrix(linear.weight.detach()), linear.bias)
    x = torch.randn(41, depth)
    with torch.inference_mode():
        expected, got = linear(x), layer(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for rows in range(41):
            assert torch.equal(layer(x[:rows]), got[:rows]), "a row depends on how many there are"
        assert torch.equal(layer(x[:, None]), got[:, None])
        apart = torch.randn(5, 2 * depth)[:, ::2]
        torch.testing.assert_close(layer(apart), linear(apart), rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_finite_stay_in_their_row():
    matrix = PackedMatrix(torch.randn(33, 16))
    x = torch.randn(14, 16)
    expected = matrix.product(x)
    x[3, 2], x[13, 0] = torch.nan, torch.inf
    got = matrix.product(x)
    whole = [row for row in range(14) if row not in (3, 13)]
    assert torch.equal(got[whole], expected[whole])
    assert got[3].isnan().all() and not got[13].isfinite().any()


@pytest.mark.parametrize("outputs", [32, 96, 40])
def test_panels_lie_where_the_weight_lay_if_they_may(outputs):
    weight, x = torch.randn(outputs, 11), torch.randn(3, 11)
    kept = weight.clone()
    matrix = PackedMatrix(weight)
    assert torch.equal(weight, kept) and matrix.panels.data_ptr() != weight.data_ptr()
    written_over = PackedMatrix(weight, over=True)
    assert (written_over.panels.data_ptr() == weight.data_ptr()) == (outputs % WIDTH == 0)
    assert torch.equal(written_over.product(x), matrix.product(x))
    torch.testing.assert_close(matrix.product(x), x @ kept.T)


def test_rows_of_a_packed_table_are_those_of_the_plain_one():
    table = torch.randn(67, 12)
    numbers = torch.tensor([0, 66, 31, 32, 5, 5])
    assert torch.equal(PackedMatrix(table).rows(numbers), table[numbers])


def decoder(qk_norm=False, tie=True):
    model = Decoder(ModelConfig(64, 32, 48, 2, 4, 2, 8, max_position=64, qk_norm=qk_norm, tie_embeddings=tie)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def logits(model, tokens):
    attention = lambda layer, q, k, v: q * k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1)  # noqa: E731
    with torch.inference_mode():
        return model(tokens, torch.arange(len(tokens)), attention)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_a_packed_decoder_has_the_decoders_logits(qk_norm, tie):
    model = decoder(qk_norm, tie)
    tokens = torch.randint(64, (9,))
    expected = logits(model, tokens)
    assert pack(model) is model and pack(model) is model
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert model.ops.compiled and all(layer.ops.compiled for layer in model.layers)


@pytest.mark.parametrize("tie", [False, True])
def test_whoever_holds_a_parameter_holds_nothing_or_what_is_served(tie):
    """Weights cannot grow stale: those that were moved are gone; norms, and a table for lookups alone, are served."""
    model = decoder(tie=tie)
    held = dict(model.named_parameters())
    pack(model)
    kept = {name for name, parameter in held.items() if parameter.numel()}
    assert kept == {name for name in held if "norm" in name} | (set() if tie else {"embed.weight"})
    with torch.no_grad():
        for name in kept:
            held[name].zero_()
    assert logits(model, torch.arange(5)).count_nonzero() == 0


def test_a_packed_model_refuses_what_needs_plain_weights(tmp_path):
    model = pack(decoder())
    assert model.to("cpu").float() is model
    for move in (lambda: model.to("meta"), model.double, model.state_dict, lambda: weights.save(model, tmp_path)):
        with pytest.raises((PackedModel, CheckpointError), match="pack"):
            move()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_weights_of_its_own(copied):
    model, tokens = pack(decoder()), torch.arange(9)
    expected = logits(model, tokens)
    other = copied(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.matrix.panels.zero_()
    assert torch.equal(logits(other, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_code_writes_fp32_whatever_the_default_dtype_is(dtype):
    linear = nn.Linear(24, 40)
    x = torch.randn(13, 24)
    torch.set_default_dtype(dtype)
    try:
        layer = PackedLinear(PackedMatrix(linear.weight.detach()), linear.bias)
        got = layer(x)
        assert layer.matrix.panels.dtype == layer.bias.dtype == got.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, linear(x).detach())


def test_what_cannot_be_packed_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    assert pack(model) is model and type(model[0]) is nn.Linear


@pytest.fixture
def only_new_objects():
    """The garbage collector looks at what comes from here on: a million older objects take it seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def tensor_bytes():
    """Bytes of all tensors that `gc` knows, each storage once; packed ones have no storage that could be seen."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    plain = [tensor for tensor in tensors if tensor.layout == torch.strided]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in plain)}
    opaque = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_mkldnn}
    return sum(storages.values()) + sum(opaque.values())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_loaded_llm_holds_its_weights_once(only_new_objects, tmp_path, tie, stored):
    config = ModelConfig(TRAINED.get_vocab_size(), 64, 160, 3, 4, 2, 16, max_position=64, tie_embeddings=tie)
    weights.save(Decoder(config), tmp_path, stored)
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    gc.collect()
    before = tensor_bytes()
    llm = LLM.load(tmp_path, num_pages=9)
    gc.collect()
    pool = llm.engine.cache.k.nbytes + llm.engine.cache.v.nbytes
    parameter_bytes = 4 * config.num_parameters
    assert parameter_bytes <= tensor_bytes() - before - pool <= 1.05 * parameter_bytes


BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not BF16, reason="needs a CPU with AMX or AVX512-BF16")
@pytest.mark.parametrize("tie", [False, True])
def test_products_in_bf16_are_off_in_the_third_digit_and_logits_are_not_rounded(tie):
    model, tokens = decoder(tie=tie), torch.randint(64, (9,))
    expected = logits(model, tokens)
    packed = pack(model, torch.bfloat16)
    got = logits(packed, tokens)
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    assert 1e-4 < (got - expected).norm() / expected.norm() < 3e-2
    kinds = [type(layer.qkv).__name__ for layer in packed.layers] + [type(packed.unembed).__name__]
    assert kinds == ["RoundedLinear", "RoundedLinear", "PackedLinear"]


def test_products_in_another_dtype_are_refused_and_the_model_is_as_it_was(monkeypatch):
    model = decoder()
    with pytest.raises(ValueError, match="float32 or torch.bfloat16, got torch.float16"):
        pack(model, torch.float16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="neither AMX nor AVX512-BF16"):
        pack(model, torch.bfloat16)
    assert isinstance(model.unembed, nn.Linear) and not model.ops.compiled
