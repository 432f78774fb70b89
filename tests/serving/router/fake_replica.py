"""A replica that speaks the contract and has no model: its tokens are a function of the prompt, so wrong ones show.

Run as a program it is a process that can be killed: it writes its port to stdout, and one line for each request that
it begins to a journal. GET /control?ready=0 makes it not ready; SIGTERM makes it drain and exit with 0.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
from pathlib import Path
from urllib.parse import parse_qs

import h11


def tokens_of(prompt: str, count: int) -> list[str]:
    """The tokens that any replica must generate."""
    return [hashlib.sha256(f"{prompt}/{number}".encode()).hexdigest()[:6] for number in range(count)]


class FakeReplica:
    """Answers on 127.0.0.1; a token takes `pace` seconds."""

    def __init__(self, name: str, fingerprint: str = "good", pace: float = 0.0, journal: str | None = None) -> None:
        self.name, self.fingerprint, self.pace, self.journal = name, fingerprint, pace, journal
        self.ready, self.begun, self.running, self.port = True, [], 0, 0
        self.full = False  # answers 429
        self.hangs = False  # answers nothing
        self.api_key = None  # that models are shown for
        self.before_tokens = 0.0  # seconds
        self._tasks = set()

    async def start(self, port: int = 0) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def kill(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader, writer) -> None:
        self._tasks.add(asyncio.current_task())
        wire = h11.Connection(h11.SERVER)
        try:
            while await self._next(wire, reader, writer):
                wire.start_next_cycle()
        except (ConnectionError, h11.ProtocolError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(asyncio.current_task())
            writer.transport.abort()

    async def _next(self, wire, reader, writer) -> bool:
        head, body = None, b""
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        await self._answer(head, body, lambda *events: self._send(wire, writer, events))
        return wire.our_state is h11.DONE

    async def _send(self, wire, writer, events) -> None:
        writer.write(b"".join(wire.send(event) for event in events))
        await writer.drain()

    async def _answer(self, head, body, send) -> None:
        path, _, query = head.target.decode().partition("?")
        if self.hangs:
            await asyncio.sleep(60)
        if path == "/control":
            self.ready = parse_qs(query)["ready"] == ["1"]
        if path in ("/health", "/control"):
            return await self._json(send, 200, {})
        if path == "/ready" or not self.ready:
            state = {"state": "ready" if self.ready else "draining"}
            return await self._json(send, 200 if self.ready else 503, state)
        if path == "/v1/models":
            if self.api_key and dict(head.headers).get(b"authorization") != f"Bearer {self.api_key}".encode():
                return await self._json(send, 401, {"error": {"message": "no key"}})
            model = {"id": "tiny", "object": "model", "fingerprint": self.fingerprint, "max_model_len": 512}
            return await self._json(send, 200, {"object": "list", "data": [model]})
        if self.full:
            return await self._json(send, 429, {"error": {"message": "full", "code": "queue_full"}})
        try:
            asked = json.loads(body)
            prompt, count = str(asked["prompt"]), int(asked.get("max_tokens", 4))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            return await self._json(send, 400, {"error": {"message": str(error), "code": "unreadable"}})
        return await self._generate(prompt, count, asked.get("stream"), dict(head.headers), send)

    async def _json(self, send, status, content) -> None:
        encoded = json.dumps(content).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(encoded))),
            ("x-replica", self.name),
        ]
        headers += [("retry-after", "1")] if status in (429, 503) else []
        await send(h11.Response(status_code=status, headers=headers), h11.Data(data=encoded), h11.EndOfMessage())

    async def _generate(self, prompt, count, stream, headers, send) -> None:
        self._begin(headers.get(b"x-request-id", b"-").decode())
        try:
            if not stream:
                await asyncio.sleep(self.before_tokens + self.pace * count)
                text = " ".join(tokens_of(prompt, count))
                return await self._json(send, 200, {"choices": [{"text": text, "finish_reason": "length"}]})
            kind = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked"), ("x-replica", self.name)]
            await send(h11.Response(status_code=200, headers=kind))
            await asyncio.sleep(self.before_tokens)
            for token in tokens_of(prompt, count):
                await asyncio.sleep(self.pace)
                await send(h11.Data(data=f"data: {json.dumps({'choices': [{'text': token}]})}\n\n".encode()))
            await send(h11.Data(data=b"data: [DONE]\n\n"), h11.EndOfMessage())
        finally:
            self.running -= 1

    def _begin(self, request_id: str) -> None:
        self.begun.append(request_id)
        self.running += 1
        if self.journal:
            with Path(self.journal).open("a", encoding="utf-8") as journal:
                journal.write(f"{request_id} {self.name}\n")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="replica")
    parser.add_argument("--fingerprint", default="good")
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--journal")
    parser.add_argument("--wait", action="store_true", help="for the end of stdin before it listens")
    asked = parser.parse_args()
    replica = FakeReplica(asked.name, asked.fingerprint, asked.pace, asked.journal)
    term = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, term.set)
    if asked.wait:
        os.read(0, 1)
    os.write(1, f"{await replica.start(asked.port)}\n".encode())
    await term.wait()
    replica.ready = False
    while replica.running:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)  # the last bytes leave


if __name__ == "__main__":
    asyncio.run(main())
