"""A proxy whose backends die, hang, stammer and come back: each request is answered once, and nothing is left over."""

import asyncio
import json
import math
import threading
import urllib.request
from collections import Counter
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest

from minilib.classic.http.backend import Backend
from minilib.classic.http.proxy import Proxy
from minilib.classic.http.wire import Client, SharedTimeout
from minilib.mechanisms.balancing import BoundedHashing, LeastLoaded, RoundRobin, Sticky, TwoChoices
from tests.classic.http.http_cases import ask, bad_backend, held, raw, run, until
from tests.classic.http.test_http_wire import BAD_REQUESTS

pytestmark = pytest.mark.filterwarnings("error")
REQUEST = b"GET /k?work=0 HTTP/1.1\r\nHost: a\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"


@pytest.fixture(autouse=True)
def no_pause_ends_by_itself(monkeypatch):
    monkeypatch.setattr("minilib.classic.http.proxy.PAUSE", 60.0)


def end_pause(proxy):
    """Who is down may be tried again from now on."""
    for health in proxy._dispatcher.health:
        health._paused_until -= 60.0


class Heard(RoundRobin):
    """Round robin that remembers what it was asked, chose and was told."""

    def __init__(self):
        super().__init__()
        self.keys, self.chosen, self.windows = [], [], []

    def choose(self, key, loads):
        target = super().choose(key, loads)
        self.keys.append(key)
        self.chosen.append(target)
        return target

    def observe(self, loads):
        self.windows.append(list(loads))


def on_stage(check, policy, num_backends=3, **options):
    """Run `check(backends, proxy, client)` with everything listening."""

    async def main():
        backends = [Backend(number) for number in range(num_backends)]
        async with before([await backend.start() for backend in backends], policy, **options) as proxy:
            client = Client(proxy.port)
            try:
                await check(backends, proxy, client)
                client.check_invariants()
            finally:
                await client.close()
                for backend in backends:
                    await backend.kill()
                    backend.check_invariants()
        proxy.check_invariants()

    run(main)


@asynccontextmanager
async def before(ports, policy=None, **options):
    """A proxy before ports of any kind."""
    proxy = Proxy(policy or RoundRobin(), ports, **options)
    await proxy.start()
    try:
        yield proxy
        proxy.check_invariants()
    finally:
        await proxy.kill()


def test_requests_go_where_the_policy_says_and_connections_are_kept():
    policy = Heard()

    async def check(backends, proxy, client):
        answers = [await client.get(f"/a%20{number}?work=0") for number in range(7)]
        assert [json.loads(answer.body)["backend"] for answer in answers] == [0, 1, 2, 0, 1, 2, 0]
        assert policy.keys == [f"a {number}" for number in range(7)], "without query, slash and escapes"
        assert policy.windows == [[1, 1, 0], [1, 0, 1], [0, 1, 1]], "one request is left over"
        assert [len(backend._connections) for backend in backends] == [1, 1, 1] and len(proxy._connections) == 1
        assert [backend.served for backend in backends] == [3, 2, 2]

    on_stage(check, policy, window=2)


def test_loads_are_requests_in_flight():
    async def check(backends, proxy, client):
        async with held(*backends):
            waiting = [asyncio.create_task(client.get("/k")) for _ in range(7)]
            await until(lambda: sum(proxy.loads()) == sum(backend.queue_length for backend in backends) == 7)
            assert sorted(proxy.loads()) == [2, 2, 3]
            proxy.check_invariants()
        await asyncio.gather(*waiting)
        assert proxy.loads() == [0, 0, 0]

    on_stage(check, LeastLoaded())


@pytest.mark.parametrize(
    "policy",
    [RoundRobin(), LeastLoaded(), TwoChoices(0), BoundedHashing(3), Sticky(3)],
    ids=lambda policy: type(policy).__name__,
)
def test_killed_while_requests_flow_none_is_lost(policy):
    async def check(backends, proxy, client):
        answers = []

        async def ask_on():
            while len(answers) < 300:
                answers.append(await client.get(f"/k{len(answers) % 17}?work=0.0005"))

        clients = [asyncio.create_task(ask_on()) for _ in range(12)]
        await until(lambda: len(answers) > 60)
        victim = max(range(3), key=lambda target: backends[target].queue_length)
        await backends[victim].kill()
        await until(lambda: proxy.loads()[victim] == math.inf)
        proxy.check_invariants()
        await asyncio.gather(*clients)
        assert {answer.status for answer in answers} == {200}
        said = [json.loads(answer.body) for answer in answers]
        assert len({(each["backend"], each["served"]) for each in said}) == len(said), "an answer for each request"
        before, served = len(answers), backends[victim].served
        await backends[victim].start()
        assert proxy.loads()[victim] == math.inf
        end_pause(proxy)
        assert proxy.loads()[victim] == 0
        more = [await client.get(f"/k{number}?work=0") for number in range(60)]
        assert {answer.status for answer in more} == {200} and len(answers) == before
        assert backends[victim].served > served, "who is back is chosen again"

    on_stage(check, policy)


def test_with_nobody_left_the_answer_says_why():
    policy = Heard()

    async def check(backends, proxy, client):
        assert (await client.get("/k")).status == 200
        for backend in backends:
            await backend.kill()
        first, second = await client.get("/k"), await client.get("/k")
        assert (first.status, second.status) == (502, 503), "tried all; knew that all are down"
        assert b"3 backends failed, the last one: " in first.body and second.body == b"no backend is up\n"
        assert proxy.loads() == [math.inf] * 3 and sorted(policy.chosen[1:]) == [0, 1, 2], "each was tried once"
        proxy.check_invariants()
        await backends[1].start()
        end_pause(proxy)
        assert proxy.loads() == [0, 0, 0]
        assert json.loads((await client.get("/k")).body)["backend"] == 1
        assert proxy.loads()[1] == 0

    on_stage(check, policy)


def test_who_takes_too_long_is_left():
    async def check(backends, proxy, client):
        assert (await client.get("/k?work=9")).status == 504
        assert proxy.loads() == [math.inf, math.inf]
        end_pause(proxy)
        answer = await client.get("/k")
        assert answer.status == 504 and b"2 backends failed, the last one: not done within 0.05 s" in answer.body

    on_stage(check, RoundRobin(), num_backends=2, answer_within=0.05)


def test_who_failed_is_tried_again_with_one_request_at_a_time():
    policy = Heard()

    async def main():
        good, bad = Backend(1), Backend(0)
        async with before([await bad.start(), await good.start()], policy) as proxy:
            client = Client(proxy.port)
            await bad.kill()
            assert (await client.get("/k")).status == 200 and policy.chosen == [0, 1]
            assert proxy.loads() == [math.inf, 0]
            await bad.start()
            end_pause(proxy)
            assert proxy.loads() == [0, 0]
            async with held(good, bad):
                waiting = [asyncio.create_task(client.get("/k")) for _ in range(5)]
                await until(lambda: good.queue_length == 4 and bad.queue_length == 1)
                assert proxy.loads() == [math.inf, 4]
            assert {(await answer).status for answer in waiting} == {200}
            assert proxy.loads() == [0, 0]
            async with held(good, bad):
                waiting = [asyncio.create_task(client.get("/k")) for _ in range(4)]
                await until(lambda: proxy.loads() == [2, 2])
            await asyncio.gather(*waiting)
            await client.close()
        for backend in (good, bad):
            await backend.kill()

    run(main)


async def answers(reader, writer, *pieces, first=False):
    """Read requests and send these bytes to each; hang up after the first, or not."""
    while b"GET" in await reader.readuntil(b"\r\n\r\n"):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)
        if first:
            return


async def silent(reader, writer):
    await reader.read()


MISBEHAVIOUR = {
    "garbage": lambda r, w: answers(r, w, b"\x00\x01garbage"),
    "another protocol": lambda r, w: answers(r, w, b"SSH-2.0-OpenSSH\r\n"),
    "half a head": lambda r, w: answers(r, w, WHOLE[:20], first=True),
    "half a body": lambda r, w: answers(r, w, WHOLE[:-2], first=True),
    "half a body, and then nothing": lambda r, w: answers(r, w, WHOLE[:-2]),
    "no length": lambda r, w: answers(r, w, b"HTTP/1.1 200 OK\r\n\r\ngood", first=True),
    "chunks": lambda r, w: answers(r, w, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "too long a body": lambda r, w: answers(r, w, b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n"),
    "endless headers": lambda r, w: answers(r, w, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 9999),
    "hanging up at once": lambda r, w: asyncio.sleep(0),
    "hanging up when asked": lambda r, w: answers(r, w, first=True),
    "silence": silent,
}


@pytest.mark.parametrize("behave", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_a_backend_that_misbehaves_is_left_for_another(behave):
    async def main():
        good, policy = Backend(7), Heard()
        async with bad_backend(behave) as bad:
            async with before([bad, await good.start()], policy, answer_within=0.1) as proxy:
                (status, body), (again, _) = await ask(proxy.port, "/k", "/k")
                assert (status, json.loads(body)["backend"], again) == (200, 7, 200)
                assert policy.chosen[:3] == [0, 1, 1] and good.served == 2
            async with before([bad], answer_within=0.1) as proxy:
                (status, _), (again, _) = await ask(proxy.port, "/k", "/k")
                assert status in (502, 504) and again == 503
                end_pause(proxy)
                assert proxy.loads() == [0]
                assert (await ask(proxy.port, "/k"))[0][0] == status and proxy.loads() == [math.inf]
        await good.kill()

    run(main)


@pytest.mark.parametrize("status", [500, 404, 599, 299], ids=["500", "404", "no phrase", "good without a phrase"])
def test_whatever_a_backend_answers_is_passed_on(status):
    async def main():
        oops = b"HTTP/1.1 %d Oops\r\nContent-Length: 4\r\nContent-Type: text/x\r\n\r\noops" % status
        async with bad_backend(lambda r, w: answers(r, w, oops)) as bad, before([bad]) as proxy:
            client = Client(proxy.port)
            answer = await client.get("/k")
            assert (answer.status, answer.body, answer.content_type) == (status, b"oops", "text/x")
            assert (await ask(proxy.port, "/k"))[0] == (status, b"oops")
            assert proxy.loads() == [0], "it is up: it has answered"
            await client.close()

    run(main)


@pytest.mark.parametrize("extra, first", [(b"HTTP/1.1 200 OK\r\n", False), (b"", True)], ids=["says more", "hangs up"])
def test_a_kept_connection_that_went_bad_is_not_held_against_its_backend(extra, first):
    policy = Heard()

    async def main():
        async with (
            bad_backend(lambda r, w: answers(r, w, WHOLE + extra, first=first)) as bad,
            before([bad], policy) as proxy,
        ):
            for _ in range(4):
                assert (await ask(proxy.port, "/k"))[0] == (200, b"good"), "the answer to this request and no other"
                await asyncio.sleep(0.005)
            assert policy.chosen == [0] * 4 and proxy.loads() == [0]

    run(main)


def test_bad_requests_are_refused_before_any_backend_sees_them():
    policy = Heard()

    async def check(backends, proxy, client):
        for data, status, _ in BAD_REQUESTS.values():
            assert (await raw(proxy.port, data, half_close=True)).startswith(b"HTTP/1.1 %d " % status), data[:40]
        assert (await ask(proxy.port, "/k", method="PUT"))[0][0] == 501
        assert policy.chosen == []
        assert (await client.get("/k?work=lots")).status == 400, "what is wrong for a backend, it says itself"
        assert proxy.loads() == [0] * 3

    on_stage(check, policy)


def test_a_policy_that_fails_costs_one_answer(caplog):
    class Broken(Heard):
        def choose(self, key, loads):
            return super().choose(key, loads) if key != "bad" else 1 / 0

        def observe(self, loads):
            super().observe(loads)
            return len(self.windows) > 1 or 1 / 0

    policy = Broken()

    async def check(backends, proxy, client):
        targets = ("/bad", "/good", "/first window", "/good", "/second window")
        assert [(await client.get(quote(target))).status for target in targets] == [500, 200, 500, 200, 200]
        assert caplog.text.count("ZeroDivisionError") == 2 and policy.windows == [[1, 1, 0], [1, 0, 1]]

    on_stage(check, policy, window=2)


def test_a_request_in_every_state_when_the_proxy_is_killed():
    async def main():
        backends = [Backend(number) for number in range(3)]
        ports = [await backend.start() for backend in backends]
        async with bad_backend(silent) as bad:
            proxy = Proxy(Sticky(5), [*ports, bad, ports[0]])
            await proxy.start()
            await backends[2].kill()
            keys = {}
            for number in range(100):
                keys.setdefault(proxy.policy.choose(f"k{number}", [0] * 5), f"/k{number}?work=9")
            states = {
                "idle": raw(proxy.port),
                "half sent": raw(proxy.port, REQUEST),
                "kept after an answer": raw(proxy.port, REQUEST + b"\r\n"),
                "served": Client(proxy.port).get(keys[0]),
                "queued": Client(proxy.port).get(keys[0]),
                "retried": Client(proxy.port).get(keys[2]),
                "with a backend that is silent": Client(proxy.port).get(keys[3]),
            }
            tasks = {state: asyncio.ensure_future(request) for state, request in states.items()}
            await until(
                lambda: (
                    sum(proxy._dispatcher.in_flight) == 4
                    and proxy._dispatcher.health[2].on_trial
                    and len(proxy._connections) == 7
                )
            )
            await until(lambda: sum(backend.served for backend in backends) == 1)
            proxy.check_invariants()
            await proxy.kill()
            got = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
            proxy.check_invariants()
            assert not proxy._connections and proxy._dispatcher.in_flight == [0] * 5
            assert got["kept after an answer"].count(b"HTTP/1.1 200") == 1
            assert got["idle"] == got["half sent"] == b""
            for state in ("served", "queued", "retried", "with a backend that is silent"):
                assert isinstance(got[state], ConnectionError), state
            with pytest.raises(ConnectionRefusedError):
                await raw(proxy.port, REQUEST)
        for backend in backends:
            await backend.kill()

    run(main)


class Foreign(BaseHTTPRequestHandler):
    """A backend of the standard library."""

    protocol_version = "HTTP/1.1"
    connections = set()

    def do_GET(self):
        self.connections.add(self.client_address)
        body = f"{self.path} for {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_and_a_client_of_the_standard_library_on_either_side():
    async def main():
        with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as server:
            server.daemon_threads = False  # so that closing the server waits for them, and for their sockets
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
            try:
                client = Client(server.server_port)
                for number in range(3):
                    answer = await client.get(f"/k{number}?work=1")
                    assert (answer.status, answer.body) == (200, b"/k%d?work=1 for 127.0.0.1" % number)
                assert len(Foreign.connections) == 1, "all on one connection"
                await client.close()
                async with before([server.server_port]) as proxy:
                    assert await ask(proxy.port, "/a", "/b%20c") == [
                        (200, b"/a for 127.0.0.1"),
                        (200, b"/b%20c for 127.0.0.1"),
                    ]
                    url = f"http://127.0.0.1:{proxy.port}/u"
                    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                    with await asyncio.to_thread(direct.open, url, timeout=5) as answer:
                        assert answer.read() == b"/u for 127.0.0.1"
                assert len(Foreign.connections) == 2, "the proxy keeps one connection as well"
            finally:
                await asyncio.to_thread(server.shutdown)

    run(main)


def test_answers_are_not_swapped_between_clients():
    """Each client's answers name its own request, though all share the proxy's connections."""

    async def echo(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ")[1]
            await asyncio.sleep(0.001 * (len(path) % 3))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))

    async def main():
        async with bad_backend(echo) as one, bad_backend(echo) as two, before([one, two], TwoChoices(0)) as proxy:
            paths = [[f"/{client}/{'x' * number}" for number in range(15)] for client in range(6)]
            got = await asyncio.gather(*[ask(proxy.port, *each) for each in paths])
            assert [[body.decode() for _, body in each] for each in got] == paths
            assert Counter(status for each in got for status, _ in each) == {200: 90}

    run(main)


def test_a_response_that_comes_late_is_not_taken_for_the_next_one():
    told = asyncio.Event()

    async def late(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ")[1]
            if path == b"/slow":
                await asyncio.wait_for(told.wait(), 5)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))

    async def main():
        async with bad_backend(late) as port:
            client = Client(port)
            assert (await client.get("/first")).body == b"/first"
            patient, client._timeout = client._timeout, SharedTimeout(0.01)
            with pytest.raises(TimeoutError):
                await client.get("/slow")
            client._timeout = patient
            told.set()
            await asyncio.sleep(0.01)
            assert (await client.get("/next")).body == b"/next"
            client.check_invariants()
            told.clear()
            in_use = asyncio.create_task(client.get("/slow"))
            await until(lambda: not client._idle)
            await client.close()
            told.set()
            assert (await in_use).body == b"/slow", "close leaves a connection in use alone"
            client.check_invariants()

    run(main)


@pytest.mark.parametrize("options", [{"window": 0}, {"answer_within": 0}, {"ports": []}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="needs a port or more, window ≥ 1"):
        Proxy(RoundRobin(), **{"ports": [1], **options})
