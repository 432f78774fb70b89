"""The router before replicas without a model: what it passes on, whom it asks, and what it says when it cannot."""

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from minilib.classic.gateway.hooks import Ending
from minilib.mechanisms.balancing import LeastLoaded, RoundRobin
from minilib.serving.router.discovery import in_file, in_list
from minilib.serving.router.prefix_aware import PrefixAware
from minilib.serving.router.router import ReplicaRouter
from tests.serving.router.fake_replica import FakeReplica, tokens_of

pytestmark = pytest.mark.filterwarnings("error")


@asynccontextmanager
async def before(*replicas, policy=None, discover=None, every=30.0, **options):
    """A router before fake replicas, and a client of it."""
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.kill)
        discover = discover or in_list([replica.url for replica in replicas])
        router = ReplicaRouter(discover, policy, every=every, **options)
        await router.start()
        stack.push_async_callback(router.stop)
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{router.gateway.port}", timeout=10.0, trust_env=False)
        await stack.enter_async_context(client)
        yield router, client
        router.check_invariants()


def run(drill, within=30):
    return asyncio.run(asyncio.wait_for(drill, within))


async def complete(client, prompt, count=4, **fields):
    return await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": count} | fields)


async def stream(client, prompt, count=4, **headers):
    """Tokens, the error that ended them if any, and whether the end was told."""
    tokens, error, done = [], None, False
    body = {"prompt": prompt, "max_tokens": count, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        try:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        error = event["error"]
                    else:
                        tokens.append(event["choices"][0]["text"])
        except httpx.RemoteProtocolError as cut:
            error = error or {"code": "cut", "message": str(cut)}
    return tokens, error, done


def test_answers_and_streams_are_those_of_the_replicas():
    async def drill():
        async with before(*(FakeReplica(f"r{n}") for n in range(3))) as (router, client):
            for prompt in ("a", "b" * 500, "é"):
                answer = await complete(client, prompt)
                assert answer.json()["choices"][0]["text"].split() == tokens_of(prompt, 4)
                assert await stream(client, prompt) == (tokens_of(prompt, 4), None, True)
            models = (await client.get("/v1/models")).json()
            assert models["data"][0]["fingerprint"] == "good"
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).json()["ready"]

    run(drill())


def test_a_conversation_stays_where_its_prefix_is():
    async def drill():
        replicas = [FakeReplica(f"r{n}") for n in range(4)]
        async with before(*replicas) as (router, client):
            for number in range(8):
                history, homes = f"conversation {number}: " + "x" * 128, set()
                for turn in range(4):
                    history += f"turn {turn} of {number} " * 10
                    homes.add((await complete(client, history)).headers["x-replica"])
                assert len(homes) == 1
            assert [len(replica.begun) for replica in replicas] == [8] * 4, "and conversations spread"
            text = (await client.get("/metrics")).text
            assert 'router_requests_total{outcome="complete",replica="' + replicas[0].url + '"} 8.0' in text
            matched = next(line for line in text.splitlines() if line.startswith("router_prompt_blocks_matched "))
            assert float(matched.split()[1]) == router.policy.matched_blocks > 0

    run(drill())


def test_load_counts_at_dispatch():
    """A burst that comes at once: nobody has answered, and still each replica gets its share."""

    async def drill():
        replicas = [FakeReplica(f"r{n}", pace=0.02) for n in range(4)]
        async with before(*replicas, policy=PrefixAware(gap=0, ratio=1)) as (router, client):
            prompt = "all the same " * 20
            await asyncio.gather(*(complete(client, prompt) for _ in range(16)))
            assert [len(replica.begun) for replica in replicas] == [4] * 4
            assert router.gateway.backends.dispatcher.in_flight == [0] * 4

    run(drill())


def test_a_replica_of_other_weights_is_refused_by_name():
    async def drill():
        good, odd, late = FakeReplica("a"), FakeReplica("b", fingerprint="bad"), FakeReplica("c")
        async with before(odd, good, late, policy=RoundRobin()) as (router, client):
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(9)} == {"a", "c"}
            said = {one["replica"]: one for one in (await client.get("/ready")).json()["replicas"]}
            assert said[odd.url]["state"] == "refused" and said[good.url]["state"] == "ready"
            assert "serves tiny bad" in said[odd.url]["reason"] and "tiny good" in said[odd.url]["reason"]
            odd.fingerprint, late.fingerprint = "good", "bad"  # a process in the place of another
            await router.watch.round()
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(9)} == {"a", "b"}
        async with before(FakeReplica("a"), FakeReplica("b", "wanted"), fingerprint="wanted") as (router, client):
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(4)} == {"b"}
        async with before(FakeReplica("a"), fingerprint="wanted") as (router, client):
            answer = await client.get("/ready")
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert "wanted is wanted" in answer.json()["replicas"][0]["reason"]
            refused = await complete(client, "x")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_replica"

    run(drill())


def test_checks_send_the_key_that_replicas_ask_for():
    async def drill():
        for key, state in (("secret", "ready"), (None, "unreachable")):
            replica = FakeReplica("a")
            replica.api_key = "secret"
            async with before(replica, api_key=key) as (router, client):
                (one,) = (await client.get("/ready")).json()["replicas"]
                assert one["state"] == state and ("401" in one["reason"]) == (key is None)

    run(drill())


def test_a_replica_that_is_not_ready_drains_and_comes_back():
    async def drill():
        leaving, staying = FakeReplica("leaving", pace=0.02), FakeReplica("staying")
        async with before(leaving, staying, policy=LeastLoaded()) as (router, client):
            begun = asyncio.create_task(stream(client, "long", 20))
            while not leaving.running:
                await asyncio.sleep(0.005)
            leaving.ready = False
            await router.watch.round()
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(6)} == {"staying"}
            assert await begun == (tokens_of("long", 20), None, True), "what had begun ends as it should"
            leaving.ready = True
            await router.watch.round()
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(6)} == {"leaving", "staying"}

    run(drill())


def test_replicas_come_and_go_with_a_file(tmp_path):
    async def drill():
        first, second, listed = FakeReplica("first"), FakeReplica("second"), tmp_path / "replicas"
        listed.write_text("# nobody\n\n")
        async with before(first, second, discover=in_file(listed)) as (router, client):
            assert (await complete(client, "x")).status_code == 503
            seen = []
            for urls in ([first.url], [first.url, second.url], [second.url], [second.url, first.url]):
                listed.write_text("\n".join(urls))
                await router.watch.round()
                seen.append({(await complete(client, f"{n}")).headers["x-replica"] for n in range(4)})
            assert seen == [{"first"}, {"first", "second"}, {"second"}, {"first", "second"}]
            for unreadable in ("https://x\n", "http://127.0.0.1:1/path\n"):
                listed.write_text(unreadable)
                await router.watch.round()
                assert len(router.watch.replicas) == 2, "what cannot be read says nothing"
            listed.unlink()
            await router.watch.round()
            assert (await complete(client, "x")).status_code == 200

    run(drill())


def test_a_full_replica_sends_its_requests_to_another_and_all_full_is_429():
    async def drill():
        full, free = FakeReplica("full"), FakeReplica("free")
        full.full = True
        async with before(full, free, policy=RoundRobin()) as (router, client):
            assert {(await complete(client, str(n))).headers["x-replica"] for n in range(4)} == {"free"}
            free.full = True
            answer = await complete(client, "x")
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"

    run(drill())


def test_a_full_replica_does_not_attract_the_turns_that_it_refused():
    async def drill():
        full, free = FakeReplica("full"), FakeReplica("free")
        async with before(full, free) as (router, client):
            full.full, prompt = True, "a long beginning " * 20
            for turn in range(6):
                prompt += f"turn {turn} " * 20
                assert (await complete(client, prompt)).headers["x-replica"] == "free"
            assert router.metrics.count(Ending.REFUSED) <= 1, "asked once, and then known to hold nothing"

    run(drill())


def test_nobody_listens():
    async def drill():
        replica = FakeReplica("gone")
        async with before(replica) as (router, client):
            await replica.kill()
            answer = await complete(client, "x")
            assert answer.status_code == 502 and answer.json()["error"]["code"] == "replica_failed"
            for _ in range(2):
                await router.watch.round()
            assert (await client.get("/ready")).status_code == 503
            assert (await complete(client, "x")).status_code == 503

    run(drill())


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b"[" * 5000, b'{"messages": [3, {"content": [1]}]}'])
def test_what_cannot_be_read_goes_to_a_replica(body):
    """It knows better what is wrong."""

    async def drill():
        async with before(FakeReplica("a")) as (router, client):
            answer = await client.post("/v1/completions", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "unreadable"

    run(drill())
