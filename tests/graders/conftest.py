import pytest

from tests.graders.preloaded import preloaded_kernels
from tests.graders.sheet_runner import sheet_runner
from tools.grading.course import settings


@pytest.fixture(autouse=True, scope="session")
def kernels():
    with preloaded_kernels():
        yield


@pytest.fixture(scope="session")
def run_sheet(tmp_path_factory):
    """A function that runs a sheet's cells."""
    with sheet_runner(settings(tmp_path_factory.mktemp("course")).Execute.timeout) as run:
        yield run
