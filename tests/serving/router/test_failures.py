"""A replica that fails: before the first token another one answers, after it the client is told; and nobody hangs."""

import asyncio

import httpx
import pytest

from minilib.classic.gateway.hooks import Ending
from minilib.classic.gateway.rules import GatewayLimits
from minilib.mechanisms.balancing import RetryBudget, RoundRobin
from minilib.serving.router.discovery import ReplicaAddress
from minilib.serving.router.prefix_aware import RoutingKey
from tests.serving.router.fake_replica import FakeReplica, tokens_of
from tests.serving.router.test_router import before, complete, run, stream

pytestmark = pytest.mark.filterwarnings("error")


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def test_a_stream_that_had_begun_ends_with_an_error_event():
    async def drill():
        dying, other = FakeReplica("dying", pace=0.02), FakeReplica("other")
        async with before(dying, other, policy=RoundRobin()) as (router, client):
            begun = asyncio.create_task(stream(client, "x", 50, x_request_id="one"))
            await until(lambda: dying.running)
            await asyncio.sleep(0.1)
            await dying.kill()
            tokens, error, done = await begun
            assert 0 < len(tokens) < 50 and tokens == tokens_of("x", 50)[: len(tokens)], "its tokens, and no others"
            assert error["code"] == "replica_failed" and dying.url in error["message"] and not done
            assert other.begun == [] and router.metrics.count(Ending.CUT) == 1, "nothing was generated again"

    run(drill())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_without_a_token_is_answered_by_another_replica(streamed):
    """Also where the head of the stream has come already: it says nothing."""

    async def drill():
        dying, other = FakeReplica("dying"), FakeReplica("other")
        dying.before_tokens = 10.0
        async with before(dying, other, policy=RoundRobin()) as (router, client):
            if streamed:
                begun = asyncio.create_task(stream(client, "x", 4))
            else:
                begun = asyncio.create_task(complete(client, "x", 4))
            await until(lambda: dying.running)
            await asyncio.sleep(0.02)
            await dying.kill()
            if streamed:
                assert await begun == (tokens_of("x", 4), None, True)
            else:
                assert (await begun).json()["choices"][0]["text"].split() == tokens_of("x", 4)
            assert len(dying.begun) == 1 and dying.begun == other.begun, "one id, once at each"
            assert (router.metrics.count(Ending.FAILED), router.metrics.count(Ending.COMPLETE)) == (1, 1)

    run(drill())


def test_nobody_is_left_to_answer():
    async def drill():
        dying = FakeReplica("dying")
        dying.before_tokens = 10.0
        async with before(dying) as (router, client):
            begun = asyncio.create_task(complete(client, "x"))
            await until(lambda: dying.running)
            await dying.kill()
            answer = await begun
            assert answer.status_code == 502 and answer.json()["error"]["type"] == "server_error"

    run(drill())


def test_a_slow_replica_does_not_double_its_load():
    """A request that is too slow is not sent to another one, which has the same to compute: it ends with 504."""

    async def drill():
        replicas = [FakeReplica(f"r{n}") for n in range(3)]
        for replica in replicas:
            replica.before_tokens = 10.0
        async with before(*replicas, limits=GatewayLimits(answer_within=0.1)) as (router, client):
            answer = await complete(client, "x")
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "replica_too_slow"
            assert sum(len(replica.begun) for replica in replicas) == 1

    run(drill())


def test_retries_have_a_budget():
    async def drill():
        replicas = [FakeReplica(f"r{n}") for n in range(4)]
        async with before(*replicas, budget=RetryBudget(ratio=0, per_second=0, most=2)) as (router, client):
            for replica in replicas:
                replica.full = True
            for _ in range(10):
                assert (await complete(client, "x")).status_code == 429
            assert router.gateway.budget.retries == 2
            assert router.metrics.count(Ending.REFUSED) == 2 and router.metrics.count(Ending.COMPLETE) == 10

    run(drill())


def test_a_client_that_leaves_ends_the_request_at_its_replica():
    async def drill():
        replica = FakeReplica("r", pace=0.01)
        async with before(replica) as (router, client):
            body = {"prompt": "x", "max_tokens": 1000, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                await anext(response.aiter_bytes())
            await until(lambda: replica.running == 0)
            await until(lambda: router.gateway.backends.dispatcher.in_flight == [0])
            assert router.metrics.count(Ending.LEFT) == 1

    run(drill())


def test_checks_that_fail_once_change_nothing_and_twice_they_do():
    async def drill():
        replica, other = FakeReplica("r"), FakeReplica("o")
        async with before(replica, other) as (router, client):
            prompt = "the same beginning " * 20
            home = (await complete(client, prompt)).headers["x-replica"]
            dying = {"r": replica, "o": other}[home]
            port, watched = dying.port, next(r for r in router.watch.replicas.values() if r.address.port == dying.port)
            await dying.kill()
            await router.watch.round()
            assert watched.state == "ready"
            await router.watch.round()
            assert watched.state == "unreachable" and watched.identity is None
            assert router.policy.held.depths(RoutingKey.of_text(prompt), 2) == [0, 0], "a new process holds nothing"
            assert (await complete(client, prompt)).headers["x-replica"] != home
            await dying.start(port)
            await router.watch.round()
            assert watched.state == "ready" and str(watched.identity) == "tiny good of 512 tokens"

    run(drill())


def test_a_replica_that_hangs_is_found_out():
    async def drill():
        hanging, other = FakeReplica("hanging"), FakeReplica("other")
        async with before(hanging, other, within=0.3) as (router, client):
            hanging.hangs = True
            for _ in range(2):
                await router.watch.round()
            assert [one.state for one in router.watch.replicas.values()] == ["unreachable", "ready"]
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(4)} == {"other"}

    run(drill())


def test_a_round_that_fails_is_not_the_last_one(caplog):
    async def drill():
        replica, rounds = FakeReplica("r"), []

        async def discover():
            rounds.append(len(rounds))
            if len(rounds) == 2:
                raise RuntimeError("nobody thought of this")
            return [ReplicaAddress("127.0.0.1", replica.port)]

        async with before(replica, discover=discover, every=0.01) as (router, client):
            await until(lambda: len(rounds) >= 4)
            assert (await complete(client, "x")).status_code == 200

    run(drill())
    assert "nobody thought of this" in caplog.text


def test_stop_lets_streams_finish():
    async def drill():
        async with before(FakeReplica("r", pace=0.01)) as (router, client):
            begun = asyncio.create_task(stream(client, "x", 20))
            await until(lambda: router.gateway.backends.dispatcher.in_flight == [1])
            assert await router.stop(within=5.0) == 0
            assert await begun == (tokens_of("x", 20), None, True)
            with pytest.raises(httpx.TransportError):
                await complete(client, "y")

    run(drill())
