"""Bits that flip in the state of one rank of a training run, and healthy runs in which nothing is to be found."""

import random

import pytest
import torch

from minilib.operations.checkpoint import RngState, replica_state
from minilib.operations.integrity import IntegrityVerdict, ReplicaCheck, flip_bit
from tests.operations.checkpoint.runs import comm_of_ranks, on_ranks, trainer_of


def flips(world_size: int, count: int) -> list[tuple[int, float, float]]:
    """Of each flip the rank, which tensor and which of its bits, as shares."""
    draw = random.Random(7)
    return [(draw.randrange(world_size), draw.random(), draw.random()) for _ in range(count)]


def flips_and_compares(count: int) -> dict:
    """One bit after the other, anywhere in weights and moments; healed each time."""
    comm = comm_of_ranks()
    trainer = trainer_of("data", comm)
    trainer.run(2)
    check = ReplicaCheck({"run": trainer, "rng": RngState(comm.rank, comm.world_size)}, comm)
    found, expected = [check.compare(0)], []
    parts = check.parts()
    names = sorted(set(parts) - set(check.uncovered))
    for number, (rank, which, bit) in enumerate(flips(comm.world_size, count), start=1):
        name = names[int(which * len(names))]
        data = parts[name].data
        if comm.rank == rank:
            flip_bit(data, int(bit * 8 * data.nbytes))
        found.append(check.compare(number))
        if comm.rank == rank:
            flip_bit(data, int(bit * 8 * data.nbytes))
        expected.append((rank, name))
    kinds = {name.rsplit(".", 1)[1] for _, name in expected if name.startswith("optimizer")}
    return {"found": [*found, check.compare(count + 1)], "expected": expected, "kinds": kinds,
            "uncovered": check.uncovered, "covered": check.covered_bytes, "checked": check.checked_bytes}  # fmt: skip


def test_each_of_120_flipped_bits_is_found_and_its_rank_named():
    for each in on_ranks(flips_and_compares, 3, 120):
        first, *found, last = each["found"]
        assert first.agreed and last == IntegrityVerdict(121)
        for verdict, (rank, name) in zip(found, each["expected"], strict=True):
            assert (verdict.suspects, verdict.named, verdict.tensors) == ((rank,), True, (name,))
        assert {rank for rank, _ in each["expected"]} == {0, 1, 2}
        assert each["kinds"] == {"exp_avg", "exp_avg_sq", "step"}, "moments were flipped, too"
        assert all(name.startswith("rng.") for name in each["uncovered"]) and each["uncovered"]
        assert each["checked"] == 122 * each["covered"], "one pass over the bytes a comparison"


def test_of_two_replicas_it_is_one_or_the_other():
    for each in on_ranks(flips_and_compares, 2, 8):
        assert all(v.suspects == (0, 1) and not v.named and v.tensors == (name,)
                   for v, (_, name) in zip(each["found"][1:-1], each["expected"], strict=True))  # fmt: skip


def moments_that_come_later() -> list[IntegrityVerdict]:
    """A comparison before the first step, when the optimizer has no moments; then one of them flips."""
    comm = comm_of_ranks()
    trainer = trainer_of("data", comm)
    check = ReplicaCheck({"run": trainer}, comm)
    verdicts = [check.compare(0)]
    trainer.run(1)
    verdicts.append(check.compare(1))
    if comm.rank == 2:
        flip_bit(trainer.optimizer.state[trainer.model.embed.weight]["exp_avg"], 99)
    return [*verdicts, check.compare(2)]


def test_moments_are_compared_once_there_are_any():
    for before, after, flipped in on_ranks(moments_that_come_later, 3):
        assert before.agreed and after.agreed
        assert flipped == IntegrityVerdict(2, (2,), True, ("optimizer.state.embed.weight.exp_avg",))


def healthy(count: int) -> dict:
    """A comparison after each of many steps, with values that are not equal to themselves and zeros of both signs."""
    comm = comm_of_ranks()
    trainer = trainer_of("data", comm)
    odd = torch.nn.ParameterList([torch.tensor([float("nan"), -0.0, 0.0, float("inf")]) for _ in range(2)])
    flip_bit(odd[1].data, 3)  # a NaN with a payload
    torch.manual_seed(comm.rank)
    rng, before = RngState(comm.rank, comm.world_size), 0
    check = ReplicaCheck({"run": trainer, "odd": replica_state(odd), "rng": rng}, comm)
    agreed = [check.compare(0).agreed]
    for number in range(count):
        if number % 34 == 33:
            trainer.run(trainer.step + 1)
        torch.rand(comm.rank + 1)  # generators go their own way
        sent = comm.traffic.bytes
        agreed.append(check.compare(number).agreed)
        before = comm.traffic.bytes - sent
    return {"agreed": agreed, "steps": trainer.step, "sent": before}


def test_no_false_alarm_in_200_healthy_comparisons():
    for each in on_ranks(healthy, 3, 200):
        assert each["agreed"] == [True] * 201 and each["steps"] == 5
        assert each["sent"] <= 3 * 2 * 8, "a few bytes a rank"


def zero_and_tensor(parallel: str, world_size: int) -> dict:
    comm = comm_of_ranks()
    trainer = trainer_of(parallel, comm)
    trainer.run(1)
    check = ReplicaCheck({"run": trainer}, comm)
    verdicts = [check.compare(1)]
    parts = check.parts()
    for name in sorted(set(parts) - set(check.uncovered)):  # one bit in each part that is covered
        if comm.rank == world_size - 1:
            flip_bit(data := parts[name].data.contiguous(), 0)
            parts[name].data.copy_(data)
        verdicts.append(check.compare(1))
        if comm.rank == world_size - 1:
            flip_bit(data, 0)
            parts[name].data.copy_(data)
    whole = sum(fragment.data.nbytes for fragment in parts.values())
    return {"verdicts": verdicts, "covered": check.covered_bytes, "whole": whole, "uncovered": check.uncovered}


@pytest.mark.parametrize("parallel", ["zero1", "zero3", "tensor"])
def test_what_one_rank_alone_holds_is_not_covered_and_said_to_be_so(parallel):
    for each in on_ranks(zero_and_tensor, 2, parallel, 2):
        first, *others = each["verdicts"]
        assert first.agreed and all(verdict.suspects == (0, 1) for verdict in others)
        assert each["covered"] < each["whole"] and each["uncovered"]
        if parallel == "tensor":
            assert others and any("norm" in verdict.tensors[0] for verdict in others)


def a_batch_norm(ignore: list[str]) -> bool:
    comm = comm_of_ranks()
    model = torch.nn.BatchNorm1d(3)
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(comm.rank)))
    return ReplicaCheck({"run": model}, comm, ignore).compare(0).agreed


def test_what_replicas_may_have_of_their_own_can_be_left_out():
    assert on_ranks(a_batch_norm, 2, []) == [False, False]
    assert on_ranks(a_batch_norm, 2, ["*running_*"]) == [True, True]


def groups_on_a_mesh() -> IntegrityVerdict:
    """Two halves of a model, each on two ranks: a flip in one half leaves the other half's ranks out of suspicion."""
    comm = comm_of_ranks()
    half = torch.nn.ParameterDict({f"half_{comm.rank % 2}": torch.ones(4), "all": torch.ones(2)})
    check = ReplicaCheck({"run": replica_state(half)}, comm)
    assert check.compare(0).agreed
    if comm.rank == 3:
        flip_bit(half["half_1"].data, 5)
    return check.compare(1)


def test_ranks_that_hold_something_else_are_no_suspects():
    for verdict in on_ranks(groups_on_a_mesh, 4):
        assert verdict == IntegrityVerdict(1, (1, 3), False, ("model.half_1",))
