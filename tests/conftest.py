"""What all tests share."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from minilib.ranks.launch import local
from tests.graders.preloaded import preloaded_kernels

# Threads cost small tensors far more than they save when the cores are shared with other tests: one of these tests took
# 14 s with two threads and 1.1 s with one. Only these folders measure what all cores can do.
ALL_THREADS = ("numbers/probes", "gpu")
ON_RANKS = ("tests.ranks.", "tests.parallel.", "tests.training.")

# A busy machine makes an example slow and its data late; neither says anything about the code.
settings.register_profile("no clocks", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("no clocks")


@pytest.fixture(scope="session", autouse=True)
def ranks_share_what_tests_on_ranks_import():
    """The fork server of this process loads them once; otherwise every rank would, for a quarter of a second each."""
    ours = sorted(name for name in sys.modules if name.startswith(ON_RANKS))
    local.server.preload([*local.PRELOAD, *ours])


@pytest.fixture(scope="session")
def preloaded():
    """Kernels that Jupyter starts from here are forks of one process, which has loaded torch; its socket."""
    with preloaded_kernels() as door:
        yield door


@pytest.fixture(scope="module", autouse=True)
def one_thread(request):
    """One thread for torch, but in the folders above."""
    before = torch.get_num_threads()
    if not any(request.path.is_relative_to(Path(__file__).parent / folder) for folder in ALL_THREADS):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
