"""What the trainer asks of every strategy: accumulation, averaging, bytes, and states of other versions."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilib.model.decoder import Decoder
from minilib.parallel.data.data_parallel import NoBackward
from minilib.parallel.zero import StepWithoutBackward
from minilib.parallel.zero.ledger import STAGES, expected_bytes
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.strategies import PARALLEL, choose_strategy
from minilib.training.trainer import CannotResume
from tests.training.test_trainer_ranks import SHAPE, SHORT, alone, changed, check_same, outcome, trainer, trains

EPOCH = changed(SHORT, sampling="epoch", batch_size=7)  # 24 windows: three steps of 7 and one of 3


# Several backwards a step


@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_several_backwards_are_one_large_batch(accumulate):
    check_same(alone(changed(SHORT, accumulate=accumulate)), alone(SHORT))


@pytest.mark.parametrize(
    ("world_size", "config"),
    [
        (2, changed(SHORT, accumulate=2)),
        (2, changed(SHORT, batch_size=3, accumulate=2)),
        (3, changed(EPOCH, accumulate=3)),
    ],
    ids=["even parts", "a part without a sequence", "epochs in three parts"],
)
def test_and_so_they_are_on_ranks_in_every_strategy(world_size, config):
    expected = alone(changed(config, accumulate=1))
    for results in run(trains, world_size, config, PARALLEL):
        for found in results.values():
            check_same(found, expected)


def traffic(parallel: str, accumulate: int) -> tuple[int, int]:
    """Bytes that a rank sends in a step, and how many of a bucket's gradients one reduction sends."""
    comm = Communicator(GroupTransport())
    each = trainer(changed(SHORT, accumulate=accumulate, evaluate_every=9), comm, parallel)
    each.run(until=1)
    before = comm.traffic.bytes
    each.run(until=2)
    padded = sum(row.layout.length for row in each.strategy.zero.rows) if parallel.startswith("zero") else 0
    return comm.traffic.bytes - before, padded * 4 // 2  # (n - 1) / n on two ranks


@pytest.mark.parametrize("parallel", ["data", "zero0", "zero1", "zero2"])
def test_accumulation_sends_gradients_once_a_step_unless_they_are_cut(parallel):
    for (once, gradients), (thrice, _) in zip(run(traffic, 2, parallel, 1), run(traffic, 2, parallel, 3), strict=True):
        assert thrice - once == (2 * gradients if parallel == "zero2" else 0)


def held_between_backwards(stage: int) -> tuple[dict, dict]:
    comm = Communicator(GroupTransport())
    each = trainer(changed(SHORT, accumulate=2), comm, f"zero{stage}")
    zero, seen = each.strategy.zero, []
    loss = each._loss

    def look(tokens, weight):
        seen.append(zero.bytes_per_rank()["gradients"])
        return loss(tokens, weight)

    each._loss = look
    each.run(until=1)
    return seen, expected_bytes(sum(row.layout.length for row in zero.rows), 2, stage)["gradients"]


@pytest.mark.parametrize("stage", [2, 3])
def test_cut_gradients_stay_cut_while_they_accumulate(stage):
    for seen, expected in run(held_between_backwards, 2, stage):
        assert seen == [expected] * 2


# Epochs


def saves_epochs(parallel: str, path: Path) -> None:
    each = trainer(EPOCH, Communicator(GroupTransport()), parallel)
    each.run(until=2)
    each.save(path)


def goes_on_with_epochs(parallel: str, path: Path) -> dict:
    each = trainer(EPOCH, Communicator(GroupTransport()), parallel, seed=7)
    each.resume(path)
    each.run()
    return outcome(each) | {"tokens": each.tokens_per_second * each.seconds}


@pytest.mark.parametrize(("first", "second", "ranks"), [("data", "zero3", 3), ("zero2", "data", 4)])
def test_a_run_goes_on_within_an_epoch_on_another_number_of_ranks(first, second, ranks, tmp_path):
    run(saves_epochs, 2, first, tmp_path / "run.pt")
    found = run(goes_on_with_epochs, ranks, second, tmp_path / "run.pt")[0]
    check_same(found, alone(EPOCH))
    assert found["tokens"] == pytest.approx((24 + 14) * 8), "an epoch, and two steps of 7"


# Gradients are averaged once, whoever asks first


def steps_without_a_norm(parallel: str, norm: bool) -> dict:
    comm = Communicator(SharedMemoryTransport())
    model = Decoder(SHAPE)
    model.initialize(0)
    strategy = choose_strategy(parallel, model, comm, SHORT)
    tokens = torch.arange(4)[None] + comm.rank
    with pytest.raises((NoBackward, StepWithoutBackward), match="backward"):
        strategy.step()
    for micro in (1, 2, 1):
        for number in range(micro):
            with strategy.no_sync() if number + 1 < micro else nullcontext():
                model.loss(tokens + number, torch.arange(4)[None], tokens + 1).backward()
        if norm:
            strategy.clip_grad_norm(1e9)
        strategy.step()
        strategy.zero_grad()
    return strategy.full_state_dict()


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_step_averages_what_nobody_has_averaged(parallel):
    with_norm, without = (run(steps_without_a_norm, 2, parallel, norm) for norm in (True, False))
    for mine, other in zip(with_norm, without, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.get("model", {}).items():
            assert torch.equal(value, other["model"][name]), name
    ranks = [state["model"] for state in without if state]
    assert all(torch.equal(x, state[name]) for state in ranks for name, x in ranks[0].items())


# bf16


def bf16_bytes(stage: int) -> tuple[dict, dict, int]:
    each = trainer(changed(SHORT, precision="bf16"), Communicator(SharedMemoryTransport()), f"zero{stage}")
    each.run(until=2)
    zero = each.strategy.zero
    steps = sum(len(row.parts) for row in zero.rows) * 4  # AdamW counts steps in a float for each tensor
    found = zero.bytes_per_rank()
    found["optimizer"] -= steps
    dtypes = {p.dtype for p in each.model.parameters()}
    saved = each.strategy.full_state_dict()
    full = {x.dtype for x in saved["model"].values()} if saved else {torch.float32}
    return found, expected_bytes(sum(row.layout.length for row in zero.rows), 2, stage, "bf16"), dtypes, full


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_with_zero_holds_what_the_ledger_says(stage):
    for found, expected, dtypes, full in run(bf16_bytes, 2, stage):
        assert {name: found[name] for name in expected} == expected
        assert dtypes == {torch.bfloat16} and full == {torch.float32}


def bf16_losses(path: Path) -> list[float]:
    each = trainer(changed(SHORT, precision="bf16"), Communicator(SharedMemoryTransport()), "zero3", seed=7)
    each.resume(path)
    each.run()
    return each.losses


def test_a_bf16_run_goes_on_from_one_process_to_zero(tmp_path):
    config = changed(SHORT, precision="bf16")
    single = trainer(config)
    single.run(until=3)
    single.save(tmp_path / "run.pt")
    for losses in run(bf16_losses, 2, tmp_path / "run.pt"):
        assert losses == pytest.approx(alone(config)["losses"], rel=1e-3)


# Saved runs


class Copied(TorchDispatchMode):
    """Counts elements that copy_ writes, and refuses to put whole tensors together."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.copy_.default:
            self.elements += args[0].numel()
        assert op is not torch.ops.aten.cat.default
        return op(*args, **(kwargs or {}))


def resumes_counting(parallel: str, path: Path) -> tuple[int, int, int]:
    each = trainer(SHORT, Communicator(GroupTransport()), parallel, seed=7)
    with Copied() as copied:
        each.strategy.load_full_state_dict(torch.load(path, weights_only=True, mmap=True))
    zero = each.strategy.zero
    owned = sum(row.own.numel() for row in zero.rows)
    return copied.elements, owned, sum(row.layout.numel for row in zero.rows)


def test_a_rank_reads_the_slices_that_it_owns(tmp_path):
    single = trainer(SHORT)
    single.run(until=3)
    single.save(tmp_path / "run.pt")
    ranks = run(resumes_counting, 4, "zero3", tmp_path / "run.pt")
    everything = ranks[0][2]
    for copied, owned, _ in ranks:
        assert owned < everything / 3
        assert copied <= 3 * owned, "more than its values and two moments"
    assert sum(copied for copied, _, _ in ranks) == pytest.approx(3 * everything, rel=0.01)


def resumes_and_loses_the_file(parallel: str, path: Path) -> list[float]:
    each = trainer(SHORT, Communicator(GroupTransport()), parallel, seed=7)
    each.resume(path)
    each.comm.barrier()
    if each.rank == 0:
        path.write_bytes(b"")  # in place: mapped pages would be gone
    each.comm.barrier()
    each.run()
    return each.losses


@pytest.mark.parametrize("parallel", ["data", "expert", "zero1"])
def test_a_file_may_go_once_it_is_read(parallel, tmp_path):
    single = trainer(SHORT)
    single.run(until=3)
    single.save(tmp_path / "run.pt")
    for losses in run(resumes_and_loses_the_file, 2, parallel, tmp_path / "run.pt"):
        assert losses == pytest.approx(alone(SHORT)["losses"], rel=1e-5)


def old_file(path: Path, config) -> Path:
    """A run as it was saved before there were these fields."""
    single = trainer(config)
    single.run(until=3)
    single.save(path)
    state = torch.load(path, weights_only=True)
    assert state["config"].pop("sampling") and "accumulate" not in state["config"]
    del state["config"]["balance"]["z_loss"], state["config"]["model tie_embeddings"]
    torch.save(state, path)
    return path


def test_a_run_that_was_saved_before_a_field_was_there_goes_on(tmp_path):
    path = old_file(tmp_path / "run.pt", SHORT)
    single = trainer(SHORT, seed=7)
    single.resume(path)
    single.run()
    check_same(outcome(single), alone(SHORT))
    with pytest.raises(CannotResume, match="run.pt is another run: sampling was 'windows', now 'epoch'$"):
        trainer(changed(SHORT, sampling="epoch")).resume(path)


def test_a_run_may_go_on_in_more_backwards_a_step(tmp_path):
    single, other = trainer(SHORT), trainer(changed(SHORT, accumulate=3), seed=7)
    single.run(until=3)
    single.save(tmp_path / "run.pt")
    other.resume(tmp_path / "run.pt")
    other.run()
    check_same(outcome(other), alone(SHORT))


def test_a_step_that_was_interrupted_takes_the_same_sequences_again(monkeypatch):
    single = trainer(EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(single.optimizer, "step", partial(next, iter(())))
        with pytest.raises(StopIteration):
            single.run()
    single.run()
    check_same(outcome(single), alone(EPOCH))
