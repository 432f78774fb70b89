"""Ranks are killed, stopped, or raise; the job begins again and comes to the same end, with each sample once."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from minilib.operations.elastic import (
    NoProgress,
    RestartsExhausted,
    TooFewRanks,
    report_step,
    restart_count,
    resume_and_train,
    run_elastic,
)
from minilib.operations.elastic.progress import ProgressFile, RankProgress, Standing
from minilib.ranks.launch import RankFailed, run
from tests.operations.elastic.runs import (
    EVERY,
    STEPS,
    Fault,
    check_each_window_once,
    counted_windows,
    small_trainer,
    trains,
)

MOMENTS = ("data", "forward", "backward", "gradients", "optimizer", "loss", "collective", "save")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(trains, 2, str(tmp_path_factory.mktemp("uninterrupted")), {}, timeout=120)


def chosen_faults(seed: int) -> dict[int, Fault]:
    """Three kills: during a step, in a collective, amid a save, or between a save and the next step."""
    chance, faults, step = random.Random(seed), {}, 0
    for attempt, latest in enumerate((4, 7, 9)):
        step, moment = chance.randint(step, latest), chance.choice(MOMENTS)
        if moment == "save":
            step = EVERY * (latest // EVERY)
        if attempt == 1 and seed == 0:
            step, moment = 6, "data"  # between the save of step 6 and the step after it
        count = {"collective": chance.randint(0, 3), "save": chance.randint(0, 2)}.get(moment, 0)
        faults[attempt] = Fault(chance.randint(0, 1), step, moment, count)
    return faults


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_three_times_is_bit_by_bit_the_run_that_was_not(tmp_path, uninterrupted, seed):
    faults = chosen_faults(seed)
    found = run_elastic(trains, 2, str(tmp_path), faults, timeout=120)
    assert [(each.kind, each.failed) for each in found.attempts] == [
        *(("killed", (fault.rank,)) for fault in faults.values()),
        ("", ()),
    ]
    assert [each.ranks for each in found.attempts] == [2, 2, 2, 2]
    for each in found.attempts:
        assert each.from_step % EVERY == 0 and each.from_step <= each.reached <= STEPS and each.seconds > 0
    check_each_window_once(counted_windows(tmp_path, found.attempts))
    for mine, expected in zip(found.values, uninterrupted, strict=True):
        assert (mine["losses"], mine["validation"]) == (expected["losses"], expected["validation"])
        torch.testing.assert_close(mine["model"], expected["model"], rtol=0, atol=0)


def test_without_spares_it_goes_on_with_fewer_ranks(tmp_path, uninterrupted):
    faults = {0: Fault(2, 4, "backward"), 1: Fault(0, 7, "collective", 1)}
    found = run_elastic(trains, 3, str(tmp_path), faults, spares=1, min_ranks=2, timeout=120)
    assert [each.ranks for each in found.attempts] == [3, 3, 2]
    check_each_window_once(counted_windows(tmp_path, found.attempts))
    assert found.values[0]["losses"] == pytest.approx(uninterrupted[0]["losses"], rel=1e-5)
    torch.testing.assert_close(found.values[0]["model"], uninterrupted[0]["model"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("moment", ["forward", "optimizer"])
def test_a_rank_that_stops_is_named_by_its_silence_not_by_those_who_wait(tmp_path, uninterrupted, moment):
    faults = {0: Fault(1, 4, moment, how="stop"), 1: Fault(0, 7, "forward", how="raise")}
    found = run_elastic(trains, 3, str(tmp_path), faults, 1.5, min_ranks=1, spares=0, timeout=60)
    hung, raised, done = found.attempts
    assert (hung.kind, hung.failed, hung.ranks) == ("hung", (1,), 3) and "rank" in hung.reason
    assert (raised.kind, raised.failed, raised.reason) == ("raised", (0,), "ValueError: a bad batch in step 7")
    assert (raised.ranks, done.kind, done.ranks) == (2, "", 1)
    check_each_window_once(counted_windows(tmp_path, found.attempts))
    assert found.values[0]["losses"] == pytest.approx(uninterrupted[0]["losses"], rel=1e-5)


def fails_at(step: int, how: str) -> None:
    report_step(step)
    if how == "raise":
        raise TypeError(f"a deterministic error in step {step}")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how, kind", [("raise", "raised"), ("kill", "killed")])
def test_a_step_that_always_fails_does_not_burn_all_restarts(how, kind):
    with pytest.raises(
        NoProgress, match=r"3 attempts in a row failed at step 7, from step 7.*rank 0 " + kind
    ) as raised:
        run_elastic(fails_at, 1, 7, how, max_restarts=1000)
    assert [each.kind for each in raised.value.attempts] == [kind] * 3
    assert isinstance(raised.value.__cause__, RankFailed)


def test_a_run_that_cannot_resume_ends_by_name(tmp_path):
    run_elastic(trains, 1, str(tmp_path), {})

    def another_run(folder):
        trainer = small_trainer()
        object.__setattr__(trainer.config, "learning_rate", 0.5)
        resume_and_train(trainer, f"{folder}/checkpoints", EVERY)

    with pytest.raises(NoProgress, match="before its first step.*CannotResume.*learning_rate"):
        run_elastic(another_run, 1, str(tmp_path), patience=2, max_restarts=1000)


def later_each_time() -> None:
    report_step(restart_count())
    raise ValueError("again")


def test_restarts_are_bounded_even_with_progress():
    with pytest.raises(RestartsExhausted, match="began again 2 times.*rank 0 raised .ValueError: again") as raised:
        run_elastic(later_each_time, 1, max_restarts=2)
    assert [each.reached for each in raised.value.attempts] == [0, 1, 2]
    with pytest.raises(RestartsExhausted, match="began again 0 times"):
        run_elastic(later_each_time, 1, max_restarts=0)


def test_too_few_ranks_end_the_job_by_name():
    with pytest.raises(TooFewRanks, match="1 ranks are left, and the job needs 2 or more") as raised:
        run_elastic(later_each_time, 2, spares=0)
    assert len(raised.value.attempts) == 1
    with pytest.raises(TooFewRanks, match=r"3 ranks are left, and the job needs 1 or more and a number in \[4\]"):
        run_elastic(later_each_time, 4, spares=0, min_ranks=1, allowed=[4])


def fewer_each_time() -> int:
    if restart_count() < 2 and os.environ["RANK"] == "0":
        report_step(restart_count())
        raise ValueError("again")
    return int(os.environ["WORLD_SIZE"])


def test_the_largest_allowed_number_of_ranks_is_taken():
    found = run_elastic(fewer_each_time, 4, spares=0, min_ranks=1, allowed=[1, 2, 4])
    assert [each.ranks for each in found.attempts] == [4, 2, 1] and found.values == [1]


def test_a_job_in_which_nobody_returns_in_time_has_hung():
    with pytest.raises(RestartsExhausted, match="rank 0, 1 hung .2 of 2 ranks had not returned after 0.5 s"):
        run_elastic(time.sleep, 2, 60, max_restarts=0, timeout=0.5)


def waits(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def test_the_user_ends_everything(tmp_path):
    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_elastic(waits, 2, str(tmp_path), max_restarts=1000)
    assert len(list(tmp_path.iterdir())) == 2, "it was not begun again"
    assert not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_restarts": -1}, "max_restarts is a whole number ≥ 0, got -1"),
        ({"min_ranks": 0}, "min_ranks is a whole number ≥ 1, got 0"),
        ({"patience": 0}, "patience is a whole number ≥ 1, got 0"),
        ({"spares": -1}, "spares is a whole number ≥ 0, got -1"),
        ({"timeout": -1.0}, "timeout is in seconds"),
        ({"min_ranks": 2}, "min_ranks is 2, and the job begins with 1 rank"),
        ({"allowed": {2, 4}}, r"1 rank.*allowed.*\[2, 4\]"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        run_elastic(later_each_time, 1, **wrong)


def test_what_cannot_be_sent_to_ranks_is_not_tried_again():
    with pytest.raises(TypeError, match="must be picklable"):
        run_elastic(later_each_time, 1, threading.Lock())


def test_a_world_without_ranks_is_refused_by_its_name():
    with pytest.raises(ValueError, match="world_size is a whole number ≥ 1, got 0"):
        run_elastic(later_each_time, 0)


def test_a_rank_that_died_before_its_first_word_has_reported_no_step(tmp_path):
    file = ProgressFile(tmp_path / "progress")
    assert file.read(2) == [RankProgress()] * 2
    file.write(1, RankProgress(4, 7, Standing.RETURNED))
    assert file.read(3) == [RankProgress(), RankProgress(4, 7, Standing.RETURNED), RankProgress()]
    file.write(0, RankProgress(0, 0))
    assert file.read(1) == [RankProgress(0, 0, Standing.RUNNING)]
