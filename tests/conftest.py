"""What all tests share."""

import sys

import pytest
from hypothesis import HealthCheck, settings

from minilib import launch_local

# A busy machine makes an example slow and its data late; neither says anything about the code.
settings.register_profile("no clocks", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("no clocks")


@pytest.fixture(scope="session", autouse=True)
def ranks_share_what_tests_of_training_import():
    """The fork server of this process loads them once; otherwise every rank would, for a quarter of a second each."""
    ours = sorted(name for name in sys.modules if name.startswith("tests.training."))
    launch_local.server.set_forkserver_preload([*launch_local.PRELOAD, *ours])
