"""Bytes that are almost HTTP, from both sides: through the gateway they mean what h11 alone makes of them, or fail."""

import asyncio
import random

import h11
import pytest

from minilib.classic.gateway.rules import GatewayLimits
from tests.classic.gateway.gateway_cases import NEVER_OUT, SHORT, before, exchange, on_stage, read_response, saying
from tests.classic.http.http_cases import bad_backend, raw, run

pytestmark = pytest.mark.filterwarnings("error")
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nA: b\r\n\r\nhello, world",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=1\r\n, world\r\n0\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\n\r\nuntil the end",
    b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
]
REQUESTS = [
    b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /stream HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"PUT /stream HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HEAD /stream HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, x\r\nX: 1\r\n\r\n",
]
SPICE = [b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"0", b"1", b"f", b"\xff", b"Content-Length: 3\r\n",
         b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b";", b"-", b"HTTP/1.0",
         b"Connection: close\r\n"]  # fmt: skip


def mutated(rng, data):
    """A few bytes changed, lost, doubled or added."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        at, size = rng.randrange(len(data)), rng.choice([0, 0, 1, 1, 2, 9])
        data = data[:at] + rng.choice([b"", rng.choice(SPICE), data[at : at + size] * 2]) + data[at + size :]
        data = data or b"x"
    return data


async def by_h11_alone(data):
    """What a client reads that has the backend's bytes without a gateway in between."""
    reader, wire = asyncio.StreamReader(), h11.Connection(h11.CLIENT)
    wire.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    wire.send(h11.EndOfMessage())
    reader.feed_data(data)
    reader.feed_eof()
    return await read_response(reader, wire)


@pytest.mark.parametrize("seed", range(6))
def test_responses_mean_what_they_mean_without_a_gateway(seed):
    rng, said, outcomes = random.Random(seed), b"", set()

    async def behave(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(said), cut):
            writer.write(said[start : start + cut])
            await asyncio.sleep(0)

    async def main():
        nonlocal said, cut
        async with bad_backend(behave) as port, before(port, health=NEVER_OUT, limits=SHORT) as gateway:
            for _ in range(120):
                said, cut = mutated(rng, rng.choice(RESPONSES)), rng.choice([1, 7, 1000])
                alone, here = await by_h11_alone(said), await exchange(gateway.port)
                if alone[3]:
                    assert (here[0], here[2], here[3]) == (alone[0], alone[2], True), said
                else:
                    assert here[0] == 502 or not here[3], f"{said} has no proper end: {here}"
                    assert here[0] == 502 or alone[2].startswith(here[2])
                outcomes.add((alone[3], here[3]))

    cut = 1
    run(main)
    assert {(True, True), (False, True)} <= outcomes


def complete_requests(data):
    """How many requests h11 reads from these bytes before the first error, the end, or a request that is the last."""
    wire, number = h11.Connection(h11.SERVER), 0
    wire.receive_data(data)
    try:
        while True:
            event = wire.next_event()
            if isinstance(event, h11.EndOfMessage):
                number += 1
                wire.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                wire.send(h11.EndOfMessage())
                if wire.our_state is not h11.DONE:
                    return number
                wire.start_next_cycle()
            elif event in (h11.NEED_DATA, h11.PAUSED):
                return number
    except h11.ProtocolError:
        return number


@pytest.mark.parametrize("seed", range(6))
def test_no_backend_sees_a_request_that_the_client_has_not_sent(seed, caplog):
    rng, limits = random.Random(seed), GatewayLimits(idle_within=0.02, head_within=0.02, body_within=0.02)

    async def check(gateway, backend):
        for _ in range(60):
            data = b"".join(mutated(rng, rng.choice(REQUESTS)) for _ in range(rng.choice([1, 2, 3])))
            seen = backend.requests
            answer = await raw(gateway.port, data)
            sent = complete_requests(data)
            assert backend.requests - seen <= sent, f"{data} became {backend.requests - seen} requests of {sent}"
            assert answer.count(b"HTTP/1.1 ") <= sent + 1
            gateway.check_invariants()
        assert (await exchange(gateway.port))[0] == 200 and not caplog.records

    on_stage(check, limits=limits, health=NEVER_OUT)


def test_responses_in_pieces_of_every_size():
    async def main():
        for response in RESPONSES[:3]:
            for cut in range(1, len(response)):

                async def behave(reader, writer, response=response, cut=cut):
                    await reader.readuntil(b"\r\n\r\n")
                    for part in (response[:cut], response[cut:]):
                        writer.write(part)
                        await asyncio.sleep(0.001)

                async with bad_backend(behave) as port, before(port) as gateway:
                    status, _, body, proper = await exchange(gateway.port)
                    assert proper and status in (200, 404) and body in (b"hello, world", b"until the end")
        async with saying(RESPONSES[1] * 2, stays=True) as port, before(port) as gateway:
            for _ in range(3):  # what comes after the end belongs to nobody
                assert (await exchange(gateway.port))[2] == b"hello, world"

    run(main)
