"""Ray's side of placement-peers: job lists as placement groups on nodes that Ray simulates; run with Ray's Python.

Reads {"nodes": [GPUs, …], "jobs": {list: [job, …]}, "strategies": […]} and writes, in JSON,
{"version", "traces": {list: {strategy: [moment, …]}}, "said": {what was tried: what happened}}.
"""

import json
import os
import secrets
import sys
import time
from dataclasses import asdict

from event_trace import ListedJob, trace  # this file's own folder is on sys.path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # on this machine nobody else may run what Ray runs

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util import placement_group, placement_group_table, remove_placement_group  # noqa: E402

QUIET = 1.5  # seconds without a change after which Ray is taken to have decided
PAUSE = {"gcs_create_placement_group_retry_max_interval_ms": 200}  # between tries of a group that waits, usually 1,000
STORE = 80 * 2**20  # bytes of each node's object store, nearly the least that Ray takes


class Groups:
    """A placement group for each job; a worker is a bundle."""

    def __init__(self, strategy, hosts):
        self.strategy, self.hosts, self.groups = strategy, hosts, {}

    def submit(self, job, now):
        self.groups[job.name] = placement_group([{"GPU": job.gpus}] * job.workers, self.strategy)

    def finish(self, name, now):
        remove_placement_group(self.groups.pop(name))

    def decide(self, now):
        before, since = None, time.monotonic()
        while before is None or time.monotonic() - since < QUIET:
            running = {name: found for name, group in self.groups.items() if (found := self.where(group))}
            if running != before:
                before, since = running, time.monotonic()
            time.sleep(0.05)
        return before

    def where(self, group):
        """Hosts of a group's bundles; none while it waits."""
        table = placement_group_table(group)
        if table["state"] != "CREATED":
            return []
        return [self.hosts[node] for _, node in sorted(table["bundles_to_node_id"].items())]


def hosts_by_id():
    """Names of the nodes that have GPUs; each has a resource of its name."""
    return {
        node["NodeID"]: next((r for r in node["Resources"] if r.startswith("host")), "head") for node in ray.nodes()
    }


def said(cluster, hosts, nodes):
    """What Ray does with a bundle of one and a half GPUs, and with a group whose node is lost."""
    groups = Groups("PACK", hosts)
    half = placement_group([{"GPU": 1.5}])
    found = {"bundle of 1.5 GPUs": "accepted" if half.wait(20) else "waits"}
    remove_placement_group(half)
    groups.submit(ListedJob("lost", 0, 1, 1, 1), 0)
    (before,) = groups.decide(0)["lost"]
    cluster.remove_node(nodes[before], allow_graceful=False)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and groups.where(groups.groups["lost"]) in ([], [before]):
        time.sleep(0.2)
    after = groups.where(groups.groups["lost"])
    found["group on a lost node"] = "placed anew" if after and after != [before] else "not placed anew"
    return found


def main():
    """Start Ray, run every list with every strategy, say what was seen, and end Ray."""
    asked = json.load(sys.stdin)
    quiet = {"num_cpus": 0, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**quiet, "include_dashboard": False,
                                                               "_system_config": PAUSE})  # fmt: skip
    try:
        nodes = {f"host{n}": cluster.add_node(**quiet, num_gpus=gpus, resources={f"host{n}": 1})
                 for n, gpus in enumerate(asked["nodes"])}  # fmt: skip
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        hosts, traces = hosts_by_id(), {}
        for name, jobs in asked["jobs"].items():
            listed = [ListedJob(**job) for job in jobs]
            traces[name] = {s: list(map(asdict, trace(Groups(s, hosts), listed))) for s in asked["strategies"]}
        found = said(cluster, hosts, nodes) if asked["said"] else {}
        print(json.dumps({"version": ray.__version__, "traces": traces, "said": found}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
