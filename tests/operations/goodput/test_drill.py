"""A run that is really killed: no step is missing, and goodput is what a short trial predicted."""

import math
import os

import pytest

from minilib.operations.goodput.drill import RANKS, DrillPlan, DrillTrial, carry_out, rehearse
from minilib.operations.goodput.interval import ImpossibleInterval, expected_goodput
from minilib.operations.goodput.timeline import DrillEvent, DrillTimeline, EventFile
from minilib.ranks.launch import RankFailed

TRIES = 3  # a trial and a drill each; the first within the bounds decides, and all are printed


@pytest.mark.parametrize("kills, mean_life", [(1, 8), (6, 48), (6, 50), (12, 40), (100, 64)])
def test_a_schedule_has_the_mean_and_the_spread_of_its_distribution(kills, mean_life):
    plan = DrillPlan(kills, mean_life, seed=3)
    *lives, last = plan.lives()
    assert len(lives) == kills and sum(kill.after for kill in lives) + last == plan.steps == kills * mean_life
    assert all(0 <= kill.fraction < 1 and 0 <= kill.rank < RANKS for kill in lives) and last >= 1
    assert plan.lives() == DrillPlan(kills, mean_life, seed=3).lives()
    if kills == 100:
        assert lives != DrillPlan(kills, mean_life, seed=4).lives()[:-1]
        lengths = sorted(kill.after + kill.fraction for kill in lives)
        assert sum(lengths) / kills == pytest.approx(mean_life, rel=0.01)
        assert lengths[50] == pytest.approx(mean_life * math.log(2), rel=0.02)
        assert {kill.rank for kill in lives} == set(range(RANKS))


def test_a_plan_that_cannot_be():
    for bad in ({"kills": 0}, {"every": 0}, {"mean_life": 2.5}):
        with pytest.raises(ValueError, match="whole number ≥ 1"):
            DrillPlan(**bad)
    with pytest.raises(ValueError, match="the run would hardly get on"):
        DrillPlan(mean_life=7, every=8)


def test_a_prediction_is_the_expectation_of_a_life_of_steps():
    plan, trial = DrillPlan(mean_life=50, every=5), DrillTrial(step=2.0, stall=1.0, write=3.0, restart=40.0)
    predicted = trial.predicted(plan)
    saved = 5 * math.exp(-3 / (50 * 2.2)) / math.expm1(5 / 50)  # steps of a life that are durable
    assert predicted == pytest.approx(saved * 2 / (50 * 2 + 50 / 5 * 1 + 40))
    assert predicted == expected_goodput(10, trial.costs(plan))
    with pytest.raises(ImpossibleInterval, match="write"):
        DrillTrial(0.01, 0.0, 3.0, 1.0).predicted(plan)


def test_goodput_of_a_timeline_by_hand():
    """Two lives; 4 steps of 1 s, a save of 0.5 s after the second, a kill in the middle of the fifth, 10 s without."""

    def event(kind, at, life, step=0, rank=0):
        return DrillEvent(kind, at, life, step, rank)

    events = [event("start", 0, 0), event("loaded", 100, 0), event("step", 101, 0, 1), event("step", 102, 0, 2),
              event("save", 102, 0, 2), event("save", 102, 0, 2, 1), event("saved", 102.4, 0, 2, 1),
              event("saved", 102.5, 0, 2), event("durable", 103, 0, 2), event("step", 103.5, 0, 3),
              event("step", 104.5, 0, 4), event("kill", 105, 0, 4, 0), event("ended", 106, 0), event("start", 106, 1),
              event("loaded", 115, 1, 2), event("step", 116, 1, 3), event("step", 117, 1, 4), event("step", 118, 1, 5),
              event("ended", 120, 1)]  # fmt: skip
    timeline = DrillTimeline(tuple(events))
    timeline.check_invariants()
    assert (timeline.useful, timeline.executed, timeline.lost, len(timeline.kills)) == (5, 7, 2, 1)
    assert timeline.step_times == [1.0] * 5 and timeline.stalls == [0.5] and timeline.cut == [0.5]
    assert timeline.restarts == [10.0] and timeline.mean_write == 0.5 and timeline.wall == 18
    assert timeline.counted == pytest.approx(5 / (7 + 0.5 + 0.5 + 10)) == timeline.by_clock
    for wrong in (event("loaded", 115, 1, 0), event("loaded", 115, 1, 3)):
        with pytest.raises(AssertionError):
            DrillTimeline((*events[:14], wrong, *events[15:])).check_invariants()


def test_events_of_several_processes_are_whole(tmp_path):
    path, children = tmp_path / "events.jsonl", []
    for number in range(4):
        if not (child := os.fork()):
            for step in range(200):
                EventFile(path).write("step", number, step)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    events = list(EventFile(path).read())
    assert len(events) == 800 and {(e.life, e.step) for e in events} == {(n, s) for n in range(4) for s in range(200)}
    assert all(before.at <= after.at for before, after in zip(events, events[1:], strict=False))


@pytest.mark.timeout(600)
def test_goodput_of_a_killed_run_is_what_was_predicted(tmp_path):
    plan, ratios = DrillPlan(kills=6, mean_life=48, seed=1), []
    for attempt in range(TRIES):
        trial = rehearse(plan, tmp_path / f"trial {attempt}")
        predicted = trial.predicted(plan)
        drill = carry_out(plan, tmp_path / f"drill {attempt}", trial)
        drill.check_invariants()
        assert len(drill.kills) == 6 and {kill.rank for kill in drill.kills} == {0, 1}
        assert abs(drill.executed - plan.steps) <= 2 * plan.kills, "a kill may come a step or two late"
        assert 0 < drill.lost <= plan.kills * 2 * plan.every, "no more than the steps since a durable checkpoint"
        ratios.append(predicted / drill.counted)
        print(f"{trial}: predicted {predicted:.3f}, counted {drill.counted:.3f}, by the clock {drill.by_clock:.3f}")
        if 0.9 <= ratios[-1] <= 1.1:
            return
    pytest.fail(f"predicted / measured goodput: {ratios}")


def test_a_failure_that_nobody_planned_is_raised(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder has to be")
    with pytest.raises(RankFailed, match="FileExistsError.*checkpoints"):
        carry_out(DrillPlan(kills=1), tmp_path, DrillTrial(0.01, 0.0, 0.0, 0.1))


def test_a_folder_that_has_a_drill_is_refused(tmp_path):
    EventFile(tmp_path / "events.jsonl").write("start", 0)
    for drill in (rehearse, lambda plan, folder: carry_out(plan, folder, DrillTrial(0.01, 0.0, 0.0, 0.1))):
        with pytest.raises(FileExistsError, match=f"{tmp_path}.*has events of another drill"):
            drill(DrillPlan(kills=1), tmp_path)
