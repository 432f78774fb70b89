"""Segments of an NVL72 against counting, and against jobs placed one by one."""

import random

import pytest

from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.fitting import best_placement
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.segments import usable_share, usable_trays


def test_nine_loses_capacity_fastest():
    """Whole, 9 uses all of 18 trays; with one tray lost, half of them."""
    assert [usable_trays(segment) for segment in (4, 9, 16, 18)] == [16, 18, 16, 18]
    assert [usable_trays(segment, 1) for segment in (4, 9, 16, 18)] == [16, 9, 16, 0]
    lost = {segment: usable_share(segment, 0) - usable_share(segment, 0.02) for segment in (1, 2, 4, 9, 16)}
    assert max(lost, key=lost.get) == 9 and lost[1] == pytest.approx(0)


def test_the_share_is_what_draws_average_to():
    choices, drawn = random.Random(5), 0
    for _ in range(20_000):
        drawn += usable_trays(4, sum(choices.random() < 0.05 for _ in range(18)))
    assert drawn / 20_000 / (18 * 0.95) == pytest.approx(usable_share(4, 0.05), rel=0.005)


@pytest.mark.parametrize(("segment", "failed"), [(16, 0), (16, 2), (16, 3), (9, 0), (9, 1), (4, 2), (4, 3)])
def test_jobs_take_as_many(segment, failed):
    free = FreeGpus(GpuCluster.regular(1, 18, 4, nvlink_domain=72, gpu="gb200"))
    free.take_out(range(4 * failed), "failed")
    taken = 0
    while placement := best_placement(GangJob(f"job{taken}", 4 * segment, 4, segment=4 * segment), free):
        free.take(placement.job.name, placement.gpus)
        taken += segment
    assert taken == usable_trays(segment, failed)


def test_bad_input():
    for wrong in ((0, 0), (1, 19), (1.5, 0)):
        with pytest.raises(ValueError):
            usable_trays(*wrong)
    with pytest.raises(ValueError, match="below 1"):
        usable_share(4, 1.0)
