"""MFU, HFU and MBU against counts by hand and by torch; each way in which others published a wrong one is a case."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.numbers.machine import Machine
from minilib.operations.metrics.utilisation import (
    DATASHEET_OF,
    ImpossibleUtilisation,
    UnknownDevice,
    bandwidth_utilisation,
    datasheet_of,
    decode_bytes,
    flops_utilisation,
    hardware_flops_per_token,
    model_flops_per_token,
    visible_tokens,
)
from minilib.serving.phases import decode_phase
from minilib.training.planner.shape import TrainedShape

CONFIG = ModelConfig(64, 32, 48, 3, 4, 2, 8, 128)
EXPERTS = ModelConfig(64, 32, 48, 3, 4, 2, 8, 128, moe=MoEConfig(8, 2, 24))
SHAPE, SEQUENCE = TrainedShape.of(CONFIG), 32


def products(layer, q, k, v):
    """Attention as two plain products, which compute hidden pairs too."""
    q, k, v = (x.movedim(-2, -3).repeat_interleave(4 // x.shape[-2], -3) for x in (q, k, v))
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return ((q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v).movedim(-3, -2)


def counted(config, attention, recomputed=0):
    """FLOPs a token of forward and backward, by torch's counter; the first layers compute their forward twice."""
    model = Decoder(config)
    for layer in list(model.layers)[:recomputed]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    tokens, positions = torch.arange(SEQUENCE)[None] % config.vocab_size, torch.arange(SEQUENCE)[None]
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model.loss(tokens, positions, tokens, attention).backward()
    return counter.get_total_flops() / SEQUENCE


# MFU


def test_flops_of_a_dense_model_by_hand():
    qkv, out, ffn = 32 * (4 + 2 + 2) * 8, 4 * 8 * 32, 3 * 32 * 48
    forward = 2 * (3 * (qkv + out + ffn) + 32 * 64)
    pairs = 3 * 4 * 2 * (2 * 8) * (SEQUENCE / 2)  # layers · heads · (scores and sums) · 2 FLOPs a width · visible
    assert model_flops_per_token(SHAPE, SEQUENCE) == 3 * (forward + pairs)


def test_a_mixture_counts_the_experts_that_a_token_meets():
    """By all of its experts, a mixture would be above its machine's peak."""
    shape = TrainedShape.of(EXPERTS)
    qkv, out, router, expert = 32 * 64, 32 * 32, 32 * 8, 3 * 32 * 24
    pairs = 3 * 4 * 2 * (2 * 8) * (SEQUENCE / 2)
    by_hand = 3 * (2 * (3 * (qkv + out + router + 2 * expert) + 32 * 64) + pairs)
    assert model_flops_per_token(shape, SEQUENCE) == by_hand
    by_all = by_hand + 6 * 3 * 6 * expert
    speed = 1e12 / 2 / by_hand
    assert flops_utilisation(by_hand, speed, 1e12) == pytest.approx(0.5)
    with pytest.raises(ImpossibleUtilisation, match="are all experts counted"):
        flops_utilisation(by_all, speed, 1e12)


def test_experts_by_the_counter_of_torch():
    shape = TrainedShape.of(EXPERTS)
    assert counted(EXPERTS, products) == hardware_flops_per_token(shape, SEQUENCE, hidden_pairs=True)


@pytest.mark.parametrize("window", [1, 2, 5, 31, 32, 33])
def test_pairs_in_a_window_are_those_of_its_mask(window):
    places = torch.arange(SEQUENCE)
    apart = places[:, None] - places
    pairs = ((apart >= 0) & (apart < window)).sum().item()
    half_of_itself = min(window, SEQUENCE) / (2 * SEQUENCE) * SEQUENCE
    assert visible_tokens(SEQUENCE, window) * SEQUENCE == pairs - half_of_itself


def test_windows_count_layer_by_layer():
    """As Gemma and gpt-oss have them; a count without windows would be the larger the longer the sequence is."""
    every = model_flops_per_token(SHAPE, SEQUENCE)
    assert model_flops_per_token(SHAPE, SEQUENCE, [None, None, None]) == every
    one = model_flops_per_token(SHAPE, SEQUENCE, [4, None, None])
    assert every - one == 3 * 4 * 2 * (2 * 8) * (SEQUENCE / 2 - visible_tokens(SEQUENCE, 4))
    long = 100_000
    assert model_flops_per_token(SHAPE, long) / model_flops_per_token(SHAPE, long, [4, 4, 4]) > 50
    with pytest.raises(ValueError, match="3 layers is needed, got 2"):
        model_flops_per_token(SHAPE, SEQUENCE, [4, 4])
    with pytest.raises(ValueError, match="window"):
        model_flops_per_token(SHAPE, SEQUENCE, [0, None, None])


def test_the_counter_of_torch_sees_no_attention_on_a_cpu():
    """Where SDPA runs on a CPU it counts 0 FLOPs, so its sum is too small by all of attention."""
    attention = Decoder(CONFIG).ops.causal_attention
    without = 6 * SHAPE.matrix_parameters
    assert counted(CONFIG, attention) == without < model_flops_per_token(SHAPE, SEQUENCE)
    assert counted(CONFIG, products) == SHAPE.flops_per_token(SEQUENCE, causal=False)


def test_seconds_taken_before_the_device_had_ended_are_no_seconds():
    """A log of MaxText's documentation shows 917,442 TFLOP/s of one device."""
    with pytest.raises(ImpossibleUtilisation, match="before the device had ended"):
        flops_utilisation(917_442e12, 1, Machine.datasheet("h100-sxm").peak("bf16"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_utilisation_refuses_what_is_no_number(bad):
    for words in ((bad, 1, 1), (1, bad, 1), (1, 1, bad)):
        with pytest.raises(ValueError, match="both finite"):
            flops_utilisation(*words)
        with pytest.raises(ValueError, match="both finite"):
            bandwidth_utilisation(*words)
    with pytest.raises(ValueError, match="devices"):
        flops_utilisation(1, 1, 1, devices=0)


# Peaks


def test_a_device_is_looked_up_by_its_whole_name():
    for name, sheet in DATASHEET_OF.items():
        assert Machine.datasheet(datasheet_of(name)).name == sheet
    sheets = {datasheet_of(name) for name in DATASHEET_OF}
    assert sheets == {name for name in Machine.datasheets() if Machine.datasheet(name).kind == "gpu"}


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H20", "NVIDIA B300", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "",
     "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA GeForce RTX 5090 D"],
)  # fmt: skip
def test_a_similar_name_gets_no_peak(name):
    with pytest.raises(UnknownDevice, match="exactly"):
        datasheet_of(name)


# HFU


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_recomputed_layers_are_counted_as_torch_counts_them(recomputed):
    expected = hardware_flops_per_token(SHAPE, SEQUENCE, recomputed / 3, hidden_pairs=True)
    assert counted(CONFIG, products, recomputed) == pytest.approx(expected, rel=1e-12)


def test_hfu_is_mfu_where_a_device_does_what_is_needed():
    assert hardware_flops_per_token(SHAPE, SEQUENCE) == model_flops_per_token(SHAPE, SEQUENCE)
    full = hardware_flops_per_token(SHAPE, SEQUENCE, 1.0)
    tables = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    forward = model_flops_per_token(SHAPE, SEQUENCE) / 3
    assert full == 4 * forward - tables
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            hardware_flops_per_token(SHAPE, SEQUENCE, bad)


# MBU


@pytest.mark.parametrize("batch", [1, 4])
def test_bytes_of_a_step_are_those_that_the_price_of_decoding_has(batch):
    context = 20
    priced = decode_phase(Decoder(CONFIG), batch, context).cost.bytes
    assert decode_bytes(CONFIG, [context + 1] * batch, 4, 4) == priced


def test_bytes_by_hand():
    weights = 3 * (32 * 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32 + 64 * 32
    keys_and_values = 2 * 3 * 2 * 8
    assert decode_bytes(CONFIG, [3, 7], 2, 1) == weights * 2 + 10 * keys_and_values
    assert CONFIG.num_parameters == weights


def test_a_mixture_reads_the_experts_that_its_tokens_hit():
    """One token reads top_k experts a layer; many tokens read nearly all, which MFU never counts."""
    expert = 3 * 3 * 32 * 24  # of all layers
    one, many = decode_bytes(EXPERTS, [1], 1, 0), decode_bytes(EXPERTS, [1] * 1000, 1, 0)
    assert many - one == pytest.approx(6 * expert)


def test_utilisation_of_bandwidth():
    assert bandwidth_utilisation(3e9, 2, 3e9) == 0.5
    with pytest.raises(ImpossibleUtilisation, match="cache"):
        bandwidth_utilisation(3e9, 0.5, 3e9)
    with pytest.raises(ValueError, match="a sequence or more"):
        decode_bytes(CONFIG, [], 2, 2)
    with pytest.raises(ValueError, match="context"):
        decode_bytes(CONFIG, [0], 2, 2)
