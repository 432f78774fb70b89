"""Clients that are slow, many, too long or sly; backends that drain and that are checked; and how a gateway stops."""

import asyncio
import math
import random
import socket
from collections import Counter

import pytest

from minilib.classic.gateway.rules import CHUNK, CheckRule, GatewayLimits
from minilib.classic.gateway.streaming_backend import StreamingBackend
from minilib.mechanisms.balancing import HealthRule, LeastLoaded
from tests.classic.gateway.gateway_cases import NEVER_OUT, SHORT, Heard, before, exchange, on_stage, saying
from tests.classic.http.http_cases import bad_backend, raw, run, until

pytestmark = pytest.mark.filterwarnings("error")
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
SLY = {
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "length and encoding": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "encoding of HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "encoding twice": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    "another encoding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "hidden encoding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "encoding in quotes": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 501),
    "space before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "length with a sign": (POST + b"Content-Length: +3\r\n\r\nabc", 400),
    "length in hexadecimal": (POST + b"Content-Length: 0x3\r\n\r\nabc", 400),
    "length with an underscore": (POST + b"Content-Length: 1_0\r\n\r\nabcdefghij", 400),
    "chunk size with 0x": (POST + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n", 400),
    "chunk without its end": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\naXX0\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "folded first header": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "null": (b"GET / HTTP/1.1\r\nHost: a\r\nA: \x00\r\n\r\n", 400),
    "a tunnel": (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "no path": (b"GET k HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "absolute without host": (b"GET http:///k HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a long head in one piece": (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 20_000 + b"\r\n\r\n", 431),
    "a long target": (b"GET /" + b"b" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    "an endless head": (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 200_000, 431),
    "a body too long": (POST + b"Content-Length: 20000000\r\n\r\n", 413),
    "chunks too long": (POST + b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n" + b"x" * 0xFFFFF + b"\r\n1\r\n", 413),
}


@pytest.mark.parametrize("data, status", SLY.values(), ids=SLY)
def test_what_two_readers_could_read_in_two_ways_reaches_no_backend(data, status):
    async def check(gateway, backend):
        smuggled = b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n"
        answer = await raw(gateway.port, data + smuggled)
        assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
        assert backend.requests == 0 and b"connection: close" in answer.lower()

    on_stage(check, limits=GatewayLimits(max_body=0xFFFFF - 1, replay_body=1 << 20))


def test_absolute_targets_name_the_host():
    async def check(gateway, backend):
        answer = await raw(gateway.port, b"GET http://b.example/stream?n=1 HTTP/1.0\r\nHost: a\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and (b"host", b"b.example") in backend.heads[0]

    on_stage(check)


SLOW = {
    "says nothing": ([], b""),
    "half a head": ([b"GET / HTTP/1.1\r\n"], b"HTTP/1.1 408 "),
    "a head by the byte": ([bytes([byte]) for byte in POST[:25]], b"HTTP/1.1 408 "),
    "a body by the byte": ([POST + b"Content-Length: 99\r\n\r\n"] + [b"x"] * 25, b"HTTP/1.1 408 "),
    "no body": ([POST + b"Content-Length: 99\r\n\r\n"], b"HTTP/1.1 408 "),
    "no chunk": ([POST + b"Transfer-Encoding: chunked\r\n\r\n"], b"HTTP/1.1 408 "),
}


@pytest.mark.parametrize("pieces, expected", SLOW.values(), ids=SLOW)
def test_slow_clients_are_given_up(pieces, expected):
    async def check(gateway, backend):
        answer = await raw(gateway.port, *pieces, pause=0.01)
        assert answer.startswith(expected) and bool(answer) == bool(expected) and backend.requests == 0
        await until(lambda: not gateway._connections)

    on_stage(check, limits=SHORT)


def test_who_is_one_too_many_is_told_so():
    async def check(gateway, backend):
        idle = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(5)]
        await until(lambda: len(gateway._connections) == 5)
        assert (await exchange(gateway.port))[0] == 503
        _, gone = idle.pop()
        gone.transport.abort()
        await until(lambda: len(gateway._connections) == 4)
        assert (await exchange(gateway.port))[0] == 200
        for _, writer in idle:
            writer.transport.abort()

    on_stage(check, limits=GatewayLimits(max_connections=5))


def test_a_client_that_does_not_read_slows_its_backend_and_fills_no_memory():
    async def check(gateway, backend):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", gateway.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        writer.transport.pause_reading()
        writer.write(b"GET /stream?n=100000&size=10000 HTTP/1.1\r\nHost: a\r\n\r\n")
        sent = -1
        while sent != backend.counts["chunks"] or not sent:
            sent = backend.counts["chunks"]
            await asyncio.sleep(0.1)
        assert sent < 2000, "of 1 GB hardly what sockets hold is sent"
        (client,) = gateway._connections.values()
        assert client.writer.transport.get_write_buffer_size() <= 5 * CHUNK
        await until(lambda: backend.counts["left"] == 1)  # and it is given up
        writer.transport.abort()

    on_stage(check, limits=GatewayLimits(send_within=0.5))


def test_a_backend_that_does_not_read_slows_its_client():
    async def deaf(reader, writer):
        writer.transport.pause_reading()
        await asyncio.sleep(30)

    async def main():
        async with (
            bad_backend(deaf) as port,
            before(port, limits=GatewayLimits(replay_body=1000, send_within=0.5)) as gateway,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(1500):
                writer.write(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            sent, last = -1, 0
            while sent != last:
                last = sent
                await asyncio.sleep(0.1)
                sent = sum(each.bytes_received for each in gateway._connections.values())
            assert sent < 12_000_000, "it is not taken without end"
            writer.transport.abort()
            await until(lambda: not gateway._connections)

    run(main)


def test_a_backend_drains():
    async def check(gateway, one, two):
        running = asyncio.create_task(exchange(gateway.port, target="/stream?n=20&gap=0.005"))
        await until(lambda: one.requests == 1)
        gateway.backends.drain(0)
        assert gateway.backends.loads() == [math.inf, 0] and not await gateway.backends.drained(0, within=0)
        for _ in range(4):
            assert (await exchange(gateway.port))[0] == 200
        assert (one.requests, two.requests) == (1, 4)
        assert await gateway.backends.drained(0, within=5) and (await running)[3] and one.counts["complete"] == 1
        gateway.backends.restore(0)
        assert gateway.backends.loads() == [0, 0]
        assert await gateway.backends.remove(0, within=1) and gateway.backends.add("127.0.0.1", one.port) == 2
        with pytest.raises(ValueError, match="gets another number"):
            gateway.backends.restore(0)
        assert gateway.backends.loads() == [math.inf, 0, 0]

    on_stage(check, {}, {})


def test_checks_take_out_and_bring_back():
    rule = HealthRule(fall=2, rise=3, begins_healthy=False)

    async def check(gateway, one, two):
        assert gateway.backends.loads() == [math.inf] * 2
        await until(lambda: gateway.backends.loads() == [0, 0])
        assert min(one.counts["checks"], two.counts["checks"]) >= 3
        one.healthy = False
        seen = one.counts["checks"]
        await until(lambda: gateway.backends.loads() == [math.inf, 0])
        assert one.counts["checks"] - seen >= 2
        await two.kill()
        await until(lambda: gateway.backends.loads() == [math.inf, math.inf])
        one.healthy = True
        await two.start()
        await until(lambda: gateway.backends.loads() == [0, 0])

    on_stage(check, {}, {}, checks=CheckRule("/health", 0.005, 0.5), health=rule)


@pytest.mark.parametrize("within, cut", [(5, 0), (0, 1)])
def test_a_gateway_that_stops_lets_requests_finish_or_cuts_them(within, cut):
    async def check(gateway, backend):
        idle = asyncio.create_task(raw(gateway.port))
        running = asyncio.create_task(exchange(gateway.port, target="/stream?n=20&gap=0.005"))
        await until(lambda: backend.requests == 1 and len(gateway._connections) == 2)
        assert await gateway.stop(within) == cut
        assert (await running)[3] == (not cut) and await idle == b""
        with pytest.raises(ConnectionRefusedError):
            await exchange(gateway.port)

    on_stage(check)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_the_books_are_in_order(seed):
    rng, hooks, statuses = random.Random(seed), Heard(), Counter()

    async def check(gateway, *backends):
        async def client():
            for _ in range(12):
                target = rng.choice(["/stream", "/stream?n=30&gap=0.001", "/stream?die=2", "/stream?status=503",
                                     "/stream?die=read", "/stream?wait=0.01", "/stream?n=9&size=30000"])  # fmt: skip
                body, method = b"x" * rng.choice([0, 5, 3000]), rng.choice(["GET", "POST", "HEAD"])
                work = exchange(gateway.port, method, target, body=body if method == "POST" else b"")
                try:
                    status, _, _, proper = await asyncio.wait_for(work, rng.choice([0.004, 5, 5]))
                    statuses[status, proper] += 1
                except TimeoutError:
                    statuses["left"] += 1
                gateway.check_invariants()

        async def trouble():
            while True:
                victim = rng.randrange(3)
                await asyncio.sleep(0.01)
                gateway.backends.drain(victim)
                await asyncio.sleep(0.005)
                gateway.backends.restore(victim)
                await backends[victim].kill()
                await asyncio.sleep(0.005)
                await backends[victim].start()
                gateway.check_invariants()

        troubled = asyncio.create_task(trouble())
        try:
            await asyncio.gather(*[client() for _ in range(6)])
        finally:
            troubled.cancel()
            await asyncio.gather(troubled, return_exceptions=True)
        await until(lambda: not gateway._busy)
        assert len(hooks.endings) == len(hooks.dispatches) and statuses[200, True] > 0
        assert gateway.backends.dispatcher.in_flight == gateway.backends.dispatcher.unanswered == [0, 0, 0]

    on_stage(check, {}, {}, {}, hooks=hooks, policy=LeastLoaded(), health=NEVER_OUT)


def test_a_backend_that_answers_before_it_has_the_body():
    early = b"HTTP/1.1 413 Too Long\r\nContent-Length: 3\r\n\r\nno\n"

    async def main():
        async with saying(early, stays=True) as port, before(port, limits=GatewayLimits(replay_body=1000)) as gateway:
            head = POST + b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n"
            answer = await raw(gateway.port, head)
            assert answer.startswith(b"HTTP/1.1 413 ") and answer.endswith(b"no\n")

    run(main)


def test_what_is_killed_leaves_nothing():
    async def main():
        backend = StreamingBackend(n=1000, gap=0.01)
        async with before(await backend.start(), checks=CheckRule("/health")) as gateway:
            starts = ((), (POST,), (POST + b"Content-Length: 9\r\n\r\n",))
            states = [raw(gateway.port, *start) for start in starts]
            states += [exchange(gateway.port), exchange(gateway.port, target="/stream?wait=9")]
            tasks = [asyncio.ensure_future(state) for state in states]
            await until(lambda: backend.requests == 2 and len(gateway._connections) == 5)
            await gateway.kill()
            assert not gateway._connections and sum(gateway.backends.dispatcher.in_flight) == 0
            answers = await asyncio.gather(*tasks)
            assert answers[:3] == [b""] * 3 and not answers[3][3] and answers[4][0] is None
            await until(lambda: backend.counts["left"] == 2)
        await backend.kill()

    run(main)
