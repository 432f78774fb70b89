"""What the tests of the replicated log share."""

import shutil
from contextlib import contextmanager

import psutil
import pytest

from minilib.classic.log.file import LogFile
from minilib.mechanisms.replication import plans

over_plans = pytest.mark.parametrize("plan", [plans.star, plans.chain, plans.tree], ids=lambda plan: plan.__name__)


@contextmanager
def nothing_left_over(folder):
    """No process, no open file or socket, and no file but the replicas' own."""
    process = psutil.Process()
    children, held = process.children(), process.num_fds()
    yield
    assert process.children() == children and process.num_fds() == held
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".log"}
    shutil.rmtree(folder)  # what is deleted soon need not be written to the disk


def contents(log):
    """The bytes of each replica's file."""
    return [log.path(rank).read_bytes() for rank in range(log.world_size)]


def records_in(path):
    log = LogFile(path)
    log.check_invariants()
    records = [log.read(index) for index in range(len(log))]
    log.close()
    return records
