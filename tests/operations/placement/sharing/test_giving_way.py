"""The least loss against all sets of victims, with what fits counted by hand; and against Kubernetes' rule."""

import random
from collections import Counter
from itertools import combinations

import pytest

from minilib.classic.pod_scheduler import Pod, find_preemption
from minilib.mechanisms.scheduling.placing import Ledger, Node
from minilib.mechanisms.scheduling.placing.filters import FILTERS
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.sharing.giving_way import least_lost
from minilib.operations.placement.sharing.lost_work import GangRun

DAY, HOUR, MINUTE = 86_400, 3_600, 60


def cluster_with(cluster, gangs):
    """What is free beside gangs, (job, GPUs, seconds that it ran) each."""
    free = FreeGpus(cluster)
    for job, gpus, _ in gangs:
        free.take(job.name, gpus)
    return free, [GangRun(job, seconds, HOUR) for job, _, seconds in gangs]


def some_cluster(choices):
    """Hosts in domains, filled with gangs that lie anywhere."""
    cluster = GpuCluster.regular(2, 3, 4, nvlink_domain=choices.choice((4, 12)))
    gpus, gangs = list(range(cluster.gpus)), []
    if choices.random() < 0.5:
        choices.shuffle(gpus)
    while len(gpus) > 3 and len(gangs) < 9:
        size = choices.choice((1, 2, 3, 4, 6))
        own, gpus = gpus[:size], gpus[size:]
        if choices.random() < 0.85:
            job = GangJob(f"g{len(gangs)}", len(own), checkpoint_every=choices.choice((None, 50)),
                          restart_seconds=choices.choice((0, 5, 20)))  # fmt: skip
            gangs.append((job, own, choices.randint(0, 200)))
    return cluster, gangs


def usable(job, cluster, taken):
    """GPUs that whole workers find in hosts, and whole segments in domains."""
    in_domains = Counter()
    for host in range(len(cluster.hosts)):
        free = sum(gpu not in taken for gpu in cluster.gpus_of(host))
        worker = job.gpus_per_host or 1
        in_domains[cluster.group_number("domain", host)] += free // worker * worker
    segment = job.segment or job.gpus_per_host or 1
    return sum(free // segment * segment for free in in_domains.values())


@pytest.mark.parametrize("seed", range(120))
def test_no_set_of_victims_loses_less(seed):
    choices = random.Random(seed)
    cluster, gangs = some_cluster(choices)
    size = choices.choice((4, 8, 12))
    shape = choices.choice(({}, {"gpus_per_host": 4}, {"gpus_per_host": 2, "segment": 4}))
    job = GangJob("new", size, **shape)
    free, runs = cluster_with(cluster, gangs)
    found = least_lost(job, free, runs)
    losses = {}
    for count in range(len(gangs) + 1):
        for kept in combinations(range(len(gangs)), len(gangs) - count):
            if usable(job, cluster, {gpu for at in kept for gpu in gangs[at][1]}) >= size:
                gone = frozenset(range(len(gangs))) - set(kept)
                losses[gone] = sum(runs[at].lost_gpu_seconds for at in gone)
    if not losses:
        assert found is None
        return
    assert found.exact and found.lost == pytest.approx(min(losses.values()))
    victims = frozenset(int(victim.name[1:]) for victim in found.victims)
    assert victims in losses and not any(other < victims for other in losses), "a victim too many"
    left = {gpu for at in range(len(gangs)) if at not in victims for gpu in gangs[at][1]}
    assert not left & set(found.placement.gpus) and found.placement.job is job and not found.shrunk


@pytest.mark.parametrize("seed", range(60))
def test_no_mixture_of_victims_and_of_those_who_shrink_loses_less(seed):
    choices = random.Random(seed)
    cluster = GpuCluster.regular(1, 3, 4)
    gangs, gpus = [], list(range(cluster.gpus))
    while gpus and len(gangs) < 5:
        size = min(len(gpus), choices.choice((1, 2, 4)))
        least = choices.choice((None, 1))
        job = GangJob(f"g{len(gangs)}", size, min_gpus=least, restart_seconds=choices.choice((1, 7, 30)),
                      checkpoint_every=choices.choice((None, 50)))  # fmt: skip
        gangs.append((job, gpus[:size], choices.randint(0, 200)))
        gpus = gpus[size:]
    free, runs = cluster_with(cluster, gangs)
    job = GangJob("new", choices.randint(1, 8))

    def least(at, lacking):
        """The smallest loss if gangs from `at` on give what lacks."""
        if lacking <= 0:
            return 0
        if at == len(runs):
            return float("inf")
        run = runs[at]
        ways = [least(at + 1, lacking), run.lost_gpu_seconds + least(at + 1, lacking - run.job.gpus)]
        if run.job.min_gpus is not None:
            ways.append(run.shrinking_gpu_seconds + least(at + 1, lacking - run.job.gpus + 1))
        return min(ways)

    found = least_lost(job, free, runs)
    assert found.exact and found.lost == pytest.approx(least(0, job.gpus - len(gpus)))
    shrunk = {placement.job.name: placement for placement in found.shrunk}
    assert {victim.name for victim in found.victims if victim.keeps} == set(shrunk)
    everybody = [gpu for placement in (found.placement, *found.shrunk) for gpu in placement.gpus]
    everybody += [gpu for job, own, _ in gangs if job.name not in {v.name for v in found.victims} for gpu in own]
    assert len(set(everybody)) == len(everybody) <= cluster.gpus
    if len(found.victims) == 1 and shrunk:
        assert len(everybody) == cluster.gpus, "it could have kept more"


def long_and_short():
    """Two hosts of 8: on one a gang that ran a day and keeps nothing, on the other two that saved a minute ago."""
    gangs = [(GangJob("day", 8, priority=9), range(8), DAY)]
    gangs += [(GangJob(f"saved{n}", 4, priority=9, checkpoint_every=HOUR, restart_seconds=2 * MINUTE),
               range(8 + 4 * n, 12 + 4 * n), DAY + MINUTE) for n in range(2)]  # fmt: skip
    return GpuCluster.regular(1, 2, 8), gangs


def test_the_rule_of_fewest_victims_loses_a_day_where_ours_loses_minutes():
    cluster, gangs = long_and_short()
    pods = {job.name: Pod(job.name, {"gpu": job.gpus}, priority=0) for job, _, _ in gangs}
    ledger = Ledger([Node(host.name, {"gpu": host.gpus, "pods": 110}) for host in cluster.hosts])
    for job, gpus, _ in gangs:
        ledger.reserve(pods[job.name].claim, cluster.hosts[cluster.host_of(gpus[0])].name)
    theirs = find_preemption(Pod("new", {"gpu": 8}, priority=1), pods, ledger, FILTERS)
    free, runs = cluster_with(cluster, gangs)
    lost = {run.job.name: run.lost_gpu_seconds for run in runs}
    assert [victim.name for victim in theirs.victims] == ["day"] and lost["day"] == 8 * DAY == 691_200
    ours = least_lost(GangJob("new", 8, gpus_per_host=8), free, runs)
    assert [victim.name for victim in ours.victims] == ["saved0", "saved1"]
    assert ours.lost == 8 * (1 + 2) * MINUTE == 1_440 and lost["day"] == 480 * ours.lost
    assert ours.placement.gpus == tuple(range(8, 16))


def test_one_pod_that_gives_way_ends_its_whole_gang():
    """Kubernetes sees one victim of 8 GPUs; the gang of four hosts stands still with it."""
    cluster = GpuCluster.regular(1, 5, 8)
    gangs = [(GangJob("wide", 32, gpus_per_host=8), range(32), HOUR), (GangJob("two", 8), range(32, 40), 2 * HOUR)]
    free, runs = cluster_with(cluster, gangs)
    assert [run.lost_gpu_seconds for run in runs] == [32 * HOUR, 16 * HOUR]
    assert [victim.name for victim in least_lost(GangJob("new", 8), free, runs).victims] == ["two"]


def test_a_gang_shrinks_by_no_more_than_is_needed():
    gangs = [(GangJob("elastic", 8, min_gpus=2, restart_seconds=10), range(8), HOUR)]
    free, runs = cluster_with(GpuCluster.regular(1, 1, 8), gangs)
    found = least_lost(GangJob("new", 3), free, runs)
    assert found.lost == 80 and found.victims[0].keeps == 5 and found.shrunk[0].job.gpus == 5
    assert found.shrunk[0].job.seconds == HOUR * 8 / 5 + 10
    free, runs = cluster_with(GpuCluster.regular(1, 1, 8), gangs)
    whole = least_lost(GangJob("new", 7), free, runs)  # it cannot go on with one
    assert whole.lost == 8 * (HOUR + 10) and not whole.shrunk


def test_gpus_out_of_use_help_nobody():
    gangs = [(GangJob("a", 4), range(4), 1), (GangJob("b", 4), range(4, 8), 100)]
    free, runs = cluster_with(GpuCluster.regular(1, 2, 4), gangs)
    free.take_out([0], "drained")
    found = least_lost(GangJob("new", 4), free, runs)
    assert [victim.name for victim in found.victims] == ["b"]


def test_nobody_to_ask_and_nobody_to_be_asked():
    cluster = GpuCluster.regular(1, 1, 8)
    assert least_lost(GangJob("new", 9), FreeGpus(cluster), []) is None
    fits = least_lost(GangJob("new", 8), FreeGpus(cluster), [])
    assert fits.victims == () and fits.lost == 0


def test_who_may_not_give_way_does_not_and_what_is_not_enough_is_not():
    gangs = [(GangJob(name, 2), range(2 * at, 2 * at + 2), 10 * at) for at, name in enumerate("abcd")]
    cluster = GpuCluster.regular(1, 1, 8)
    free, runs = cluster_with(cluster, gangs)
    found = least_lost(GangJob("new", 2), free, runs, may=lambda victims: all(v.name != "a" for v in victims))
    assert [victim.name for victim in found.victims] == ["b"]
    free, runs = cluster_with(cluster, gangs)
    found = least_lost(GangJob("new", 2), free, runs, enough=lambda victims: sum(v.frees for v in victims) >= 4)
    assert sorted(victim.name for victim in found.victims) == ["a", "b"]
    free, runs = cluster_with(cluster, gangs)
    assert least_lost(GangJob("new", 2), free, runs, may=lambda victims: not victims) is None


def test_ties_cost_little_and_a_search_that_ends_early_says_so_and_asks_nobody_in_vain():
    cluster = GpuCluster.regular(8, 8, 8)
    gangs = [(GangJob(f"g{at:03}", 2), range(2 * at, 2 * at + 2), 100) for at in range(256)]
    free, runs = cluster_with(cluster, gangs)
    equal = least_lost(GangJob("new", 64), free, runs)
    assert equal.exact and len(equal.victims) == 32 and equal.sets <= 33
    choices = random.Random(0)
    gangs = [(GangJob(f"g{at:03}", 2), range(2 * at, 2 * at + 2), choices.randint(1, 999)) for at in range(256)]
    free, runs = cluster_with(cluster, gangs)
    early = least_lost(GangJob("new", 96, gpus_per_host=8), free, runs, limit=300)
    assert not early.exact and early.sets <= 300
    hosts = Counter(cluster.host_of(2 * int(victim.name[1:])) for victim in early.victims)
    assert sum(count == 4 for count in hosts.values()) == 12 and len(hosts) == 12, "hosts that nobody needs"
