"""A device mesh on ranks: a communicator for every axis of its shape (mesh_shape.py), or for several as one.

    mesh = DeviceMesh(MeshShape.of(dp=2, tp=4))
    mesh.comm("tp")            between the 4 ranks of this rank's group along tp
    mesh.comm("dp", "tp")      between all 8

In production: torch's DeviceMesh, Megatron-LM's parallel_state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from minilib.mechanisms.basics.checks import check_quantity
from minilib.ranks.collectives import Communicator
from minilib.ranks.mesh_shape import MeshDoesNotFit, MeshShape, Regrouping
from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.group import GroupTransport

Groups = MeshShape | Regrouping
MakeCommunicator = Callable[[dist.ProcessGroup, Sequence[int]], Communicator]


class DeviceMesh:
    """Communicators along the axes of a mesh. A collective: every rank of the default group makes the same mesh.

    Args:
        shape: of as many ranks as the default group has.
        make: a communicator from a process group and its ranks; over the group's send and receive if left out.
            `lambda group, ranks: TorchCommunicator(group)` brings GPUs.
        timeout: seconds that a rank waits for another.

    Raises:
        MeshDoesNotFit: on every rank, if the mesh has another number of ranks, or ranks ask for different meshes.
        TypeError: if the shape is none.
        ValueError: for a timeout that is none.
    """

    def __init__(self, shape: MeshShape, make: MakeCommunicator | None = None, timeout: float = 60.0) -> None:
        if not isinstance(shape, MeshShape):
            raise TypeError(f"a mesh has a MeshShape, such as MeshShape.of(dp=2, tp=4); got {shape!r}")
        check_quantity("timeout", timeout, above_zero=True)
        self.shape, self.rank, self._closed = shape, dist.get_rank(), False
        asked: list[MeshShape | None] = [None] * dist.get_world_size()
        dist.all_gather_object(asked, shape)
        shape.check(len(asked))
        for rank, other in enumerate(asked):
            if other != asked[0]:
                raise MeshDoesNotFit(f"rank 0 makes the mesh {asked[0]}, rank {rank} the mesh {other}: "
                                     "all ranks make the same one")  # fmt: skip
        self._timeout = timeout
        self._make = make or (lambda group, ranks: Communicator(GroupTransport(group, timeout)))
        self._made: dict[tuple[Groups, frozenset[str]], tuple[Communicator, dist.ProcessGroup]] = {}

    @property
    def coordinates(self) -> dict[str, int]:
        """Where this rank stands."""
        return self.shape.coordinates(self.rank)

    def comm(self, *axes: str, of: Regrouping | None = None) -> Communicator:
        """Between the ranks of this rank's group along the axes: ("tp"), or ("dp", "cp") as one.

        All ranks ask for a group for the first time in the same order, as they make collectives; later they get the
        same communicator.

        Args:
            axes: of the mesh, or of the regrouping.
            of: such as the mesh of the experts.

        Raises:
            NoSuchAxis: if there is no such axis.
            CollectiveFailed: after `close`.
        """
        if self._closed:
            raise CollectiveFailed(f"rank {self.rank} asks for a group of {', '.join(axes)} of a mesh that is closed")
        groups = of or self.shape
        mine, key = groups.group(self.rank, *axes), (groups, frozenset(axes))
        if key not in self._made:
            # Only its members make a group, so that groups of one rank, of which a mesh has many, cost nobody time.
            seconds = timedelta(seconds=self._timeout)
            group = dist.new_group(mine, timeout=seconds, use_local_synchronization=True)
            self._made[key] = (self._make(group, mine), group)
        return self._made[key][0]

    def close(self) -> None:
        """Close all communicators and their groups; a mesh that is closed makes none."""
        self._closed = True
        for comm, group in self._made.values():
            comm.close()
            dist.destroy_process_group(group)
        self._made = {}
