"""Engines for processes of their own: small, with text, and with faults that a request can ask for."""

import asyncio
import os
import threading
import time
from pathlib import Path

import psutil

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from minilib.serving.server.remote_engine import RemoteEngine
from minilib.serving.server.supervision import Supervision
from tests.model.random_weights import randomize

LIMIT = 150  # seconds after which a test that hangs fails
EXIT, HANG, RAISE = (
    33,
    34,
    35,
)  # tokens that, at the end of what is computed, end the process, stop it, or make it raise
QUICK = Supervision(first_pause=0.01, most_crashes=100, step_timeout=60)


CONFIG = ModelConfig(37, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)


class Letters:
    """A letter for each token."""

    def decode(self, ids):
        return "".join(map(self.id_to_token, ids))

    def id_to_token(self, token):
        return chr(ord("A") + token)


def small_engine(*, num_pages=40, **options):
    """Weights so large, in float64, that no rounding decides which token is likeliest."""
    model = Decoder(CONFIG).double()
    randomize(model, seed=5, scale=2)
    return Engine(model, num_pages, 4, tokenizer=Letters(), **options)


def breakable_engine(**options):
    """An engine whose process breaks where a prompt ends with one of three tokens."""
    engine = small_engine(**options)
    forward = engine._forward

    def breaking(work, interrupts):
        last = {sequence.token_ids[-1] for sequence, _ in work if sequence.num_output_tokens == 0}
        if EXIT in last:
            os._exit(3)
        if HANG in last:
            time.sleep(LIMIT)
        time.sleep(0.002)
        return forward(work, interrupts)

    engine._forward = breaking
    schedule = engine.scheduler.schedule

    def raising():
        new = [sequence for sequence in engine.scheduler.waiting if not sequence.num_output_tokens]
        if any(sequence.token_ids[-1] == RAISE for sequence in new):
            raise ArithmeticError("the scheduler broke")  # no request ran, so that no request can be the reason
        return schedule()

    engine.scheduler.schedule = raising
    return engine


def run(main):
    """Run a coroutine; it may not hang, nor leave a process, a thread or a file descriptor."""
    me = psutil.Process()

    async def limited():
        before = me.num_fds(), set(threading.enumerate()), set(me.children())
        async with asyncio.timeout(LIMIT):
            result = await main
        await asyncio.sleep(0)
        assert set(me.children()) <= before[2], "a process was left"
        assert set(threading.enumerate()) <= before[1], "a thread was left"
        assert me.num_fds() <= before[0], "a file descriptor was left"
        return result

    return asyncio.run(limited())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def outputs(served, *request, **options):
    """All outputs of a request, without its name, one sample after another."""
    made = [rounded(output) async for output in await served.submit(*request, **options)]
    return sorted(made, key=lambda output: output[0])


def rounded(output):
    """With log-probabilities to so many digits that it does not matter who else was in the batch."""
    score = None if output.logprob is None else round(output.logprob, 9)
    return (*output[1:7], score, [(token, round(other, 9)) for token, other in output.top_logprobs])


async def ready(remote):
    """Wait until a process that crashed has been started again."""
    await until(lambda: remote.status().state in ("ready", "stopped"))
    assert remote.status().state == "ready"


async def assert_idle(remote):
    """The process holds nothing, and nobody waits here."""
    await remote.check_invariants()
    status = remote.status()
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert status.num_free_pages == status.num_pages


def remote_engine(make=breakable_engine, supervision=QUICK, **options):
    return RemoteEngine(make, supervision=supervision, **options)


def shared_memory():
    """Names in the machine's shared memory that this user's processes may leave."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.owner() == Path.home().owner()}


KINDS = [
    ((9, 10, 11), SamplingParams(12, temperature=0)),
    ((12, 13), SamplingParams(9, seed=1, n=3)),
    ((14, 15, 16, 17, 18, 19), SamplingParams(20, seed=2, top_k=5, logprobs=3)),
    ((20, 22), SamplingParams(12, temperature=0, logprobs=0)),
    ((23, 24), SamplingParams(30, seed=3, temperature=1.5, stop=("g", "m"))),
    ((25, 26), SamplingParams(30, seed=4, stop_token_ids=(9, 10, 11))),
    ((27, 28, 29, 30), SamplingParams(8, seed=5, top_p=0.6, n=2, logprobs=2)),
]
