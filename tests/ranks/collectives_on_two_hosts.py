"""Under torchrun: the two-level all-reduce over all ranks, shared memory within each host, and the axes of a mesh.

Usage: torchrun … collectives_on_two_hosts.py RESULTS
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from minilib.mechanisms.replication import plans
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.mesh_shape import MeshShape
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.ranks.collective_cases import same_everywhere, values


def work() -> dict:
    hosts, rank = launch.hosts(), dist.get_rank()
    groups = [dist.new_group([r for r in range(len(hosts)) if hosts[r] == host]) for host in dict.fromkeys(hosts)]
    within = groups[hosts[rank]]
    dist.all_reduce(total := torch.arange(4.0) * 10**rank)
    found = {"hosts": hosts, "sum": total.tolist()}
    for name, comm, plan, group in (
        ("two-level", Communicator(GroupTransport(timeout=20.0)), plans.two_level(hosts), None),
        ("shared", Communicator(SharedMemoryTransport(within, timeout=20.0)), None, within),
    ):
        right = []
        for numel in (1, 101, 300_001):
            x, expected = values(numel), values(numel)
            dist.all_reduce(expected, group=group)
            comm.all_reduce(x, plan=plan)
            right.append(torch.equal(x, expected))
        comm.all_reduce(x := torch.randn(1001, generator=torch.Generator().manual_seed(rank)), plan=plan)
        found[name] = right
        found[f"{name}, same bits"] = same_everywhere(x) if group is None else True
        found[f"{name}, bytes"] = comm.traffic.bytes
        comm.close()
    return found | {"mesh": along_the_axes(hosts)}


def along_the_axes(hosts: list[int]) -> dict:
    """Which ranks each axis adds up, and how many bytes an all-reduce of 8 sends between hosts."""
    mesh = DeviceMesh(MeshShape.of(len(hosts), dp=None, tp=2), timeout=20.0)
    found = {}
    for axis in ("dp", "tp"):
        mesh.comm(axis).all_reduce(total := torch.tensor([10**mesh.rank]))
        found[axis] = [total.item(), sum(group.bytes for group in mesh.shape.crossings(axis, 8, hosts))]
    mesh.close()
    return found


results = launch.run(work, None, timeout=20.0)
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(results))
