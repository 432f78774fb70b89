"""Jobs that no cluster could run are refused by name."""

import math

import pytest

from minilib.mechanisms.scheduling import InvalidPriority
from minilib.operations.placement.gangs.job import GangJob, GangPlacement, InvalidJob
from minilib.operations.placement.gangs.price import MeshTraffic
from minilib.ranks.mesh_shape import MeshShape

MESH = MeshShape.of(dp=2, tp=4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpus": 1.5}, "gpus is a whole number ≥ 1, got 1.5"),
        ({"gpus": 0}, "got 0"),
        ({"gpus": True}, "got True"),
        ({"gpus": 8, "gpus_per_host": 3}, "no whole number of workers of 3"),
        ({"gpus": 8, "gpus_per_host": 0}, "gpus_per_host is a whole number ≥ 1"),
        ({"gpus": 8, "segment": 3}, "segments of 3"),
        ({"gpus": 8, "min_gpus": 9}, "min_gpus is at most gpus = 8, got 9"),
        ({"gpus": 4, "mesh": MESH}, "8 ranks and the job 4 GPUs"),
        ({"gpus": 8, "mesh": MESH, "anywhere": True}, "talk to each other"),
        ({"gpus": 8, "mesh": MeshShape.of(dp=8), "work": MeshTraffic(MESH, {})}, "not that of its work"),
        ({"gpus": 8, "seconds": 0}, "seconds is a finite number > 0"),
        ({"gpus": 8, "seconds": math.nan}, "got nan"),
        ({"gpus": 8, "seconds": math.inf}, "got inf"),
        ({"gpus": 8, "checkpoint_every": 0}, "checkpoint_every"),
        ({"gpus": 8, "restart_seconds": -1}, "restart_seconds is a finite number ≥ 0"),
    ],
)
def test_what_is_no_job(given, said):
    with pytest.raises(InvalidJob, match=said):
        GangJob("x", **given)


def test_priorities_are_those_of_tasks():
    with pytest.raises(InvalidPriority):
        GangJob("x", 8, priority=-1)


def test_what_lies_together():
    assert GangJob("x", 8).on_one_host(8) == 1 and GangJob("x", 8, gpus_per_host=4).in_one_domain(8) == 4
    tensor = GangJob("x", 8, mesh=MESH)
    assert (tensor.on_one_host(8), tensor.in_one_domain(8)) == (4, 4)
    assert (tensor.on_one_host(6), tensor.in_one_domain(6)) == (1, 4)  # hosts of six hold no whole groups
    assert GangJob("x", 8, mesh=MESH, tp_in_domain=False).in_one_domain(8) == 1
    assert GangJob("x", 8, mesh=MESH, gpus_per_host=2).in_one_domain(8) == 4
    assert GangJob("x", 24, segment=8, gpus_per_host=6).in_one_domain(8) == 24
    assert GangJob("x", 8, work=MeshTraffic(MESH, {})).mesh == MESH
    assert GangJob("x", 8).least_gpus == 8 and GangJob("x", 8, min_gpus=2).least_gpus == 2


def test_a_placement_has_a_gpu_of_its_own_for_each_rank():
    job = GangJob("x", 2)
    assert GangPlacement(job, [4, 2]).gpus == (4, 2)
    for wrong in ((1,), (1, 1), (1, 2, 3)):
        with pytest.raises(InvalidJob, match="2 ranks run on 2 different GPUs"):
            GangPlacement(job, wrong)
