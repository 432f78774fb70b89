"""An engine in a process of its own: the outputs of AsyncEngine, its refusals and its end, and nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.asynchronous.errors import EngineNotReady, EngineStopped, QueueFull, RequestAborted
from minilib.serving.request import InvalidRequest, SamplingParams
from minilib.serving.server.remote_engine import RemoteEngine
from tests.serving.server.engines import (
    KINDS,
    LIMIT,
    QUICK,
    assert_idle,
    breakable_engine,
    outputs,
    remote_engine,
    run,
    shared_memory,
    small_engine,
    until,
)

LONG = SamplingParams(40, temperature=0)


def test_outputs_are_those_of_async_engine():
    """With text, stop strings, samples, seeds and log-probabilities; alone and together, and after requests left."""

    async def main():
        make, before = partial(small_engine, num_pages=14, max_batch_tokens=5), shared_memory()
        async with AsyncEngine(make()) as near:
            expected = await asyncio.gather(*(outputs(near, *kind) for kind in KINDS))
            described = near.description
        async with remote_engine(make) as far:
            assert far.description == described
            assert await asyncio.gather(*(outputs(far, *kind) for kind in KINDS)) == expected
            leaving = [await far.submit(*kind) for kind in KINDS]
            again = asyncio.gather(*(outputs(far, *kind) for kind in KINDS))
            for count, stream in enumerate(leaving):
                for _ in range(count % 3):
                    await anext(stream)
                stream.close()
            assert await again == expected
            await assert_idle(far)
            last = await far.submit((9, 10), LONG)
            await anext(last)
            last.close()
            await until(lambda: far.status().num_free_pages == far.status().num_pages)  # also without another step
            found = far.status()
        assert found.generated_tokens >= 2 * sum(len(made) for made in expected) and found.restarts == 0
        assert shared_memory() <= before

    run(main())


def test_refusals_and_the_end():
    async def main():
        far = RemoteEngine(partial(breakable_engine, max_sequences=1), max_waiting=2, supervision=QUICK)
        starting = asyncio.create_task(far.start())
        await asyncio.sleep(0)
        assert far.status().state == "starting"
        with pytest.raises(EngineNotReady, match="loading its model") as early:
            await far.submit((9,))
        assert early.value.retry_after > 0
        await starting
        for bad in [(), (97,), (1.5,), 3, tuple(range(8, 37)) * 4]:
            with pytest.raises(InvalidRequest):
                await far.submit(bad)
        with pytest.raises(TypeError, match="no_such_option") as refusal:
            await far.submit((9,), LONG, no_such_option=1)
        assert "engine_loop.py" in str(refusal.value.__cause__), "the traceback of the other process"
        with pytest.raises((AttributeError, TypeError)):  # what does not pickle stays here
            await far.submit((9,), LONG, scheduling=lambda: None)
        assert far.num_waiting == 0
        with pytest.raises(RuntimeError, match="the event loop that it was started in"), ThreadPoolExecutor(1) as other:
            other.submit(asyncio.run, far.submit((9,))).result(LIMIT)
        streams = [await far.submit((9, 10), LONG, request_id="a")]
        await until(lambda: far.status().num_running)
        with pytest.raises(InvalidRequest, match="'a' is being served already"):
            await far.submit((9, 10), LONG, request_id="a")
        streams += [await far.submit((9, 10, number), LONG, request_id=str(number)) for number in (11, 12)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            await far.submit((9,), LONG)
        streams.pop().close()
        streams.append(await far.submit((9, 11), LONG, request_id="12"))  # the place and the name are free at once
        draining = asyncio.create_task(far.drain())
        await until(lambda: far.status().state == "draining")
        with pytest.raises(EngineStopped, match="draining; send the request to another engine"):
            await far.submit((9,))
        await draining
        assert [len([o async for o in stream]) for stream in streams] == [40, 40, 40]
        assert far.status().state == "stopped" and far.status().num_running == 0
        with pytest.raises(EngineStopped, match="has stopped"):
            await far.submit((9,))

    run(main())


@pytest.mark.parametrize("end", ["drain", "shutdown"])
def test_the_rest_is_aborted_by_name(end):
    async def main():
        async with remote_engine() as far:
            stream = await far.submit((9, 10), SamplingParams(60, temperature=0))
            first = await anext(stream)
            assert first.token_id is not None
            await (far.drain(0.01) if end == "drain" else far.shutdown())
            with pytest.raises(RequestAborted, match="before this request was finished"):
                while await stream.get_many():
                    pass

    run(main())


def test_a_start_that_fails_raises_its_own_error():
    def missing():
        return Path("/there/is/no/such/checkpoint").read_bytes()

    async def main():
        with pytest.raises(FileNotFoundError, match="no/such/checkpoint") as failure:
            async with RemoteEngine(missing):
                pass
        assert "in missing" in str(failure.value.__cause__)
        with pytest.raises(ValueError, match="max_waiting must be a whole number ≥ 1"):
            RemoteEngine(missing, 0)

    run(main())


def test_the_process_ends_with_the_one_that_started_it():
    """Also in the midst of a step that never ends."""
    code = (
        "import asyncio\n"
        "from tests.serving.server.engines import HANG, remote_engine\n"
        "async def main():\n"
        "    async with remote_engine() as far:\n"
        "        await far.submit((9, HANG))\n"
        "        print(far._process.pid, flush=True)\n"
        "        await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        engine = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    engine.wait(LIMIT)


def test_a_server_that_names_a_checkpoint_loads_no_torch():
    modules = "minilib.serving.server.remote_engine, minilib.serving.server.checkpoint_engine"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
