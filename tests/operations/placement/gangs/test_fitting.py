"""Which GPUs a gang gets: known traps, and what holds for every placement."""

import random

import pytest

from minilib.mechanisms.scheduling.placing import FreeIndex
from minilib.operations.placement.cluster.capacity import FreeGpus
from minilib.operations.placement.cluster.topology import GpuCluster, Host
from minilib.operations.placement.gangs.fitting import best_placement, candidates
from minilib.operations.placement.gangs.job import GangJob
from minilib.operations.placement.gangs.price import MeshTraffic
from minilib.ranks.mesh_shape import MeshShape

NVL72 = GpuCluster.regular(3, 18, 4, nvlink_domain=72, gpu="gb200")


def with_free(*counts: int, rack: int = 100, size: int = 8) -> FreeGpus:
    """Hosts of one rack, with so many free GPUs each."""
    hosts = [Host(f"h{n}", size, f"h{n}", f"r{n // rack}", "u") for n in range(len(counts))]
    free = FreeGpus(GpuCluster("x", "h100-sxm", tuple(hosts)))
    for host, count in enumerate(counts):
        if count < size:
            free.take(f"other {host}", list(free.cluster.gpus_of(host))[count:])
    return free


def left(free: FreeGpus, job: GangJob) -> list[int]:
    """Free GPUs of each host after a job was placed; empty if it does not fit."""
    placement = best_placement(job, free)
    if placement is None:
        return []
    free.take(job.name, placement.gpus)
    free.check_invariants()
    return [len(free.free_on(host)) for host in range(len(free.cluster.hosts))]


def test_a_small_job_leaves_the_larger_hole():
    """2 GPUs on free {4, 2} leave {4}: kueue#3756."""
    assert left(with_free(4, 2), GangJob("x", 2)) == [4, 0]
    assert left(with_free(4, 2), GangJob("x", 2, mesh=MeshShape.of(tp=2))) == [4, 0]


def test_workers_that_do_not_talk_leave_the_larger_hole():
    """Two workers of one GPU on free {2, 1, 1} leave {2}: kueue#4474. Those that talk stay together."""
    assert left(with_free(2, 1, 1), GangJob("x", 2, gpus_per_host=1, anywhere=True)) == [2, 0, 0]
    assert left(with_free(2, 1, 1), GangJob("x", 2, gpus_per_host=1)) == [0, 1, 1]


def test_eight_gpus_on_one_host_are_not_four_on_two():
    """Two nodes with 4 free GPUs each do not start a worker of 8, which would wait for ever."""
    assert left(with_free(4, 4), GangJob("x", 8, gpus_per_host=8)) == []
    assert left(with_free(4, 4), GangJob("x", 8)) == [0, 0]
    assert left(with_free(4, 4), GangJob("x", 8, mesh=MeshShape.of(tp=8))) == []
    assert left(with_free(4, 4), GangJob("x", 8, mesh=MeshShape.of(tp=8), tp_in_domain=False)) == [0, 0]
    assert left(with_free(3, 3, 6), GangJob("x", 8, mesh=MeshShape.of(dp=4, tp=2))) == [1, 3, 0]


def test_whole_hosts_go_first_and_the_rest_fits_best():
    """20 GPUs: two whole hosts, and the four where four are free, so that a whole host is left."""
    assert left(with_free(8, 4, 8, 8), GangJob("x", 20)) == [0, 0, 0, 8]
    assert left(with_free(8, 4, 8, 6), GangJob("x", 18)) == [0, 2, 0, 6]


def test_few_racks():
    free = with_free(8, 8, 4, 8, 8, 8, rack=2)
    assert left(free, GangJob("x", 16)) == [0, 0, 4, 8, 8, 8]
    free = with_free(4, 8, 4, 8, 8, 8, rack=2)
    assert left(free, GangJob("x", 12)) == [0, 0, 4, 8, 8, 8]


def test_a_mesh_prefers_whole_hosts_to_remainders_of_the_same_rack():
    """16 GPUs on free 8 4 4 8: two hosts rather than three, as far apart."""
    assert left(with_free(8, 4, 4, 8), GangJob("x", 16, mesh=MeshShape.of(dp=8, tp=2))) == [0, 4, 4, 0]


def test_64_of_72_leave_8_stranded():
    """18 trays of four are 72: three jobs of 64 use 192 of 216 GPUs, and no domain has room for 16 more."""
    free = FreeGpus(NVL72)
    for number in range(3):
        placement = best_placement(GangJob(f"job{number}", 64, mesh=MeshShape.of(dp=4, tp=16)), free)
        assert len(set(NVL72.numbers_of("domain", placement.gpus))) == 1
        free.take(placement.job.name, placement.gpus)
    assert free.free == 24
    assert best_placement(GangJob("x", 16, mesh=MeshShape.of(tp=16)), free) is None
    assert best_placement(GangJob("x", 24, mesh=MeshShape.of(dp=3, tp=8)), free) is not None


def test_segments_lie_within_domains():
    """32 trays in segments of 16 take two domains; in segments of 9 trays, a domain holds two."""
    free = FreeGpus(NVL72)
    both = best_placement(GangJob("x", 128, gpus_per_host=4, segment=64), free)
    assert sorted(map(NVL72.numbers_of("domain", both.gpus).count, range(3))) == [0, 64, 64]
    nine = best_placement(GangJob("x", 108, gpus_per_host=4, segment=36), free)
    assert sorted(map(NVL72.numbers_of("domain", nine.gpus).count, range(3))) == [0, 36, 72]
    free.take_out([0], "failed")  # one tray of a domain's 18
    free.take("whole", range(72, 216))
    assert best_placement(GangJob("x", 72, gpus_per_host=4, segment=36), free) is None
    assert best_placement(GangJob("x", 64, gpus_per_host=4, segment=64), free) is not None


def test_the_price_chooses_between_candidates():
    """Fewer racks are nearer, and yet dp with one port on its thinnest host is slower than with whole hosts."""
    free = with_free(8, 7, 1, 8, rack=3)
    mesh = MeshShape.of(dp=16)
    near = GangJob("x", 16, mesh=mesh)
    assert left(free, near) == [0, 0, 0, 8]
    by_hosts = [placement.gpus for placement in candidates(near, with_free(8, 7, 1, 8, rack=3))]
    assert by_hosts == [(*range(8), *range(8, 15), 16), (*range(8), *range(24, 32))]


@pytest.mark.parametrize("seed", range(4))
def test_every_placement_meets_its_constraints(seed):
    """On random clusters with random holes: GPUs are free, workers on one host, groups of tp in one domain, and a job
    is refused room only if workers and groups counted one by one do not fit."""
    choices, placed, without = random.Random(seed), 0, 0
    for _ in range(150):
        per_domain = choices.choice((1, 2, 3))
        hosts = [Host(f"h{n}", 4, f"d{n // per_domain}", f"r{n // 6}", f"u{n // 12}", {"zone": choices.choice("ab")})
                 for n in range(24)]  # fmt: skip
        free = FreeGpus(GpuCluster("x", "gb200", tuple(hosts)))
        free.take("other", choices.sample(range(96), choices.randrange(96)))
        tp, worker = choices.choice(((1, None), (2, None), (4, None), (8, None), (2, 1), (1, 2), (4, 4), (4, 2)))
        selector = choices.choice(({}, {"zone": "a"}))
        groups = choices.randint(1, 48 // tp)
        gpus = tp * groups if not worker or tp % worker == 0 else worker * groups
        mesh = MeshShape.of(dp=gpus // tp, tp=tp)
        job = GangJob("x", gpus, worker, MeshShape.of(dp=gpus // tp, tp=tp), MeshTraffic(mesh, {"tp": 100}),
                      selector=selector)  # fmt: skip
        placement = best_placement(job, free)
        on_host, in_domain = job.on_one_host(4), job.in_one_domain(4)
        room = 0
        for domain in free.cluster.groups("domain"):
            hosts_free = [len(free.free_on(h)) for h in domain.hosts if selector.items() <= hosts[h].labels.items()]
            room += sum(count // on_host * on_host for count in hosts_free) // in_domain * in_domain
        assert (placement is not None) == (room >= gpus)
        if placement is None:
            without += 1
            continue
        placed += 1
        assert all(map(free.is_free, placement.gpus)) and len(set(placement.gpus)) == gpus
        for host in free.cluster.numbers_of("host", placement.gpus):
            assert selector.items() <= hosts[host].labels.items()
        for group in mesh.groups("tp"):
            assert len(set(free.cluster.numbers_of("domain", [placement.gpus[rank] for rank in group]))) == 1
    assert placed > 20 and without > 20


def test_a_decision_looks_at_few_of_many_hosts():
    """Half of the hosts are busy: what is looked at for 8, 64 and 512 GPUs depends on the job, not on the cluster."""
    looked_at = {}
    for racks in (25, 250, 2_500):
        free = FreeGpus(GpuCluster.regular(racks, 4))
        for host in range(0, racks * 4, 2):
            free.take(f"other {host}", free.cluster.gpus_of(host)[: 1 + host % 8])
        for gpus in (8, 64, 512):
            job = GangJob("x", gpus, mesh=MeshShape.of(dp=gpus // 8, tp=8))
            if gpus > racks * 16:
                continue
            best_placement(job, free)
            before = free.looked_at
            assert best_placement(job, free) is not None
            looked_at.setdefault(gpus, []).append(free.looked_at - before)
    # Two candidates, of workers and of whole hosts; for each host of the job a look at each of three levels.
    assert all(max(counts) <= 2 * 3 * gpus // 8 + 10 for gpus, counts in looked_at.items()), looked_at
    assert all(counts[-1] <= 1.5 * counts[0] for counts in looked_at.values()), looked_at


def test_what_is_looked_at_is_counted(monkeypatch):
    """A look that the index does not count would make the test above worthless."""
    free = FreeGpus(GpuCluster.regular(25, 4))
    job = GangJob("x", 64, mesh=MeshShape.of(dp=8, tp=8))
    best_placement(job, free)
    seen = []

    def spying(order):
        def iterate(self, amount):
            for number in order(self, amount):
                seen.append(number)
                yield number

        return iterate

    monkeypatch.setattr(FreeIndex, "least_first", spying(FreeIndex.least_first))
    monkeypatch.setattr(FreeIndex, "most_first", spying(FreeIndex.most_first))
    before = free.looked_at
    assert best_placement(job, free) is not None
    assert free.looked_at - before >= len(seen) > 0
