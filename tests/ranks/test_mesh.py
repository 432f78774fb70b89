"""Coordinates, groups and communicators of a mesh, against torch's DeviceMesh and by what must hold for any mesh."""

import itertools
import math
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from minilib.mechanisms.replication import plans
from minilib.mechanisms.sharding.placement import lost_with, places_of
from minilib.numbers.machine import Link
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import RankFailed, run
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.mesh_shape import MeshDoesNotFit, MeshShape, NoSuchAxis
from minilib.ranks.transport.shaped import ShapedTransport
from minilib.ranks.transport.shared import SharedMemoryTransport

AXES = ("dp", "pp", "cp", "tp")


def meshes(largest: int):
    """All sizes of four axes with at most so many ranks, in every order of the axes."""
    sizes = [s for s in itertools.product(range(1, largest + 1), repeat=4) if math.prod(s) <= largest]
    return [MeshShape(order, s) for s in sizes for order in itertools.permutations(AXES)]


def check_partition(groups: list[list[int]], world_size: int) -> None:
    assert sorted(itertools.chain(*groups)) == list(range(world_size))


def check_pairs(groups: dict[str, list[list[int]]], world_size: int) -> None:
    for axis, found in groups.items():
        check_partition(found, world_size)
        assert len({len(group) for group in found}) == 1, axis
    for one, other in itertools.combinations(groups, 2):
        for a, b in itertools.product(groups[one], groups[other]):
            assert len(set(a) & set(b)) <= 1, (one, other, a, b)


def check_shape(shape: MeshShape) -> None:
    n = shape.world_size
    check_pairs({axis: shape.groups(axis) for axis in shape.names}, n)
    for rank in range(n):
        at = shape.coordinates(rank)
        assert tuple(at) == shape.names and shape.rank_at(**at) == rank
        for axis in shape.names:
            assert shape.group(rank, axis) == [shape.rank_at(**{**at, axis: i}) for i in range(shape.size(axis))]
    check_partition(shape.groups("dp", "cp"), n)
    assert shape.groups(*shape.names) == [list(range(n))] and shape.groups() == [[rank] for rank in range(n)]


def test_every_mesh_of_up_to_8_ranks():
    shapes = meshes(8)
    assert len(shapes) == 24 * (1 + 4 + 4 + 10 + 4 + 16 + 4 + 20)  # orders · products of four that make 1 … 8
    for shape in shapes:
        check_shape(shape)


def test_random_larger_meshes():
    draw = random.Random(0)
    for _ in range(30):
        check_shape(MeshShape(tuple(draw.sample(AXES, 4)), tuple(draw.choice([1, 2, 3, 4, 5]) for _ in AXES)))


def test_experts_lie_on_the_ranks_of_the_other_axes():
    """For all meshes of up to 8 ranks and all ways to regroup a stage: the same three properties."""
    for shape in meshes(8)[:: len(AXES)]:
        inside = shape.size("dp", "cp", "tp")
        for ep, etp in itertools.product(range(1, inside + 1), repeat=2):
            if inside % (ep * etp):
                with pytest.raises(MeshDoesNotFit, match="no multiple"):
                    shape.regrouped(("dp", "cp", "tp"), edp=None, ep=ep, etp=etp)
                continue
            experts = shape.regrouped(("dp", "cp", "tp"), edp=None, ep=ep, etp=etp)
            check_pairs({axis: experts.groups(axis) for axis in ("pp", "edp", "ep", "etp")}, shape.world_size)
            assert all(len(group) == ep for group in experts.groups("ep"))
            stages = shape.groups("dp", "cp", "tp")  # an expert's exchange never leaves its stage
            assert all(any(set(group) <= set(stage) for stage in stages) for group in experts.groups("ep"))


def test_expert_groups_are_megatrons():
    """parallel_state.py's documented example: 16 GPUs, tp 2, pp 2; with ep 2 and etp 1 neighbours exchange tokens."""
    shape = MeshShape.of(16, pp=2, dp=None, cp=1, tp=2)
    assert shape.groups("tp") == [[rank, rank + 1] for rank in range(0, 16, 2)]
    assert shape.groups("pp") == [[rank, rank + 8] for rank in range(8)]
    assert shape.groups("dp") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    experts = shape.regrouped(("dp", "cp", "tp"), edp=None, ep=4)
    assert experts.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert experts.groups("edp") == [[rank, rank + 4] for rank in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert experts.groups("pp") == shape.groups("pp")
    with pytest.raises(NoSuchAxis, match="the ranks of dp are regrouped as edp 2 × ep 4"):
        experts.groups("dp")


@pytest.mark.parametrize("sizes", [{"pp": 2, "dp": 2, "tp": 2}, {"tp": 2, "dp": 3, "cp": 2}, {"dp": 1, "pp": 4}])
def test_groups_are_those_of_torch(sizes):
    shape = MeshShape.of(**sizes)
    for rank in range(shape.world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=shape.world_size)
        try:
            mesh = init_device_mesh("cpu", shape.sizes, mesh_dim_names=shape.names)
            assert dict(zip(shape.names, mesh.get_coordinate(), strict=True)) == shape.coordinates(rank)
            for axis in shape.names:
                assert dist.get_process_group_ranks(mesh.get_group(axis)) == shape.group(rank, axis)
            pair = shape.names[:2]
            assert mesh[pair]._flatten().mesh.tolist() == shape.group(rank, *pair)
        finally:
            dist.destroy_process_group()


def test_which_axis_crosses_which_link():
    """16 ranks on nodes of 4: tp stays within, dp crosses all the time; the other order turns that round."""
    near, far = MeshShape.of(pp=2, dp=2, tp=4), MeshShape.of(tp=4, dp=2, pp=2)
    nodes = places_of(16, 4)
    assert [c.bytes for c in near.crossings("tp", 800, nodes)] == [0] * 4
    assert [c.bytes for c in near.crossings("dp", 800, nodes)] == [2 * 800] * 8  # both of 2 ranks send 2 · 1/2 · S
    assert all(c.bytes == 4 * 2 * 3 * 200 for c in far.crossings("tp", 800, nodes))
    assert [c.bytes for c in far.crossings("dp", 800, nodes)] == [0] * 8


NEAR, FAR = Link(1e12, 0.0), Link(2e7, 2e-3)


def by_node(ranks, nodes):
    return lambda src, dst: NEAR if nodes[ranks[src]] == nodes[ranks[dst]] else FAR


def shaped_all_reduces(shape: MeshShape, nodes: list[int], numel: int) -> dict:
    """For each axis the seconds of an all-reduce, and the bytes that this rank sent to another node."""

    def make(group, ranks):
        return Communicator(ShapedTransport(SharedMemoryTransport(group, timeout=20.0), by_node(ranks, nodes)))

    mesh, found = DeviceMesh(shape, make, timeout=20.0), {}
    for axis in shape.names:
        comm, group = mesh.comm(axis), shape.group(mesh.rank, axis)
        following = group[(comm.rank + 1) % comm.world_size]
        comm.barrier()
        before, started = comm.traffic.bytes, time.perf_counter()
        comm.all_reduce(torch.ones(numel), plan=plans.ring("all_reduce", comm.world_size))
        crossed = comm.traffic.bytes - before if nodes[following] != nodes[mesh.rank] else 0
        found[axis] = (time.perf_counter() - started, crossed)
    mesh.close()
    return found


@pytest.mark.parametrize(("names", "slow"), [(("dp", "tp"), "dp"), (("tp", "dp"), "tp")])
def test_what_crosses_is_what_ranks_send_and_takes_at_least_its_price(names, slow):
    shape, nodes, numel = MeshShape(names, (2, 2)), places_of(4, 2), 60_000
    results = run(shaped_all_reduces, 4, shape, nodes, numel, timeout=60)
    for axis in names:
        expected = shape.crossings(axis, 4 * numel, nodes)
        assert sum(found[axis][1] for found in results) == sum(each.bytes for each in expected)
        assert (sum(each.bytes for each in expected) > 0) == (axis == slow)
        price = shape.seconds(axis, 4 * numel, by_node(range(4), nodes))
        assert max(found[axis][0] for found in results) >= 0.99 * price
    assert shape.seconds(slow, 4 * numel, by_node(range(4), nodes)) == pytest.approx(
        2 * (2e-3 + 2 * numel / 2e7), rel=1e-3
    )


def test_a_lost_node_takes_what_no_other_node_replicates():
    """State is replicated along dp alone: only where dp crosses nodes does a copy survive."""
    nodes = places_of(8, 4)
    across, within = MeshShape.of(dp=2, tp=4), MeshShape.of(pp=2, dp=2, tp=2)
    assert lost_with(0, across.groups("dp"), nodes) == []
    assert len(lost_with(0, within.groups("dp"), nodes)) == 2  # the first stage, both parts of it


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeshShape.of(8, dp=None, tp=3), "8 ranks are no multiple of 3"),
        (lambda: MeshShape.of(4, dp=None, tp=8), "4 ranks are no multiple of 8"),
        (lambda: MeshShape.of(8, dp=2, tp=2), "dp 2 × tp 2 has 4 ranks, and there are 8"),
        (lambda: MeshShape.of(8, dp=None, tp=None), "one axis may be None"),
        (lambda: MeshShape.of(dp=None), "one axis may be None"),
        (lambda: MeshShape.of(dp=0), "axis dp has a whole number of ranks ≥ 1, got 0"),
        (lambda: MeshShape.of(dp=2.0), "got 2.0"),
        (lambda: MeshShape(("dp", "dp"), (2, 2)), "one name and one size"),
    ],
)
def test_what_fits_no_mesh(call, message):
    with pytest.raises(MeshDoesNotFit, match=message):
        call()


def test_what_is_not_in_the_mesh():
    shape = MeshShape.of(dp=2, tp=2)
    with pytest.raises(NoSuchAxis, match="no axis 'pp'; the mesh has dp, tp"):
        shape.groups("pp")
    with pytest.raises(IndexError, match="rank 4 is none of the 4"):
        shape.coordinates(4)
    with pytest.raises(IndexError, match="axis tp has places 0 … 1, got 2"):
        shape.rank_at(tp=2)


def sums(shape: MeshShape) -> dict:
    """What every communicator adds up: a power of ten for each rank says who took part."""
    mesh = DeviceMesh(shape, timeout=20.0)
    experts = shape.regrouped(("dp", "cp"), edp=None, ep=2)
    found = {}
    for axes, of in ((("dp",), None), (("cp",), None), (("pp",), None), (("dp", "cp"), None), (("ep",), experts)):
        mesh.comm(*axes, of=of).all_reduce(total := torch.tensor([10**mesh.rank]))
        assert mesh.comm(*axes, of=of) is mesh.comm(*axes, of=of)
        found[axes] = total.item()
    mesh.close()
    return found


def test_communicators_connect_the_groups():
    shape = MeshShape.of(pp=1, dp=2, cp=2)
    experts = shape.regrouped(("dp", "cp"), edp=None, ep=2)
    for rank, found in enumerate(run(sums, 4, shape, timeout=60)):
        for axes, total in found.items():
            groups = experts.groups(*axes) if axes == ("ep",) else shape.groups(*axes)
            assert total == sum(10**other for group in groups if rank in group for other in group)


def fails_everywhere(shapes: list[MeshShape]) -> str:
    try:
        DeviceMesh(shapes[dist.get_rank()])
    except MeshDoesNotFit as error:
        return str(error)
    return "nothing"


def test_a_mesh_that_does_not_fit_is_an_error_on_every_rank():
    small, right, other = MeshShape.of(dp=1), MeshShape.of(dp=2), MeshShape.of(tp=2)
    assert all("dp 1 has 1 ranks, and there are 2" in said for said in run(fails_everywhere, 2, [small] * 2))
    assert all("rank 1 the mesh tp 2" in said for said in run(fails_everywhere, 2, [right, other]))
    assert all("the mesh dp" in said for said in run(fails_everywhere, 2, [small, right]))


def one_rank_dies() -> None:
    mesh = DeviceMesh(MeshShape.of(dp=2, tp=2), timeout=20.0)
    comm = mesh.comm("tp")
    if mesh.rank == 3:
        raise RuntimeError("lost")
    comm.all_reduce(torch.zeros(1))
    mesh.comm("dp").all_reduce(torch.zeros(1))


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankFailed, match="rank 3 of 4") as caught:
        run(one_rank_dies, 4, timeout=60)
    assert caught.value.rank == 3
