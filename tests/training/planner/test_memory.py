"""Shapes, FLOPs and bytes against published parameters and rates, Korthikanti's formulas and Megatron's."""

import pytest

from minilib.model.config import ModelConfig
from minilib.model.moe.config import MoEConfig
from minilib.numbers import quoted
from minilib.numbers.open_models import open_models
from minilib.training.planner.layout import ParallelLayout
from minilib.training.planner.memory import layer_bytes, layers_in_flight, parameters_of_rank, price_memory
from minilib.training.planner.published import published_runs
from minilib.training.planner.shape import TrainedShape

RUNS = published_runs()
DENSE = ModelConfig(100, 24, 32, 3, 4, 2, 6, 64, tie_embeddings=False)
MIXTURE = ModelConfig(100, 24, 32, 3, 4, 2, 6, 64, moe=MoEConfig(8, 2, 16, num_shared_experts=1))


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_the_decoders_parameters_and_products_but_for_its_norms(config):
    shape, norms = TrainedShape.of(config), config.hidden_size * (2 * config.num_layers + 1)
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    assert shape.parameters + norms == config.num_parameters
    assert shape.matrix_parameters + norms == config.num_active_parameters - lookup


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("megatron-1_7b", 1.7e9),
        ("megatron-16b", 16e9),
        ("megatron-177b", 177e9),
        ("llama-3-405b-16k", 405e9),
        ("llama-3-70b-fp8", quoted.model("llama-3-70b").parameters),
        ("mpt-70b", 64_862_437_376),
        ("deepseek-v3-bf16", 671e9),
        ("qwen3-235b", open_models()["qwen3-235b"].weight_bytes / 2),
    ],
)
def test_published_parameters(name, parameters):
    assert RUNS[name].shape.parameters == pytest.approx(parameters, rel=0.03 if parameters < 2e10 else 0.01)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.tokens_per_second])
def test_flops_are_counted_as_their_source_counts_them(name):
    """FLOP/s over tokens/s of one source, to the digits that it prints: DeepSeek-V3's is 0.5 % less than ours."""
    run = RUNS[name]
    flops = run.shape.flops_per_token(run.sequence, run.causal) * run.tokens_per_second
    assert flops == pytest.approx(run.tflops * 1e12, rel=0.006)
    wrong = run.shape.flops_per_token(run.sequence, not run.causal) * run.tokens_per_second
    assert abs(wrong / (run.tflops * 1e12) - 1) > 0.015


def test_active_parameters_of_a_mixture_not_all_of_them():
    """The trap of MFU by total parameters: 671B would be 18 times the FLOPs."""
    shape = RUNS["deepseek-v3-bf16"].shape
    assert shape.matrix_parameters == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_activations_are_korthikantis(tp):
    """Table 2 of the paper, per layer and token: GPT with dropout, heads a, width h, sequence s."""
    h, a, s = 6144, 64, 2048
    gpt = TrainedShape(48, h, a, a, h // a, 4 * h, 51200, gated=False)

    def kept(recompute, sequence_parallel):
        return layer_bytes(gpt, tp, s, recompute, sequence_parallel, dropout=True)

    assert kept("none", False) == pytest.approx(h * (10 + 24 / tp + 5 * a * s / (h * tp)))
    assert kept("none", True) == pytest.approx(h / tp * (34 + 5 * a * s / h))
    assert kept("selective", False) == pytest.approx(h * (10 + 24 / tp))
    assert kept("selective", True) == pytest.approx(h / tp * 34)
    assert kept("full", False) == 2 * h


def test_layers_in_flight():
    """Korthikanti 4.2.3: 1F1B holds L layers, interleaved L (1 + (p-1)/(p m)); breadth-first all microbatches."""
    shape = RUNS["megatron-177b"].shape
    assert layers_in_flight(shape, ParallelLayout(1, pp=6), 24) == 96
    assert layers_in_flight(shape, ParallelLayout(1, pp=6), 4) == 64  # fewer microbatches than stages
    assert layers_in_flight(shape, ParallelLayout(1, pp=6, interleave=4), 24) == 96 * (1 + 5 / 24)
    assert layers_in_flight(shape, ParallelLayout(1, pp=6, zero=2), 24) == 24 * 16
    assert layers_in_flight(shape, ParallelLayout(1), 24) == 96


@pytest.mark.parametrize(
    ("zero", "per_parameter"),
    [(0, lambda d: 18), (1, lambda d: 6 + 12 / d), (2, lambda d: 2 + 16 / d), (3, lambda d: 18 / d)],
)
def test_state_is_megatrons(zero, per_parameter):
    """Megatron-LM's table for bf16 parameters and fp32 gradients: 18 bytes, 6 + 12/d with the distributed optimizer."""
    shape, layout = TrainedShape(2, 64, 4, 4, 16, 256, 128, gated=False), ParallelLayout(8, zero=zero)
    memory = price_memory(shape, layout, 8, 32)
    state = memory.parameters + memory.gradients + memory.optimizer
    assert state == pytest.approx(per_parameter(8) * shape.parameters)


def test_every_parameter_is_on_some_rank():
    """Of layers that divide evenly: dense parts over pp · tp ranks, experts over ep · etp · pp, one table each side."""
    shape = TrainedShape(8, 64, 4, 4, 16, 256, 128, experts=8, top_k=2, expert_ffn=32, shared_ffn=32)
    dense, experts = parameters_of_rank(shape, ParallelLayout(4, pp=2, tp=2, ep=4))
    assert experts * 2 * 4 == 8 * 8 * shape.expert_parameters
    assert dense * 2 * 2 + experts * 2 * 4 == shape.parameters
