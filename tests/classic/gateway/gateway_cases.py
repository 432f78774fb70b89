"""What the tests of the gateway share: a stage, a client that watches framing, backends that say given bytes."""

import asyncio
from contextlib import asynccontextmanager

import h11

from minilib.classic.gateway.gateway import Gateway
from minilib.classic.gateway.hooks import GatewayHooks
from minilib.classic.gateway.rules import GatewayLimits
from minilib.classic.gateway.streaming_backend import StreamingBackend
from minilib.mechanisms.balancing import HealthRule, RoundRobin
from tests.classic.http.http_cases import bad_backend, run

NEVER_OUT = HealthRule(max_failures=1000)


class Heard(GatewayHooks):
    """Remembers what it heard."""

    def __init__(self):
        self.dispatches, self.answers, self.endings = [], [], []

    def dispatched(self, request, target):
        self.dispatches.append(target)
        return [(b"x-attempt", b"%d" % len(request.tried))]

    def answered(self, request, target, status, headers):
        self.answers.append((target, status))
        return [(b"x-seen", b"yes")]

    def ended(self, request, target, ending):
        self.endings.append(ending.value)


@asynccontextmanager
async def before(*ports, policy=None, **options):
    """A gateway before these ports; its books must be in order at the end, and nothing in flight."""
    gateway = Gateway(policy or RoundRobin(), [("127.0.0.1", port) for port in ports], **options)
    await gateway.start()
    try:
        yield gateway
        gateway.check_invariants()
    finally:
        await gateway.kill()
        gateway.check_invariants()
        assert sum(gateway.backends.dispatcher.in_flight) == 0 and not gateway._connections


def on_stage(check, *backends, **options):
    """Run `check(gateway, *backends)` before streaming backends with these defaults."""

    async def main():
        served = [StreamingBackend(**defaults) for defaults in backends or ({},)]
        try:
            async with before(*[await backend.start() for backend in served], **options) as gateway:
                await check(gateway, *served)
        finally:
            for backend in served:
                await backend.kill()

    run(main)


async def exchange(port, method="GET", target="/stream", headers=(), body=b"", version=b"1.1"):
    """Status, headers, body, and whether the response ended properly, as h11's client sees it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        framing = [("content-length", str(len(body)))] if body else []
        request = h11.Request(method=method, target=target, headers=[("host", "a"), *framing, *headers])
        wire = h11.Connection(h11.CLIENT)
        data = wire.send(request) + wire.send(h11.Data(data=body)) + wire.send(h11.EndOfMessage())
        writer.write(data.replace(b" HTTP/1.1\r\n", b" HTTP/" + version + b"\r\n", 1))
        return await read_response(reader, wire)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def read_response(reader, wire):
    """As exchange, for a request that was sent."""
    head, body = None, b""
    while True:
        try:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await asyncio.wait_for(reader.read(65536), 10))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return head.status_code, dict(head.headers), body, True
            elif isinstance(event, h11.ConnectionClosed):
                return None, {}, b"", False
        except (h11.RemoteProtocolError, ConnectionResetError):
            return head and head.status_code, dict(head.headers) if head else {}, body, False


def saying(data, *, reset=False, stays=False, requests=None):
    """A backend that answers each request with these bytes, then closes, resets or stays."""

    async def behave(reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if requests is not None:
                requests.append(head)
            writer.write(data)
            await writer.drain()
            if reset:
                await asyncio.sleep(0.002)
                writer.transport.abort()
            if not stays:
                return

    return bad_backend(behave)


SHORT = GatewayLimits(
    idle_within=0.1, head_within=0.1, body_within=0.1, slowest_body=1e9, answer_within=0.2, stall_within=0.2,
    connect_within=0.2, send_within=0.3,
)  # fmt: skip
