"""What this kernel allows, asked once; and after each test: nothing of a container is left."""

import os
from pathlib import Path

import psutil
import pytest

from minilib.classic.container import PARTS, survey_kernel


@pytest.fixture(scope="session")
def survey():
    return survey_kernel()


def _needed(part):
    @pytest.fixture(name=part)
    def skip_without(survey):
        """Skip a test that needs this part where the kernel does not allow it."""
        if survey[part]:
            pytest.skip(survey[part])

    return skip_without


namespaces, overlay, memory, pids, cpu = map(_needed, PARTS)


def left_over():
    """What a container could leave behind: mounts, cgroups that this process made, children."""
    mounts = Path("/proc/self/mountinfo").read_text()
    groups = {path for path in Path("/sys/fs/cgroup").rglob(f"container-{os.getpid()}-*")}
    return mounts, groups, {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    before = left_over()
    yield
    assert left_over() == before
    assert not list(tmp_path.glob("container-*"))
