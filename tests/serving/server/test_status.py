"""What a server shows of its requests while they run, and by tenant when they have waited."""

import asyncio
import json
import time

import pytest

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.engine_process.remote_engine import RemoteEngine
from minilib.serving.server.metrics import TENANTS
from tests.serving import served
from tests.serving.server.api import MODEL, head_of, new_engine, running, slowed

ASKED = {"model": MODEL, "prompt": "import os\n", "max_tokens": 2, "ignore_eos": True, "temperature": 0}


def status_of(server, **options):
    code, _, body = server.ask("/status", **options)
    return json.loads(body) if code == 200 else code


def test_open_requests_are_shown():
    with running(slowed(new_engine(max_sequences=1), 0.005), name="r", api_key="key") as server:
        key = {"Authorization": "Bearer key"}
        assert status_of(server) == 401
        assert status_of(server, headers=key)["open"] == []
        with server.connect() as first, server.connect() as second:
            for connection, user in ((first, "ann"), (second, "bob")):
                body = json.dumps(ASKED | {"max_tokens": 800, "stream": True, "user": user}).encode()
                head = head_of("/v1/completions", len(body)).removesuffix(b"\r\n")
                connection.sendall(head + b"Authorization: Bearer key\r\n\r\n" + body)
                server.until(lambda status: status.num_running and status.generated_tokens > 5)
            server.until(lambda status: status.num_waiting)
            shown = status_of(server, headers=key)
            tenants = {request["tenant"]: request for request in shown["open"]}
            assert {name: request["state"] for name, request in tenants.items()} == {"ann": "running", "bob": "waiting"}
            assert tenants["ann"]["generated_tokens"] > 0 == tenants["bob"]["generated_tokens"]
            assert shown["replica"] == "r" and shown["tokens_sent"] >= tenants["ann"]["generated_tokens"]
        server.until_idle()


def test_tenants_beyond_the_first_share_a_name():
    with running() as server:
        for number in range(TENANTS + 3):
            server.ask("/v1/completions", ASKED | {"max_tokens": 1, "user": f"tenant {number}"})
        lines = server.ask("/metrics")[2].decode().splitlines()
        prompts = {line for line in lines if line.startswith("minilib_tenant_prompts_total{")}
        assert len(prompts) == TENANTS
        assert 'minilib_tenant_prompts_total{tenant="other"} 4.0' in prompts
        assert server.metric("minilib_request_queue_time_seconds_count") == TENANTS + 3


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_request_knows_when_its_first_step_began(kind):
    async def drill():
        async with AsyncEngine(served.engine()) if kind == "thread" else RemoteEngine(served.engine) as engine:
            submitted = time.monotonic_ns()
            stream = await engine.submit(served.prompt(9), served.likeliest(3))
            outputs = [output async for output in stream]
            assert len(outputs) == 3
            assert submitted <= stream.started_ns <= time.monotonic_ns()

    asyncio.run(drill())
