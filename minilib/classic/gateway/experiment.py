"""What proxies do with streams, retries, connections and slow clients: counts at the backends behind each of them.

Clients and backends share one event loop, so that "the first chunk was here before the second was made" is an order of
events and no comparison of clocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import h11

from minilib.classic.gateway.backends import becomes
from minilib.classic.gateway.connection import HttpConnection, PeerGone
from minilib.classic.gateway.proxies import Options, available, real_proxy
from minilib.classic.gateway.streaming_backend import StreamingBackend
from minilib.classic.http.experiment import run_in_thread
from minilib.classic.http.wire import HOST, Result

HTTP_1_1 = {"location": 'proxy_http_version 1.1; proxy_set_header Connection "";', "upstream": "keepalive 8;"}
GZIP = {**HTTP_1_1, "location": HTTP_1_1["location"] + "gzip on; gzip_min_length 0; gzip_types *;"}
SETUPS: dict[str, tuple[str, Options, dict]] = {  # name → proxy, its options, options of Gateway
    "nobody": ("nobody", {}, {}),
    "gateway": ("gateway", {}, {}),
    "gateway, held": ("gateway", {}, {"hold": 1 << 20}),
    "nginx": ("nginx", {}, {}),
    "nginx, HTTP/1.1": ("nginx", HTTP_1_1, {}),
    "nginx, unbuffered": ("nginx", {"location": "proxy_buffering off;"}, {}),
    "nginx, HTTP/1.1, gzip": ("nginx", GZIP, {}),
    "haproxy": ("haproxy", {}, {}),
    "haproxy, no delay": ("haproxy", {"location": "option http-no-delay"}, {}),
}
TROUBLES = {
    "refuses connections": None,
    "closes, request unread": {"die": "accept"},
    "closes, request read": {"die": "read"},
    "says 503": {"status": 503},
}


@dataclass
class Received:
    """A response as a client saw it.

    Attributes:
        status: None if there was no response.
        body: bytes of it.
        proper: whether it ended as a whole response does.
        made: chunks that the backend had made when each chunk came.
        seconds: from the request to the first byte of the body, and to the end.
    """

    status: int | None = None
    body: bytes = b""
    proper: bool = False
    made: tuple[int, ...] = ()
    seconds: tuple[float, float] = (0.0, 0.0)


async def fetch(
    port: int, target: str, backend: StreamingBackend | None = None, method: str = "GET", headers: Sequence = ()
) -> Received:
    """Send one request on a new connection; a POST has a body of 4 bytes."""
    clock, said = asyncio.get_running_loop().time, Received()
    reader, writer = await asyncio.open_connection(HOST, port)
    connection, since, first = HttpConnection(reader, writer, h11.CLIENT, 65536), clock(), 0.0
    body = b"data" if method == "POST" else b""
    length = [(b"content-length", b"4")] if body else []
    request = h11.Request(method=method, target=target, headers=[(b"host", b"test"), *length, *headers])
    try:
        await connection.send(request, h11.Data(data=body), h11.EndOfMessage())
        while not isinstance(event := await connection.receive(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                said.status = event.status_code
            elif isinstance(event, h11.Data):
                first, said.body = first or clock() - since, said.body + event.data
                said.made += (backend.counts["chunks"],) if backend else ()
        said.proper = True
    except (PeerGone, h11.RemoteProtocolError, OSError):
        pass
    finally:
        connection.abort()
    said.seconds = (first, clock() - since)
    return said


@asynccontextmanager
async def behind(setup: str, *defaults: dict | None, slow: int | None = None):
    """A proxy before streaming backends with these defaults, None for one that is down; yields proxy and backends."""
    name, options, ours = SETUPS[setup]
    options = options if slow is None else {**options, "slow": str(slow)}
    async with AsyncExitStack() as stack:
        backends = [StreamingBackend(**(each or {})) for each in defaults]
        for backend, each in zip(backends, defaults, strict=True):
            await backend.start()
            stack.push_async_callback(backend.kill)
            if each is None:
                await backend.kill()
        ports = [backend.port for backend in backends]
        yield await stack.enter_async_context(real_proxy(name, ports, options, **ours)), backends


async def streamed(setup: str, n: int = 6) -> Received:
    """A stream of n chunks, one each 15 ms; `made[0]` is 1 if the first chunk came before the second was made."""
    async with behind(setup, {"n": n, "gap": 0.015, "size": 64}) as (proxy, (backend,)):
        return await fetch(proxy.port, "/", backend, headers=[(b"accept-encoding", b"gzip")])


async def connections_for(setup: str, requests: int = 8) -> int:
    """Connections that a backend sees for requests that come one after the other on new connections of clients."""
    async with behind(setup, {}) as (proxy, (backend,)):
        await fetch(proxy.port, "/")
        before = backend.counts["connections"]
        for _ in range(requests):
            await fetch(proxy.port, "/")
        return backend.counts["connections"] - before


async def sent_again(setup: str, method: str, trouble: dict | None) -> tuple[int, int | None]:
    """Backends of three, all in the same trouble, that saw one request; and the status that the client got.

    A backend that is down sees nothing: for those the third is well, and the count is 1 if the request came there.
    """
    defaults = [trouble, trouble, {} if trouble is None else trouble]
    async with behind(setup, *defaults) as (proxy, backends):
        said = await fetch(proxy.port, "/", method=method)
        return sum(backend.requests + bool(backend.counts["accepted"]) for backend in backends), said.status


async def cut_short(setup: str, version: bytes = b"1.1") -> tuple[bool, int]:
    """A backend that dies after 2 of 5 chunks: whether the client could tell, and how many chunks it got.

    A client of HTTP/1.0 has no chunks: the end of the connection is the end of the body, if nothing resets it.
    """
    async with behind(setup, {"n": 5, "die": 2, "gap": 0.005}) as (proxy, _):
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        writer.write(b"GET / HTTP/" + version + b"\r\nHost: a\r\nConnection: close\r\n\r\n")
        received, reset = b"", False
        try:
            while data := await reader.read(65536):
                received += data
        except ConnectionError:
            reset = True
        finally:
            writer.transport.abort()
        ended = received.endswith(b"0\r\n\r\n") if b"chunked" in received.lower() else not reset
        return not ended or not received.startswith(b"HTTP/1.1 200"), received.count(b"....") // 3


async def left_behind(setup: str) -> tuple[bool, int]:
    """A client that leaves after the first of 80 chunks: whether the backend was told, and the chunks it had made."""
    async with behind(setup, {"n": 80, "gap": 0.005}) as (proxy, (backend,)):
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b".0\n")
        writer.close()
        await becomes(lambda: bool(backend.counts["left"] or backend.counts["complete"]), 5)
        return backend.counts["left"] == 1, backend.counts["chunks"]


async def moved_away(setup: str) -> tuple[bool, bool]:
    """New backends while a stream runs: whether the stream comes to its end, and a new request to the new backend."""
    async with behind(setup, {"n": 60, "gap": 0.005}, {}) as (proxy, (old, new)):
        proxy.move([old.port])
        await asyncio.sleep(0.2)  # the reload before the one that is looked at
        running = asyncio.create_task(fetch(proxy.port, "/"))
        await becomes(lambda: old.requests == 1, 5)
        proxy.move([new.port])

        async def comes() -> bool:
            with suppress(OSError):
                await fetch(proxy.port, "/?n=1")
            return new.requests > 0

        came = False
        for _ in range(40):
            came = came or await comes()
            await asyncio.sleep(0.01)
        return (await running).proper, came


async def slow_heads(setup: str, connections: int = 5, slow: int = 1) -> tuple[int, int]:
    """Clients that send a byte of their head each 50 ms, a second too long: how many are closed, and how many told."""
    async with behind(setup, {}, slow=slow) as (proxy, _):

        async def drip() -> bytes | None:
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            received = asyncio.create_task(reader.read())
            with suppress(OSError):
                for number in range(int((slow + 1) / 0.05)):
                    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nA: "[number : number + 1] or b"a")
                    await asyncio.wait({received}, timeout=0.05)
                    if received.done():
                        break
            closed = received.done()
            writer.transport.abort()
            (answer,) = await asyncio.gather(received, return_exceptions=True)
            return (answer if isinstance(answer, bytes) else b"") if closed else None

        answers = await asyncio.gather(*[drip() for _ in range(connections)])
        return sum(answer is not None for answer in answers), sum(b" 408 " in (answer or b"") for answer in answers)


def setups() -> list[str]:
    """Names of SETUPS whose proxies are on this machine."""
    here = available()
    return [name for name, (proxy, _, _) in SETUPS.items() if proxy in here]


def compare_proxies(row: Callable[[str], Coroutine[Any, Any, Result]], names: Sequence[str] = ()) -> dict[str, Result]:
    """One row of the comparison, all setups at once, in an event loop of its own.

    Args:
        row: such as `streamed`, `connections_for`, `left_behind`; a lambda for one with arguments.
        names: of SETUPS; all that are on this machine if none is given.

    Raises:
        KeyError: if there is no setup of a name.
    """
    chosen = list(names) or setups()
    unknown = set(chosen) - SETUPS.keys()
    if unknown:
        raise KeyError(f"no setup {sorted(unknown)}; there are {list(SETUPS)}")

    async def all_at_once() -> list[Result]:
        return await asyncio.gather(*map(row, chosen))

    return dict(zip(chosen, run_in_thread(all_at_once), strict=True))
