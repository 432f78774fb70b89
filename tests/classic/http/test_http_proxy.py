"""A proxy whose backends die, hang, stammer and come back: each request is answered once, and nothing is left over."""

import asyncio
import json
import math
import threading
import urllib.request
from collections import Counter
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minilib.classic.http.backend import HEALTH, Backend
from minilib.classic.http.client import Client
from minilib.classic.http.experiment import stage
from minilib.classic.http.policies_by_key import BoundedHashing, Sticky
from minilib.classic.http.proxy import STATUS, Proxy
from minilib.mechanisms.balancing import LeastLoaded, RoundRobin, TwoChoices
from tests.classic.http.http_cases import ask, bad_backend, raw, run, until
from tests.classic.http.test_http_wire import BAD_REQUESTS

pytestmark = pytest.mark.filterwarnings("error")
REQUEST = b"GET /k?work=0 HTTP/1.1\r\nHost: a\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"


class Heard(RoundRobin):
    """Round robin that remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.keys, self.windows = [], []

    def choose(self, key, loads):
        self.keys.append(key)
        return super().choose(key, loads)

    def observe(self, loads):
        self.windows.append(list(loads))


def on_stage(check, policy, num_backends=3, **options):
    """Run `check(backends, proxy, client)` with everything listening."""

    async def main():
        async with stage(policy, [1.0] * num_backends, **options) as (backends, proxy, client):
            await check(backends, proxy, client)
            proxy.check_invariants()
            client.check_invariants()
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
        await proxy.close()


def test_requests_go_where_the_policy_says_and_connections_are_kept():
    policy = Heard()

    async def check(backends, proxy, client):
        answers = [await client.get(f"/a%20{number}?work=0", 5) for number in range(7)]
        assert [json.loads(answer.body)["backend"] for answer in answers] == [0, 1, 2, 0, 1, 2, 0]
        assert [answer.headers["x-backend"] for answer in answers[:3]] == ["0", "1", "2"]
        assert policy.keys == [f"a {number}" for number in range(7)], "without query, slash and escapes"
        assert policy.windows == [[1, 1, 0], [1, 0, 1], [0, 1, 1]], "one request is left over"
        assert [len(backend._connections) for backend in backends] == [1, 1, 1] and len(proxy._connections) == 1
        status, body = (await ask(proxy.port, STATUS))[0]
        assert status == 200 and [each["forwarded"] for each in json.loads(body)] == [3, 2, 2]
        assert proxy.retries == 0

    on_stage(check, policy, window=2)


def test_loads_are_requests_in_flight():
    policy = LeastLoaded()

    async def check(backends, proxy, client):
        for backend in backends:
            await backend.hold()
        waiting = [asyncio.create_task(client.get("/k", 5)) for _ in range(7)]
        await until(lambda: sum(proxy.loads()) == sum(backend.queue_length for backend in backends) == 7)
        assert sorted(proxy.loads()) == [2, 2, 3]
        proxy.check_invariants()
        for backend in backends:
            backend.release()
        await asyncio.gather(*waiting)
        assert proxy.loads() == [0, 0, 0]

    on_stage(check, policy)


def test_a_window_of_requests_in_flight_shows_who_is_slow():
    policy = Heard()

    async def check(backends, proxy, client):
        await backends[1].hold()
        await client.get("/k", 5)
        held = asyncio.create_task(client.get("/k", 5))
        await until(lambda: backends[1].queue_length == 1)
        for _ in range(2):  # to backends 2 and 0
            await client.get("/k", 5)
        assert policy.windows == [[0, 0 + 0 + 1 + 1, 0]], "what each had, added up over four requests"
        backends[1].release()
        await held

    on_stage(check, policy, window=4, signal="in_flight")


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
                answers.append(await client.get(f"/k{len(answers) % 17}?work=0.0005", 5))

        clients = [asyncio.create_task(ask_on()) for _ in range(12)]
        await until(lambda: len(answers) > 60)
        victim = max(range(3), key=lambda target: backends[target].queue_length)
        backends[victim].kill()
        await until(lambda: len(answers) > 120)
        proxy.check_invariants()
        assert proxy.loads()[victim] == math.inf and proxy.backends[victim].reason
        await asyncio.gather(*clients)
        assert {answer.status for answer in answers} == {200}
        said = [json.loads(answer.body) for answer in answers]
        assert len({(each["backend"], each["served"]) for each in said}) == len(said), "an answer for each request"
        assert proxy.retries >= proxy.backends[victim].failures >= 1
        assert sum(backend.forwarded for backend in proxy.backends) == len(answers) + proxy.retries
        before, served = len(answers), backends[victim].served
        await backends[victim].start()
        await until(lambda: proxy.backends[victim].up)
        more = [await client.get(f"/k{number}?work=0", 5) for number in range(60)]
        assert {answer.status for answer in more} == {200} and len(answers) == before
        assert backends[victim].served > served, "who is back is chosen again"

    on_stage(check, policy)


def test_with_nobody_left_the_answer_says_why():
    async def check(backends, proxy, client):
        assert (await client.get("/k", 5)).status == 200
        for backend in backends:
            backend.kill()
        first, second = await client.get("/k", 5), await client.get("/k", 5)
        assert (first.status, second.status) == (502, 503), "tried all; knew that all are down"
        assert b"3 backends failed, the last one: " in first.body and second.headers["retry-after"] == "1"
        assert proxy.loads() == [math.inf] * 3 and proxy.retries == 2
        proxy.check_invariants()
        await backends[1].start()
        await until(lambda: proxy.backends[1].up)
        assert json.loads((await client.get("/k", 5)).body)["backend"] == 1

    on_stage(check, RoundRobin())


def test_who_takes_too_long_is_left():
    async def check(backends, proxy, client):
        await backends[0].hold()
        assert json.loads((await client.get("/k", 5)).body)["backend"] == 1
        assert (proxy.retries, proxy.backends[0].failures, proxy.backends[0].reason) == (1, 1, "TimeoutError")
        await backends[1].hold()
        await until(lambda: proxy.backends[0].up)  # alive, it says, and it is slow still
        answer = await client.get("/k", 5)
        assert answer.status == 504 and b"2 backends failed, the last one by not answering in time" in answer.body

    on_stage(check, RoundRobin(), num_backends=2, answer_within=0.05)


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
        good = Backend(7)
        async with bad_backend(behave) as bad:
            async with before([bad, await good.start()], answer_within=0.05, probe_every=9) as proxy:
                (status, body), (again, _) = await ask(proxy.port, "/k", "/k")
                assert (status, json.loads(body)["backend"], again) == (200, 7, 200)
                assert proxy.loads() == [math.inf, 0] and (proxy.retries, good.served) == (1, 2)
            async with before([bad], answer_within=0.05, probe_every=0.01) as proxy:
                statuses = [status for status, _ in await ask(proxy.port, "/k", "/k")]
                assert statuses[0] in (502, 504) and statuses[1] == 503
                await asyncio.sleep(0.03)
                assert proxy.loads() == [math.inf], "what misbehaves does not pass a probe either"
        await good.close()

    run(main)


@pytest.mark.parametrize("status", [500, 404, 599, 299], ids=["500", "404", "no phrase", "good without a phrase"])
def test_whatever_a_backend_answers_is_passed_on(status):
    async def main():
        oops = b"HTTP/1.1 %d Oops\r\nContent-Length: 4\r\nContent-Type: text/x\r\n\r\noops" % status
        async with bad_backend(lambda r, w: answers(r, w, oops)) as bad, before([bad]) as proxy:
            client = Client(proxy.port)
            answer = await client.get("/k", 5)
            assert (answer.status, answer.body, answer.headers["content-type"]) == (status, b"oops", "text/x")
            assert (await ask(proxy.port, "/k"))[0] == (status, b"oops")
            assert proxy.loads() == [0], "it is up: it has answered"
            await client.close()

    run(main)


@pytest.mark.parametrize("extra, first", [(b"HTTP/1.1 200 OK\r\n", False), (b"", True)], ids=["says more", "hangs up"])
def test_a_kept_connection_that_went_bad_is_not_held_against_its_backend(extra, first):
    async def main():
        async with (
            bad_backend(lambda r, w: answers(r, w, WHOLE + extra, first=first)) as bad,
            before([bad]) as proxy,
        ):
            for _ in range(4):
                assert (await ask(proxy.port, "/k"))[0] == (200, b"good"), "the answer to this request and no other"
                await asyncio.sleep(0.005)
            assert proxy.retries == 0 and proxy.backends[0].forwarded == 4

    run(main)


def test_bad_requests_are_refused_before_any_backend_sees_them():
    async def check(backends, proxy, client):
        for data, status, _ in BAD_REQUESTS.values():
            assert (await raw(proxy.port, data, half_close=True)).startswith(b"HTTP/1.1 %d " % status), data[:40]
        assert (await ask(proxy.port, "/k", method="PUT"))[0][0] == 405
        assert (await raw(proxy.port, REQUEST)).startswith(b"HTTP/1.1 408 "), "a slow client"
        assert [backend.forwarded for backend in proxy.backends] == [0] * 3
        assert (await client.get("/k?work=lots", 5)).status == 400, "what is wrong for a backend, it says itself"
        assert proxy.loads() == [0] * 3

    on_stage(check, RoundRobin(), timeout=0.1)


def test_a_policy_that_fails_costs_one_answer(caplog):
    class Broken(RoundRobin):
        def choose(self, key, loads):
            return super().choose(key, loads) if key != "bad" else 1 / 0

    async def check(backends, proxy, client):
        assert [(await client.get(target, 5)).status for target in ("/bad", "/good")] == [500, 200]
        assert "ZeroDivisionError" in caplog.text

    on_stage(check, Broken())


@pytest.mark.parametrize("grace", [0.0, 5.0])
def test_a_request_in_every_state_when_the_proxy_closes(grace):
    async def main():
        backends = [Backend(number) for number in range(3)]
        ports = [await backend.start() for backend in backends]
        async with bad_backend(silent) as bad:
            proxy = Proxy(Sticky(5), [*ports, bad, ports[0]], answer_within=0.3)
            await proxy.start()
            backends[2].kill()
            keys, work = {}, "?work=0.02" if grace else "?work=9"
            for number in range(100):
                keys.setdefault(proxy.policy.choose(f"k{number}", [0] * 5), f"/k{number}")
            states = {
                "idle": raw(proxy.port),
                "half sent": raw(proxy.port, REQUEST),
                "refused, and not yet read": raw(proxy.port, b"?\r\n\r\n"),
                "kept after an answer": raw(proxy.port, REQUEST + b"\r\n"),
                "served": Client(proxy.port).get(keys[0] + work, 9),
                "queued": Client(proxy.port).get(keys[0] + work, 9),
                "retried": Client(proxy.port).get(keys[2] + work, 9),
                "with a backend that is silent": Client(proxy.port).get(keys[3], 9),
            }
            tasks = {state: asyncio.ensure_future(request) for state, request in states.items()}
            await until(lambda: sum(backend.in_flight for backend in proxy.backends) >= 4 and not proxy.backends[2].up)
            await asyncio.sleep(0.01)
            proxy.check_invariants()
            await proxy.close(grace)
            got = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
            proxy.check_invariants()
            assert not proxy._connections and not proxy._answering and all(b.in_flight == 0 for b in proxy.backends)
            assert got["kept after an answer"].count(b"HTTP/1.1 ") == 1
            for state in ("served", "queued", "retried", "with a backend that is silent"):
                if grace:
                    assert got[state].status == 200, state
                else:
                    assert isinstance(got[state], ConnectionError), state
            with pytest.raises(ConnectionRefusedError):
                await raw(proxy.port, REQUEST)
        for backend in backends:
            await backend.close()

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
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
            try:
                client = Client(server.server_port)
                for number in range(3):
                    answer = await client.get(f"/k{number}?work=1", 5)
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
                        assert (answer.headers["X-Backend"], answer.read()) == ("0", b"/u for 127.0.0.1")
                assert len(Foreign.connections) == 2, "the proxy keeps one connection as well"
            finally:
                await asyncio.to_thread(server.shutdown)

    run(main)


def test_health_is_not_queued():
    async def check(backends, proxy, client):
        await backends[0].hold()
        assert (await ask(backends[0].port, HEALTH))[0] == (200, b"alive\n")

    on_stage(check, RoundRobin())


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
    async def late(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ")[1]
            await asyncio.sleep(0.05 if path == b"/slow" else 0)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))

    async def main():
        async with bad_backend(late) as port:
            client = Client(port)
            assert (await client.get("/first", 5)).body == b"/first"
            with pytest.raises(TimeoutError):
                await client.get("/slow", 0.01)
            await asyncio.sleep(0.1)
            assert (await client.get("/next", 5)).body == b"/next"
            client.check_invariants()
            in_use = asyncio.create_task(client.get("/slow", 5))
            await asyncio.sleep(0.01)
            await client.close()
            assert (await in_use).body == b"/slow", "close leaves a connection in use alone"
            client.check_invariants()

    run(main)


@pytest.mark.parametrize("options", [{"window": 0}, {"signal": "noise"}, {"answer_within": 0}, {"probe_every": -1}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="needs a port or more, window ≥ 1"):
        Proxy(RoundRobin(), [1], **options)
    with pytest.raises(ValueError, match="needs a port or more"):
        Proxy(RoundRobin(), [])
