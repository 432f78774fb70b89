"""Serving on ranks that share every layer, against one engine: the same tokens, whatever happens to pages."""

import os
import pickle
import signal
import time
from functools import partial
from multiprocessing import Pipe, get_context
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from minilib.mechanisms.sharding.columns import DoesNotDivide
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.parallel.tensor_parallel import CannotBeCut
from minilib.serving.cache.tiers import SecondTier
from minilib.serving.engine import Engine
from minilib.serving.llm import LLM
from minilib.serving.request import InvalidRequest, SamplingParams, TokenOutput
from minilib.serving.tensor_parallel.plan import RecordedPages
from minilib.serving.tensor_parallel.remote import EngineOnRanks, RanksGone, answer_calls
from tests.parallel.tensor_parallel.models import VOCABULARY, config_of, decoder

LONG = {"max_position": 64}
MODEL = partial(decoder, 0, **LONG)  # two KV heads: on 4 ranks two ranks have each
BEGIN = torch.randint(VOCABULARY, (24,), generator=torch.Generator().manual_seed(0)).tolist()


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts that begin alike, greedy and drawn, with one and with several samples."""
    found = []
    for number in range(8):
        prompt = [*BEGIN[: 3 * number], number, VOCABULARY - 1 - number]
        drawn = SamplingParams(max_tokens=9 + number, temperature=1.0, seed=number, n=3 if number % 3 == 0 else 1)
        found.append((prompt, drawn if number % 2 == 0 else SamplingParams(max_tokens=12, temperature=0.0)))
    return found


def served(engine: Engine | EngineOnRanks) -> dict[tuple[str, int], list[int]]:
    """The tokens of all samples; one request is aborted on its way, and one joins late."""
    tokens: dict[tuple[str, int], list[int]] = {}

    def take(outputs: list[TokenOutput]) -> None:
        for output in outputs:
            if output.token_id is not None:
                tokens.setdefault((output.request_id, output.sample), []).append(output.token_id)

    *first, (prompt, params) = requests()
    for number, request in enumerate(first):
        engine.add_request(f"{number}", *request)
    for _ in range(4):
        take(engine.step())
        engine.check_invariants()
    assert engine.abort("2") and not engine.abort("2")
    engine.add_request("late", torch.tensor(prompt), params)
    with pytest.raises(InvalidRequest, match="being served already"):
        engine.add_request("late", prompt, params)
    while engine.has_unfinished:
        take(engine.step())
        engine.check_invariants()
    assert not engine.requests and not engine.step()
    return tokens


class Recording(Engine):
    """One process, whose pages write down how they move."""

    new_cache = RecordedPages


SWAPPED = {"num_pages": 22, "num_swap_pages": 8, "preemption": "swap", "prefix_cache": "radix"}
RECOMPUTED = {"num_pages": 20, "max_batch_tokens": 9}


@pytest.mark.parametrize(
    ("n", "options", "moves"),
    [(2, SWAPPED, {"copy", "swap_out", "swap_in"}), (4, RECOMPUTED, {"copy"})],
    ids=["two ranks, pages swapped, prefixes kept", "four ranks, few tokens a step, pages recomputed"],
)
def test_the_tokens_are_those_of_one_engine(n, options, moves):
    alone = Recording(MODEL(), page_size=4, **options)
    expected = served(alone)
    assert {kind for kind, _ in alone.cache.moves} == moves
    engine = EngineOnRanks(config_of(**LONG), MODEL, n, page_size=4, **options)
    assert served(engine) == expected
    engine.close()
    with pytest.raises(RanksGone, match="they were closed"):
        engine.step()


def test_an_llm_on_ranks_gives_the_text_of_one_that_is_not():
    params, prompts = SamplingParams(max_tokens=12, temperature=0.0), ["def main(", "import os\n"]
    alone, shared = (LLM.load(dtype=torch.float64, **o) for o in ({"pack": False}, {"tensor_parallel": 2}))
    expected = alone.generate(prompts, params)
    assert shared.generate(prompts, params) == expected
    assert "".join(output.text for output in shared.stream(prompts[0], params)) == expected[0][0].text
    for _ in shared.stream(prompts[0], params):
        break  # and so it is aborted
    assert not shared.engine.requests
    shared.close()
    alone.close()


def test_what_cannot_be_served_on_ranks_is_refused_by_name(tmp_path):
    model = MODEL()
    with pytest.raises(DoesNotDivide, match="4 num_heads cannot be dealt to 3 shards"):
        LLM(model, tensor_parallel=3)
    with pytest.raises(CannotBeCut, match="mixture of experts"):
        LLM(Decoder(config_of(moe=MoEConfig(4, 2, 8))), tensor_parallel=2)
    with pytest.raises(ValueError, match="these are on meta"):
        LLM(Decoder(config_of()).to("meta"), tensor_parallel=2)
    packed = MODEL()
    packed.ops.compiled = True
    with pytest.raises(ValueError, match="these are packed; load the model with pack=False"):
        LLM(packed, tensor_parallel=2)
    for ranks in (0, -1, 1.0, 2.0, True, None, "2"):
        with pytest.raises(ValueError, match=f"tensor_parallel is how many ranks .*; got {ranks!r}"):
            LLM(model, tensor_parallel=ranks)
    for options, error, message in (
        ({"page_size": 0}, ValueError, "page_size is a whole number ≥ 1"),
        ({"pack": True}, ValueError, "pack is for one process"),
        ({"prefix_cache": "hash", "second_tier": SecondTier()}, ValueError, "second_tier is for one process"),
        ({"sizes_of_pages": 4}, TypeError, "unexpected keyword argument 'sizes_of_pages'"),
    ):
        with pytest.raises(error, match=message):
            LLM(model, tensor_parallel=2, **options)


def test_rank_0_speaks_up_while_nobody_asks():
    """Or the others would take it for lost after the timeout of their transport."""
    asks, answers = Pipe()
    spoken = []

    def keep_waiting() -> None:
        spoken.append(len(spoken))
        if len(spoken) == 3:
            asks.send_bytes(pickle.dumps(("abort", ("nobody",))))

    engine = SimpleNamespace(
        keep_waiting=keep_waiting, abort=lambda request_id: [request_id, asks.close()], requests={}
    )
    with pytest.raises((EOFError, OSError)):
        answer_calls(engine, answers, patience=0.01)
    assert spoken == [0, 1, 2]


class Interrupted:
    """A connection whose user is interrupted behind each call of a step."""

    def __init__(self, connection) -> None:
        self.connection, self.recv_bytes = connection, connection.recv_bytes

    def send_bytes(self, content: bytes) -> None:
        self.connection.send_bytes(content)
        if pickle.loads(content)[0] == "step":
            signal.raise_signal(signal.SIGINT)


def test_interrupts_lose_no_token_and_forked_processes_keep_no_rank():
    prompt, params = [1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=5, temperature=0.0)
    alone, shared = (LLM(MODEL(), max_batch_tokens=4, tensor_parallel=n) for n in (1, 2))  # step 1 makes no token
    expected = alone.generate([prompt], params)
    assert shared.generate([prompt], params) == expected
    engine = shared.engine
    engine._connection, connection = Interrupted(engine._connection), engine._connection
    engine.add_request("0", prompt, params)
    tokens, interrupts = [], 0
    while engine.has_unfinished:
        try:
            tokens += [output.token_id for output in engine.step()]
        except KeyboardInterrupt:
            interrupts += 1
    assert tokens == expected[0][0].token_ids and interrupts == 6
    engine.add_request("1", prompt, SamplingParams(max_tokens=1))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert not engine.requests and engine.unseen == {"1"} and engine.has_unfinished
    with pytest.raises(InvalidRequest, match="being served already"):
        engine.add_request("1", prompt)
    assert engine.abort("1") and not engine.abort("1") and not engine.has_unfinished
    engine._connection = connection
    fork = get_context("fork")
    copy, sleeper = fork.Process(target=engine.close), fork.Process(target=time.sleep, args=(30,))
    copy.start()
    copy.join()
    assert shared.generate([prompt], params) == expected, "a copy of the object has ended the ranks"
    engine.add_request("2", prompt, params)
    sleeper.start()
    shared.close()
    assert sleeper.is_alive(), "close has waited for a process that is no rank"
    sleeper.kill()
    assert not engine.requests and not engine.has_unfinished


def test_ranks_end_with_the_object():
    engine = EngineOnRanks(config_of(**LONG), MODEL, 2, page_size=4)
    ranks = engine._ranks
    assert ranks.is_alive()
    del engine
    ranks.join(timeout=30)
    assert not ranks.is_alive()


def dying(marks: Path) -> Decoder:
    """A model whose third pass through its last layer kills rank 1."""
    (marks / str(os.getpid())).touch()
    model = MODEL()
    feed_forward, passes = model.layers[-1].feed_forward, []

    def pass_or_die(x):
        passes.append(x)
        if dist.get_rank() == 1 and len(passes) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return feed_forward(x)

    model.layers[-1].feed_forward = pass_or_die
    return model


def raising() -> Decoder:
    raise ArithmeticError("no such weights")


def test_a_rank_that_dies_is_named_and_nothing_is_left_running(tmp_path):
    engine = EngineOnRanks(config_of(**LONG), partial(dying, tmp_path), 2, page_size=4)
    engine.add_request("0", [1, 2, 3], SamplingParams(max_tokens=20))
    started = time.monotonic()
    with pytest.raises(RanksGone, match="rank 1 of 2 was killed by SIGKILL"):
        while engine.has_unfinished:
            engine.step()
    with pytest.raises(RanksGone, match="rank 1 of 2 was killed by SIGKILL"):
        engine.add_request("1", [1, 2, 3])
    assert time.monotonic() - started < 20
    processes = [int(mark.name) for mark in tmp_path.iterdir()]
    assert len(processes) == 2 and not any(map(psutil.pid_exists, processes))
    with pytest.raises(RanksGone, match="no such weights"):
        EngineOnRanks(config_of(**LONG), raising, 2)
