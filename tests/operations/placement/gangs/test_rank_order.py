"""Which rank runs on which GPU, also after a loss."""

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.rank_order import NoReplacement, in_rank_order, replaced, topology_order
from minilib.ranks.mesh_shape import MeshShape

HOSTS = GpuCluster.regular(2, 4, 4)
NVL = GpuCluster.regular(2, 4, 4, nvlink_domain=16)


@pytest.mark.parametrize("mesh", [MeshShape.of(pp=2, dp=2, tp=4), MeshShape.of(tp=4, pp=2, dp=2), MeshShape.of(dp=16)])
def test_tp_is_on_one_host_however_the_mesh_orders_its_axes(mesh):
    placement = in_rank_order(GangJob("x", 16, mesh=mesh), range(15, -1, -1))
    for axis in mesh.names:
        for group in mesh.groups(axis):
            hosts = HOSTS.numbers_of("host", [placement.gpus[rank] for rank in group])
            assert len(set(hosts)) == 1 if axis == "tp" else len(set(hosts)) == len(group) or axis == "dp"
    assert sorted(topology_order(mesh)) == list(range(16))


def test_the_usual_order_is_kept_and_unknown_axes_are_farthest():
    assert topology_order(MeshShape.of(pp=2, dp=2, cp=2, tp=2)) == tuple(range(16))
    assert topology_order(MeshShape.of(tp=2, islands=2)) == (0, 2, 1, 3)


def test_a_lost_host_is_replaced_in_its_place():
    """The ranks of the lost host, in their order, are on the spare one; nobody else moves."""
    job = GangJob("x", 16, mesh=MeshShape.of(tp=4, dp=4))
    before = in_rank_order(job, range(16))
    after = replaced(before, HOSTS.gpus_of(1), HOSTS.gpus_of(6), HOSTS)
    moved = [rank for rank in range(16) if before.gpus[rank] != after.gpus[rank]]
    assert {before.gpus[rank] for rank in moved} == set(HOSTS.gpus_of(1))
    assert [after.gpus[rank] - 24 for rank in moved] == [before.gpus[rank] - 4 for rank in moved]
    for group in job.mesh.groups("tp"):
        assert len(set(HOSTS.numbers_of("host", [after.gpus[rank] for rank in group]))) == 1


def test_a_group_moves_whole_unless_its_domain_has_a_spare():
    """One GPU of four is lost: over hosts all four ranks of tp move, within an NVL rack only one does."""
    job = GangJob("x", 8, mesh=MeshShape.of(dp=2, tp=4))
    before = in_rank_order(job, range(8))
    assert replaced(before, [5], range(8, 16), HOSTS).gpus == (0, 1, 2, 3, 8, 9, 10, 11)
    assert replaced(before, [5], range(8, 16), NVL).gpus == (0, 1, 2, 3, 4, 8, 6, 7)
    assert replaced(before, [5], range(16, 32), NVL).gpus == (0, 1, 2, 3, 16, 17, 18, 19)
    assert replaced(before, [99], [], NVL) == before
    free = GangJob("x", 8, mesh=job.mesh, tp_in_domain=False)
    assert replaced(in_rank_order(free, range(8)), [5], [9], HOSTS).gpus == (0, 1, 2, 3, 4, 9, 6, 7)


def test_spares_that_do_not_suffice():
    before = in_rank_order(GangJob("x", 8, mesh=MeshShape.of(dp=2, tp=4)), range(8))
    for spare, most in (([], 0), ([8, 9, 10, 12, 13], 3), ([5, 6, 9], 1)):
        with pytest.raises(NoReplacement, match=f"more than {most} spare GPUs: {4 - most} too few"):
            replaced(before, [5], spare, HOSTS)
