"""Manifests against published schemas, and against what a gang needs: a number and rank 0's address for each."""

import copy

import pytest
import yaml
from jsonschema import ValidationError
from kubernetes_validate.utils import SchemaNotFoundError

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet, ScatteredRanks
from minilib.operations.placement.outlets.kubernetes.gangs import native_gang, volcano_gang
from minilib.operations.placement.outlets.kubernetes.jobs import indexed_job, job_set, pinned_set
from minilib.operations.placement.outlets.kubernetes.pods import GPU, HOSTNAME, PodOptions, manifest_text
from minilib.operations.placement.outlets.kubernetes.queues import kueue_queue, within
from minilib.operations.placement.outlets.kubernetes.replicas import gpu_claim_template, leader_worker_set
from tests.operations.placement.outlets.crd_shapes import check, pods_in

JOB = HostedJob("gpt", ("python", "train.py", "--lr", "1e-3"), ("h3", "h1", "h2"), 8)
POD = PodOptions("registry.example/train:1")
RELEASE = "1.37"
CLAIMED = PodOptions("registry.example/train:1", claim_template="eight")
EVERYTHING = {
    "indexed": indexed_job(JOB, POD),
    "set": [job_set(JOB, POD, queue="tenant-a")],
    "set, claimed": [job_set(JOB, CLAIMED)],
    "pinned": [pinned_set(JOB, POD)],
    "topology": [job_set(JOB, within(POD, "example.com/rack"))],
    "replicas": [leader_worker_set("chat", ("serve",), 3, 2, 4, POD, "example.com/domain")],
    "claims": [gpu_claim_template("eight", 8, same="resource.kubernetes.io/pcieRoot")],
    "kueue": kueue_queue("tenant-a", "team", 64, ("example.com/rack", "example.com/domain"), "all", 32),
    "volcano": [volcano_gang(JOB, POD, "research")[0], *indexed_job(JOB, volcano_gang(JOB, POD)[1])],
    "native": [native_gang(JOB, POD, "1.37", "example.com/domain")[0], job_set(JOB, native_gang(JOB, POD, "1.37")[1])],
}


def container_of(pod):
    (container,) = pod["containers"]
    return container


@pytest.mark.parametrize("objects", EVERYTHING.values(), ids=EVERYTHING)
def test_published_schemas(objects):
    assert list(yaml.safe_load_all(manifest_text(objects))) == objects
    for each in objects:
        check(each, RELEASE)


ONE_OF_EACH = {each["kind"] + each["apiVersion"]: each for objects in EVERYTHING.values() for each in objects
               if each["kind"] not in ("Job", "Service")}  # fmt: skip  # whose schemas tests/deploy checks
FREE = {"limits", "minResources", "nodeSelector", "labels", "annotations", "matchLabels", "selector"}  # any names


@pytest.mark.parametrize("found", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_schemas_refuse_what_is_wrong(found):
    """The check itself: a field that does not exist is refused wherever it stands."""
    paths = [path for path in dicts_in(found["spec"]) if path[-2:-1] != ("env",)]
    assert paths
    for path in paths:
        wrong = copy.deepcopy(found)
        place = wrong["spec"]
        for key in path:
            place = place[key]
        place["noSuchField"] = 1
        with pytest.raises(ValidationError):
            check(wrong, RELEASE)


def dicts_in(value, path=()):
    """Paths of what has fields of fixed names."""
    if isinstance(value, dict):
        if not FREE.intersection(path[-1:]):
            yield path
        for key, each in value.items():
            yield from dicts_in(each, (*path, key))
    elif isinstance(value, list) and value:
        yield from dicts_in(value[0], (*path, 0))


def test_the_gang_api_was_replaced():
    """PodGroup of 1.36 is alpha and unknown to 1.37, and the other way round."""
    for release, other in (("1.36", "1.37"), ("1.37", "1.36")):
        group, pods = native_gang(JOB, POD, release)
        check(group, release)
        assert group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 3}}
        with pytest.raises(SchemaNotFoundError):
            check(group, other)
        assert pods.fields["schedulingGroup"] == {"podGroupName": group["metadata"]["name"]}
    for release in ("1.35", "1.34", ""):
        with pytest.raises(InvalidOutlet, match="1.36, 1.37"):
            native_gang(JOB, POD, release)
    alpha = job_set(JOB, native_gang(JOB, POD, "1.36")[1])
    with pytest.raises(ValidationError, match="schedulingGroup"):
        check(alpha, "1.35")


def test_a_gang_counts_pods_and_not_gpus():
    assert native_gang(JOB, POD, "1.37")[0]["spec"]["schedulingPolicy"]["gang"]["minCount"] == len(JOB.hosts) == 3
    group, pods = volcano_gang(JOB, POD, "research")
    assert group["spec"] == {"minMember": 3, "queue": "research", "minResources": {GPU: 24}}
    assert pods.annotations == {"scheduling.k8s.io/group-name": "gpt"} and pods.fields["schedulerName"] == "volcano"


def test_pinned_workers_lie_where_the_placement_says():
    jobs = pinned_set(JOB, POD)["spec"]["replicatedJobs"]
    pods = [each["template"]["spec"]["template"]["spec"] for each in jobs]
    assert [pod["nodeSelector"] for pod in pods] == [{HOSTNAME: host} for host in ("h3", "h1", "h2")]
    assert [container_of(pod)["env"] for pod in pods] == [[{"name": "NODE_RANK", "value": str(n)}] for n in range(3)]
    assert all("--master-addr=gpt-w0-0-0.gpt" in container_of(pod)["command"] for pod in pods)


def test_a_job_that_fails_is_not_a_gang_of_n_minus_one():
    (_, job) = indexed_job(JOB, POD)
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["backoffLimit"] == 0
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    for made in (job_set(JOB, POD, 5), pinned_set(JOB, POD, 5)):
        assert made["spec"]["failurePolicy"] == {"maxRestarts": 5}
        assert all(each["template"]["spec"]["backoffLimit"] == 0 for each in made["spec"]["replicatedJobs"])
    group = leader_worker_set("chat", ("serve",), 3, 2, 4, POD)["spec"]["leaderWorkerTemplate"]
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart" and group["size"] == 2


def test_ranks_find_rank_0():
    service, job = indexed_job(JOB, POD)
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "gpt"
    assert "--master-addr=gpt-0.gpt" in container_of(pod)["command"]
    assert container_of(pod)["command"][-5:] == ["--no-python", "python", "train.py", "--lr", "1e-3"]
    (workers,) = job_set(JOB, POD)["spec"]["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    assert "--master-addr=gpt-workers-0-0.gpt" in container_of(pod)["command"]


@pytest.mark.parametrize("options", [POD, CLAIMED], ids=["counted", "claimed"])
def test_gpus_are_counted_or_claimed_and_never_both(options):
    (_, job) = indexed_job(JOB, options)
    pod = job["spec"]["template"]["spec"]
    resources = container_of(pod)["resources"]
    if options.claim_template:
        assert resources == {"claims": [{"name": "gpus"}]}
        assert pod["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "eight"}]
    else:
        assert resources == {"limits": {GPU: 8}} and "resourceClaims" not in pod


def test_kueue_looks_for_hosts_before_it_admits():
    topology, flavor, queue, local = kueue_queue("a", "team", 64, ("unit", "rack"), "all", 32)
    assert [level["nodeLabel"] for level in topology["spec"]["levels"]] == ["unit", "rack", HOSTNAME]
    assert flavor["spec"]["topologyName"] == topology["metadata"]["name"]
    ((group,),) = (queue["spec"]["resourceGroups"],)
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert group["flavors"][0]["resources"] == [{"name": GPU, "nominalQuota": 64, "borrowingLimit": 32}]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"] and local["metadata"]["namespace"] == "team"
    assert within(POD, "rack", required=False).annotations == {"kueue.x-k8s.io/podset-preferred-topology": "rack"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kueue_queue("a", "b", 1.5, ()), "whole numbers of GPUs, got 1.5"),
        (lambda: kueue_queue("a", "b", 8, (), borrow=4), "no cohort"),
        (lambda: kueue_queue("a", "b", 8, (HOSTNAME,)), "which is added"),
        (lambda: kueue_queue("a", "b", 8, ("rack", "rack")), "different node labels"),
        (lambda: gpu_claim_template("x", 1.5), "whole number of devices"),
        (lambda: leader_worker_set("x", ("y",), 1, 0, 8, POD), "hosts_per_replica is a whole number ≥ 1, got 0"),
        (lambda: job_set(JOB, POD, -1), "max_restarts"),
        (lambda: PodOptions(""), "image"),
        (lambda: HostedJob("GPT", ("x",), ("h",), 1), "lower-case"),
        (lambda: HostedJob("a" * 41, ("x",), ("h",), 1), "at most 40"),
        (lambda: HostedJob("a", ("x",), ("h\nh",), 1), "host's name"),
        (lambda: HostedJob("a", (), ("h",), 1), "command"),
        (lambda: HostedJob("a", "true", ("h",), 1), "command"),
        (lambda: HostedJob("a", ("x",), (), 1), "hosts"),
        (lambda: HostedJob("a", ("x",), ("h",), 1.5), "gpus_per_worker is a whole number ≥ 1, got 1.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidOutlet, match=message):
        call()


CLUSTER = GpuCluster.regular(1, 4, 8)


@pytest.mark.parametrize(
    "gpus, per_host, hosts, size",
    [
        (range(32), None, ("host0", "host1", "host2", "host3"), 8),
        ([*range(16, 24), *range(8)], None, ("host2", "host0"), 8),
        ([0, 1, 2, 3, 4, 5, 8, 9], None, ("host0", "host0", "host0", "host1"), 2),
        ([0, 1, 8, 9, 2, 3], 2, ("host0", "host1", "host0"), 2),
        ([7], None, ("host0",), 1),
    ],
)
def test_hosts_come_in_rank_order(gpus, per_host, hosts, size):
    placement = GangPlacement(GangJob("job", len(gpus), per_host), tuple(gpus))
    found = HostedJob.of(placement, CLUSTER, ("train",))
    assert (found.hosts, found.gpus_per_worker, found.ranks) == (hosts, size, len(gpus))


def test_a_worker_on_two_hosts_is_refused():
    with pytest.raises(ScatteredRanks, match="worker 0 of job has 2 ranks"):
        HostedJob.of(GangPlacement(GangJob("job", 2, 2), (7, 8)), CLUSTER, ("train",))


def test_every_pod_is_found_by_the_check():
    """A shape without pods would let any of them pass."""
    assert len(pods_in([1, {"a": {"x": 1}}], {"items": {"properties": {"a": {"pod": True}}}})) == 1
    (made,) = EVERYTHING["pinned"]
    for each in made["spec"]["replicatedJobs"]:
        each = copy.deepcopy(each)
        each["template"]["spec"]["template"]["spec"]["containers"][0]["image"] = 5
        wrong = {**made, "spec": {**made["spec"], "replicatedJobs": [each]}}
        with pytest.raises(ValidationError, match="image"):
            check(wrong, RELEASE)
