"""What the server really serves, asked once for all tests here."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minilib.serving.router.discovery import ReplicaAddress, in_list
from minilib.serving.router.router import ReplicaRouter
from minilib.serving.router.watch import get
from tests.serving.server.api import running


@pytest.fixture(scope="package")
def server():
    with running(name="replica-0") as found:
        yield found
        found.until_idle()


@pytest.fixture(scope="package")
def routes(server):
    """Paths of the server that answer GET with 200 while it is ready."""
    paths = ("/health", "/ready", "/metrics", "/v1/models")
    return {path for path in paths if server.ask(path)[0] == 200}


@pytest.fixture(scope="package")
def served_metrics(server):
    """Kinds of metrics by the names that a query finds them under."""
    assert server.ask("/v1/completions", {"model": "tiny", "prompt": "def", "max_tokens": 1})[0] == 200
    found = {}
    for family in text_string_to_metric_families(server.ask("/metrics")[2].decode()):
        found |= {sample.name: family.type for sample in family.samples}
    return found


@pytest.fixture(scope="package")
def router_metrics(server):
    """Names that a router before the server serves."""

    async def asked():
        async with ReplicaRouter(in_list([server.url])) as router:
            address = ReplicaAddress("127.0.0.1", router.gateway.port)
            assert (await get(address, "/v1/models"))[0] == 200  # some series begin with the first request
            return await get(address, "/metrics")

    status, body = asyncio.run(asked())
    assert status == 200
    families = text_string_to_metric_families(body.decode())
    return {sample.name for family in families for sample in family.samples}
