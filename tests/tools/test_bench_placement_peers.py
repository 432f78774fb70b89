"""Lists of jobs on a clock that stands still; Slurm and Ray beside ours, where they are installed."""

import importlib.util
import subprocess
import sys

import psutil
import pytest

from minilib.mechanisms.scheduling.placing import BinPacking, Spreading
from minilib.operations.placement.outlets.hosted_job import HostedJob
from minilib.operations.placement.outlets.slurm import SlurmOptions, batch_script
from tools.bench.peers import placement, slurm_cluster
from tools.bench.peers.environments import HERE, PLACEMENT_PEERS, Unavailable
from tools.bench.peers.event_trace import ListedJob, Moment, trace

GPU = "gpu"


def job(name, arrival, workers, gpus, minutes):
    return ListedJob(name, arrival, workers, gpus, minutes)


def sets_of(found):
    return {moment.now: (set(moment.running), moment.waiting) for moment in found}


def test_instants_are_arrivals_and_ends():
    jobs = [job("b", 1, 1, 8, 5), job("a", 0, 1, 8, 3), job("c", 3, 1, 8, 1)]
    found = trace(placement.PlacedClaims([8], BinPacking(GPU)), jobs)
    assert sets_of(found) == {0: ({"a"}, []), 1: ({"a"}, ["b"]), 3: ({"b"}, ["c"]), 8: ({"c"}, []), 9: (set(), [])}
    assert trace(placement.PlacedClaims([8], BinPacking(GPU)), []) == []


def test_a_job_that_never_starts_does_not_hang():
    found = trace(placement.PlacedClaims([8], BinPacking(GPU)), [job("a", 0, 1, 9, 3), job("b", 1, 1, 8, 3)])
    assert sets_of(found) == {0: (set(), ["a"]), 1: (set(), ["a", "b"])}
    found = trace(
        placement.PlacedClaims([8], BinPacking(GPU), overtaking=True), [job("a", 0, 1, 9, 3), job("b", 1, 1, 8, 3)]
    )
    assert sets_of(found) == {0: (set(), ["a"]), 1: ({"b"}, ["a"]), 4: (set(), ["a"])}


def test_all_workers_or_none():
    found = trace(placement.PlacedClaims([8, 8], BinPacking(GPU)), [job("a", 0, 3, 5, 3), job("b", 1, 2, 5, 3)])
    assert sets_of(found)[1] == (set(), ["a", "b"])
    claims = placement.PlacedClaims([8, 8], BinPacking(GPU), overtaking=True)
    found = trace(claims, [job("a", 0, 3, 5, 3), job("b", 1, 2, 5, 3)])
    assert found[1].running == {"b": ["host0", "host1"]}
    claims.ledger.check_invariants()
    assert not claims.ledger.claims, "what has ended has given back"


@pytest.mark.parametrize(
    "score, together, hosts",
    [
        (BinPacking(GPU), None, ["host2", "host2"]),
        (Spreading(GPU), None, ["host0", "host1"]),
        (Spreading(GPU), "one node", ["host0", "host0"]),
        (BinPacking(GPU), "apart", ["host2", "host0"]),
    ],
)
def test_rules(score, together, hosts):
    (first, *_) = trace(placement.PlacedClaims([8, 8, 4], score, together=together), [job("a", 0, 2, 2, 1)])
    assert first.running == {"a": hosts}


def test_differences_are_those_between_instants_too():
    def at(now, *running):
        return Moment(now, dict.fromkeys(running, ["h"]), [])

    assert placement.differences([at(0, "a"), at(4)], [at(0, "a"), at(4)]) == []
    ours, theirs = [at(0, "a"), at(2, "a", "b"), at(9)], [at(0, "a"), at(5, "b"), at(9)]
    assert placement.differences(ours, theirs) == [
        {"now": 2, "ours_alone": ["b"], "theirs_alone": []},
        {"now": 5, "ours_alone": ["a"], "theirs_alone": []},
    ]
    assert placement.differences([], [at(0, "a")]) == [{"now": 0, "ours_alone": [], "theirs_alone": ["a"]}]


def test_our_backfill_starts_what_does_not_delay_the_first():
    found = sets_of(trace(placement.Gangs(), placement.SLURM_LISTS["second in line"]))
    assert found[5][1] == ["B"] and found[10][0] == {"A", "C"}
    assert found[70] == ({"A", "long"}, ["B", "all"]), "the second in line is not promised anything"
    assert found[120][0] == {"B", "long"}, "the first is not delayed"


def test_lists_fit_what_they_run_on():
    for lists, nodes in ((placement.RAY_LISTS, placement.RAY_NODES), (placement.SLURM_LISTS, [8] * placement.HOSTS)):
        for jobs in lists.values():
            assert len({each.name for each in jobs}) == len(jobs)
            assert all(each.workers * each.gpus <= sum(nodes) and each.gpus <= max(nodes) for each in jobs)
    assert all(package.count("==") == 1 for package in PLACEMENT_PEERS["ray"].packages)


def test_what_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm_cluster, "_program", lambda name: None)
    with pytest.raises(Unavailable, match="no munged, slurmctld"):
        slurm_cluster.SlurmCluster(1, 1)

    def cannot(name):
        raise Unavailable("no network")

    monkeypatch.setattr(placement, "python_of", cannot)
    found = placement.placement_peers()
    assert found["failed"]["ray"] == "no network" and found["failed"]["slurm"].startswith("no munged")
    assert list(placement.lines(found)) == [f"{name}: {reason}" for name, reason in found["failed"].items()]
    broken = tmp_path / "python"
    broken.write_text(f"#!{sys.executable}\nraise SystemExit('no module named ray')\n")
    broken.chmod(0o755)
    with pytest.raises(Unavailable, match="no module named ray"):
        placement.ray_traces(str(broken), {}, (), said=False)


@pytest.fixture(scope="module")
def slurm():
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    before = {each.pid for each in psutil.process_iter()}
    with slurm_cluster.SlurmCluster(placement.HOSTS, placement.WHOLE) as cluster:
        yield cluster
    _, left = psutil.wait_procs(
        [each for each in psutil.process_iter(["name"]) if each.pid not in before and "slurm" in each.info["name"]], 10
    )
    assert not left, "something of Slurm was left running"


def test_slurm_runs_ranks_where_the_script_says(slurm):
    """The real Slurm, and not only what its manual says: its own order of hosts is another one."""
    show = "echo $RANK $LOCAL_RANK $GROUP_RANK $SLURM_NODEID $WORLD_SIZE $SLURMD_NODENAME $MASTER_ADDR"
    gang = HostedJob("gpt", ("bash", "-c", show), ("host2", "host0", "host3"), 2)
    (slurm.folder / "gpt.sh").write_text(batch_script(gang, SlurmOptions(90, checkpoint_seconds=10)))
    slurm.run("sbatch", "--wait", "gpt.sh")
    (log,) = slurm.folder.glob("gpt-*.log")
    hosts, node_ids = ("host2", "host0", "host3"), (1, 0, 2)
    assert sorted(log.read_text().splitlines()) == [
        f"{rank} {rank % 2} {rank // 2} {node_ids[rank // 2]} 6 {hosts[rank // 2]} host2" for rank in range(6)
    ]


def test_slurm_refuses_what_is_wrong(slurm):
    with pytest.raises(Unavailable, match="Invalid node name"):
        gang = HostedJob("gpt", ("true",), ("nowhere",), 2)
        (slurm.folder / "wrong.sh").write_text(batch_script(gang, SlurmOptions(90)))
        slurm.run("sbatch", "wrong.sh")


def test_slurm_starts_the_same_jobs(slurm):
    """First come, first served, with a small job that ends before the first in line can start."""
    jobs = [job("A", 0, 6, 8, 120), job("B", 5, 4, 8, 60), job("C", 10, 2, 8, 60)]
    theirs, ours = trace(placement.SlurmJobs(slurm), jobs), trace(placement.Gangs(), jobs)
    assert placement.differences(ours, theirs) == []
    assert [sorted(moment.running) for moment in theirs] == [["A"], ["A"], ["A", "C"], ["A"], ["B"], []]


def test_ray_runs_the_same_jobs_by_its_own_rules():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed here (the extra named ray)")
    jobs = {
        "tiny": (job("eight", 0, 1, 8, 9), job("seven", 1, 1, 7, 9), job("big", 2, 1, 8, 9), job("two", 3, 1, 2, 9))
    }
    found = placement.ray_traces(sys.executable, jobs, ("PACK",), said=False)
    ours = trace(placement.ours_for("PACK")["overtaking, emptiest node"], jobs["tiny"])
    assert placement.differences(ours, found["traces"]["tiny"]["PACK"]) == []


def test_ray_groups_need_nothing_of_this_project():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import event_trace; print(sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "minilib" not in out and "torch" not in out
