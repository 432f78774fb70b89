"""What a gang loses that gives way, in closed forms, and with how few GPUs it goes on."""

import pytest

from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.sharing.lost_work import GangRun, shrink_sizes
from minilib.ranks.mesh_shape import MeshShape

DAY, HOUR = 86_400, 3_600


def run(seconds, resumed=False, left=1_000, **job):
    return GangRun(GangJob("j", 8, **job), seconds, left, resumed)


def test_work_since_the_last_checkpoint_and_the_restart_on_each_gpu():
    assert run(DAY).lost_gpu_seconds == 8 * DAY  # it keeps nothing
    assert run(DAY + 60, checkpoint_every=600, restart_seconds=120).lost_gpu_seconds == 8 * (60 + 120)
    assert run(DAY, checkpoint_every=600, restart_seconds=120).lost_gpu_seconds == 8 * 120  # just saved
    assert run(599, checkpoint_every=600).lost_gpu_seconds == 8 * 599
    assert run(0).lost_gpu_seconds == 0


def test_a_run_that_was_resumed_begins_with_its_restart():
    again = run(100, resumed=True, checkpoint_every=600, restart_seconds=120)
    assert again.progress == again.saved == 0 and again.lost_gpu_seconds == 8 * (100 + 120)
    before, after = (run(s, True, checkpoint_every=600, restart_seconds=120) for s in (719, 720))
    assert before.lost_gpu_seconds == 8 * (719 + 120)  # nothing of this run is kept, its restart was in vain
    assert after.saved == 600 and after.lost_gpu_seconds == 8 * 120


def test_the_next_run_goes_on_from_the_last_checkpoint():
    job = {"checkpoint_every": 600, "restart_seconds": 120}
    assert run(1_500, left=2_100, **job).next_seconds == 3_600 - 1_200 + 120
    assert run(1_500, left=1_020, resumed=True, **job).next_seconds == 2_520 - 1_200  # has the restart in it already
    assert run(5_000, left=-10, **job).next_seconds == HOUR  # the default of `seconds`


@pytest.mark.parametrize("runs", (1, 2, 5))
def test_gpu_seconds_of_all_runs_are_the_work_and_what_was_lost(runs):
    """Whatever is preempted when: time on GPUs = useful work + lost work and restarts, to the second."""
    job = GangJob("j", 4, seconds=10_000, checkpoint_every=700, restart_seconds=90)
    spent, lost, seconds, resumed = 0, 0, job.seconds, False
    for number in range(runs):
        ran = 900 + 350 * number
        each = GangRun(job, ran, seconds - ran, resumed)
        spent, lost = spent + 4 * ran, lost + each.lost_gpu_seconds
        seconds, resumed = each.next_seconds, True
    assert spent + 4 * seconds == 4 * job.seconds + lost


def test_sizes_are_whole_workers_segments_and_replicas():
    assert list(shrink_sizes(GangJob("j", 8))) == []  # all of them, if it does not say
    assert list(shrink_sizes(GangJob("j", 4, min_gpus=2))) == [3, 2]
    assert list(shrink_sizes(GangJob("j", 16, gpus_per_host=4, min_gpus=5))) == [12, 8]
    assert list(shrink_sizes(GangJob("j", 16, segment=8, min_gpus=1))) == [8]
    meshed = GangJob("j", 24, mesh=MeshShape.of(pp=2, dp=3, tp=4), min_gpus=1)
    assert list(shrink_sizes(meshed)) == [16, 8]
    assert list(shrink_sizes(GangJob("j", 8, mesh=MeshShape.of(tp=8), min_gpus=1))) == []
    assert list(shrink_sizes(GangJob("j", 1, min_gpus=1))) == []


def test_on_fewer_gpus_it_takes_longer_in_proportion():
    job = GangJob("j", 24, mesh=MeshShape.of(pp=2, dp=3, tp=4), min_gpus=1, restart_seconds=30)
    fewer = GangRun(job, 100, 400).on_fewer(8)
    assert fewer.mesh == MeshShape.of(pp=2, dp=1, tp=4) and fewer.gpus == 8
    assert fewer.seconds == 400 * 3 + 30
    assert GangRun(job, 100, 400).shrinking_gpu_seconds == 24 * 30


def test_right_after_a_move_no_work_is_lost():
    run = GangRun(GangJob("x", 1, checkpoint_every=600, restart_seconds=60), -60, 3660)
    assert (run.progress, run.saved, run.lost_gpu_seconds) == (0, 0, 60)
