"""Every job that never starts is refused with the constraint that fails, and by how much."""

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster, Host
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.refusal import Feasibility
from minilib.ranks.mesh_shape import MeshShape

HOSTS = tuple(Host(f"h{n}", 8, f"h{n}", "r", "u", {"zone": "ab"[n // 3]}) for n in range(4))
CLUSTER = GpuCluster("four hosts", "h100-sxm", HOSTS)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (GangJob("x", 40), "x needs 40 GPUs, and four hosts has 32: 8 too many"),
        (GangJob("x", 16, mesh=MeshShape.of(tp=16)),
         "x needs 16 GPUs in one NVLink domain for each group of tp, and the largest has 8: 8 too many"),
        (GangJob("x", 32, gpus_per_host=16), "x needs 16 GPUs on one host for each worker, and the largest host has 8: "
         "8 too many"),
        (GangJob("x", 16, segment=16), "in one NVLink domain for each segment, and the largest has 8: 8 too many"),
        (GangJob("x", 8, selector={"zone": "c"}), "x asks for hosts with zone=c, and none of 4 hosts has that"),
        (GangJob("x", 16, selector={"zone": "b"}), "x needs 16 GPUs, and hosts with zone=b have 8: 8 too many"),
        (GangJob("x", 25, gpus_per_host=5),
         "x needs 25 GPUs, and with 5 on a host and 5 in a domain together its hosts hold 20: 5 too many"),
        (GangJob("x", 24, mesh=MeshShape.of(dp=4, tp=6)),
         None),
        (GangJob("x", 30, mesh=MeshShape.of(dp=5, tp=6)),
         "x needs 30 GPUs, and with 1 on a host and 6 in a domain together its hosts hold 24: 6 too many"),
        (GangJob("x", 32), None),
        (GangJob("x", 16, mesh=MeshShape.of(tp=16), tp_in_domain=False), None),
        (GangJob("x", 8, selector={"zone": "b"}, gpus_per_host=8), None),
    ],
)  # fmt: skip
def test_reasons(job, said):
    refused = Feasibility(CLUSTER).refusal(job)
    if said is None:
        assert refused is None
    else:
        assert refused.job is job and said in refused.reason
