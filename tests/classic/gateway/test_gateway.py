"""What a gateway passes on, in which framing, and when."""

import asyncio
import shutil
from collections import Counter

import httpx
import pytest

from minilib.classic.gateway.gateway import Gateway
from minilib.classic.gateway.hooks import GatewayHooks
from minilib.classic.gateway.messages import GatewayError, Reply
from minilib.classic.gateway.rules import CheckRule, GatewayLimits, RetryRule
from minilib.mechanisms.balancing import RoundRobin
from tests.classic.gateway.gateway_cases import Heard, before, exchange, on_stage, saying
from tests.classic.http.http_cases import bad_backend, raw, run, until

pytestmark = pytest.mark.filterwarnings("error")


def test_responses_are_whole_and_connections_are_kept_on_both_sides():
    async def check(gateway, one, two):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", trust_env=False) as client:
            for number in range(8):
                answer = await client.get(f"/stream?n={number}&size=100")
                assert answer.status_code == 200 and len(answer.content) == 100 * number
        assert (one.counts["connections"], two.counts["connections"], one.requests, two.requests) == (1, 1, 4, 4)

    on_stage(check, {}, {})


@pytest.mark.parametrize("hold, first_seen_after", [(0, 1), (1 << 20, 5)])
def test_a_piece_reaches_the_client_before_the_next_is_made_unless_it_is_held(hold, first_seen_after):
    async def main():
        go, sent = asyncio.Event(), []

        async def behave(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for number in range(5):
                sent.append(number)
                writer.write(b"2\r\n#%d\r\n" % number)
                await writer.drain()
                if not hold:
                    await go.wait()
                    go.clear()
            writer.write(b"0\r\n\r\n")
            await writer.drain()

        async with bad_backend(behave) as port, before(port, hold=hold) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            seen = b""
            for number in range(5):
                while b"#%d" % number not in seen:
                    seen += await reader.read(4096)
                if number == 0:
                    assert len(sent) == first_seen_after
                go.set()
            writer.close()
            await writer.wait_closed()

    run(main)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
@pytest.mark.parametrize("size", [0, 1, 65536, 300_001])
def test_any_method_and_body(method, size):
    body, requests = b"x" * size, []

    async def main():
        async with (
            saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", stays=True, requests=requests) as port,
            before(port, limits=GatewayLimits(replay_body=65536)) as gateway,
        ):
            assert (await exchange(gateway.port, method, body=body))[0] == 200
        head = requests[0].lower()
        assert head.startswith(method.lower().encode() + b" /stream http/1.1\r\n")
        with_length = size or method in ("POST", "PUT", "PATCH")
        assert (b"content-length: %d\r\n" % size in head) == bool(with_length)

    run(main)


def test_bodies_of_every_kind_arrive_whole():
    async def check(gateway, backend):
        async def pieces():
            for _ in range(30):
                yield b"y" * 10_000

        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", trust_env=False) as client:
            for content, size in ((b"z" * 1000, 1000), (pieces(), 300_000), (b"z" * 500_000, 500_000)):
                before_it = backend.counts["body"]
                assert (await client.post("/stream", content=content)).status_code == 200
                assert backend.counts["body"] - before_it == size

    on_stage(check, limits=GatewayLimits(replay_body=100_000))


def test_headers_of_the_connection_end_here_and_others_pass():
    requests = []
    said = (
        b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nKeep-Alive: timeout=5\r\nX-Secret: 1\r\nConnection: x-secret\r\n"
        b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\nok"
    )
    asked = (
        b"POST /p?q=%20 HTTP/1.1\r\nHost: shop.example\r\nConnection: close, X-Mine, Content-Length, Host\r\n"
        b"X-Mine: 1\r\nX-Other: 2\r\nTE: trailers\r\nUpgrade: websocket\r\nX-Forwarded-For: 10.1.1.1\r\n"
        b"X-Forwarded-For: 10.2.2.2\r\nProxy-Authorization: secret\r\nContent-Length: 3\r\n\r\nabc"
    )

    async def main():
        async with saying(said, stays=True, requests=requests) as port, before(port, hooks=Heard()) as gateway:
            answer = await raw(gateway.port, asked)
        head = requests[0].lower()
        for kept in (b"host: shop.example", b"x-other: 2", b"content-length: 3", b"x-attempt: 1",
                     b"x-forwarded-for: 10.1.1.1, 10.2.2.2, 127.0.0.1", b"via: 1.1 minilib"):  # fmt: skip
            assert kept in head, kept
        for gone in (b"x-mine", b"upgrade", b"\r\nte:", b"proxy-authorization", b"connection:"):
            assert gone not in head, gone
        assert answer.startswith(b"HTTP/1.1 200 Fine\r\n") and answer.endswith(b"\r\n\r\nok")
        assert answer.lower().count(b"set-cookie: ") == 2 and b"x-seen: yes" in answer.lower()
        assert b"X-Secret" not in answer and b"Keep-Alive" not in answer and b"connection: close" in answer.lower()

    run(main)


@pytest.mark.parametrize(
    "said, method, expected",
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", (204, b"", None)),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "GET", (304, b"", b"9")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD", (200, b"", b"9")),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", "GET", (200, b"until the end", None)),
        (b"HTTP/1.0 200 OK\r\n\r\nold", "GET", (200, b"old", None)),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hint\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
         "GET", (200, b"x", b"1")),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n1\r\nx\r\n0\r\nT: 1\r\n\r\n",
         "GET", (200, b"x", None)),
    ],
    ids=["204", "304", "HEAD", "until close", "HTTP/1.0", "1xx first", "two lengths, trailers"],
)  # fmt: skip
def test_framing_of_responses(said, method, expected):
    async def main():
        async with saying(said) as port, before(port) as gateway:
            status, headers, body, proper = await exchange(gateway.port, method)
            assert (status, body, headers.get(b"content-length"), proper) == (*expected, True)

    run(main)


def test_old_clients_get_what_they_understand():
    async def check(gateway, backend):
        answer = await raw(gateway.port, b"GET /stream?n=2&size=4 HTTP/1.0\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n...0\n...1\n".replace(b"...", b"..")) and b"chunked" not in answer
        assert (b"host", f"127.0.0.1:{backend.port}".encode()) in backend.heads[0]

    on_stage(check)


def test_who_expects_100_gets_it_and_who_is_too_long_does_not():
    async def check(gateway, backend):
        head = b"POST /stream HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nConnection: close\r\n"
        head += b"Content-Length: %d\r\n\r\n"
        answer = await raw(gateway.port, head % 3, b"abc", pause=0.02)
        assert answer.startswith(b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 ") and backend.counts["body"] == 3
        assert not [value for name, value in backend.heads[0] if name == b"expect"]
        answer = await raw(gateway.port, head % 11)
        assert answer.startswith(b"HTTP/1.1 413 ") and backend.requests == 1
        answer = await raw(gateway.port, head.replace(b"100-continue", b"a pony") % 3)
        assert answer.startswith(b"HTTP/1.1 417 ")

    on_stage(check, limits=GatewayLimits(max_body=10))


def test_requests_in_a_row_are_answered_in_their_order():
    async def check(gateway, backend):
        requests = [b"GET /stream?n=1&size=%d HTTP/1.1\r\nHost: a\r\n\r\n" % size for size in (3, 4, 5)]
        last = requests[-1].replace(b"Host", b"Connection: close\r\nHost")
        answer = await raw(gateway.port, b"".join(requests[:2]) + last)
        assert [answer.index(body) for body in (b".0\n", b"..0\n", b"...0\n")]
        assert answer.count(b"HTTP/1.1 200") == 3 and backend.requests == 3

    on_stage(check)


def test_hooks_answer_refuse_and_fail(caplog):
    class Own(GatewayHooks):
        async def answer(self, request):
            if request.target == "/own":
                return Reply(200, b"mine", [(b"x-mine", b"1")])
            if request.target == "/no":
                raise GatewayError(403, "not you", retry_after=7)
            if request.target == "/broken":
                raise ConnectionError("the hook's own")
            return None

    def render(error):
        return Reply(error.status, b'{"error": "%s"}' % str(error).encode(), [(b"content-type", b"application/json")])

    async def check(gateway, backend):
        assert (await exchange(gateway.port, target="/own"))[::2] == (200, b"mine")
        status, headers, body, _ = await exchange(gateway.port, target="/no")
        assert (status, headers[b"retry-after"], body) == (403, b"7", b'{"error": "not you"}')
        assert (await exchange(gateway.port, target="/broken"))[0] == 500 and "the hook's own" in caplog.text
        assert (await exchange(gateway.port, "HEAD", target="/no"))[0] == 403
        assert backend.requests == 0

    on_stage(check, hooks=Own(), render_error=render)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("flags", [[], ["--http1.0"], ["--data-binary", "@/etc/hostname"], ["-I"], ["--raw"],
                                   ["-H", "Transfer-Encoding: chunked", "--data-binary", "x"]], ids=str)  # fmt: skip
def test_curl_is_served(flags):
    async def check(gateway, backend):
        command = ["curl", "-sS", "--noproxy", "*", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", *flags]
        curl = await asyncio.create_subprocess_exec(
            *command, f"http://127.0.0.1:{gateway.port}/stream", stdout=asyncio.subprocess.PIPE
        )
        assert (await curl.communicate())[0] == b"200" and curl.returncode == 0

    on_stage(check)


def test_fifty_clients_at_once_get_their_own():
    async def check(gateway, *backends):
        async def one(size):
            status, _, body, proper = await exchange(gateway.port, target=f"/stream?n=3&gap=0.002&size={size}")
            return status, len(body) == 3 * size, proper

        assert Counter(await asyncio.gather(*map(one, range(10, 60)))) == {(200, True, True): 50}
        assert [backend.requests for backend in backends] == [25, 25]

    on_stage(check, {}, {})


def test_options_that_make_no_sense_are_refused():
    makes = [lambda: Gateway(RoundRobin(), hold=-1), lambda: GatewayLimits(max_head=0), lambda: CheckRule("health")]
    makes += [lambda: GatewayLimits(stall_within=float("nan")), lambda: RetryRule(0), lambda: CheckRule(every=0)]
    for make in makes:
        with pytest.raises(ValueError):
            make()


def test_listening_twice_is_refused():
    async def check(gateway, backend):
        with pytest.raises(RuntimeError, match="listens on port"):
            await gateway.start()
        await until(lambda: not gateway._busy)

    on_stage(check)
