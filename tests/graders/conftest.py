import pytest

from tests.graders.preloaded import preloaded_kernels


@pytest.fixture(autouse=True, scope="session")
def kernels():
    with preloaded_kernels():
        yield
