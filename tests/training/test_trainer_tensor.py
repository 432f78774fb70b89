"""The trainer with a part of every layer on each rank: the steps of one process, saved and gone on with anywhere."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.model.decoder import Decoder
from minilib.parallel.data.data_parallel import NoBackward
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.strategies import SAME_BATCH, choose_strategy
from tests.training.test_trainer_ranks import SHAPE, SHORT, alone, changed, check_same, outcome, trainer, trains

CLIPPED = changed(SHORT, clip=0.05, accumulate=2, batch_size=3)
EPOCH = changed(SHORT, sampling="epoch", batch_size=7)


@pytest.mark.parametrize("config", [SHORT, CLIPPED, EPOCH], ids=["windows", "clipped, in two parts", "an epoch"])
def test_ranks_that_share_layers_take_the_steps_of_one_process(config):
    for results in run(trains, 2, config, SAME_BATCH):
        for found in results.values():
            check_same(found, alone(changed(config, accumulate=1)))


def steps_without_a_norm(norm: bool) -> list[dict]:
    comm, found = Communicator(SharedMemoryTransport()), []
    for parallel in SAME_BATCH:
        model = Decoder(SHAPE)
        strategy, tokens = choose_strategy(parallel, model, comm, SHORT), torch.arange(4)[None]
        with pytest.raises(NoBackward, match="backward"):
            strategy.step()
        for number in range(2):
            model.loss(tokens + number, tokens, tokens + 1).backward()
            if norm:
                strategy.clip_grad_norm(1e9)
            strategy.step()
            strategy.zero_grad()
        found.append(strategy.full_state_dict())
    return found


def test_a_step_sums_what_nobody_has_summed():
    with_norm, without = (run(steps_without_a_norm, 2, norm) for norm in (True, False))
    torch.testing.assert_close(without, with_norm, rtol=0, atol=0)


def in_bf16() -> list[float]:
    each = trainer(changed(SHORT, precision="bf16"), Communicator(SharedMemoryTransport()), "sequence")
    each.run()
    return each.losses


def test_in_bf16():
    assert run(in_bf16, 2)[0] == pytest.approx(alone(changed(SHORT, precision="bf16"))["losses"], rel=1e-2)


def saves_all(folder: Path) -> None:
    for parallel in (*SAME_BATCH, "zero3", "data"):
        each = trainer(SHORT, Communicator(GroupTransport()), parallel, seed=dist.get_rank())
        each.run(until=3)
        each.save(folder / f"{parallel}.pt")


def goes_on_with(folder: Path, pairs: list[tuple[str, str]]) -> list[dict]:
    found = []
    for first, second in pairs:
        each = trainer(SHORT, Communicator(GroupTransport()), second, seed=7)
        each.resume(folder / f"{first}.pt")
        each.run()
        found.append(outcome(each))
    return found


def test_a_run_goes_on_with_another_part_of_it_on_each_rank(tmp_path):
    run(saves_all, 2, tmp_path)
    pairs = [
        ("tensor", "sequence"),
        ("sequence", "data"),
        ("zero3", "tensor"),
        ("data", "sequence"),
        ("tensor", "zero2"),
    ]
    for found in run(goes_on_with, 2, tmp_path, pairs)[0]:
        check_same(found, alone(SHORT))
    single = trainer(SHORT, seed=5)
    single.resume(tmp_path / "sequence.pt")
    single.run()
    check_same(outcome(single), alone(SHORT))
