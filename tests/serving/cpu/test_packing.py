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
from minilib.model.stored.files import CheckpointError
from minilib.serving.cpu import packing
from minilib.serving.cpu.machine_code import MULTIPLIES_PAIRS, WIDTH
from minilib.serving.cpu.packing import PackedLinear, PackedMatrix, PackedModel, in_pairs, pack
from minilib.serving.cpu.tape import room_for_product
from minilib.serving.llm import LLM
from tests.serving.test_detokenizer import TRAINED

needs_pairs = pytest.mark.skipif(not MULTIPLIES_PAIRS, reason="needs a CPU with AVX512-BF16")
needs_onednn = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU on which oneDNN multiplies in bf16"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_pairs)]
BF16_BY_OWN_BLOCK = [pytest.param(True, marks=needs_pairs), pytest.param(False, marks=needs_onednn)]


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


@needs_pairs
@pytest.mark.parametrize("outputs, depth", [(1, 1), (40, 24), (32, 7), (97, 131)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_in_bf16_is_that_of_rounded_numbers(outputs, depth, bias):
    linear = nn.Linear(depth, outputs, bias=bias)
    layer = PackedLinear(PackedMatrix(linear.weight.detach(), dtype=torch.bfloat16), linear.bias)
    x = torch.randn(41, depth)
    exact_x, exact_weight = x.bfloat16().double(), linear.weight.detach().bfloat16().double()
    exact = exact_x @ exact_weight.T
    bound = depth * 2**-24 * (exact_x.abs() @ exact_weight.abs().T)  # a sum in fp32 rounds once for each number
    with torch.inference_mode():
        if bias:
            exact += linear.bias
            bound += 2**-24 * (exact.abs() + bound)
        got = layer(x)
        assert ((got - exact).abs() <= bound).all()
        for rows in range(41):
            assert torch.equal(layer(x[:rows]), got[:rows]), "a row depends on how many there are"
            assert torch.equal(layer(x[rows : rows + 1]), got[rows : rows + 1]), "a row depends on its place"


@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_are_rounded_to_bf16_as_torch_rounds_them(width, monkeypatch):
    used_before = lambda *shape: room_for_product(*shape).fill_(torch.nan)  # noqa: E731
    monkeypatch.setattr(packing, "room_for_product", used_before)
    bits = torch.randint(-(2**31), 2**31, (4000, width)).int()
    bits[::4] = bits[::4] & -(2**16) | 2**15  # in the middle of two
    bits[1::4] &= -(2**31) + 0xFFFFFF  # 0 and numbers next to it
    bits[2::4] |= 0x7F000000  # infinity, NaN, and numbers that come next
    bits[3] = torch.tensor(-torch.inf).view(torch.int32)
    x = bits.view(torch.float32)
    got, expected = in_pairs(x).contiguous().view(torch.bfloat16), x.bfloat16()
    assert torch.equal(got[:, :width].isnan(), x.isnan()) and x.isnan().any()
    there = ~x.isnan()
    assert torch.equal(got[:, :width][there].view(torch.int16), expected[there].view(torch.int16))
    assert got[:, width:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [16, 17])
def test_numbers_that_are_not_finite_stay_in_their_row(dtype, depth):
    matrix = PackedMatrix(torch.randn(33, depth), dtype=dtype)
    x = torch.randn(14, depth)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [12, 13])
def test_rows_of_a_packed_table_are_those_of_the_plain_one(dtype, depth):
    table = torch.randn(67, depth)
    numbers = torch.tensor([0, 66, 31, 32, 5, 5])
    assert torch.equal(PackedMatrix(table, dtype=dtype).rows(numbers), table[numbers].to(dtype))


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


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("own", BF16_BY_OWN_BLOCK)
def test_products_in_bf16_are_off_in_the_third_digit_and_logits_are_not_rounded(tie, own, monkeypatch):
    monkeypatch.setattr(packing, "bf16_by_own_block", lambda: own)
    model, tokens = decoder(tie=tie), torch.randint(64, (9,))
    expected = logits(model, tokens)
    packed = pack(model, torch.bfloat16)
    got = logits(packed, tokens)
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    assert 1e-4 < (got - expected).norm() / expected.norm() < 3e-2
    products = [layer.qkv for layer in packed.layers]
    assert all(isinstance(product, PackedLinear if own else packing.RoundedLinear) for product in products)
    assert not own or {product.matrix.panels.dtype for product in products} == {torch.bfloat16}
    assert packed.unembed.matrix.panels.dtype == torch.float32


@pytest.mark.parametrize("pairs, amx, own", [(True, False, True), (True, True, False), (False, False, False)])
def test_bf16_is_multiplied_by_the_own_block_but_not_beside_amx(pairs, amx, own, monkeypatch):
    monkeypatch.setattr(packing, "MULTIPLIES_PAIRS", pairs)
    monkeypatch.setattr(packing, "HAS_AMX", amx)
    assert packing.bf16_by_own_block() == own
    if not pairs:
        with pytest.raises(ValueError, match="no AVX512-BF16"):
            PackedMatrix(torch.randn(3, 4), dtype=torch.bfloat16)


def test_products_in_another_dtype_are_refused_and_the_model_is_as_it_was(monkeypatch):
    model = decoder()
    with pytest.raises(ValueError, match="float32 or torch.bfloat16, got torch.float16"):
        pack(model, torch.float16)
    monkeypatch.setattr(packing, "MULTIPLIES_PAIRS", False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="neither AMX nor AVX512-BF16"):
        pack(model, torch.bfloat16)
    assert isinstance(model.unembed, nn.Linear) and not model.ops.compiled
