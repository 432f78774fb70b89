"""Drills with processes: a replica is killed, or drained, twenty times under load.

Every token that a client got is the right one in the right place, nobody waits for ever, whoever did not get all of an
answer was told so, and no request of which no token had come was lost.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import httpx

from minilib.classic.gateway.rules import GatewayLimits
from minilib.mechanisms.balancing import RetryBudget
from minilib.serving.router.discovery import in_list
from minilib.serving.router.prefix_aware import PrefixAware
from minilib.serving.router.router import ReplicaRouter
from tests.serving.router import fake_replica
from tests.serving.router.fake_replica import tokens_of
from tests.serving.router.test_router import run, stream

CLIENTS, TOKENS, TIMES = 6, 6, 20


class ReplicaProcess:
    """A fake replica as a process, which comes back on the same port."""

    def __init__(self, name, journal):
        self.name, self.journal, self.port, self.process, self.next = name, journal, 0, None, None

    def prepare(self):
        """Load the next process, which waits."""
        arguments = ["--name", self.name, "--port", str(self.port), "--pace", "0.004", "--journal", str(self.journal)]
        program = [sys.executable, fake_replica.__file__, *arguments, "--wait"]
        self.next = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self):
        self.process, self.next = self.next, None
        self.process.stdin.close()
        self.port = int(self.process.stdout.readline())

    def send(self, number):
        self.process.send_signal(number)

    def close(self):
        for process in filter(None, (self.process, self.next)):
            process.kill()
            process.wait(5)
            process.stdin.close()
            process.stdout.close()
        self.process = self.next = None


class Told:
    """What clients were told: by prompt, and how often each ending came."""

    def __init__(self):
        self.endings, self.number = Counter(), 0

    async def client(self, url, going):
        """Ask again and again, each turn longer than the one before."""
        async with httpx.AsyncClient(base_url=url, timeout=5.0, trust_env=False) as client:
            history = f"client {id(client)} of {url}: " + "x" * 64
            while not going.is_set():
                self.number += 1
                history += f" turn {self.number} " * 3
                try:
                    tokens, error, done = await stream(client, history, TOKENS, **{"x-request-id": f"r{self.number}"})
                except AssertionError as refused:
                    self.endings["refused: " + str(refused)[:60]] += 1
                    continue
                assert tokens == tokens_of(history, TOKENS)[: len(tokens)], "a wrong token"
                assert done == (error is None), "a clean end without all tokens, or an error and a clean end"
                assert done == (len(tokens) == TOKENS) or error, "an end that is too early"
                assert tokens or done, "a request without a token was lost"
                self.endings["complete" if done else error["code"]] += 1


async def drill(tmp_path, num_routers, disturb):
    """Three replicas, routers and clients; one replica after the other is disturbed, and comes back.

    Returns:
        What clients were told, and how often each request began.
    """
    journal, told, going = tmp_path / "journal", Told(), asyncio.Event()
    async with AsyncExitStack() as stack:
        replicas = [ReplicaProcess(f"replica {number}", journal) for number in range(3)]
        for replica in replicas:
            stack.callback(replica.close)
            replica.prepare()
            replica.start()
        urls = [f"http://127.0.0.1:{replica.port}" for replica in replicas]
        routers = []
        for _ in range(num_routers):
            policy, budget = PrefixAware(num_routers=num_routers), RetryBudget(ratio=1, most=100)
            limits = GatewayLimits(answer_within=5, stall_within=5)
            router = ReplicaRouter(in_list(urls), policy, every=0.05, budget=budget, limits=limits)
            await router.start()
            stack.push_async_callback(router.stop)
            routers.append(router)
        ports = [routers[number % num_routers].gateway.port for number in range(CLIENTS)]
        clients = [asyncio.create_task(told.client(f"http://127.0.0.1:{port}", going)) for port in ports]
        for number in range(TIMES):
            await asyncio.sleep(0.05)
            await disturb(replicas[number % 3], routers)
        going.set()
        await asyncio.wait_for(asyncio.gather(*clients), 10)
        for router in routers:
            router.check_invariants()
            assert sum(router.gateway.backends.dispatcher.in_flight) == 0
    begun = Counter(line.split()[0] for line in Path(journal).read_text().splitlines())
    return told, begun


async def becomes_ready(routers, count=3):
    async with asyncio.timeout(5):
        while any(len(router.watch.ready) != count for router in routers):
            await asyncio.sleep(0.01)


async def kill(replica, routers):
    os.kill(replica.process.pid, signal.SIGKILL)
    await asyncio.to_thread(replica.close)
    replica.prepare()
    await becomes_ready(routers, 2)
    await asyncio.to_thread(replica.start)
    await becomes_ready(routers)


async def drain(replica, routers):
    """As Kubernetes does: SIGTERM, and the process ends when its streams have ended."""
    replica.send(signal.SIGTERM)
    assert await asyncio.to_thread(replica.process.wait, 5) == 0
    await asyncio.to_thread(replica.close)
    replica.prepare()
    await becomes_ready(routers, 2)
    await asyncio.to_thread(replica.start)
    await becomes_ready(routers)


def test_a_replica_killed_twenty_times_under_load(tmp_path):
    told, begun = run(drill(tmp_path, 2, kill), 60)
    complete, cut = told.endings.pop("complete"), told.endings.pop("replica_failed", 0)
    assert not told.endings, f"whoever was not served to the end was told so by an event: {told.endings}"
    assert complete > 5 * TIMES and complete + cut == told.number
    assert cut <= TIMES * CLIENTS
    assert max(begun.values()) <= 3 and sum(begun.values()) - len(begun) <= TIMES * CLIENTS, "retries double nothing"


def test_a_replica_drained_twenty_times_under_load(tmp_path):
    told, begun = run(drill(tmp_path, 2, drain), 60)
    assert told.endings == {"complete": told.number}, "nobody lost a token"
    assert set(begun.values()) == {1}, "and none was generated twice"
