"""What the tests of HTTP share: a loop that must be left clean, clients of other make, backends that misbehave."""

import asyncio
import gc
import http.client
from contextlib import asynccontextmanager

import psutil

LIMIT = 20.0  # seconds that a test's loop may take


def run(main):
    """Run a coroutine function in a new loop; no task and no file may be left when it returns."""

    async def checked():
        async with asyncio.timeout(LIMIT):
            await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {left}"

    before = psutil.Process().num_fds()
    gc.freeze()  # only what comes from here on is looked through below, which is quick
    try:
        asyncio.run(checked())
        gc.collect()  # a socket or a coroutine that nobody closed warns now
    finally:
        gc.unfreeze()
    assert psutil.Process().num_fds() == before, "files are left open"


async def raw(port, *pieces, pause=0.0, half_close=False):
    """Send bytes as they are, in pieces; returns all that comes back until the server closes, or resets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        if half_close:
            writer.write_eof()
        while piece := await asyncio.wait_for(reader.read(1 << 16), LIMIT):
            received += piece
    except ConnectionResetError:
        pass
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return received


async def ask(port, *targets, method="GET"):
    """Statuses and bodies from the standard library's client, all on one connection."""

    def blocking():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        answers = []
        for target in targets:
            connection.request(method, target)
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        connection.close()
        return answers

    return await asyncio.to_thread(blocking)


async def until(condition):
    """Wait until something is so."""
    while not condition():
        await asyncio.sleep(0.001)


@asynccontextmanager
async def held(*backends):
    """Keep backends from starting a request, so that queues build up."""
    for backend in backends:
        await backend._worker.acquire()
    try:
        yield
    finally:
        for backend in backends:
            backend._free_at = asyncio.get_running_loop().time()
            backend._worker.release()


@asynccontextmanager
async def bad_backend(behave):
    """A server that does `behave(reader, writer)` with each connection; yields its port."""
    tasks = set()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await behave(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
