"""A mesh that is asked for what it has not: an error by name, and nothing taken for something else."""

import itertools
import math

import pytest

from minilib.mechanisms.sharding.placement import places_of
from minilib.numbers.machine import Link
from minilib.ranks.launch import run
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.mesh_shape import MeshDoesNotFit, MeshShape, NoSuchAxis, Regrouping
from minilib.ranks.transport.base import CollectiveFailed

MESH = MeshShape.of(pp=2, dp=2, tp=2)
EXPERTS = MESH.regrouped(("dp", "tp"), edp=None, ep=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeshShape.of("8", dp=None, tp=4), "world_size is a whole number ≥ 1, got '8'"),
        (lambda: MeshShape.of(8.0, dp=None, tp=4), "world_size is a whole number ≥ 1, got 8.0"),
        (lambda: MeshShape.of(math.nan, dp=2), "world_size is a whole number ≥ 1, got nan"),
        (lambda: MeshShape.of(0, dp=None, tp=4), "world_size is a whole number ≥ 1, got 0"),
        (lambda: MeshShape.of(True, dp=1), "world_size is a whole number ≥ 1, got True"),
        (lambda: MeshShape.of(dp=True), "axis dp has a whole number of ranks ≥ 1, got True"),
        (lambda: MeshShape.of(dp=math.inf), "axis dp has a whole number of ranks ≥ 1, got inf"),
        (lambda: MeshShape((1,), (2,)), "each axis has one name and one size"),
        (lambda: MeshShape(("",), (2,)), "each axis has one name and one size"),
        (lambda: MeshShape("dp", (1, 2)), "each axis has one name and one size"),
        (lambda: MeshShape(None, (1,)), "each axis has one name and one size"),
        (lambda: MeshShape(("dp",), 2), "each axis has one name and one size"),
        (lambda: MESH.regrouped(("dp", "dp"), edp=2, ep=2), "each axis once, got dp, dp"),
        (lambda: MESH.regrouped(("dp", "tp"), pp=2, ep=2), "pp is an axis that stays"),
        (lambda: MESH.regrouped("dp", ep=2), "a sequence of names, got 'dp'"),
        (lambda: MESH.regrouped(("dp", "tp"), ep=3), "ep 3 has 3 ranks, and there are 4"),
        (lambda: Regrouping(MESH, ("dp",), MeshShape.of(ep=3)), "ep 3 has 3 ranks, and there are 2"),
        (lambda: MESH.size("tp", "tp"), "each axis once, got tp, tp"),
        (lambda: MESH.groups("tp", "tp"), "each axis once, got tp, tp"),
        (lambda: MESH.group(0, "tp", "dp", "tp"), "each axis once, got tp, dp, tp"),
        (lambda: EXPERTS.groups("ep", "ep"), "each axis once, got ep, ep"),
        (lambda: EXPERTS.group(0, "pp", "pp"), "each axis once, got pp, pp"),
    ],
)
def test_what_fits_no_mesh(call, message):
    with pytest.raises(MeshDoesNotFit, match=message):
        call()


@pytest.mark.parametrize("rank", [8, -1, 1.0, math.nan, True, None, "1"])
def test_ranks_that_are_none(rank):
    for call in (MESH.coordinates, lambda rank: MESH.group(rank, "tp"), lambda rank: EXPERTS.group(rank, "ep")):
        with pytest.raises(IndexError, match="is none of the 8 ranks of the mesh"):
            call(rank)
    with pytest.raises(IndexError, match="is none of the 8 ranks of the mesh"):
        EXPERTS.group(rank, "pp")


@pytest.mark.parametrize("place", [2, -1, 1.0, math.nan, True, None, "1"])
def test_places_that_are_none(place):
    with pytest.raises(IndexError, match="axis tp has places 0 … 1, got"):
        MESH.rank_at(tp=place)


def test_an_axis_that_neither_mesh_has_is_looked_for_in_both():
    for call in (lambda: EXPERTS.groups("cp"), lambda: EXPERTS.group(0, "ep", "cp")):
        with pytest.raises(NoSuchAxis, match="no axis 'cp'; the mesh has pp, and regrouped edp, ep"):
            call()
    with pytest.raises(NoSuchAxis, match="no axis 'x'; the mesh has none"):
        MeshShape.of().groups("x")


def test_meshes_of_one_rank_and_of_no_axis():
    for shape in (MeshShape.of(), MeshShape.of(dp=1), MeshShape([], []), MeshShape(["dp"], [1])):
        assert shape.world_size == 1 and shape.groups() == [[0]] and shape.group(0) == [0] and hash(shape)
        assert shape.regrouped(()).groups() == [[0]] and shape.regrouped((), ep=None).inner.sizes == (1,)
    assert MeshShape(["dp"], [1]) == MeshShape.of(dp=1)
    assert EXPERTS.groups() == [[rank] for rank in range(8)] == [EXPERTS.group(rank) for rank in range(8)]


def test_a_group_of_a_regrouping_is_the_one_of_its_groups():
    for axes in itertools.chain.from_iterable(itertools.combinations(("pp", "edp", "ep"), n) for n in range(4)):
        groups = EXPERTS.groups(*axes)
        for rank in range(8):
            assert sorted(EXPERTS.group(rank, *axes)) == next(sorted(group) for group in groups if rank in group)


@pytest.mark.parametrize(
    ("axis", "nbytes", "places", "message"),
    [
        ("tp", 800, places_of(7, 4), "places has one entry for each of 8 ranks, got 7"),
        ("tp", 800, places_of(9, 4), "places has one entry for each of 8 ranks, got 9"),
        ("tp", 800, [], "places has one entry for each of 8 ranks, got 0"),
        ("tp", -8, places_of(8, 4), "nbytes is a whole number ≥ 0, got -8"),
        ("tp", 8.5, places_of(8, 4), "nbytes is a whole number ≥ 0, got 8.5"),
        ("tp", math.nan, places_of(8, 4), "nbytes is a whole number ≥ 0, got nan"),
    ],
)
def test_crossings_of_what_is_not_there(axis, nbytes, places, message):
    with pytest.raises(ValueError, match=message):
        MESH.crossings(axis, nbytes, places)
    if "nbytes" in message:
        with pytest.raises(ValueError, match=message):
            MESH.seconds(axis, nbytes, lambda src, dst: Link(1.0, 0.0))


def test_no_bytes_cross_nowhere():
    assert {each.messages for each in MESH.crossings("pp", 0, places_of(8, 4))} == {0}
    assert MESH.seconds("pp", 0, lambda src, dst: Link(1.0, 1.0)) == 0


def refuses_afterwards() -> list:
    """What a rank sees of a mesh: one group, one communicator, in whichever order its axes are named; then closed."""
    said = []
    for timeout in (0, -1.0, math.nan, math.inf, "1"):
        try:
            DeviceMesh(MeshShape.of(dp=2), timeout=timeout)
        except ValueError as error:
            said.append("timeout" in str(error))
    for shape in (None, (2,)):
        try:
            DeviceMesh(shape)
        except TypeError as error:
            said.append("MeshShape" in str(error))
    mesh = DeviceMesh(MeshShape.of(dp=2, tp=1), timeout=20.0)
    said.append(mesh.comm("dp", "tp") is mesh.comm("tp", "dp"))
    comm = mesh.comm("dp")
    for _ in range(2):
        mesh.close()
    for call in (comm.barrier, lambda: mesh.comm("dp"), lambda: mesh.comm("tp")):
        try:
            call()
        except CollectiveFailed as error:
            said.append("closed" in str(error))
    comm.close()
    return said


def test_a_mesh_is_closed_once_and_then_refuses():
    assert run(refuses_afterwards, 2, timeout=60) == [[True] * 11] * 2
