#!/usr/bin/env bash
# Placement groups of Ray that wait stand in no line: while a group of 8 GPUs waits for the one GPU that another group
# has, later groups start on the node that the large one needs, so that it waits for them as well. Ray's documentation
# promises all bundles or none, and says nothing of an order; a queue that serves first what came first, or keeps room
# for the first in line, was expected. And PACK does not pack groups: one GPU goes to the emptiest node.
# The way round: ask for small groups only after `wait()` of the large one, or let another scheduler admit jobs.
. "$(dirname "$0")/environment.sh" "ray==2.60.0"

observe <<'EOF'
import os
import secrets

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group

quiet = {"num_cpus": 0, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**quiet, "include_dashboard": False})
cluster.add_node(**quiet, num_gpus=8, resources={"node of 8": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")


def group(gpus):
    return placement_group([{"GPU": gpus}], "PACK")


print("ray", ray.__version__)
first = group(1)
assert first.wait(60)
large = group(8)
later = [group(3), group(4)]
print("a group of 8 waits; later groups started:", [each.wait(60) for each in later])
remove_placement_group(first)
print("the group that it waited for is gone, and it", "runs" if large.wait(20) else "waits")
for each in later:
    remove_placement_group(each)
print("the later groups are gone, and it", "runs" if large.wait(60) else "waits")
remove_placement_group(large)

cluster.add_node(**quiet, num_gpus=4, resources={"node of 4": 1})
cluster.wait_for_nodes()
names = {node["NodeID"]: [r for r in node["Resources"] if r.startswith("node of")] for node in ray.nodes()}
one = group(1)
assert one.wait(60)
(node,) = placement_group_table(one)["bundles_to_node_id"].values()
print("one GPU, packed beside a free node of 4:", *names[node])
ray.shutdown()
cluster.shutdown()
EOF
expect <<'EOF'
ray 2.60.0
a group of 8 waits; later groups started: [True, True]
the group that it waited for is gone, and it waits
the later groups are gone, and it runs
one GPU, packed beside a free node of 4: node of 8
EOF
