"""FLOPs of a step: what torch and the attention kernel count, and as many however the step is cut."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.numbers.machine import Machine
from minilib.serving.load.simulation import MachinePrice, StepCounts
from minilib.serving.step_cost import pair_flops, pairs_behind, product_flops, weights_read

DENSE = ModelConfig(97, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_position=64)
UNTIED = ModelConfig(**{**DENSE.__dict__, "tie_embeddings": False})
MIXTURE = ModelConfig(**{**DENSE.__dict__, "moe": MoEConfig(8, 2, 16, num_shared_experts=1)})
NORMS = 32 * (2 * 3 + 1)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("config", [DENSE, UNTIED])
def test_products_are_those_that_torch_counts(config, rows):
    model, ids = Decoder(config).eval(), torch.arange(7)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(ids, ids, lambda layer, q, k, v: torch.zeros_like(q), logits_indices=torch.arange(rows))
    assert product_flops(config, 7, rows) == counter.get_total_flops() + 2 * NORMS * 7


@pytest.mark.parametrize("config", [DENSE, UNTIED, MIXTURE])
def test_a_step_costs_the_same_however_it_is_cut(config):
    whole = product_flops(config, 17, 1) + pair_flops(config, pairs_behind(3, 17))
    parts = [
        product_flops(config, 1, start == 19) + pair_flops(config, pairs_behind(start, 1)) for start in range(3, 20)
    ]
    assert whole == sum(parts) and product_flops(config, 0, 0) == pair_flops(config, pairs_behind(5, 0)) == 0


def test_pairs_are_those_of_the_attention_kernel():
    counts = StepCounts((1, 5, 9), (8, 5, 30), 3)
    priced = MachinePrice(Machine.datasheet("h200"), DENSE)
    assert priced.attention_cost(counts).flops == pair_flops(DENSE, counts.pairs)
    assert counts.pairs == sum(pairs_behind(*given) for given in ((7, 1), (0, 5), (21, 9)))


def test_weights_are_read_once_and_tables_only_for_logits():
    table = 97 * 32
    assert weights_read(DENSE, 5, 0) == weights_read(UNTIED, 500, 0) == DENSE.num_parameters - table
    assert weights_read(DENSE, 1, 1) == weights_read(UNTIED, 1, 9) == DENSE.num_parameters
    assert weights_read(MIXTURE, 1, 1) == pytest.approx(MIXTURE.num_active_parameters)
    assert weights_read(MIXTURE, 10_000, 1) == pytest.approx(MIXTURE.num_parameters)
