"""A backend's queue by its own clock, and whatever a client may do to a server."""

import asyncio
import json
import socket
import urllib.request

import pytest

from minilib.classic.http.backend import Backend
from minilib.classic.http.wire import Client, HttpServer, Response
from tests.classic.http.http_cases import ask, held, raw, run, until
from tests.classic.http.test_http_wire import BAD_REQUESTS

pytestmark = pytest.mark.filterwarnings("error")
GET = b"GET /k?work=0 HTTP/1.1\r\nHost: a\r\n\r\n"


def serving(check, server=Backend, *options):
    """Run `check(server)` with a server of this kind that listens."""

    async def main():
        served = server(*options or [0])
        await served.start()
        try:
            await check(served)
        finally:
            await served.kill()
            assert not served._connections

    run(main)


async def hello(target):
    """What a server does that does nothing."""
    return Response(200, target.encode())


def test_one_at_a_time_first_come_first_served_by_a_clock_that_is_never_late():
    async def check(backend):
        client, order, waiting = Client(backend.port), [], []

        async def get(number, work):
            said = json.loads((await client.get(f"/k{number}?work={work}")).body)
            order.append(number)
            return said

        works = (0.004, 0.002, 0, 0.006, 0.001)
        async with held(backend):
            for number, work in enumerate(works):
                waiting.append(asyncio.create_task(get(number, work)))
                await until(lambda number=number: backend.queue_length == number + 1)
                backend.check_invariants()
        said = await asyncio.gather(*waiting)
        assert order == [0, 1, 2, 3, 4] and [each["served"] for each in said] == [1, 2, 3, 4, 5]
        assert [each["service"] for each in said] == pytest.approx([work / 2 for work in works], abs=1e-9)
        starts = [each["came"] + each["queued"] for each in said]
        ends = [start + each["service"] for start, each in zip(starts, said, strict=True)]
        assert starts[1:] == pytest.approx(ends[:-1], abs=1e-9), "the next one starts when this one ends"
        assert (backend.served, backend.queue_length) == (5, 0)
        await client.close()

    serving(check, Backend, 0, 2.0)


def test_a_slower_one_is_slower_from_the_next_request_on():
    async def check(backend):
        client = Client(backend.port)
        for speed, service in ((1.0, 0.001), (0.5, 0.002), (4.0, 0.00025)):
            backend.speed = speed
            assert json.loads((await client.get("/k?work=0.001")).body)["service"] == pytest.approx(service)
        await client.close()

    serving(check)
    for speed in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite and above 0"):
            Backend(0, speed)


def test_clients_of_others_are_served():
    async def check(backend):
        answers = await ask(backend.port, "/a?work=0", "/b?work=x", "/b?work=-1", "/b?work=nan", "/c")
        assert [status for status, _ in answers] == [200, 400, 400, 400, 200]
        assert json.loads(answers[-1][1])["served"] == 2
        assert b"a number of seconds from 0 to 60" in answers[1][1]
        url = f"http://127.0.0.1:{backend.port}/a?work=0.001"
        assert (
            json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read()))["backend"] == 0
        )
        assert (await ask(backend.port, "/a", method="POST"))[0] == (501, b"only GET is answered, got POST\n")

    serving(check)


def test_bad_bytes_are_answered_and_hurt_nobody():
    async def check(backend):
        for data, status, _ in BAD_REQUESTS.values():
            answer = await raw(backend.port, data, half_close=True)
            assert answer.startswith(b"HTTP/1.1 %d " % status), data[:40]
            assert b"Connection: close\r\n" in answer
        answer = await raw(backend.port, GET[:-2] + b"A: b\r\n" * 20_000)
        assert answer.startswith(b"HTTP/1.1 431 "), "it can be read, although much more was sent than was looked at"
        assert (await ask(backend.port, "/k"))[0][0] == 200

    serving(check)


def test_requests_in_pieces_and_in_a_row():
    async def check(backend):
        assert (await raw(backend.port, *[bytes([byte]) for byte in GET], half_close=True)).count(b"HTTP/1.1 200") == 1
        assert (await raw(backend.port, GET * 5, half_close=True)).count(b"HTTP/1.1 200") == 5
        bad = GET.replace(b"work=0", b"work=x")
        answers = await raw(backend.port, GET + bad + GET, half_close=True)
        assert [answers.count(b"HTTP/1.1 %d" % status) for status in (200, 400)] == [2, 1], "a bad one hurts no other"

    serving(check)


def test_slow_clients_are_given_up():
    async def check(backend):
        assert (await raw(backend.port, GET[:10])).startswith(b"HTTP/1.1 408 ")
        assert (await raw(backend.port, GET[:10], GET[10:20], pause=0.04)).startswith(b"HTTP/1.1 408 "), "all in all"
        assert await raw(backend.port) == b"", "who never asked is not answered"
        assert (await raw(backend.port, GET[:10], half_close=True)).startswith(b"HTTP/1.1 400 ")

    serving(check, HttpServer, hello, 0.06)


def test_a_client_that_does_not_read_is_given_up():
    async def check(backend):
        _, writer = await asyncio.open_connection("127.0.0.1", backend.port)
        writer.transport.pause_reading()
        await until(lambda: backend._connections)
        for end in (writer.transport, *(served.transport for served in backend._connections.values())):
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 4096)
        while backend._connections:
            writer.write(GET * 100)
            await asyncio.sleep(0.005)
        writer.transport.abort()

    serving(check, HttpServer, hello, 0.1)


def test_an_error_of_its_own_is_answered(monkeypatch, caplog):
    async def check(backend):
        monkeypatch.setattr(backend, "_answer", None)
        assert (await ask(backend.port, "/k"))[0][0] == 500
        assert "no answer to /k" in caplog.text

    serving(check)


def test_killed_and_started_again():
    async def check(backend):
        client = Client(backend.port)
        assert (await client.get("/k")).status == 200
        waiting = [asyncio.create_task(client.get("/k?work=9")) for _ in range(3)]
        await until(lambda: backend.queue_length == 3)
        await backend.kill()
        backend.check_invariants()
        for failed in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(failed, ConnectionError), "one was on a connection that was kept"
        with pytest.raises(ConnectionRefusedError):
            await client.get("/k")
        port = backend.port
        assert await backend.start() == port and backend.queue_length == 0
        said = json.loads((await client.get("/k")).body)
        assert (said["served"], said["queued"]) == (2, 0)
        with pytest.raises(RuntimeError, match=f"listens on port {port} already"):
            await backend.start()
        client.check_invariants()
        await client.close()

    serving(check)


def test_who_is_killed_leaves_nothing_whatever_goes_on():
    async def check(backend):
        clients = {
            "served": Client(backend.port).get("/k?work=50"),
            "queued": Client(backend.port).get("/k?work=50"),
            "half sent": raw(backend.port, GET[:10]),
            "idle": raw(backend.port),
        }
        reader, writer = await asyncio.open_connection("127.0.0.1", backend.port)
        writer.write(b"?\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 "), "and the server lingers"
        tasks = {state: asyncio.ensure_future(work) for state, work in clients.items()}
        await until(lambda: backend.queue_length == 2 and len(backend._connections) == 5)
        arriving = asyncio.ensure_future(raw(backend.port, GET))
        await asyncio.sleep(0)
        await backend.kill()
        assert not backend._connections and backend.queue_length == 0
        with pytest.raises(ConnectionError):
            await tasks["served"]
        with pytest.raises(ConnectionError, match="before its response was complete"):
            await tasks["queued"]
        assert await tasks["half sent"] == await tasks["idle"] == b""
        await asyncio.wait([arriving], timeout=5)
        assert arriving.done() and (arriving.exception() or arriving.result() == b"")
        writer.transport.abort()

    serving(check)
