"""The phases' FLOPs are those that torch counts, and each computes what generation computes."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.numbers.machine import Machine
from minilib.serving.phases import decode_phase, prompt_phase, rows_at_the_ridge

SHAPE = ModelConfig(97, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_position=64)
NORMS = 32 * (2 * 3 + 1)  # weights of norms, which take no products


def model(**changes):
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**SHAPE.__dict__, **changes})).eval()


def products(workload):
    """FLOPs of products with weights, as torch counts them on a CPU, where attention is not counted."""
    run = workload.make("cpu")
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("batch", "new", "context"), [(1, 1, 0), (1, 17, 0), (1, 64, 0), (1, 1, 63), (5, 1, 12)])
def test_flops_are_products_with_the_weights_and_pairs(batch, new, context, tied):
    of = model(tie_embeddings=tied)
    work = prompt_phase(of, new) if context == 0 and batch == 1 else decode_phase(of, batch, context)
    pairs = sum(range(1, new + 1)) if context == 0 else batch * (context + 1)
    attention, norms = 4 * 3 * 4 * 8 * pairs, 2 * NORMS * batch * new
    assert work.cost.flops == products(work) + attention + norms
    state = batch * (context + new) * SHAPE.kv_values_per_token
    weights = SHAPE.num_parameters  # a second table is looked up, not read
    assert work.cost.bytes == 4 * (weights + state) and work.cost.dtype == "fp32"


def test_what_runs_is_a_step_of_generation():
    of = model()
    ids = torch.arange(20) % 97
    whole = of(ids, torch.arange(20), lambda *args: of.ops.causal_attention(args[0], *(x[None] for x in args[1:]))[0])
    assert torch.allclose(prompt_phase(of, 20).make("cpu")(), whole[-1:], atol=1e-5)
    step = decode_phase(of, 3, 10).make("cpu")
    assert step().shape == (3, 97) and torch.equal(step(), step()), "a step may be run again and again"


def test_the_ridge_is_where_products_change_their_bound():
    machine = Machine.datasheet("h100-sxm")
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        rows = rows_at_the_ridge(machine, dtype)
        read, computed = itemsize / machine.memory_bandwidth, 2 * rows / machine.peak(dtype)
        assert computed == pytest.approx(read)


@pytest.mark.parametrize("numbers", [(0,), (65,), (0, 5), (1, 64), (1, -1)], ids=str)
def test_what_has_no_position_is_refused(numbers):
    phase = prompt_phase if len(numbers) == 1 else decode_phase
    with pytest.raises(ValueError, match="at most 64 positions"):
        phase(model(), *numbers)


def test_models_without_a_price_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float64"):
        prompt_phase(copy.deepcopy(model()).double(), 4)
    with pytest.raises(ValueError, match="with experts"):
        prompt_phase(model(moe=MoEConfig(4, 2, 16)), 4)
