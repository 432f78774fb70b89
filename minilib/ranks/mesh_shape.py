"""The shape of a device mesh: which rank stands where on named axes. Arithmetic alone, without processes.

    MeshShape.of(pp=2, dp=2, tp=2)      rank = (pp · 2 + dp) · 2 + tp: the last axis is the fastest

                 tp 0   tp 1                 groups of tp: 01 23 45 67      neighbours, within a node
    pp 0  dp 0    0      1                   groups of dp: 02 13 46 57
          dp 1    2      3                   groups of pp: 04 15 26 37      farthest, between nodes
    pp 1  dp 0    4      5
          dp 1    6      7

The groups of an axis partition the ranks, and two groups of different axes share one rank or none.

Experts lie on the same ranks, regrouped: within each pipeline stage `regrouped` gives the ranks of dp, cp and tp other
axes, edp, ep and etp, as Megatron-LM does (parallel_state.py: expert data parallelism is world / (pp · ep · etp)) and
torchtitan (dp · cp · tp = edp · ep). So an ep group shares ranks with dp, cp and tp groups, and ep adds no ranks.

In production: torch's DeviceMesh, Megatron-LM's parallel_state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from minilib.mechanisms.basics.checks import check_whole, is_whole
from minilib.mechanisms.replication import LinkLike, Plan, plans
from minilib.mechanisms.replication import seconds as plan_seconds
from minilib.mechanisms.sharding.placement import Crossing, crossing


class MeshDoesNotFit(ValueError):
    """A mesh of another number of ranks than there are, or axes that cannot be cut so."""


class NoSuchAxis(LookupError):
    """A mesh has no axis of that name; the message lists those that it has."""


@dataclass(frozen=True)
class MeshShape:
    """Which rank stands where.

    Args:
        names: of the axes, the slowest first.
        sizes: ranks along each.

    Raises:
        MeshDoesNotFit: if a size is no whole number ≥ 1, or a name comes twice.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        lists = all(isinstance(each, tuple | list) for each in (self.names, self.sizes))
        named = lists and all(isinstance(name, str) and name for name in self.names)
        if not named or len(self.names) != len(self.sizes) or len(set(self.names)) < len(self.names):
            raise MeshDoesNotFit(f"each axis has one name and one size, got {self.names!r} and {self.sizes!r}")
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        for name, size in zip(self.names, self.sizes, strict=True):
            if type(size) is not int or size < 1:
                raise MeshDoesNotFit(f"axis {name} has a whole number of ranks ≥ 1, got {size!r}")

    @classmethod
    def of(cls, world_size: int | None = None, **sizes: int | None) -> MeshShape:
        """A mesh from its axes, the slowest first: of(8, dp=None, tp=4) has 2 · 4 ranks.

        Args:
            world_size: ranks that there are; the product of the sizes if left out.
            sizes: ranks along each axis; None for at most one, which gets what the others leave.

        Raises:
            MeshDoesNotFit: if the sizes do not multiply to world_size.
        """
        if world_size is not None:
            check_whole("world_size", world_size, 1, MeshDoesNotFit)
        rest = [name for name, size in sizes.items() if size is None]
        if len(rest) > 1 or (rest and world_size is None):
            raise MeshDoesNotFit(f"one axis may be None, with a world_size; got {sizes} and world_size={world_size!r}")
        if rest:
            known = cls.of(**{name: size for name, size in sizes.items() if size is not None}).world_size
            if world_size % known or world_size < known:
                raise MeshDoesNotFit(f"{world_size} ranks are no multiple of {known}, which {sizes} needs: "
                                     f"change an axis, or start {known} ranks or a multiple")  # fmt: skip
            sizes[rest[0]] = world_size // known
        shape = cls(tuple(sizes), tuple(sizes.values()))
        if world_size is not None:
            shape.check(world_size)
        return shape

    def check(self, world_size: int) -> None:
        """Raise MeshDoesNotFit unless the mesh has exactly so many ranks."""
        if self.world_size != world_size:
            raise MeshDoesNotFit(f"the mesh {self} has {self.world_size} ranks, and there are {world_size}: "
                                 "the sizes of the axes multiply to the number of ranks")  # fmt: skip

    @property
    def world_size(self) -> int:
        """Ranks."""
        return math.prod(self.sizes)

    def size(self, *axes: str) -> int:
        """Ranks of a group along these axes together.

        Raises:
            NoSuchAxis: if there is no such axis; so do all methods that take axes.
            MeshDoesNotFit: if an axis is named twice; so do they.
        """
        return math.prod(self.sizes[index] for index in self._indices(axes))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis.

        Raises:
            IndexError: if there is no such rank.
        """
        if not is_whole(rank, 0) or rank >= self.world_size:
            raise IndexError(f"rank {rank!r} is none of the {self.world_size} ranks of the mesh {self}")
        found = {}
        for name, size in zip(reversed(self.names), reversed(self.sizes), strict=True):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.names}

    def rank_at(self, **coordinates: int) -> int:
        """The inverse of `coordinates`; axes left out are at 0.

        Raises:
            IndexError: if there is no such place.
        """
        for name, at in coordinates.items():
            if not is_whole(at, 0) or at >= self.size(name):
                raise IndexError(f"axis {name} has places 0 … {self.size(name) - 1}, got {at!r}")
        rank = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            rank = rank * size + coordinates.get(name, 0)
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that differ only on these axes, group by group; within a group in the order of the mesh."""
        moving = self._indices(axes)
        fixed: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(product(*(range(size) for size in self.sizes))):
            fixed.setdefault(tuple(at for i, at in enumerate(place) if i not in moving), []).append(rank)
        return list(fixed.values())

    def group(self, rank: int, *axes: str) -> list[int]:
        """The group of a rank."""
        at = self.coordinates(rank)
        moving = [self.names[index] for index in sorted(self._indices(axes))]
        places = product(*(range(self.size(name)) for name in moving))
        return [self.rank_at(**at | dict(zip(moving, place, strict=True))) for place in places]

    def regrouped(self, axes: Sequence[str], **sizes: int | None) -> Regrouping:
        """The ranks of some axes under other axes, such as regrouped(("dp", "cp", "tp"), edp=None, ep=4).

        Args:
            axes: whose ranks, in the order of the mesh, are dealt anew; the others stay as they are.
            sizes: the new axes, the slowest first; None as in `of`.

        Raises:
            MeshDoesNotFit: if the new axes do not have as many ranks as the old, or the name of an axis that stays.
        """
        if isinstance(axes, str):
            raise MeshDoesNotFit(f"axes is a sequence of names, got {axes!r}; put it into a tuple")
        return Regrouping(self, tuple(axes), MeshShape.of(self.size(*axes), **sizes))

    def crossings(self, axis: str, nbytes: int, places: Sequence[int]) -> list[Crossing]:
        """What a ring all-reduce of each group of an axis sends between nodes.

        Args:
            axis: whose groups.
            nbytes: that each rank has.
            places: node of each rank, as `launch.hosts()` or `placement.places_of` tell.

        Raises:
            ValueError: if there is not one place for each rank, or no such number of bytes.
        """
        if len(places) != self.world_size:
            raise ValueError(f"places has one entry for each of {self.world_size} ranks, got {len(places)}")
        ring, chunks = self._ring(axis, nbytes)
        return [crossing(ring, chunks, [places[rank] for rank in group]) for group in self.groups(axis)]

    def seconds(self, axis: str, nbytes: int, link: Callable[[int, int], LinkLike]) -> float:
        """Predicted time of a ring all-reduce in all groups of an axis at once, each on links of its own.

        Args:
            axis: whose groups.
            nbytes: that each rank has.
            link: of two ranks of the mesh, with `latency` and `bandwidth`.

        Raises:
            ValueError: if there is no such number of bytes.
        """
        ring, chunks = self._ring(axis, nbytes)
        ways = [lambda src, dst, group=group: link(group[src], group[dst]) for group in self.groups(axis)]
        return max(plan_seconds(ring, chunks, way) for way in ways)

    def _ring(self, axis: str, nbytes: int) -> tuple[Plan, list[int]]:
        """The plan within a group, and the bytes of its chunks."""
        check_whole("nbytes", nbytes)
        n = self.size(axis)
        return plans.ring("all_reduce", n), [nbytes // n + (chunk < nbytes % n) for chunk in range(n)]

    def _indices(self, axes: Sequence[str]) -> set[int]:
        """Where these axes stand among all."""
        check_axes(axes, self.names, ", ".join(self.names) or "none")
        return {self.names.index(axis) for axis in axes}

    def __str__(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True)) or "1"


@dataclass(frozen=True)
class Regrouping:
    """A second mesh over the ranks of a first.

    Args:
        whole: the first mesh.
        axes: of the first, whose ranks are dealt anew.
        inner: the new axes, of as many ranks.

    Raises:
        MeshDoesNotFit: if they are not, or have the name of an axis that stays.
    """

    whole: MeshShape
    axes: tuple[str, ...]
    inner: MeshShape

    def __post_init__(self) -> None:
        self.inner.check(self.whole.size(*self.axes))
        if both := set(self.stays) & set(self.inner.names):
            raise MeshDoesNotFit(f"{', '.join(sorted(both))} is an axis that stays: give the new one another name")

    @property
    def stays(self) -> list[str]:
        """Axes of the first mesh that were not dealt anew."""
        return [name for name in self.whole.names if name not in self.axes]

    def groups(self, *axes: str) -> list[list[int]]:
        """Groups along new axes, and axes of the first mesh that were not dealt anew."""
        new = [axis for axis in axes if axis in self.inner.names]
        kept = [axis for axis in axes if axis not in new]
        if again := sorted(set(kept) & set(self.axes)):
            raise NoSuchAxis(f"the ranks of {', '.join(again)} are regrouped as {self.inner}: ask for those axes")
        said = f"{', '.join(self.stays) or 'none'}, and regrouped {', '.join(self.inner.names) or 'none'}"
        check_axes(axes, (*self.stays, *self.inner.names), said)
        blocks = self.whole.groups(*self.axes)  # one for each place on the axes that are kept
        at = {block[0]: block for block in blocks}
        found = []
        for first in self._joined(kept, at):
            for inner in self.inner.groups(*new) if new else [[i] for i in range(self.inner.world_size)]:
                found.append(sorted(at[start][i] for start in first for i in inner))
        return found

    def group(self, rank: int, *axes: str) -> list[int]:
        """The group of a rank."""
        self.whole.coordinates(rank)  # refused here if there is none
        if set(axes) <= set(self.inner.names):
            block = self.whole.group(rank, *self.axes)
            return [block[i] for i in self.inner.group(block.index(rank), *axes)]
        return next(group for group in self.groups(*axes) if rank in group)

    def _joined(self, kept: Sequence[str], at: Mapping[int, list[int]]) -> list[list[int]]:
        """First ranks of the blocks that a group along the kept axes spans."""
        if not kept:
            return [[start] for start in at]
        return [group for group in self.whole.groups(*kept) if group[0] in at]


def check_axes(axes: Sequence[str], known: Sequence[str], said: str) -> None:
    """Refuse axes that are unknown, or come twice.

    Raises:
        NoSuchAxis: which says what there is.
        MeshDoesNotFit: which says what came.
    """
    for axis in axes:
        if axis not in known:
            raise NoSuchAxis(f"there is no axis {axis!r}; the mesh has {said}")
    if len(set(axes)) < len(axes):
        raise MeshDoesNotFit(f"a group lies along each axis once, got {', '.join(axes)}")
