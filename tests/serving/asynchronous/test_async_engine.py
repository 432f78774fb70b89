"""The engine behind asyncio: the tokens are those of LLM, who leaves frees pages, and nobody waits for ever."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from contextlib import aclosing, contextmanager, suppress

import numpy as np
import pytest

from minilib.numbers.records import ROOT
from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.asynchronous.errors import EngineDied, EngineStopped, QueueFull, RequestAborted
from minilib.serving.llm import LLM
from minilib.serving.request import InvalidRequest, SamplingParams
from tests.serving import faults
from tests.serving.asynchronous.test_fault_isolation import breaking, ran
from tests.serving.served import assert_idle, engine, greedy, likeliest, models, prompt

COUNT = 8
LONG = likeliest(200)
LIMIT = 150  # seconds after which a test that hangs fails; a busy machine may stop it for a minute


def run(main):
    """Run a coroutine; it may not hang, nor leave a thread."""
    before = set(threading.enumerate())

    async def limited():
        async with asyncio.timeout(LIMIT):
            return await main

    result = asyncio.run(limited())
    left = {thread for thread in threading.enumerate() if thread.name == "engine steps"} - before
    assert not left
    return result


async def tokens(stream):
    """The tokens of each sample, as one gets them from LLM."""
    found = {}
    async for output in stream:
        found.setdefault(output.sample, []).append(output.token_id)
    return [tuple(found[sample]) for sample in sorted(found)]


async def complete(served, *request, **options):
    return await tokens(await served.submit(*request, **options))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


class Gate:
    """Holds an engine's thread before its next batch, so that a test decides what comes first.

    It is open at first.
    """

    def __init__(self, served):
        self.closed, self.steps, self._open = False, 0, threading.Event()
        self._open.set()
        forward = served._forward

        def gated(*inputs):
            self._open.wait(LIMIT)
            self.steps += 1
            return forward(*inputs)

        served._forward = gated

    def close(self):
        self._open.clear()

    def open(self):
        self._open.set()


@contextmanager
def gated(served):
    gate = Gate(served)
    gate.close()
    try:
        yield gate
    finally:
        gate.open()


def test_the_tokens_are_those_of_llm():
    kinds = [
        (prompt(length), SamplingParams(COUNT, heat, seed=length, n=n))
        for length, heat, n in [(3, 0, 1), (17, 1.0, 3), (40, 0, 2), (1, 0.7, 1), (64, 0, 1), (5, 2.0, 1)]
    ]
    expected = [LLM(models()[1], num_pages=64).generate([text], params)[0] for text, params in kinds]

    async def main():
        async with AsyncEngine(engine()) as served:
            found = await asyncio.gather(*(complete(served, *kind) for kind in kinds))
            served.check_invariants()
        assert_idle(served.engine)
        return found

    assert run(main()) == [[tuple(completion.token_ids) for completion in samples] for samples in expected]


def test_a_packed_model_in_another_thread():
    """Recorded steps and compiled kernels belong to the thread that steps."""

    async def main():
        served = faults.faulty_engine(40, 4, compiled=True)
        async with AsyncEngine(served) as behind:
            return await asyncio.gather(*(complete(behind, (9, 10, n), likeliest(COUNT)) for n in range(11, 20)))

    together = run(main())
    served = faults.faulty_engine(40, 4, compiled=True)
    for n, found in zip(range(11, 20), together, strict=True):
        served.add_request("a", (9, 10, n), likeliest(COUNT))
        expected = []
        while served.has_unfinished:
            expected += [output.token_id for output in served.step()]
        assert found == [tuple(expected)]


def test_a_stream_has_text_and_reasons():
    async def main():
        served = faults.faulty_engine(40, 4, tokenizer=faults.Tokenizer())
        async with AsyncEngine(served) as behind:
            stream = await behind.submit(np.array([9, 10]), likeliest(3), request_id="mine")
            outputs = [output async for output in stream]
            assert stream.request_id == "mine"
            assert [output async for output in stream] == []
        return outputs

    outputs = run(main())
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert "".join(output.text for output in outputs) == faults.Tokenizer().decode([o.token_id for o in outputs])


def test_several_event_loops_share_one_engine():
    served, found = AsyncEngine(engine()), {}

    def client(length):
        found[length] = asyncio.run(complete(served, prompt(length), likeliest(COUNT)))

    clients = [threading.Thread(target=client, args=(length,)) for length in range(5, 12)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(LIMIT)
    served.check_invariants()
    served.stop()
    assert found == {length: [greedy(prompt(length), COUNT)] for length in range(5, 12)}
    assert_idle(served.engine)


# Leaving early


async def leave_by_cancel(served, submitted):
    async def listen():
        stream = await served.submit(prompt(40), LONG)
        async for _ in stream:
            submitted.set()

    task = asyncio.create_task(listen())
    await submitted.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def leave_by_cancel_elsewhere(served, submitted):
    """The task is cancelled while it waits for something else than the next output."""

    async def listen():
        async for _ in await served.submit(prompt(40), LONG):
            submitted.set()
            await asyncio.sleep(LIMIT)

    task = asyncio.create_task(listen())
    await submitted.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def leave_by_break(served, submitted):
    async for _ in await served.submit(prompt(40), LONG):
        submitted.set()
        break


async def leave_by_closing(served, submitted):
    async with aclosing(await served.submit(prompt(40), LONG)) as stream:
        await anext(stream)
        submitted.set()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_by_timeout(served, submitted):
    stream = await served.submit(prompt(40), LONG)
    with suppress(TimeoutError):
        async with asyncio.timeout(60) as limit:
            async for _ in stream:
                if not submitted.is_set():  # its time begins with the first token, however late that comes
                    submitted.set()
                    limit.reschedule(asyncio.get_running_loop().time() + 0.05)


async def leave_unread(served, submitted):
    await served.submit(prompt(40), LONG)
    submitted.set()


LEAVING = [leave_by_cancel, leave_by_cancel_elsewhere, leave_by_break, leave_by_closing, leave_by_timeout, leave_unread]


@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
@pytest.mark.parametrize("others", [0, 2])
def test_who_leaves_early_frees_pages_within_a_step(leave, others):
    async def main():
        async with AsyncEngine(engine(200, 4)) as served:
            rest = [asyncio.create_task(complete(served, prompt(9 + n), likeliest(40))) for n in range(others)]
            await asyncio.sleep(0)
            submitted = asyncio.Event()
            await leave(served, submitted)
            gc.collect()
            assert submitted.is_set()
            served.check_invariants()  # between two steps: whatever was asked before is done
            names = [sequence.request_id for sequence in served.engine.scheduler.running]
            assert len(names) <= others and served.num_waiting == 0
            for n, task in enumerate(rest):
                assert await task == [greedy(prompt(9 + n), 40)]
        assert_idle(served.engine)

    run(main())


def test_a_request_that_is_cancelled_while_it_is_submitted():
    """In the middle of a step, so that the engine has not taken it yet."""

    async def main():
        served = engine()
        with gated(served) as gate:
            async with AsyncEngine(served) as behind:
                first = asyncio.create_task(complete(behind, prompt(9), likeliest(COUNT)))
                await until(lambda: served.requests)
                second = asyncio.create_task(complete(behind, prompt(10), likeliest(COUNT)))
                await until(lambda: behind.num_waiting == 2)
                second.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await second
                gate.open()
                assert await first == [greedy(prompt(9), COUNT)]
                behind.check_invariants()
                assert behind.num_waiting == 0
        assert_idle(served)

    run(main())


# The bounded queue


def test_a_full_queue_refuses_by_name_and_serves_the_others():
    async def main():
        served = engine(max_sequences=1)
        with gated(served) as gate:
            async with AsyncEngine(served, max_waiting=3) as behind:
                first = asyncio.create_task(complete(behind, prompt(9), likeliest(COUNT)))
                await until(lambda: served.scheduler.running)
                waiting = [asyncio.create_task(complete(behind, prompt(10 + n), likeliest(COUNT))) for n in range(2)]
                await until(lambda: behind.num_waiting == 3)
                with pytest.raises(QueueFull, match="3 requests wait already.*later.*larger max_waiting") as refusal:
                    await behind.submit(prompt(9), likeliest(COUNT))
                assert refusal.value.waiting == 3
                gate.open()
                assert await first == [greedy(prompt(9), COUNT)]
                for n, task in enumerate(waiting):
                    assert await task == [greedy(prompt(10 + n), COUNT)]
                behind.check_invariants()
                assert behind.num_waiting == 0
                assert await complete(behind, prompt(9), likeliest(COUNT)) == [greedy(prompt(9), COUNT)]

    run(main())


def test_requests_that_had_to_give_way_do_not_count_as_waiting():
    async def main():
        served, gave_way = engine(20, 2), []
        preempt = served.scheduler.preempt
        served.scheduler.preempt = lambda sequence: (preempt(sequence), gave_way.append(sequence.request_id))
        async with AsyncEngine(served, max_waiting=1) as behind:
            first = asyncio.create_task(complete(behind, prompt(9), likeliest(32)))
            await until(lambda: served.requests and not behind.num_waiting)
            second = asyncio.create_task(complete(behind, prompt(10), likeliest(31), request_id="second"))
            await until(lambda: gave_way)
            assert gave_way == ["second"] and behind.num_waiting == 0
            third = await complete(behind, prompt(30), likeliest(2))
            return await first, await second, third

    assert run(main()) == ([greedy(prompt(9), 32)], [greedy(prompt(10), 31)], [greedy(prompt(30), 2)])


@pytest.mark.parametrize("most", [0, -1, 1.5, None, True])
def test_bad_sizes_are_refused(most):
    with pytest.raises(ValueError, match="max_waiting must be a whole number ≥ 1"):
        AsyncEngine(engine(), most)


def test_an_engine_that_is_serving_already_is_refused():
    served = engine()
    served.add_request("a", prompt(9), likeliest(COUNT))
    with pytest.raises(ValueError, match="unfinished requests"):
        AsyncEngine(served)


@pytest.mark.parametrize("text", [(), (97,), (1.5,), 3, prompt(256)])
def test_what_the_engine_refuses_is_refused_to_that_caller_alone(text):
    async def main():
        async with AsyncEngine(engine()) as served:
            good = asyncio.create_task(complete(served, prompt(9), likeliest(COUNT)))
            with pytest.raises(InvalidRequest):
                await served.submit(text, likeliest(COUNT))
            with pytest.raises(TypeError, match="no_such_option"):
                await served.submit(prompt(9), likeliest(COUNT), no_such_option=1)
            assert await good == [greedy(prompt(9), COUNT)]
            served.check_invariants()
            assert served.num_waiting == 0

    run(main())


def test_a_name_that_is_taken_is_refused_and_its_owner_goes_on():
    async def main():
        async with AsyncEngine(engine()) as served:
            stream = await served.submit(prompt(9), LONG, request_id="a")
            for _ in range(3):
                with pytest.raises(InvalidRequest, match="'a' is being served already"):
                    await served.submit(prompt(10), LONG, request_id="a")
            served.check_invariants()
            assert (await tokens(stream))[0][:50] == greedy(prompt(9), 200)[:50]
            assert len(await complete(served, prompt(9), likeliest(3), request_id="a")) == 1

    run(main())


# The end


def test_a_drain_takes_no_more_and_finishes_what_it_has():
    async def main():
        served = AsyncEngine(engine(max_sequences=2))
        streams = [await served.submit(prompt(9 + n), likeliest(COUNT)) for n in range(5)]
        drain = asyncio.create_task(served.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match="is stopping or has stopped; send the request to another engine"):
            await served.submit(prompt(9), likeliest(COUNT))
        await drain
        assert_idle(served.engine)
        served.check_invariants()
        return await asyncio.gather(*map(tokens, streams))

    assert run(main()) == [[greedy(prompt(9 + n), COUNT)] for n in range(5)]


@pytest.mark.parametrize("end", ["drain", "shutdown", "exit"])
def test_the_rest_is_aborted_by_name(end):
    async def main():
        served = engine(max_sequences=2)
        with gated(served) as gate:
            behind = AsyncEngine(served)
            async with behind:
                listening = [asyncio.create_task(complete(behind, prompt(9 + n), LONG)) for n in range(4)]
                await until(lambda: behind.num_waiting == 4 and served.scheduler.running)
                if end == "drain":
                    ending = asyncio.create_task(behind.drain(0.01))
                elif end == "shutdown":
                    ending = asyncio.create_task(behind.shutdown())
                else:
                    ending = asyncio.create_task(behind.__aexit__())
                await until(lambda: behind._stopping)
                gate.open()
                await ending
                assert_idle(served)
            for task in listening:
                with pytest.raises(RequestAborted, match="before this request was finished"):
                    await task
            assert gate.steps == 1, "it stopped after the step that ran"

    run(main())


def test_what_came_before_the_abort_can_still_be_read():
    async def main():
        served = AsyncEngine(engine())
        stream = await served.submit(prompt(9), LONG)
        received = [(await anext(stream)).token_id]
        await served.shutdown()
        with pytest.raises(RequestAborted):
            async for output in stream:
                received.append(output.token_id)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return tuple(received)

    received = run(main())
    assert received == greedy(prompt(9), 200)[: len(received)]


def test_all_ends_can_come_twice_and_in_any_order():
    async def main():
        for ends in (("drain", "drain"), ("shutdown", "drain"), ("drain", "shutdown"), ("shutdown", "shutdown")):
            served = AsyncEngine(engine())
            await asyncio.gather(*(getattr(served, end)() for end in ends))
            served.stop()
            served.check_invariants()

    run(main())


class Panic(BaseException):
    """What ends a thread."""


@pytest.mark.parametrize("error", [Panic, SystemExit, KeyboardInterrupt])
def test_a_thread_that_dies_fails_everybody(error):
    async def main():
        served = engine(max_sequences=2)
        with gated(served) as gate:
            forward = served._forward

            def dying(*inputs):
                forward(*inputs)
                raise error("of that")

            served._forward = dying
            async with AsyncEngine(served) as behind:
                listening = [asyncio.create_task(complete(behind, prompt(9 + n), LONG)) for n in range(4)]
                await until(lambda: behind.num_waiting == 4 and served.scheduler.running)
                gate.open()
                for task in listening:
                    with pytest.raises(EngineDied, match=f"died of {error.__name__}: of that") as death:
                        await task
                    assert isinstance(death.value.__cause__, error)
                with pytest.raises(EngineStopped, match=f"died of {error.__name__}") as refusal:
                    await behind.submit(prompt(9))
                assert isinstance(refusal.value.__cause__, error)
                await behind.drain()
                assert_idle(served)

    run(main())


def test_a_request_that_makes_steps_raise_ends_alone():
    async def main():
        served = breaking(engine(), ran("bad"))
        async with AsyncEngine(served) as behind:
            good = [asyncio.create_task(complete(behind, prompt(9 + n), likeliest(COUNT))) for n in range(3)]
            outputs = [output async for output in await behind.submit(prompt(9), LONG, request_id="bad")]
            assert [(o.finish_reason, o.error) for o in outputs] == [("error", "its step raised Broken: no such row")]
            for n, task in enumerate(good):
                assert await task == [greedy(prompt(9 + n), COUNT)]
            behind.check_invariants()

    run(main())


def test_logits_that_are_not_finite_end_one_request():
    async def main():
        async with AsyncEngine(faults.faulty_engine(40, 4)) as served:
            good = asyncio.create_task(complete(served, (9, 10), likeliest(5)))
            outputs = [output async for output in await served.submit((9, faults.NAN), likeliest(5))]
            assert [(o.token_id, o.finish_reason) for o in outputs] == [(None, "error")] and "NaN" in outputs[0].error
            assert len((await good)[0]) == 5

    run(main())


def test_an_event_loop_that_is_closed_early_loses_its_own_requests_alone():
    served = AsyncEngine(engine())
    kept = []

    async def leave():
        kept.append(await served.submit(prompt(9), LONG))

    asyncio.run(leave())  # the stream is still referenced
    assert run_beside(served) == [greedy(prompt(20), 60)]
    served.check_invariants()
    assert not served.engine.requests, "nobody can read what the closed loop asked for"
    del kept[:]
    served.stop()
    assert_idle(served.engine)


def run_beside(served):
    return asyncio.run(complete(served, prompt(20), likeliest(60)))


def test_ctrl_c_shuts_down_through_the_context_manager():
    code = """
import asyncio, os, signal, threading
from minilib.serving.asynchronous.async_engine import AsyncEngine
from tests.serving.faults import model
from tests.serving.served import assert_idle, likeliest
from minilib.serving.engine import Engine
served = None
async def main():
    global served
    async with AsyncEngine(Engine(model(), 40, 4)) as served:
        async for _ in await served.submit((9, 10), likeliest(60)):
            os.kill(os.getpid(), signal.SIGINT)  # once: a second one would end the wait for the thread
            await asyncio.sleep(60)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    assert_idle(served.engine)
    assert threading.active_count() == 1, threading.enumerate()
    print("interrupted")
"""
    assert output_of(code) == "interrupted\n"


def test_a_program_that_ends_without_shutting_down_ends():
    code = """
import asyncio
from minilib.serving.asynchronous.async_engine import AsyncEngine
from tests.serving.faults import model
from tests.serving.served import likeliest
from minilib.serving.engine import Engine
async def main():
    served = AsyncEngine(Engine(model(), 40, 4))
    stream = await served.submit((9, 10), likeliest(60))
    print((await anext(stream)).finish_reason)
    return served, stream
kept = asyncio.run(main())
"""
    assert output_of(code) == "None\n"


def output_of(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_an_event_loop_never_waits_for_a_step():
    """While the thread is in the middle of a step, coroutines run, streams close and requests are refused."""

    async def main():
        served = engine()
        with gated(served) as gate:
            async with AsyncEngine(served, max_waiting=1) as behind:
                first = asyncio.create_task(complete(behind, prompt(9), likeliest(COUNT)))
                await until(lambda: served.scheduler.running)
                began = time.process_time()
                for _ in range(100):
                    with pytest.raises(QueueFull):
                        await behind.submit(prompt(9))
                assert gate.steps == 0 and time.process_time() - began < 30
                gate.open()
                await first

    run(main())
