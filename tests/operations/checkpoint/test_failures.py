"""Disks and ranks that fail: nothing that was acknowledged is lost, and all failures are told, by name."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.journaling import ManifestDamaged, PartDamaged, SyncFailed, numbered
from minilib.operations.checkpoint import (
    Checkpointer,
    OtherRankFailed,
    SaveFailed,
    SaveInProgress,
    StateMismatch,
    commit,
    replica_state,
)
from minilib.operations.checkpoint.format.folder import CheckpointFolder, part_name
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.operations.checkpoint.runs import comm_of_ranks
from tests.operations.checkpoint.small_models import FailingFolder, model_and_optimizer


def test_a_failure_behind_the_steps_is_told_once_by_the_next_call(tmp_path):
    state = {"run": replica_state(*model_and_optimizer())}
    calls = (
        lambda c: c.wait(),
        lambda c: c.save(state, 9),
        lambda c: c.load(state),
        lambda c: c.discard(1),
        lambda c: c.close(),
    )
    for number, call in enumerate(calls):
        folder = tmp_path / str(number)
        checkpointer = Checkpointer(folder, open_disk=lambda folder=folder: FailingFolder(folder), block_bytes=100)
        checkpointer.save(state, 1, wait=True)
        FailingFolder.fails_at = FailingFolder.taken + 4
        checkpointer.save(state, 2)
        with pytest.raises(SaveFailed, match="step 2 failed: rank 0, writing its part met OSError.*no space left"):
            call(checkpointer)
        assert checkpointer.steps() == [1] and not (folder / part_name(2, 0)).exists()
        if number < len(calls) - 1:
            checkpointer.save(state, 2)
            assert checkpointer.wait() == 2
        checkpointer.close()


def test_wherever_the_disk_fails_nothing_is_lost_and_all_is_told(tmp_path):
    """Every step of a save, and of the removal of the one before, fails in turn."""
    model, optimizer = model_and_optimizer()
    state = {"run": replica_state(model, optimizer)}
    failures = 0
    for fails_at in range(1, 80):
        folder = tmp_path / str(fails_at)
        with Checkpointer(folder, open_disk=lambda folder=folder: FailingFolder(folder), keep=1) as checkpointer:
            checkpointer.save(state, 1, wait=True)
            FailingFolder.fails_at = FailingFolder.taken + fails_at
            FailingFolder.error = SyncFailed(errno.EIO, "fsync") if fails_at % 2 else OSError(errno.EIO, "bad")
            try:
                checkpointer.save(state, 2, wait=True)
                failed = False
            except SaveFailed as error:
                failed = True
                assert ("is durable" in str(error)) <= (2 in checkpointer.steps())
            FailingFolder.fails_at = -1
            failures += failed
            steps = checkpointer.steps()
            assert steps and (failed or steps == [2])
            assert checkpointer.load(state).step == steps[-1]
            if not failed:
                break
    assert failures == fails_at - 1 >= 10


def test_damage_is_named_and_an_older_checkpoint_serves(tmp_path):
    model, optimizer = model_and_optimizer()
    state = {"run": replica_state(model, optimizer)}
    with Checkpointer(tmp_path, block_bytes=64) as checkpointer:
        checkpointer.save(state, 1)
        checkpointer.save(state, 2)
        checkpointer.wait()
        part, manifest = tmp_path / part_name(2, 0), tmp_path / numbered("manifest", 2)
        whole = part.read_bytes()
        part.write_bytes(whole[:100] + b"\xff\xfe\xfd" + whole[103:])
        with pytest.raises(PartDamaged, match="part-000000000002-00000 is damaged between bytes 64 and 128"):
            checkpointer.load(state)
        manifest.write_bytes(manifest.read_bytes()[:-30])
        with pytest.raises(ManifestDamaged, match="torn or changed"):
            checkpointer.load(state)
        assert checkpointer.load(state, 1).step == 1


def test_leftovers_of_a_killed_save_are_removed_and_other_files_stay(tmp_path):
    state = {"run": replica_state(*model_and_optimizer())}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, 1, wait=True)
    for name in (part_name(2, 0), part_name(2, 31), numbered("manifest", 2) + ".partial", "part-notes", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {part_name(1, 0), numbered("manifest", 1), "part-notes", "notes.txt", "lock"}


def fails_on_rank_1(folder: str) -> list[str]:
    comm, said = comm_of_ranks(), []
    disk = FailingFolder if dist.get_rank() == 1 else CheckpointFolder
    state = {"run": replica_state(*model_and_optimizer())}
    with Checkpointer(folder, comm, open_disk=lambda: disk(Path(folder))) as checkpointer:
        checkpointer.save(state, 1, wait=True)
        FailingFolder.fails_at = FailingFolder.taken + 2
        for call in (lambda: checkpointer.save(state, 2), checkpointer.wait):
            try:
                call()
            except SaveFailed as error:
                said.append(str(error))
        one = {"run": replica_state(*model_and_optimizer(width=7 + dist.get_rank()))}
        for other in (
            one,
            {"run": replica_state(*model_and_optimizer())} | ({"x": object()} if dist.get_rank() else {}),
        ):
            try:
                checkpointer.save(other, 3)
            except (StateMismatch, OtherRankFailed) as error:
                said.append(f"{type(error).__name__}: {error}")
        checkpointer.save(state, 4)
        said.append(str(checkpointer.wait()))
        said.append(str(checkpointer.load(state).step))
    return said


def test_ranks_fail_together_and_go_on(tmp_path):
    first, second = run(fails_on_rank_1, 2, str(tmp_path), timeout=120)
    assert first[0] == second[0] and "rank 1, writing its part met OSError" in first[0]
    assert "StateMismatch: model.0.weight is float32 (8, 5) on rank 1" in first[1] and first[1] == second[1]
    assert first[2].startswith("OtherRankFailed: rank 1 failed: StateMismatch: x is a object")
    assert second[2].startswith("StateMismatch: x is a object")
    assert first[3:] == second[3:] == ["4", "4"]


class WaitingFolder(CheckpointFolder):
    """A disk that writes nothing until it may; then it is like any other."""

    may_write = threading.Event()

    def run(self, steps):
        if threading.current_thread() is not threading.main_thread():
            assert self.may_write.wait(60)
        super().run(steps)


def test_a_save_goes_on_and_its_copy_is_kept_when_the_user_interrupts_the_wait(tmp_path):
    WaitingFolder.may_write.clear()
    model, _ = model_and_optimizer()
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Checkpointer(tmp_path, open_disk=lambda: WaitingFolder(tmp_path), busy="refuse") as checkpointer:
        try:
            checkpointer.save({"model": model}, 1)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                checkpointer.wait()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            with pytest.raises(SaveInProgress):  # or else this save would be copied over the one that is being written
                checkpointer.save({"model": model}, 2)
        finally:
            WaitingFolder.may_write.set()
        assert checkpointer.wait() == 1
        checkpointer.load({"model": model})
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


def hears_nothing_more(folder: str) -> str:
    """Rank 1 does not hear that all parts are written, while rank 0 does and publishes the manifest."""
    comm = Communicator(SharedMemoryTransport(timeout=3.0))
    told_by_all, calls = commit.told_by_all, []

    def told(text, comm):
        said = told_by_all(text, comm)
        calls.append(text)
        if comm.rank == 1 and len(calls) == 1:
            raise CollectiveFailed("rank 0 has not answered")
        return said

    commit.told_by_all = told
    checkpointer = Checkpointer(folder, comm)
    try:
        with pytest.raises(SaveFailed) as caught:
            checkpointer.save({"run": replica_state(*model_and_optimizer())}, 1, wait=True)
    finally:
        commit.told_by_all = told_by_all
        comm.close()
    return str(caught.value)


def test_a_rank_that_does_not_hear_of_the_others_leaves_its_part_to_a_manifest_that_they_may_publish(tmp_path):
    assert "has not answered" in run(hears_nothing_more, 2, str(tmp_path), timeout=60)[1]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1], "rank 0 has published it"
        assert checkpointer.load({"run": replica_state(*model_and_optimizer(seed=1))}).step == 1
