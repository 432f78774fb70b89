"""What ZeRO costs: bytes held and bytes sent, in closed form and counted."""

import copy
from functools import partial

import pytest
import torch

from minilib.parallel.zero import Zero
from minilib.parallel.zero.ledger import PRECISIONS, STAGES, expected_bytes, expected_traffic
from minilib.ranks import launch
from tests.parallel.zero.models import communicator, decoder, odd_zero, train

BIG = {"vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "num_layers": 7, "head_dim": 64}
FUSED = partial(torch.optim.AdamW, fused=True)


def test_the_papers_numbers():
    """Figure 1 of the paper: 7.5e9 parameters, 64 ranks, Adam in mixed precision."""
    held = [sum(expected_bytes(7_500_000_000, 64, stage, "bf16").values()) / 1e9 for stage in STAGES]
    assert held == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    assert sum(expected_bytes(1000, 1, 3, "fp32").values()) == 16_000
    assert expected_bytes(10, 4, 1, "fp32") == {"parameters": 40, "gradients": 40, "optimizer": 24}
    assert expected_bytes(8, 4, 3, "bf16", moments=0) == {"parameters": 4, "gradients": 4, "optimizer": 8}


def test_traffic_in_closed_form():
    assert [expected_traffic(400, 4, stage, "fp32") for stage in STAGES] == [2400, 2400, 2400, 3600]
    assert [expected_traffic(400, 4, stage, "bf16") for stage in STAGES] == [1200, 1200, 1200, 1800]
    assert expected_traffic(400, 4, 3, kept=100) == 3300
    assert expected_traffic(400, 1, 3) == 0


@pytest.mark.parametrize("wrong", [(0, 2, 3), (10, 0, 3), (10, 2, 4), (10, 2, 3, "fp8")])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        expected_bytes(*wrong)
    with pytest.raises(ValueError, match="got"):
        expected_traffic(*wrong)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_holds_what_the_formula_says(world_size):
    """A decoder of more than 10 million parameters after one AdamW step; all stages, fp32 and bf16."""

    def on_rank():
        held, tokens, model = {}, torch.arange(4)[None], decoder(**BIG)
        for precision in ("fp32", "bf16"):
            for stage in STAGES:
                comm = communicator("shared")
                zero = Zero(copy.deepcopy(model), comm, stage, FUSED, precision=precision)
                zero.model.loss(tokens, tokens, tokens).backward()
                zero.step()
                zero.zero_grad()
                held[precision, stage] = zero.bytes_per_rank(), max(row.layout.length for row in zero.rows)
                zero.check_invariants()
                comm.close()
        return held, model.config.num_parameters

    for held, num_parameters in launch.run(on_rank, world_size):
        assert num_parameters > 10_000_000
        for (precision, stage), (found, largest) in held.items():
            expected = expected_bytes(num_parameters, world_size, stage, precision)
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.001)
            buckets = 2 * largest * PRECISIONS[precision].gradients.itemsize if stage >= 2 else 0
            assert (found["buckets"], found["gathered"]) == (buckets, 0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_sends_what_the_formula_says(world_size, precision):
    """Exactly, for a decoder whose units all divide; the outer unit and the last layer are gathered once only."""

    def on_rank():
        comm = communicator("group")
        sent, tokens = [], torch.arange(8)[None]
        for stage in STAGES:
            zero = Zero(decoder(), comm, stage, precision=precision)
            for _ in range(2):
                before = comm.traffic.bytes
                zero.model.loss(tokens, tokens, tokens).backward()
                zero.step()
                zero.zero_grad()
                sent.append((stage, comm.traffic.bytes - before))
        lengths = [row.layout.length for row in zero.rows]
        return sent, lengths[0] + lengths[-1], zero.model.config.num_parameters, sum(lengths)

    for sent, kept, num_parameters, padded in launch.run(on_rank, world_size):
        assert num_parameters == padded
        for stage, found in sent:
            assert found == expected_traffic(num_parameters, world_size, stage, precision, kept=kept)


@pytest.mark.parametrize("world_size", [3, 4])
def test_padding_accumulation_and_the_norm_cost_what_they_should(world_size):
    """Odd sizes, frozen parameters and two backwards, of which the first is kept local."""

    def on_rank():
        comm = communicator("shared")
        found = []
        for stage in STAGES:
            zero = odd_zero(comm, stage)
            train(zero, [0])
            before = comm.traffic.bytes
            train(zero, [1], micro=2)
            norm = torch.zeros((), dtype=torch.float64)
            after = comm.traffic.bytes
            comm.all_reduce(norm)
            sent = after - before - (comm.traffic.bytes - after)
            found.append((stage, sent, {row.layout.name: (row.layout.length, row.trained) for row in zero.rows}))
        return found

    for found in launch.run(on_rank, world_size):
        for stage, sent, rows in found:
            assert all(length % world_size == 0 for length, _ in rows.values())
            trained = sum(length for length, is_trained in rows.values() if is_trained)
            everything = sum(length for length, _ in rows.values())
            kept = sum(length for name, (length, _) in rows.items() if name in ("outer", "blocks.3"))
            # in stage 3 both forwards gather everything, and both backwards all but what was kept
            values = {0: 2 * trained, 3: trained + 2 * (2 * everything - kept)}.get(stage, 2 * trained)
            assert sent == 8 * values * (world_size - 1) // world_size
