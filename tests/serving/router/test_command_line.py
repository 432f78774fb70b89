"""The router as a program, and the ways to say where replicas are."""

import asyncio
import re
import signal
import subprocess
import sys

import httpx
import pytest

from minilib.mechanisms.balancing import TwoChoices
from minilib.serving.router.__main__ import parse
from minilib.serving.router.discovery import ReplicaAddress, in_dns, in_file, in_list
from minilib.serving.router.prefix_aware import BySession, PrefixAware
from minilib.serving.router.router import ReplicaRouter
from tests.serving.router.fake_replica import FakeReplica, tokens_of


def test_the_program_routes_and_drains_at_sigterm():
    async def drill():
        replica = FakeReplica("r", pace=0.01)
        await replica.start()
        arguments = ["-m", "minilib.serving.router", "--replica", replica.url, "--port", "0"]
        program = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=subprocess.PIPE)
        try:
            while not (line := re.search(rb"routes on (\S+) by prefix_aware", await program.stderr.readline())):
                pass
            async with httpx.AsyncClient(base_url=line[1].decode(), trust_env=False, timeout=10) as client:
                asked = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 20})
                answer = asyncio.create_task(asked)
                while not replica.running:
                    await asyncio.sleep(0.005)
                program.send_signal(signal.SIGTERM)
                assert (await answer).json()["choices"][0]["text"].split() == tokens_of("x", 20)
            assert await program.wait() == 0
        finally:
            if program.returncode is None:
                program.kill()
                await program.wait()
            await replica.kill()

    asyncio.run(asyncio.wait_for(drill(), 30))


def test_options_make_policies():
    asked = parse(["--replica", "http://h:1", "--blocks", "7", "--routers", "2"])
    assert isinstance(asked.chosen, PrefixAware) and (asked.chosen.held.max_blocks, asked.chosen.gap) == (7, 2)
    assert isinstance(parse(["--replica", "http://h:1", "--policy", "two_choices"]).chosen, TwoChoices)
    assert isinstance(parse(["--replica-dns", "h:1", "--policy", "sticky"]).chosen, BySession)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required"),
        (["--replica", "https://h"], "http://host:port"),
        (["--replica", "http://h:1/v1"], "without a path"),
        (["--replica-dns", "h"], "a name, a colon and a port"),
        (["--replica", "http://h:1", "--replica-file", "f"], "not allowed"),
        (["--replica", "http://h:1", "--policy", "best"], "invalid choice"),
        (["--replica", "http://h:1", "--routers", "0"], "num_routers ≥ 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_addresses(tmp_path):
    listed = tmp_path / "replicas"
    listed.write_text("# two\nhttp://a:1\n\nhttp://b\nhttp://a:1/\n")
    assert asyncio.run(in_file(listed)()) == [("a", 1), ("b", 80)]
    assert asyncio.run(in_list(["http://a:1", "http://a:1", "http://[::1]:2"])()) == [("a", 1), ("::1", 2)]
    assert str(ReplicaAddress("::1", 2)) == "http://[::1]:2"
    assert ("127.0.0.1", 5) in asyncio.run(in_dns("localhost", 5)())


@pytest.mark.parametrize("every", [0, -1, float("nan")])
def test_rounds_take_time(every):
    with pytest.raises(ValueError, match="above 0"):
        ReplicaRouter(in_list([]), every=every)
