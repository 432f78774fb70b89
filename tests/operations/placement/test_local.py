"""Ranks run on the core that the placement says: the system is asked, and nothing is left running."""

import os
import signal
import threading
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.replication import plans
from minilib.numbers.machine import Link
from minilib.operations.placement import local
from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, GangPlacement
from minilib.operations.placement.local import CoresAsGpus, NoAffinity, NotEnoughCores, cores_of_threads, run_placed
from minilib.ranks import launch
from minilib.ranks.collectives import Communicator

SEEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "HOSTNAME")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(not CORES, reason="this system does not let a process choose its cores")
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="this machine has one core")


def cores(gpus):
    """As many as GPUs, in turn, where there are fewer."""
    return tuple(CORES[gpu % len(CORES)] for gpu in range(gpus))


def machine(hosts, gpus_per_host):
    cluster = GpuCluster.regular(1, hosts, gpus_per_host)
    return CoresAsGpus(cluster, cores(cluster.gpus))


def placed(*gpus):
    return GangPlacement(GangJob("job", len(gpus)), gpus)


def look():
    """What a rank sees of its place, in the main thread, in a new thread and in all."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(threading.get_native_id())))
    thread.start()
    thread.join()
    mine = set(psutil.Process().cpu_affinity())
    return {name: os.environ[name] for name in SEEN}, mine, seen[0], cores_of_threads(), launch.hosts()


@pytest.mark.parametrize(
    "hosts, per_host, gpus, groups",
    [
        (2, 1, (0, 1), ["0 0 1", "1 0 1"]),
        (2, 1, (1, 0), ["0 0 1", "1 0 1"]),
        (1, 2, (1, 0), ["0 0 2", "0 1 2"]),
        (2, 2, (2, 3, 0), ["0 0 2", "0 1 2", "1 0 1"]),
        (2, 2, (3, 0, 2), ["0 0 2", "1 0 1", "0 1 2"]),
        (1, 1, (0,), ["0 0 1"]),
    ],
    ids=str,
)
def test_each_rank_is_where_it_was_placed(hosts, per_host, gpus, groups):
    here = machine(hosts, per_host)
    run = run_placed(look, placed(*gpus), here)
    assert run.placement.gpus == gpus and run.lost == ()
    for rank, (seen, mine, new_thread, all_threads, numbers) in enumerate(run.values):
        core, host = here.cores[gpus[rank]], gpus[rank] // per_host
        assert mine == new_thread == all_threads == {core}
        group, local_rank, size = groups[rank].split()
        assert seen == {"RANK": str(rank), "WORLD_SIZE": str(len(gpus)), "LOCAL_RANK": local_rank,
                        "LOCAL_WORLD_SIZE": size, "GROUP_RANK": group, "HOSTNAME": f"host{host}"}  # fmt: skip
        assert numbers == [int(each.split()[0]) for each in groups]
    assert sorted(os.sched_getaffinity(0)) == CORES, "this process stays where it was"


def test_a_thread_that_ends_after_it_was_listed_is_no_fault(monkeypatch, tmp_path):
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    for thread in (threading.get_native_id(), ended.native_id):
        (tmp_path / str(thread)).mkdir()
    monkeypatch.setattr(local, "THREADS", tmp_path)
    assert cores_of_threads() == set(CORES)
    monkeypatch.setattr(os, "environ", dict(os.environ, RANK="0"))
    try:
        assert local._in_its_seat(machine(1, 1).seats(placed(0)), cores_of_threads, ()) == {CORES[0]}
    finally:
        os.sched_setaffinity(0, CORES)


@two_cores
def test_two_cores_are_two_hosts():
    (_, first, *_), (_, second, *_) = run_placed(look, placed(0, 1), machine(2, 1)).values
    assert first == {CORES[0]} and second == {CORES[1]}


@two_cores
def test_one_call_moves_one_thread_only():
    """Why every thread is moved: what sched_setaffinity(0) leaves behind."""

    def pin_the_caller():
        go = threading.Event()
        other = threading.Thread(target=go.wait)
        other.start()
        os.sched_setaffinity(0, {CORES[0]})
        found = cores_of_threads()
        go.set()
        other.join()
        return found

    assert launch.run(pin_the_caller, 1) == [set(CORES)]


def die_on(gpu_core, order):
    """Rank's values; the rank on a core dies, in the middle of a collective."""
    mine = torch.tensor([float(dist.get_rank())])
    if os.sched_getaffinity(0) == {gpu_core} and os.environ["HOSTNAME"] == order:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(mine)
    return os.getpid(), os.environ["RANK"], os.environ["HOSTNAME"], mine.item()


def test_a_dead_rank_moves_and_the_others_stay():
    here = machine(4, 1)
    run = run_placed(die_on, placed(2, 0, 1), here, here.cores[0], "host0", spares=[3])
    assert run.lost == (1,) and run.placement.gpus == (2, 3, 1)
    assert [value[1:] for value in run.values] == [("0", "host2", 3.0), ("1", "host3", 3.0), ("2", "host1", 3.0)]
    assert not any(psutil.pid_exists(value[0]) for value in run.values)


def test_two_deaths_take_two_spares():
    def fails_below(host):
        if int(os.environ["HOSTNAME"].removeprefix("host")) < host:
            os._exit(3)
        return os.environ["HOSTNAME"]

    run = run_placed(fails_below, placed(0), machine(3, 1), 2, spares=[1, 2])
    assert run.values == ["host2"] and run.lost == (0, 0) and run.placement.gpus == (2,)
    with pytest.raises(launch.RankFailed, match="exited with code 3"):
        run_placed(fails_below, placed(0), machine(3, 1), 2, spares=[1])


def test_nothing_is_left_running(tmp_path):
    """The others of a gang end with the rank that dies, also where no spare is left."""

    def one_dies():
        (tmp_path / f"{os.environ['HOSTNAME']}-{os.getpid()}").touch()
        dist.barrier()
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    with pytest.raises(launch.RankFailed, match="rank 1 of 2 was killed by SIGKILL"):
        run_placed(one_dies, placed(0, 1), machine(3, 1), spares=[2])
    started = [each.name.split("-") for each in tmp_path.iterdir()]
    assert sorted(host for host, _ in started) == ["host0", "host0", "host1", "host2"]
    assert not any(psutil.pid_exists(int(pid)) for _, pid in started)


def test_a_value_that_does_not_pickle_takes_no_spare(tmp_path):
    def returns_a_lock():
        (tmp_path / os.environ["HOSTNAME"]).touch()
        return threading.Lock()

    with pytest.raises(launch.ReturnNotPicklable):
        run_placed(returns_a_lock, placed(0), machine(2, 1), spares=[1])
    assert [each.name for each in tmp_path.iterdir()] == ["host0"]


def test_a_rank_that_is_not_pinned_says_so(monkeypatch):
    def ignores(thread, wanted):
        return None

    def pinned_badly(seats, fn, args):
        os.sched_setaffinity = ignores
        return local._in_its_seat(seats, fn, args)

    elsewhere = CoresAsGpus(GpuCluster.regular(1, 1, 1), (CORES[0],))
    if len(CORES) == 1:
        pytest.skip("this machine has one core")
    with pytest.raises(launch.RankFailed, match=rf"NotPinned.*core {CORES[0]} and may run on"):
        launch.run(pinned_badly, 1, elsewhere.seats(placed(0)), look, ())


SLOW, FAST = Link(bandwidth=2e6, latency=1e-3), Link(bandwidth=1e12, latency=0.0)


def exchanged(placement, cluster):
    comm = Communicator(local.transport(placement, cluster))
    links = [comm.transport._link(0, peer) for peer in range(comm.world_size)]
    x = torch.arange(1000.0) * (comm.rank + 1)
    comm.all_reduce(x, plan=plans.ring("all_reduce", comm.world_size))
    comm.close()
    return links, x


def test_links_between_hosts_are_slow():
    cluster = GpuCluster.regular(2, 1, 2, racks_per_unit=1)
    cluster = replace(cluster, links={"domain": FAST, "rack": SLOW, "unit": SLOW, "spine": SLOW})
    here = CoresAsGpus(cluster, cores(4))
    placement = placed(3, 0, 2)
    run = run_placed(exchanged, placement, here, placement, cluster)
    for links, x in run.values:
        assert links == [FAST, SLOW, FAST], "rank 0 on GPU 3 and rank 2 on GPU 2 share a host"
        assert torch.equal(x, torch.arange(1000.0) * 6)


def test_bad_input(monkeypatch):
    cluster = GpuCluster.regular(1, 1, len(CORES) + 1)
    with pytest.raises(NotEnoughCores, match=f"has {len(CORES) + 1} GPUs"):
        CoresAsGpus(cluster)
    with pytest.raises(NotEnoughCores, match="describe fewer GPUs"):
        CoresAsGpus(GpuCluster.regular(1, 1, 1), (max(CORES) + 1,))
    here = machine(2, 1)
    for spares in ([0], [1, 1], [2], [-1]):
        with pytest.raises(ValueError, match="does not use, each once"):
            run_placed(look, placed(0), here, spares=spares)
    monkeypatch.delattr(os, "sched_getaffinity")
    with pytest.raises(NoAffinity, match="run without run_placed"):
        CoresAsGpus(GpuCluster.regular(1, 1, 1))
