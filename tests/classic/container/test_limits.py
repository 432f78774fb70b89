"""What a limit does to a process that exceeds it, in counts of the kernel."""

import errno
import math
from pathlib import Path

import pytest

from minilib.classic.container import (
    CannotContain,
    Cgroup,
    Container,
    ContainerLimits,
    Counted,
    InvalidLimit,
    NotStarted,
    run_in_container,
)
from minilib.classic.container.hierarchies import Hierarchy, find_hierarchy
from minilib.classic.container.namespaces import kinds_for_us
from minilib.classic.container.syscalls import mount
from tests.classic.container import work
from tests.classic.container.work import MIB

READ_ONLY = 32 | 4096 | 1  # MS_REMOUNT, MS_BIND, MS_RDONLY
MEMORY, PIDS, CPU = (pytest.mark.usefixtures("namespaces", part) for part in ("memory", "pids", "cpu"))


@MEMORY
def test_who_exceeds_the_memory_is_killed_and_a_sibling_lives():
    with Container(["cat", "/proc/self/stat"], memory=32 * MIB) as sibling, Container(work.hang) as other:
        result = run_in_container(lambda: work.touch(64 * MIB), memory=32 * MIB)
        assert (result.status, result.value, result.counted.oom_kills) == (-9, None, 1)
        assert 31 * MIB < result.counted.peak_memory <= 32 * MIB
        assert not result.timed_out
        done = sibling.wait()
        assert (done.status, done.counted.oom_kills) == (0, 0)
        assert Path(f"/proc/{other.pid}").exists()


@MEMORY
def test_who_stays_below_the_limit_is_not_touched():
    result = run_in_container(lambda: work.touch(16 * MIB), memory=32 * MIB)
    assert (result.status, result.value, result.counted.oom_kills) == (0, 16 * MIB, 0)
    assert 16 * MIB < result.counted.peak_memory < 32 * MIB


@MEMORY
def test_memory_that_is_reserved_and_not_touched_counts_nothing():
    import mmap

    result = run_in_container(lambda: len(mmap.mmap(-1, 1024 * MIB)), memory=32 * MIB)
    assert (result.value, result.counted.oom_kills) == (1024 * MIB, 0)


@MEMORY
def test_a_child_is_killed_and_the_first_process_goes_on():
    """The trap of Kubernetes: the container runs on, less one of its workers."""
    result = run_in_container(lambda: work.status_of_child(lambda: work.touch(64 * MIB)), memory=32 * MIB)
    assert (result.status, result.value, result.counted.oom_kills) == (0, -9, 1)


@MEMORY
def test_the_limit_of_an_outer_container_binds_an_inner_one():
    def outer():
        inner = run_in_container(lambda: work.touch(64 * MIB), memory=512 * MIB)
        return inner.status, inner.counted

    result = run_in_container(outer, memory=48 * MIB)
    status, counted = result.value
    assert (result.status, status) == (0, -9)
    assert counted.peak_memory <= result.counted.peak_memory <= 48 * MIB


@MEMORY
def test_less_memory_than_a_start_takes_is_named():
    with pytest.raises(NotStarted, match="less than it needs to start"):
        run_in_container(int, memory=4096)


@PIDS
@pytest.mark.parametrize("limit", [1, 2, 9])
def test_one_process_fewer_than_the_limit_can_be_forked(limit):
    result = run_in_container(work.fork_until_refused, pids=limit)
    assert result.value == (limit - 1, errno.EAGAIN)
    assert result.counted.forks_refused == 1


@PIDS
def test_below_the_limit_of_pids_nothing_is_refused():
    result = run_in_container(lambda: work.fork_until_refused(most=4), pids=5)
    assert (result.value, result.counted.forks_refused) == ((4, None), 0)


@CPU
def test_who_uses_up_the_quota_waits_for_the_next_period():
    """0.2 s at 10 ms in each period: at least 15 periods end with nothing left, were they as coarse as 3 ms."""
    result = run_in_container(lambda: work.spend(0.2), cpus=0.1)
    counted = result.counted
    assert result.status == 0 and counted.cpu_seconds >= 0.19
    assert 15 <= counted.periods_throttled <= counted.periods


@CPU
def test_who_stays_below_the_quota_never_waits():
    result = run_in_container(["sleep", "0.3"], cpus=1)
    assert result.status == 0 and result.counted.periods_throttled == 0


@MEMORY
@pytest.mark.usefixtures("pids", "cpu")
def test_all_limits_at_once_are_in_the_kernels_files():
    with Container(work.hang, memory=64 * MIB, pids=7, cpus=1.5) as container:
        folders = container.cgroup.folders
        written = {path.name: path.read_text().strip() for folder in folders.values() for path in limit_files(folder)}
        for wanted in (str(64 * MIB), "7"):
            assert wanted in written.values()
        assert written.get("cpu.max", "150000 100000") == "150000 100000"
        assert written.get("cpu.cfs_quota_us", "150000") == "150000"
        groups = Path(f"/proc/{container.pid}/cgroup").read_text()
        assert all(folder.name in groups for folder in folders.values())
        counted = container.cgroup.counted()
        assert (counted.oom_kills, counted.forks_refused) == (0, 0) and counted.cpu_seconds >= 0


def limit_files(folder):
    names = ("memory.max", "memory.limit_in_bytes", "pids.max", "cpu.max", "cpu.cfs_quota_us")
    return [folder / name for name in names if (folder / name).exists()]


@MEMORY
def test_a_group_is_removed_when_its_body_raises():
    with pytest.raises(KeyError), Cgroup(ContainerLimits(memory=MIB)) as group:
        folder = group.folders["memory"]
        assert folder.is_dir()
        raise KeyError
    assert not folder.exists()
    group.remove()  # a second time is no error


@PIDS
def test_a_limit_that_the_kernel_does_not_take_leaves_no_group():
    with pytest.raises(CannotContain, match="pids.max") as caught:
        Cgroup(ContainerLimits(pids=1 << 40))
    assert caught.value.part == "pids"


@PIDS
def test_cgroups_that_are_mounted_read_only_are_named():
    """As in Docker; the flags of a mount are those of a mount namespace, so the host's stay as they are."""
    if "user" in kinds_for_us():
        pytest.skip("only root may change a mount's flags here")

    def inside():
        mounts = (line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
        for folder in [before.split()[4] for before, after in mounts if after.startswith("cgroup")]:
            mount("none", folder, "", READ_ONLY)
        try:
            Cgroup(ContainerLimits(pids=9)).remove()
        except CannotContain as error:
            return error.part, error.remedy

    part, remedy = run_in_container(inside).value
    assert part == "pids" and "read-only" in remedy and "--privileged" in remedy
    Cgroup(ContainerLimits(pids=9)).remove()


@pytest.mark.parametrize(
    "limits",
    [
        {"memory": 0},
        {"memory": -1},
        {"memory": 4095},
        {"memory": 1e9},
        {"memory": True},
        {"memory": "1G"},
        {"pids": 0},
        {"memory": 2**63},
        {"pids": -1},
        {"pids": 1.5},
        {"pids": True},
        {"cpus": 0},
        {"cpus": -1},
        {"cpus": 0.001},
        {"cpus": math.nan},
        {"cpus": math.inf},
        {"cpus": "1"},
    ],
)
def test_limits_that_no_process_can_be_held_to_are_named(limits):
    with pytest.raises(InvalidLimit, match=f"{next(iter(limits))} must be a (whole )?number"):
        run_in_container(int, **limits)


def test_a_group_without_limits_needs_no_cgroup():
    with Cgroup(ContainerLimits()) as group:
        assert not group.folders and group.counted() == Counted()
    assert ContainerLimits(4096, 1, 0.01) == ContainerLimits(memory=4096, pids=1, cpus=0.01)


def machine(folder, groups, mounts):
    """A folder like /proc/self that tells of these groups and mounts."""
    folder.mkdir()
    (folder / "cgroup").write_text("\n".join(groups))
    (folder / "mountinfo").write_text("\n".join(f"1 0 0:1 {mount}" for mount in mounts))
    return folder


def handing_down(folder, controllers):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.subtree_control").write_text(controllers)


def test_version_1_is_found_below_our_own_group(tmp_path):
    mounts = [f"/ {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct", f"/docker/7 {tmp_path}/m rw - cgroup x rw,memory"]
    proc = machine(tmp_path / "proc", ["4:memory:/docker/7/a", "3:cpu,cpuacct:/user", "0::/x"], mounts)
    assert find_hierarchy("memory", proc) == Hierarchy(1, tmp_path / "m" / "a")
    assert find_hierarchy("cpuacct", proc) == find_hierarchy("cpu", proc) == Hierarchy(1, tmp_path / "cpu" / "user")


def test_version_2_is_found_at_the_nearest_ancestor_that_hands_down(tmp_path):
    proc = machine(tmp_path / "proc", ["0::/user/app/shell"], [f"/ {tmp_path}/cg rw shared:1 - cgroup2 cgroup2 rw"])
    handing_down(tmp_path / "cg" / "user" / "app" / "shell", "")
    handing_down(tmp_path / "cg" / "user" / "app", "memory pids")
    handing_down(tmp_path / "cg" / "user", "cpu memory pids")
    handing_down(tmp_path / "cg", "cpu memory pids")
    assert find_hierarchy("memory", proc) == Hierarchy(2, tmp_path / "cg" / "user" / "app")
    assert find_hierarchy("cpu", proc) == Hierarchy(2, tmp_path / "cg" / "user")


@pytest.mark.parametrize(
    ("root", "groups", "said"),
    [
        ("/", ["0::/"], "no cgroup from ours up"),
        ("/docker", ["0::/../elsewhere"], "no cgroup filesystem"),
        ("/docker", ["0::/"], "no cgroup filesystem"),
        ("/", [], "no cgroup filesystem"),
    ],
)
def test_where_no_group_hands_down_it_is_said(tmp_path, root, groups, said):
    handing_down(tmp_path / "cg", "")
    proc = machine(tmp_path / "proc", groups, [f"{root} {tmp_path}/cg rw - cgroup2 cgroup2 rw"])
    with pytest.raises(CannotContain, match=said) as caught:
        find_hierarchy("memory", proc)
    assert caught.value.part == "memory" and caught.value.remedy in str(caught.value)


def test_where_there_is_no_proc_it_is_said(tmp_path):
    with pytest.raises(CannotContain, match="there is no /proc/self/cgroup"):
        find_hierarchy("memory", tmp_path)
