"""A client that reads streams of server-sent events and costs as little as it can: it notes when bytes came, and parses
them once all streams have ended.

Where client and server share two cores, a client that parses as it reads is part of what is measured: of the openai
package's client one token takes longer than of the server's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import h11
import uvloop

HOST = "127.0.0.1"
_END = b"0\r\n\r\n"  # of a chunked body


class StreamFailed(RuntimeError):
    """A stream was cut, refused or not what was asked for; the message has what came."""


@dataclass(frozen=True)
class Stream:
    """One streamed completion, times in seconds of `time.perf_counter`; uvloop's own clock has milliseconds.

    Args:
        sent: when the request was.
        first: when the first bytes of an event came that has text.
        last: when the last event with text came.
        num_events: events with text.
        text: all of it.
        usage: as the server says, {} if it says nothing.
    """

    sent: float
    first: float
    last: float
    num_events: int
    text: str
    usage: dict


class _Reader(asyncio.Protocol):
    """Sends one request, and keeps each piece of the response with its time."""

    def __init__(self, request: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport, self.sent = transport, time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if data.endswith(_END) and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def stream(port: int, path: str, body: dict, timeout: float = 600.0) -> Stream:
    """Send one request with "stream" and read its response to the end.

    Raises:
        StreamFailed: if the status is not 200, or the response is cut short or has no event with text.
        TimeoutError: if it takes longer than `timeout` seconds.
    """
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(lambda: _Reader(request, loop), HOST, port)
    try:
        async with asyncio.timeout(timeout):
            await reader.done
    finally:
        transport.abort()
    return _parsed(reader)


def load(port: int, path: str, bodies: Sequence[dict], arrivals: Sequence[float] | None = None) -> list[Stream]:
    """Send all requests, whatever becomes of the others: at once, or each at its time, in seconds from now."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # half the processor time of asyncio's own
        return runner.run(_load(port, path, bodies, arrivals))


async def _load(port: int, path: str, bodies: Sequence[dict], arrivals: Sequence[float] | None) -> list[Stream]:
    clock = asyncio.get_running_loop().time
    start = clock()

    async def at(arrival: float, body: dict) -> Stream:
        await asyncio.sleep(start + arrival - clock())
        return await stream(port, path, body)

    return list(await asyncio.gather(*map(at, arrivals or [0.0] * len(bodies), bodies)))


def _parsed(reader: _Reader) -> Stream:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", HOST), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    events: list[tuple[float, dict]] = []
    status, complete, rest = 0, False, b""
    for when, piece in reader.pieces:
        connection.receive_data(piece)
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                *lines, rest = (rest + bytes(event.data)).split(b"\n")
                found = (line[6:].strip() for line in lines if line.startswith(b"data: "))
                events += [(when, json.loads(line)) for line in found if line != b"[DONE]"]
            elif isinstance(event, h11.EndOfMessage):
                complete = True
    if status != 200 or not complete or any("error" in said for _, said in events):
        raise StreamFailed(f"status {status}, complete: {complete}; {b''.join(piece for _, piece in reader.pieces)!r}")
    texts = [(when, text) for when, said in events if (text := _text(said))]
    if not texts:
        raise StreamFailed(f"no text in {len(events)} events")
    usage = next((said["usage"] for _, said in reversed(events) if said.get("usage")), {})
    return Stream(reader.sent, texts[0][0], texts[-1][0], len(texts), "".join(text for _, text in texts), usage)


def _text(event: dict) -> str:
    """What an event of /v1/completions or of /v1/chat/completions adds."""
    return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                   for choice in event.get("choices") or ())  # fmt: skip
