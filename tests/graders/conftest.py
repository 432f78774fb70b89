import pytest

from tests.graders.sheet_runner import sheet_runner
from tools.grading.course import settings


@pytest.fixture(autouse=True, scope="session")
def every_kernel(preloaded):
    """All kernels here are forks."""


@pytest.fixture(scope="session")
def run_sheets(preloaded, tmp_path_factory):
    """A function that runs sheets' cells."""
    with sheet_runner(preloaded, settings(tmp_path_factory.mktemp("course")).Execute.timeout) as run:
        yield run
