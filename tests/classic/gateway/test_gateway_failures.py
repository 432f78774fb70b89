"""Backends that die at every byte, requests that may be sent again and those that may not, clients that leave."""

import asyncio
import math

import pytest

from minilib.classic.gateway.hooks import Ending
from minilib.classic.gateway.rules import GatewayLimits, RetryRule
from minilib.classic.gateway.streaming_backend import StreamingBackend
from minilib.mechanisms.balancing import HealthRule, LeastLoaded, RetryBudget
from tests.classic.gateway.gateway_cases import NEVER_OUT, SHORT, Heard, before, exchange, on_stage, saying
from tests.classic.http.http_cases import bad_backend, raw, run, until

pytestmark = pytest.mark.filterwarnings("error")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde"


@pytest.mark.parametrize("response", [CHUNKED, LENGTH], ids=["chunked", "length"])
@pytest.mark.parametrize("hold", [0, 1000], ids=["streamed", "held"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_killed_at_every_byte_no_client_sees_a_proper_end_of_a_part(response, hold, version):
    async def main():
        for reset in (False, True):
            for cut in range(len(response) + 1):
                async with saying(response[:cut], reset=reset) as port, before(port, hold=hold) as gateway:
                    status, _, body, proper = await exchange(gateway.port, "POST", body=b"x", version=version)
                    whole = cut == len(response)
                    if proper and status == 200:
                        assert body == b"abcde" and whole, f"{cut} bytes, {reset=}: a part as if it were all"
                    else:
                        assert not whole or reset, f"{cut} bytes, {reset=}"
                        assert status in (200, 502, None) and b"abcde".startswith(body if status == 200 else b"")
                        assert hold == 0 or status == 502, "what was held can still be an error"

    run(main)


def test_bytes_that_are_no_http_are_an_error_or_a_cut():
    async def main():
        good = b"HTTP/1.1 200 OK\r\n"
        two_lengths = b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"
        heads = [good + rest for rest in (b"A : b\r\n\r\n", b"A: b\r\n" * 9999, two_lengths)]
        for said in (b"SSH-2.0\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n", *heads):
            async with saying(said, stays=True) as port, before(port) as gateway:
                assert (await exchange(gateway.port))[0] == 502
        async with saying(CHUNKED[:-5] + b"zz\r\n", stays=True) as port, before(port) as gateway:
            assert (await exchange(gateway.port))[2:] == (b"abcde", False), "what was good before is passed on"

    run(main)


DEATHS = {
    "refuses the connection": (None, 1, 1),
    "closes before it reads": ({"die": "accept"}, 1, 0),
    "reads and closes": ({"die": "read"}, 1, 0),
    "has no place: 503 with Retry-After": ({"status": 503}, 1, 1),
    "has no place: 429": ({"status": 429}, 1, 1),
    "fails: 500": ({"status": 500}, 0, 0),
    "dies in the middle": ({"die": 1}, 0, 0),
}


@pytest.mark.parametrize("defaults, get, post", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_sent_again(defaults, get, post, method):
    hooks, again = Heard(), get if method == "GET" else post

    async def main():
        bad, good = StreamingBackend(**defaults or {}), StreamingBackend()
        ports = [await bad.start(), await good.start()]
        if defaults is None:
            await bad.kill()
        async with before(*ports, hooks=hooks) as gateway:
            status, _, _, proper = await exchange(gateway.port, method, body=b"x" if method == "POST" else b"")
            assert (good.requests, hooks.dispatches) == (again, [0, 1][: 1 + again])
            assert bad.requests + bad.counts["accepted"] == (0 if defaults is None else 1), "never twice"
            assert (status == 200 and proper) == bool(again) and gateway.budget.retries == again
        first = {"status": Ending.REFUSED if again else Ending.COMPLETE, "die": Ending.FAILED}
        if defaults == {"die": 1}:
            assert hooks.endings == ["cut"]
        elif defaults:
            assert hooks.endings[0] == first[next(iter(defaults))].value
        for backend in (bad, good):
            await backend.kill()

    run(main)


def test_a_body_that_was_not_kept_is_not_sent_again():
    async def check(gateway, bad, good):
        status, _, _, _ = await exchange(gateway.port, "PUT", body=b"x" * 5000)
        assert (status, good.requests, bad.counts["body"]) == (502, 0, 5000)

    on_stage(check, {"die": "read"}, {}, limits=GatewayLimits(replay_body=1000))


def test_a_refusal_is_passed_on_if_nobody_else_can_take_the_request():
    async def check(gateway, one, two):
        status, headers, body, _ = await exchange(gateway.port, "POST", body=b"x")
        assert (status, headers[b"retry-after"], body) == (503, b"1", b"no\n")
        assert (one.requests, two.requests) == (1, 1)

    on_stage(check, {"status": 503}, {"status": 503})


def test_retries_are_a_share_of_requests_however_much_fails():
    async def check(gateway, *backends):
        for _ in range(50):
            await exchange(gateway.port)
        seen = sum(backend.requests for backend in backends)
        assert gateway.budget.retries == seen - 50 == 2 + 49 // 5, "the first request finds the budget full"
        gateway.check_invariants()

    options = {"budget": RetryBudget(0.2, per_second=0, most=2), "health": NEVER_OUT, "retries": RetryRule(3)}
    on_stage(check, *[{"die": "read"}] * 3, **options)
    options["retries"] = RetryRule(1)
    on_stage(lambda gateway, *backends: exchange(gateway.port), {"die": "read"}, {}, **options)


def test_a_kept_connection_that_its_backend_closed_says_nothing_about_the_backend():
    async def behave(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.readuntil(b"\r\n\r\n")  # closes with the second request on it

    async def main():
        hooks = Heard()
        async with bad_backend(behave) as port, before(port, hooks=hooks) as gateway:
            for _ in range(6):
                assert (await exchange(gateway.port))[2] == b"ok"
            assert hooks.endings == ["complete"] * 6 and gateway.budget.retries == 0
            assert (await exchange(gateway.port, "POST", body=b"x"))[0] == 502, "nobody knows whether it was done"
            assert (await exchange(gateway.port, "POST", body=b"x"))[0] == 200

    run(main)


@pytest.mark.parametrize("wait", [0, 30], ids=["in the middle", "before the head"])
def test_a_client_that_leaves_ends_the_request_at_its_backend(wait):
    hooks = Heard()

    async def check(gateway, backend):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET /stream?n=100000&gap=0.001&wait=%d HTTP/1.1\r\nHost: a\r\n\r\n" % wait)
        await until(lambda: backend.requests == 1)
        if not wait:
            await reader.readuntil(b".0\n")
        assert gateway.backends.loads() == [1]
        gateway.check_invariants()
        writer.close()
        await writer.wait_closed()
        await until(lambda: backend.counts["left"] == 1)
        assert hooks.endings == ["left"] and gateway.backends.loads() == [0] and backend.counts["complete"] == 0

    on_stage(check, hooks=hooks)


def test_load_counts_at_dispatch():
    async def check(gateway, *backends):
        waiting = [asyncio.create_task(exchange(gateway.port, target="/stream?wait=0.1")) for _ in range(9)]
        await until(lambda: sum(gateway.backends.loads()) == 9)
        assert gateway.backends.loads() == [3, 3, 3]
        await asyncio.gather(*waiting)

    on_stage(check, {}, {}, {}, policy=LeastLoaded())


def test_a_backend_that_failed_is_out_then_on_trial_then_back():
    async def main():
        backend = StreamingBackend()
        port = await backend.start()
        async with before(port, health=HealthRule(max_failures=2, pause=0.05)) as gateway:
            await backend.kill()
            assert [(await exchange(gateway.port))[0] for _ in range(3)] == [502, 502, 503]
            assert gateway.backends.loads() == [math.inf]
            await backend.start()
            await until(lambda: gateway.backends.loads() == [0])
            trial = asyncio.create_task(exchange(gateway.port, target="/stream?wait=0.1"))
            await until(lambda: gateway.backends.dispatcher.unanswered == [1])
            assert (await exchange(gateway.port))[0] == 503, "one at a time"
            assert (await trial)[0] == 200 and gateway.backends.loads() == [0]
        await backend.kill()

    run(main)


def test_silent_and_stalling_backends_are_given_up():
    async def main():
        async with saying(b"", stays=True) as port, before(port, limits=SHORT) as gateway:
            assert (await exchange(gateway.port))[0] == 504
        async with saying(CHUNKED[:60], stays=True) as port, before(port, limits=SHORT) as gateway:
            status, _, _, proper = await exchange(gateway.port)
            assert (status, proper) == (200, False)

    run(main)


def test_last_words_before_a_cut_are_for_chunked_responses_alone():
    class Last(Heard):
        def last_words(self, request, target):
            return b"\n\ndata: the end\n\n"

    async def main():
        for response in (CHUNKED, LENGTH):
            async with (
                saying(response[: -6 if response is CHUNKED else -2]) as port,
                before(port, hooks=Last()) as gateway,
            ):
                answer = await raw(gateway.port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                assert (b"data: the end" in answer) == (response is CHUNKED)
                assert not answer.endswith(b"0\r\n\r\n"), "and no proper end"

    run(main)
