"""MIG profiles on one GPU, and on a cluster whose other GPUs are given whole."""

import random

import pytest

from minilib.operations.placement.cluster.topology import GpuCluster
from minilib.operations.placement.gangs.job import GangJob, InvalidJob
from minilib.operations.placement.gangs.scheduler import GangScheduler
from minilib.operations.placement.replicas.mig import (
    COMPUTE_SLICES,
    H100_PROFILES,
    MEMORY_SLICES,
    MigGpu,
    NoSuchProfile,
    SliceTaken,
    lost_by_cutting,
    mig_profile,
    smallest_profile,
)
from minilib.operations.placement.replicas.slices import GpuSlice, MigSlices, first_start, keep_large_starts

HOSTS = GpuCluster.regular(1, 2, 4)


def gpu_with(*instances: tuple[str, int]) -> MigGpu:
    gpu = MigGpu()
    for number, (name, start) in enumerate(instances):
        gpu.create(str(number), mig_profile(name), start)
    return gpu


def test_the_profiles_are_those_that_the_driver_lists():
    """`nvidia-smi mig -lgipp` and `-lgip` of an H100 80GB HBM3, profiles 19, 15, 14, 9, 5 and 0."""
    listed = """1g.10gb {0,1,2,3,4,5,6}:1 16 7/7
                1g.20gb {0,2,4,6}:2 26 4/4
                2g.20gb {0,2,4}:2 32 3/3
                3g.40gb {0,4}:4 60 2/2
                4g.40gb {0}:4 64 1/1
                7g.80gb {0}:8 132 1/1"""
    for name, placements, multiprocessors, instances in map(str.split, listed.splitlines()):
        profile = H100_PROFILES[name]
        starts = ",".join(map(str, profile.starts))
        assert placements == f"{{{starts}}}:{profile.memory}"
        assert profile.multiprocessors == int(multiprocessors)
        gpu = MigGpu()
        while (start := gpu.best_start(profile)) is not None:
            gpu.create(str(start), profile, start)
        assert instances == f"{len(gpu.instances)}/{len(gpu.instances)}"
        gpu.check_invariants()
    assert list(H100_PROFILES) == [line.split()[0] for line in reversed(listed.splitlines())]


def test_memory_slices_alone_decide_since_compute_slices_then_suffice():
    """Every state that can be reached. Without 1g.20gb 19 are full: 7g, or one of 6 left halves and 3 right ones."""
    seen, full = set(), set()

    def visit(instances: frozenset[tuple[str, int]], names: list[str]) -> None:
        if (key := (instances, len(names))) in seen:
            return
        seen.add(key)
        gpu = gpu_with(*sorted(instances))
        gpu.check_invariants()
        more = [(name, start) for name in names for start in gpu.starts(H100_PROFILES[name])]
        for each in more:
            visit(instances | {each}, names)
        if not more and len(names) == 5:
            full.add(instances)

    visit(frozenset(), list(H100_PROFILES))
    visit(frozenset(), [name for name in H100_PROFILES if name != "1g.20gb"])
    maximal = {each for each in full if max((H100_PROFILES[name].compute for name, _ in each)) < 7}
    assert len(full) == 19 and len(maximal) == 18 and len(seen) > 300


def test_a_start_at_zero_strands_the_large_profile():
    """3g.40gb at 0 leaves four slices and no start to 4g.40gb; at 4 it does, and then all 7 compute slices are used."""
    naive = gpu_with(("3g.40gb", 0))
    assert naive.stranded() == ["4g.40gb"] and naive.best_start(mig_profile("4g.40gb")) is None
    assert MigGpu().best_start(mig_profile("3g.40gb")) == 4
    better = gpu_with(("3g.40gb", 4), ("4g.40gb", 0))
    assert sum(profile.compute for profile, _ in better.instances.values()) == COMPUTE_SLICES
    assert gpu_with(("1g.10gb", 0)).stranded() == ["4g.40gb"] and gpu_with(("1g.10gb", 6)).stranded() == []


def test_starts_are_those_that_the_driver_takes():
    """Seven times `-cgi 19` on an H100 made instances 13, 11, 12, 7, 8, 9, 10, which `-lgi` shows at these starts."""
    gpu, profile, taken = MigGpu(), mig_profile("1g.10gb"), []
    for _ in range(7):
        taken.append(start := gpu.best_start(profile))
        gpu.create(str(start), profile, start)
    assert taken == [6, 4, 5, 0, 1, 2, 3] and gpu.best_start(profile) is None


def test_what_is_lost_by_cutting():
    """7 · 16 of 132 multiprocessors and 7 of 8 memory slices; nothing of the memory with 4g + 3g."""
    assert lost_by_cutting([mig_profile("1g.10gb")] * 7) == (20, 1)
    assert lost_by_cutting([mig_profile("1g.20gb")] * 4) == (28, 0)
    assert lost_by_cutting(map(mig_profile, ("4g.40gb", "3g.40gb"))) == (8, 0)
    assert lost_by_cutting([mig_profile("3g.40gb")] * 2) == (12, 0)
    assert lost_by_cutting([mig_profile("7g.80gb")]) == (0, 0) and lost_by_cutting([]) == (132, MEMORY_SLICES)


@pytest.mark.parametrize("wrong", [1.5, 0.5, "1.5", "", None, "8g.80gb", ("1g.10gb",)])
def test_a_fraction_of_a_gpu_is_no_profile(wrong):
    with pytest.raises(NoSuchProfile, match="one of 7g.80gb, 4g.40gb, 3g.40gb, 2g.20gb, 1g.20gb, 1g.10gb"):
        mig_profile(wrong)
    with pytest.raises(NoSuchProfile):
        MigSlices(GangScheduler(HOSTS)).create("x", wrong)


def test_the_smallest_profile_that_suffices():
    assert smallest_profile(0.1).name == "1g.10gb" and smallest_profile(1 / 8).name == "1g.10gb"
    assert smallest_profile(0.2).name == "1g.20gb" and smallest_profile(0.2, 30).name == "2g.20gb"
    assert smallest_profile(0.5, 61).name == "4g.40gb" and smallest_profile(1).name == "7g.80gb"
    for memory, multiprocessors in ((1.5, 1), (0, 1), (-1, 1), (float("nan"), 1), (0.5, 133), (0.5, 0)):
        with pytest.raises(NoSuchProfile, match="what needs more takes whole GPUs"):
            smallest_profile(memory, multiprocessors)
    with pytest.raises(InvalidJob, match="MIG profiles, such as 3g.40gb"):
        GangJob("x", 1.5)


def test_instances_that_cannot_be():
    gpu = gpu_with(("2g.20gb", 2))
    for profile, start in (("2g.20gb", 2), ("2g.20gb", 1), ("4g.40gb", 0), ("1g.10gb", 7), ("1g.10gb", 3)):
        with pytest.raises(SliceTaken, match=f"{profile} cannot start at {start}"):
            gpu.create("more", mig_profile(profile), start)
    with pytest.raises(SliceTaken, match="already"):
        gpu.create("0", mig_profile("1g.10gb"), 0)
    with pytest.raises(SliceTaken, match="there is no instance 'x'; there are 0"):
        gpu.destroy("x")
    assert list(gpu.instances) == ["0"]


def test_a_cut_gpu_is_no_gangs_and_whole_again_when_empty():
    scheduler = GangScheduler(HOSTS)
    slices = MigSlices(scheduler)
    assert slices.create("a", "3g.40gb") == GpuSlice(0, 4) and slices.create("b", "1g.10gb") == GpuSlice(0, 0)
    scheduler.submit(GangJob("all", 8))
    scheduler.submit(GangJob("most", 7))
    assert [placement.gpus for placement in scheduler.start(0.0)] == [tuple(range(1, 8))]
    assert slices.create("c", "4g.40gb") is None, "no GPU is left to be cut"
    slices.destroy("a")
    slices.destroy("b")
    assert scheduler.free.is_free(0) and slices.cut == {}
    scheduler.finish("most", 1.0)
    assert [placement.job.name for placement in scheduler.start(1.0)] == ["all"]
    scheduler.finish("all", 2.0)
    scheduler.submit(GangJob("half", 4))
    scheduler.start(2.0)
    scheduler.submit(GangJob("next", 8))
    scheduler.start(2.0)
    assert slices.create("d", "1g.10gb") is None, "what is kept for the next gang is not cut"


def test_a_cut_gpu_that_fails():
    scheduler = GangScheduler(HOSTS)
    slices = MigSlices(scheduler)
    slices.create("a", "4g.40gb")
    assert slices.fail(0, 1.0) == ["a"] and slices.create("a", "4g.40gb") == GpuSlice(1, 0)
    scheduler.drain([1])
    assert slices.create("b", "3g.40gb") == GpuSlice(2, 4), "a drained GPU takes no more instances"
    slices.destroy("a")
    assert scheduler.free.out(1) == "drained"
    for name in ("a", "c"):
        with pytest.raises(SliceTaken, match=f"no instance '{name}'"):
            slices.destroy(name)
    with pytest.raises(SliceTaken, match="already"):
        slices.create("b", "1g.10gb")


def test_keeping_large_starts_refuses_fewer_instances():
    """10,000 requests for the same 8 GPUs, of which 14 live at a time: 286 find no start by first fit, and 87 so."""
    refused = {first_start: [], keep_large_starts: []}
    for choose, names in refused.items():
        for seed in range(5):
            choices, slices, living = random.Random(seed), MigSlices(GangScheduler(HOSTS), choose), []
            for number in range(2_000):
                if len(living) == 14 or (living and choices.random() < 0.4):
                    slices.destroy(living.pop(choices.randrange(len(living))))
                profile = choices.choice(("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb"))
                if slices.create(f"i{number}", profile) is None:
                    names.append(profile)
                else:
                    living.append(f"i{number}")
    assert refused == {first_start: ["4g.40gb"] * 286, keep_large_starts: ["4g.40gb"] * 87}


@pytest.mark.parametrize("choose", [first_start, keep_large_starts])
def test_slices_and_gangs_over_many_operations(choose):
    choices, scheduler = random.Random(1), GangScheduler(GpuCluster.regular(2, 2, 4))
    slices, names, counted = MigSlices(scheduler, choose), [], {"create": 0, "full": 0}
    for step in range(6_000):
        operation = choices.choices(("create", "destroy", "submit", "finish", "fail", "restore"), (50, 44, 9, 9, 1, 2))[
            0
        ]
        if operation == "create":
            name, profile = f"i{step}", choices.choice(list(H100_PROFILES))
            made = slices.create(name, profile)
            counted["full" if made is None else "create"] += 1
            names += [name] if made is not None else []
            if made is None:
                usable = [gpu for number, gpu in slices.cut.items() if scheduler.free.out(number) == "reserved"]
                assert not any(gpu.starts(mig_profile(profile)) for gpu in usable)
        elif operation == "destroy" and names:
            slices.destroy(names.pop(choices.randrange(len(names))))
        elif operation == "submit" and len(scheduler.waiting) < 3:
            scheduler.submit(GangJob(f"g{step}", choices.choice((1, 2, 4)), seconds=50), step)
        elif operation == "finish" and scheduler.running:
            scheduler.finish(choices.choice(list(scheduler.running)), step)
        elif operation == "fail":
            lost = slices.fail(choices.randrange(16), step)
            names = [name for name in names if name not in lost]
        elif operation == "restore":
            scheduler.restore([gpu for gpu in range(16) if scheduler.free.out(gpu) == "failed"])
        scheduler.start(step)
        slices.check_invariants()
        scheduler.check_invariants()
    assert min(counted.values()) > 300
    for name in names:
        slices.destroy(name)
    assert slices.cut == {} and all(scheduler.free.out(gpu) in (None, "failed") for gpu in range(16))


def test_a_start_that_is_no_whole_number_and_a_choice_of_none_leave_nothing():
    gpu, profile = MigGpu(), mig_profile("1g.10gb")
    for start in (1.0, True, None):
        with pytest.raises(SliceTaken):
            gpu.create("a", profile, start)
    assert gpu.instances == {}
    slices = MigSlices(GangScheduler(GpuCluster.regular(1, 1, 8)), lambda cut, profile: None)
    assert slices.create("a", "1g.10gb") is None and slices.cut == {} and slices.scheduler.free.free == 8
    slices.check_invariants()
