"""An error that is found late, and the newest checkpoint that does not hold it."""

import pytest
import torch

from minilib.operations.checkpoint import Checkpointer
from minilib.operations.integrity import (
    CheckedSteps,
    CheckpointNotAsNoted,
    IntegrityVerdict,
    NoGoodCheckpoint,
    ReplicaCheck,
    flip_bit,
)
from tests.operations.checkpoint.runs import comm_of_ranks, on_ranks, outcome, trainer_of


def agreed(step):
    return IntegrityVerdict(step)


def test_checkpoints_up_to_the_last_agreement_are_good(tmp_path):
    checked = CheckedSteps(tmp_path / "checked.json")
    with pytest.raises(NoGoodCheckpoint, match="agreed last at step none"):
        checked.newest_good([0, 10])
    for step in (10, 20):
        checked.note(agreed(step), step * 7)
    checked.note(IntegrityVerdict(30, (1,), True), 5)
    checked.note(agreed(40), 6)  # once replicas have differed, agreement says no more
    again = CheckedSteps(tmp_path / "checked.json")
    for each in (checked, again):
        assert each.newest_good([5, 10, 15, 20, 25, 30]) == 20 and each.newest_good([25, 15]) == 15
        with pytest.raises(NoGoodCheckpoint, match=r"agreed last at step 20, .* \[25, 30\]: keep more"):
            each.newest_good([30, 25])
    again.went_back(10)
    assert again.newest_good([5, 10, 20]) == 10
    again.note(agreed(20), 8)
    assert again.newest_good([10, 20]) == 20 and CheckedSteps(tmp_path / "checked.json").newest_good([20]) == 20
    assert not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_is_held_against_what_was_noted():
    checked = CheckedSteps()
    checked.note(agreed(10), 70)
    assert checked.verify(10, 70) and not checked.verify(11, 70)
    with pytest.raises(CheckpointNotAsNoted, match="step 10 is not what replicas agreed upon"):
        checked.verify(10, 71)


def goes_back_behind_the_error(folder: str) -> dict:
    """A save every step, a comparison every second one, and a bit that flips on rank 1 after step 3."""
    comm, own = comm_of_ranks(), comm_of_ranks()
    trainer = trainer_of("data", comm)
    check, checked = ReplicaCheck({"run": trainer}, comm), CheckedSteps()
    with Checkpointer(folder, own, keep=5) as checkpointer:
        verdict = IntegrityVerdict(0)
        while verdict.agreed:
            trainer.run(trainer.step + 1)
            if trainer.step % 2 == 0:
                verdict = check.compare(trainer.step)
                checked.note(verdict, check.checksum())
            checkpointer.save({"run": trainer}, trainer.step, wait=True)
            if trainer.step == 3 and comm.rank == 1:
                flip_bit(trainer.model.embed.weight.data, 12345)
        found, kept = trainer.step, checkpointer.steps()
        good = checked.newest_good(kept)
        checkpointer.load({"run": trainer}, good)
        verified = checked.verify(good, check.checksum())
        flip_bit(trainer.model.embed.weight.data, 7)  # on all ranks alike, as if the disk had done it
        with pytest.raises(CheckpointNotAsNoted):
            checked.verify(good, check.checksum())
        flip_bit(trainer.model.embed.weight.data, 7)
        comm.barrier()
        trainer.run()
    return outcome(trainer) | {"found": found, "kept": kept, "good": good, "verified": verified, "verdict": verdict}


def trains(_: str) -> dict:
    trainer = trainer_of("data", comm_of_ranks())
    trainer.run()
    return outcome(trainer)


def test_the_run_goes_back_behind_the_error_and_ends_as_if_there_had_been_none(tmp_path):
    found, expected = (on_ranks(fn, 3, str(tmp_path)) for fn in (goes_back_behind_the_error, trains))
    for each, healthy in zip(found, expected, strict=True):
        assert (each["found"], each["kept"], each["good"], each["verified"]) == (4, [1, 2, 3, 4], 2, True)
        assert each["verdict"].suspects == (1,) and each["verdict"].named
        assert each["losses"] == healthy["losses"]
        torch.testing.assert_close(each["model"], healthy["model"], rtol=0, atol=0)
