"""A client that reads streams, servers as processes, and ours beside others; stubs in the places of all servers."""

import asyncio
import contextlib
import json
import sys
import textwrap
import time

import psutil
import pytest

from tools.bench.peers import environments, models, servers
from tools.bench.peers.process import WorkerFailed
from tools.bench.server_process import ServerProcess
from tools.bench.sse_client import StreamFailed, load, stream

# A server that sends as many letters as it is asked for. Its argument says what else it does.
STUB = textwrap.dedent(r"""
    import asyncio, json, sys
    port, what = int(sys.argv[1]), sys.argv[2]
    letters = [chr(0x20000 + token) for token in range(50)]

    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            body = json.dumps({"data": [{"id": "stub"}]}).encode()
            writer.write(b"HTTP/1.1 200 \r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()
            return writer.close()
        length = int(head.lower().split("content-length: ")[1].split("\r")[0])
        asked = json.loads(await reader.readexactly(length))
        if what == "status":
            writer.write(b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n")
            return writer.close()
        text = "".join(letters[(place + (what == "other")) % 50] for place in range(asked["max_tokens"]))
        events = [{"choices": [{"text": letter}]} for letter in text[: 3 if what == "short" else None]]
        if what == "chat":
            events = [{"choices": [{"delta": {"role": "assistant"}}]}]
            events += [{"choices": [{"delta": {"content": letter}}]} for letter in text]
        if what == "error":
            events[1] = {"error": {"message": "no"}}
        events.append({"choices": [], "usage": {"completion_tokens": len(text)}})
        said = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        body, size = said.encode(), 7 if what == "pieces" else 100
        writer.write(b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(body), size):
            part = body[at : at + size]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(0)
        if what != "cut":
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", port)
        await server.serve_forever()

    if what == "ends":
        sys.exit("the library is not there")
    asyncio.run(main())
""")


def stub(what: str = "good", timeout: float = 30) -> ServerProcess:
    """A stub, which is ready."""
    return ServerProcess([sys.executable, "-c", STUB, "{port}", what], "/v1/models", timeout)


def ask(server: ServerProcess, **body):
    server.resume()
    return asyncio.run(stream(server.port, "/v1/completions", {"max_tokens": 5, **body}, timeout=20))


@pytest.mark.parametrize("what", ["good", "pieces", "chat"])
def test_a_stream_is_read_to_its_end_however_its_bytes_are_cut(what):
    with stub(what) as server:
        found = ask(server)
    assert found.text == "".join(models.letters(5)) and found.num_events == 5
    assert found.usage == {"completion_tokens": 5} and found.sent < found.first <= found.last


@pytest.mark.parametrize(("what", "message"), [("cut", "complete: False"), ("status", "status 500"),
                                               ("error", "status 200")])  # fmt: skip
def test_a_stream_that_fails_is_no_stream(what, message):
    with stub(what) as server, pytest.raises(StreamFailed, match=message):
        ask(server)


def test_requests_are_sent_at_their_times():
    with stub() as server:
        server.resume()
        found = load(server.port, "/", [{"max_tokens": 2}] * 3, [0.0, 0.2, 0.1])
    assert found[0].sent < found[2].sent < found[1].sent and [len(each.text) for each in found] == [2, 2, 2]


def test_a_server_is_ready_or_says_why_not_and_nothing_is_left():
    before = set(psutil.Process().children())  # of other tests, such as the server that forks ranks
    with pytest.raises(WorkerFailed, match="ended with 1: the library is not there"):
        stub("ends")
    with pytest.raises(WorkerFailed, match="not ready within 0.5 s"):
        ServerProcess([sys.executable, "-c", "import time; time.sleep(60)"], "/", timeout=0.5)
    with stub() as server:
        process = psutil.Process(server._process.pid)
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED:  # it stands still while nobody asks
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ask(server).num_events == 5
    assert not process.is_running() and set(psutil.Process().children()) <= before


def test_ours_stands_beside_others_turn_by_turn():
    failed, same = {}, {}
    with contextlib.ExitStack() as stack:
        kinds = {"ours": "good", "equal": "good", "others": "other", "cuts": "cut", "short": "short"}
        running = {name: stack.enter_context(stub(what)) for name, what in kinds.items()}
        bodies = {name: {"model": name} for name in running}
        same = dict.fromkeys(running, 0)
        rows = servers._beside(running, bodies, 50, streams=2, turns=2, failed=failed, same=same)
    json.dumps(rows)
    assert [row["server"] for row in rows] == ["equal", "others"] and set(failed) == {"cuts", "short"}
    assert "3 letters came for 128 tokens" in failed["short"] and "complete: False" in failed["cuts"]
    assert same == {"ours": 2, "equal": 2, "others": 0, "cuts": 0, "short": 0}
    for row in rows:
        low, high = row["ours_over_theirs"]["quartiles"]
        assert 0 < low <= row["ours_over_theirs"]["median"] <= high and row["first_over_theirs"]["median"] > 0


def test_every_server_has_pinned_packages_and_an_engine():
    assert set(servers.SERVERS) == set(environments.SERVER_PEERS)
    assert all("==" in package for peer in environments.SERVER_PEERS.values() for package in peer.packages)
    assert all(server.converted in (None, *environments.PEERS) for server in servers.SERVERS.values())
