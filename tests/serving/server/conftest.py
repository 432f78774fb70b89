"""One server for the tests that leave it as it was."""

import pytest

from tests.serving.server.api import running


@pytest.fixture(scope="package")
def server():
    with running(name="replica-0") as found:
        yield found
        found.until_idle()
