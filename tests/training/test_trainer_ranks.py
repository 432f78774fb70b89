"""One config, trained on one process and on ranks, in every engine: the same steps."""

import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training import usage
from minilib.training.planner.shape import TrainedShape
from minilib.training.strategies import PARALLEL
from minilib.training.trainer import CannotResume, TrainConfig, Trainer

SHAPE = ModelConfig(31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64, qk_norm=True)
SHORT = TrainConfig(
    steps=6, batch_size=6, context=8, warmup=2, evaluate_every=3, validation_batches=2, weight_decay=0.3
)
ROW = torch.randint(31, (200,), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(31, (100,), generator=torch.Generator().manual_seed(1))
MACHINE = Machine("test", "test", "cpu", "measured", {"fp32": 1e12, "bf16": 4e12}, 1e10, 1e9)


def changed(config, **changes):
    return type(config)(**{**config.__dict__, **changes})


def trainer(config, comm=None, parallel="data", seed=0) -> Trainer:
    model = Decoder(SHAPE)
    model.initialize(seed)
    return Trainer(model, ROW, HELD_OUT, config, comm, parallel, MACHINE)


def outcome(of: Trainer) -> dict:
    return {"losses": of.losses, "validation": of.validation_losses, **of.strategy.full_state_dict()}


def trains(config: TrainConfig, parallels: tuple[str, ...]) -> dict[str, dict]:
    comm, results = Communicator(SharedMemoryTransport()), {}
    for parallel in parallels:
        each = trainer(config, comm, parallel, seed=dist.get_rank())
        each.run()
        results[parallel] = outcome(each)
    return results


def check_same(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert [step for step, _ in found["validation"]] == [step for step, _ in expected["validation"]]
    assert [x for _, x in found["validation"]] == pytest.approx([x for _, x in expected["validation"]], rel=1e-5)
    if "model" in found:  # rank 0
        torch.testing.assert_close(found["model"], expected["model"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["optimizer"], expected["optimizer"], rtol=1e-3, atol=1e-5)


@cache
def alone(config: TrainConfig) -> dict:
    single = trainer(config)
    single.run()
    return outcome(single)


@pytest.mark.parametrize(
    ("world_size", "batch_size"),
    [(1, 6), (2, 6), (2, 3), (4, 6), (4, 3)],
    ids=["one rank", "two ranks", "two ranks share three", "four ranks share six", "a rank with an empty share"],
)
def test_ranks_take_the_steps_of_one_process_in_every_engine(world_size, batch_size):
    config = changed(SHORT, batch_size=batch_size)
    expected = alone(config)
    for rank, results in enumerate(run(trains, world_size, config, PARALLEL)):
        for found in results.values():
            assert "model" in found or rank
            check_same(found, expected)


def test_clipped_and_in_bf16():
    config = changed(SHORT, clip=0.01, precision="bf16")
    expected = alone(config)
    for found in run(trains, 2, config, ("data", "zero3"))[0].values():
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    config = changed(SHORT, clip=0.01)
    for found in run(trains, 2, config, ("data", "zero2"))[0].values():
        check_same(found, alone(config))


# Saving and going on


def saves(parallel: str, path: Path) -> None:
    each = trainer(SHORT, Communicator(GroupTransport()), parallel, seed=dist.get_rank())
    each.run(until=3)
    each.save(path)
    assert path.is_file()  # on every rank


def goes_on(parallel: str, path: Path) -> dict:
    each = trainer(SHORT, Communicator(GroupTransport()), parallel, seed=7)
    each.resume(path)
    assert each.step == 3
    each.run()
    return outcome(each)


@pytest.mark.parametrize(
    ("first", "ranks", "second", "other_ranks"),
    [
        ("data", 2, "data", 4),
        ("data", 2, "zero3", 3),
        ("zero3", 4, "zero1", 2),
        ("zero1", 3, "data", 1),
        ("zero0", 2, "zero2", 2),
        ("zero2", 2, "alone", 0),
        ("alone", 0, "zero3", 2),
    ],
)
def test_a_run_goes_on_in_another_engine_on_another_number_of_ranks(first, ranks, second, other_ranks, tmp_path):
    path = tmp_path / "run.pt"
    if ranks:
        run(saves, ranks, first, path)
    else:
        single = trainer(SHORT)
        single.run(until=3)
        single.save(path)
    if other_ranks:
        found = run(goes_on, other_ranks, second, path)[0]
    else:
        single = trainer(SHORT, seed=7)
        single.resume(path)
        single.run()
        found = outcome(single)
    check_same(found, alone(SHORT))
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("parallel", ["data", "zero3"])
def test_a_state_before_the_first_step_is_one_too(parallel, tmp_path):
    path = tmp_path / "run.pt"
    trainer(SHORT).save(path)
    check_same(run(starts, 2, parallel, path)[0], alone(SHORT))


def starts(parallel: str, path: Path) -> dict:
    each = trainer(SHORT, Communicator(GroupTransport()), parallel, seed=7)
    each.save(path.with_name(f"{parallel}.pt"))
    each.resume(path)
    each.run()
    return outcome(each)


def refuses(path: Path) -> str:
    each = trainer(changed(SHORT, seed=1), Communicator(GroupTransport()), "zero2")
    try:
        each.resume(path)
    except CannotResume as error:
        return str(error)
    return ""


def test_every_rank_refuses_another_run(tmp_path):
    trainer(SHORT).save(tmp_path / "run.pt")
    assert run(refuses, 2, tmp_path / "run.pt") == ["run.pt is another run: seed was 0, now 1"] * 2


# What is said of it


def reports() -> tuple:
    each = trainer(SHORT, Communicator(GroupTransport()))
    each.run()
    return each.tokens_per_second, each.seconds, each.mfu, each.peak_memory()


def test_progress_comes_from_rank_0_alone(capfd):
    ranks = run(reports, 2)
    shown = capfd.readouterr().err
    assert "training: 100%" in shown and shown.count("training:   0%") == 1
    assert re.search(r"loss=\d\.\d{3}, tokens_per_s=[\d,]+, mfu=\d+\.\d%", shown)
    for speed, seconds, mfu, peaks in ranks:
        assert speed == pytest.approx(6 * 6 * 8 / seconds)  # of all ranks
        assert mfu == pytest.approx(TrainedShape.of(SHAPE).flops_per_token(8) * speed / 1e12)
        assert len(peaks) == 2 and all(10 * 2**20 < peak < 2**34 for peak in peaks)
    assert ranks[0][3] == ranks[1][3]


def test_flops_of_a_token_are_those_of_its_products():
    """Counted by torch's own counter, attention written out as its two products."""
    from torch.utils.flop_counter import FlopCounterMode

    for tied in (True, False):
        shape, context = changed(SHAPE, tie_embeddings=tied), 32
        model = Decoder(shape)
        counter = FlopCounterMode(display=False)

        def attention(layer, q, k, v):
            q, k, v = (x.movedim(-2, -3).repeat_interleave(2 // x.shape[-2], -3) for x in (q, k, v))
            return ((q @ k.mT).softmax(-1) @ v).movedim(-3, -2)

        with counter:
            model(torch.zeros(1, context, dtype=torch.int64), torch.arange(context)[None], attention)
        half = shape.num_layers * shape.num_heads * shape.head_dim * 2 * context  # of attention, which is causal
        assert TrainedShape.of(shape).flops_per_token(context) == 3 * (counter.get_total_flops() / context - half)


def hosts(kind: str) -> float:
    machine = Machine("test", "test", kind, "measured", {"fp32": 1e12}, 1e10, 1e9)
    return usage.peak_flops(machine, "fp32", Communicator(GroupTransport()))


def test_ranks_of_a_host_share_its_cpus_and_have_a_gpu_each():
    assert run(hosts, 3, "cpu") == [1e12] * 3
    assert run(hosts, 3, "gpu") == [3e12] * 3
    assert usage.peak_flops(MACHINE, "fp32", None) == 1e12


def test_without_a_machine_there_is_no_utilisation():
    single = Trainer(Decoder(SHAPE), ROW, HELD_OUT, SHORT)
    single.run(until=1)
    assert single.mfu is None and single.tokens_per_second > 0 and not math.isnan(single.losses[0])


def test_an_unknown_engine_is_refused():
    with pytest.raises(
        ValueError, match="parallel is one of data, expert, zero0, zero1, zero2, zero3, tensor, sequence; got 'fsdp'"
    ):
        Trainer(Decoder(SHAPE), ROW, HELD_OUT, SHORT, parallel="fsdp")
