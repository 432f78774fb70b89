"""What a Checkpointer promises and refuses on one process."""

import os
import random
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from minilib.classic.write_ahead_log.disks.real_disk import DiskInUse
from minilib.mechanisms.journaling import WriteFile
from minilib.operations.checkpoint import (
    AlreadySaved,
    Checkpointer,
    NoCheckpoint,
    RngState,
    SaveInProgress,
    StateMismatch,
    background,
    replica_state,
)
from minilib.operations.checkpoint.format import writing
from minilib.operations.checkpoint.format.folder import CheckpointFolder, part_name, steps_to_keep
from minilib.training.sampler import ShardedSampler
from minilib.training.trainer import CannotResume, Trainer
from tests.operations.checkpoint.runs import CONFIG, HELD_OUT, ROW, trainer_of
from tests.operations.checkpoint.small_models import model_and_optimizer, take_step


class GatedFolder(CheckpointFolder):
    """Writes wait until the gate is open."""

    gate = threading.Event()

    def run(self, steps):
        for step in steps:
            if isinstance(step, WriteFile):
                assert self.gate.wait(60)
            super().run([step])


@pytest.fixture
def gated(tmp_path):
    GatedFolder.gate = threading.Event()
    yield lambda **options: Checkpointer(tmp_path, open_disk=lambda: GatedFolder(tmp_path), **options)
    GatedFolder.gate.set()


def test_steps_go_on_while_a_copy_is_written(gated, tmp_path):
    model, optimizer = model_and_optimizer()
    with gated() as checkpointer:
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        checkpointer.save({"run": replica_state(model, optimizer)}, 1)
        assert checkpointer.latest() is None, "what is not durable is not the latest"
        for _ in range(3):
            take_step(model, optimizer)
        GatedFolder.gate.set()
        assert checkpointer.wait() == 1
        checkpointer.load({"run": replica_state(model, optimizer)})
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_threads_behind_the_steps_give_way_and_those_in_front_do_not(tmp_path, monkeypatch):
    found: dict[str, set[int]] = {"writes": set(), "checksums": set()}

    def note(what: str) -> None:
        found[what].add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - mine)

    class NotedFolder(CheckpointFolder):
        def run(self, steps):
            note("writes")
            super().run(steps)

    mine, crc32 = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), writing.crc32
    monkeypatch.setattr(writing, "crc32", lambda block: (note("checksums"), crc32(block))[1])
    state = {"run": replica_state(*model_and_optimizer())}
    with Checkpointer(tmp_path, open_disk=lambda: NotedFolder(tmp_path)) as checkpointer:
        for wait, expected in ((True, 0), (False, min(background.NICENESS, 19 - mine))):
            for each in found.values():
                each.clear()
            checkpointer.save(state, int(wait), wait=wait)
            checkpointer.wait()
            assert found == {"writes": {expected}, "checksums": {expected}}


def test_what_a_run_notes_while_a_copy_is_written_is_not_in_it(gated):
    trainer = trainer_of("data", None)
    trainer.run(3)
    with gated() as checkpointer:
        checkpointer.save({"run": trainer}, trainer.step)
        trainer.run(5)
        GatedFolder.gate.set()
        assert checkpointer.wait() == 3
        losses = list(trainer.losses)
        checkpointer.load({"run": trainer})
    assert len(losses) == 5 and trainer.losses == losses[:3]


def test_a_second_save_waits_or_is_refused(gated):
    state = {"run": replica_state(*model_and_optimizer())}
    with gated(busy="refuse") as checkpointer:
        checkpointer.save(state, 1)
        with pytest.raises(SaveInProgress):
            checkpointer.save(state, 2)
        GatedFolder.gate.set()
        assert checkpointer.wait() == 1
    GatedFolder.gate.clear()
    with gated() as checkpointer:
        checkpointer.save(state, 2)
        threading.Timer(0.05, GatedFolder.gate.set).start()
        checkpointer.save(state, 3)
        assert checkpointer.steps()[:2] == [1, 2]
        assert checkpointer.wait() == 3


def test_retention_keeps_the_newest_and_milestones(tmp_path):
    state = {"run": replica_state(*model_and_optimizer())}
    with Checkpointer(tmp_path, keep=2, keep_every=10) as checkpointer:
        for step in (5, 10, 15, 20, 25, 30, 35):
            checkpointer.save(state, step)
        checkpointer.wait()
        assert checkpointer.steps() == [10, 20, 30, 35]
        parts = sorted(path.name for path in tmp_path.glob("part-*"))
        assert parts == [part_name(step, 0) for step in (10, 20, 30, 35)]
        checkpointer.discard(35)
        checkpointer.save(state, 35, wait=True)
    assert steps_to_keep([0, 1, 2, 3], 1, 2) == [0, 2, 3] and steps_to_keep([], 3) == []
    for keep, every in ((0, 0), (1, -1)):
        with pytest.raises(ValueError):
            Checkpointer(tmp_path, keep=keep, keep_every=every)


def test_refusals_by_name(tmp_path):
    model, optimizer = model_and_optimizer()
    state = {"run": replica_state(model, optimizer)}
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(NoCheckpoint, match="no checkpoint: manifests there are of the steps none"):
            checkpointer.load(state)
        checkpointer.save(state, 1, wait=True)
        with pytest.raises(AlreadySaved, match=r"discard\(1\)"):
            checkpointer.save(state, 1)
        with pytest.raises(NoCheckpoint, match=r"no checkpoint of step 7.*\[1\]"):
            checkpointer.load(state, 7)
        with pytest.raises(NoCheckpoint):
            checkpointer.discard(7)
        for step in (-1, 1.0, True):
            with pytest.raises(ValueError, match="step is a whole number"):
                checkpointer.save(state, step)
        with pytest.raises(StateMismatch, match="replica_state"):
            checkpointer.save({"optimizer": optimizer}, 2)
        with pytest.raises(StateMismatch, match="twice"):
            checkpointer.save({"a": model, "b": model}, 2)
        with pytest.raises(DiskInUse):
            Checkpointer(tmp_path)
        assert checkpointer.steps() == [1]
    for options in ({"busy": "maybe"}, {"block_bytes": 0}):
        with pytest.raises(ValueError):
            Checkpointer(tmp_path, **options)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    model, optimizer = model_and_optimizer()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"run": replica_state(model, optimizer), "rng": RngState()}, 1, wait=True)

        def refused(said, state, ignore=("rng*",)):
            before = [x.clone() for part in state.values() for x in getattr(part, "watched", [])]
            with pytest.raises(StateMismatch, match=said):
                checkpointer.load(state, ignore=ignore)
            assert all(map(torch.equal, before, [x for p in state.values() for x in getattr(p, "watched", [])]))

        other, other_optimizer = model_and_optimizer(1, width=8)
        refused(r"model.0.weight is \(8, 5\) here and \(7, 5\)", {"run": replica_state(other, other_optimizer)})
        refused("holds optimizer.state.0.bias.exp_avg and", {"run": replica_state(model)})
        refused("has 'rng', which nobody asks for", {"run": replica_state(model, optimizer)}, ())
        refused("has no 'walk'", {"walk": replica_state(model, optimizer)}, ("*",))
        larger = torch.nn.Sequential(*model, torch.nn.Linear(3, 2))
        refused("model.3.weight is missing", {"run": replica_state(larger, torch.optim.AdamW(larger.parameters()))})
        smaller = torch.nn.Sequential(*list(model)[:2])
        refused("holds model.2.bias and 1 more", {"run": replica_state(smaller)}, ("rng*", "optimizer.*"))
        checkpointer.load({"run": replica_state(model)}, ignore=("rng*", "optimizer.*"))
        half = model_and_optimizer(3)[0].half()
        refused("is float16 here and float32 in the checkpoint", {"run": replica_state(half)}, ("rng*", "optimizer.*"))


def test_a_fresh_optimizer_gets_its_moments_and_its_step_count(tmp_path):
    """torch's own way makes a step of zeros first, which AdamW counts."""
    model, optimizer = model_and_optimizer(steps=4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"run": replica_state(model, optimizer)}, 4)
        fresh, other = model_and_optimizer(9, steps=0, lr=0.5)
        checkpointer.load({"run": replica_state(fresh, other)})
        new, new_optimizer = model_and_optimizer(steps=0)
        checkpointer.save({"run": replica_state(new, new_optimizer)}, 5)
        used, used_optimizer = model_and_optimizer(3, steps=2)
        checkpointer.load({"run": replica_state(used, used_optimizer)})
    assert [float(state["step"]) for state in other.state.values()] == [4.0] * 6
    assert other.param_groups[0]["lr"] == 0.1 and other.param_groups[0]["betas"] == (0.9, 0.999)
    assert not any(used_optimizer.state.values()), "moments that were not saved are gone"
    for one, two in ((model, optimizer), (fresh, other)), ((new, new_optimizer), (used, used_optimizer)):
        for each in (one, two):
            torch.manual_seed(8)
            take_step(*each)
        assert all(map(torch.equal, one[0].parameters(), two[0].parameters()))


def draws() -> list:
    return [(random.random(), random.gauss(), np.random.randn(), torch.randn(2).tolist()) for _ in range(3)]


def test_all_generators_go_on(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(), np.random.randn()  # both keep a second number back
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"rng": RngState()}, 0)
        draws = [(random.random(), random.gauss(), np.random.randn(), torch.randn(2).tolist()) for _ in range(3)]
        checkpointer.load({"rng": RngState()})
        assert draws == [
            (random.random(), random.gauss(), np.random.randn(), torch.randn(2).tolist()) for _ in range(3)
        ]
        with pytest.raises(StateMismatch, match="generators of 1 ranks were saved, and here are 2"):
            checkpointer.load({"rng": RngState(1, 2)})
        checkpointer.load({"rng": RngState(1, 2, other_ranks="seed")})
    with pytest.raises(ValueError, match="'refuse' or 'seed'"):
        RngState(other_ranks="guess")


def test_a_sampler_goes_on_and_another_deal_is_refused(tmp_path):
    sampler = ShardedSampler(20, 1, 0, 4, seed=3)
    sampler.next_batch()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"sampler": sampler}, 1)
        expected, other = sampler.next_batch(), ShardedSampler(20, 1, 0, 4, seed=3)
        checkpointer.load({"sampler": other})
        assert other.next_batch() == expected
        with pytest.raises(ValueError, match="another deal"):
            checkpointer.load({"sampler": ShardedSampler(20, 1, 0, 4, seed=4)})


def test_another_run_is_refused_before_anything_is_loaded(tmp_path):
    trainer = trainer_of("data", None)
    with Checkpointer(tmp_path) as checkpointer:
        trainer.run(1)
        checkpointer.save({"run": trainer}, 1)
        config = type(CONFIG)(**{**CONFIG.__dict__, "learning_rate": 0.5})
        other = Trainer(trainer_of("data", None, seed=4).model, ROW, HELD_OUT, config)
        before = other.model.embed.weight.clone()
        with pytest.raises(CannotResume, match="learning_rate was"):
            checkpointer.load({"run": other})
        assert torch.equal(before, other.model.embed.weight)


def test_memory_is_one_copy_at_most(tmp_path):
    """Behind the steps a copy of this rank's part; in the foreground a block; loading, a window."""
    model = torch.nn.Linear(1000, 2000, bias=False)
    nbytes = 8_000_000
    with Checkpointer(tmp_path) as checkpointer:
        for wait in (True, False):
            tracemalloc.start()
            checkpointer.save({"model": model}, int(wait), wait=wait)
            checkpointer.wait()
            python_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert python_bytes < 2.5e6, "blocks of 1 MiB"
            assert checkpointer.staged_bytes == (0 if wait else nbytes)
        checkpointer.save({"model": model}, 2)
        assert checkpointer.staged_bytes == nbytes
