"""Measure the server over its own engine: output tokens a second, and what is added to the time to the first token.

Called by `make bench ARGS="--only serving-http"`. The engine alone and the server with the same engine are processes of
their own, which stand still while the other one works. Turns alternate: engine, server, engine, …; a ratio is the
server over the mean of the engine just before and just after.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.basics.format import si
from minilib.numbers.measure import quartiles
from minilib.numbers.neighbours import Watch
from tools.bench.peers import LOADING, TURN, models
from tools.bench.peers.environments import BUILD
from tools.bench.peers.process import Worker
from tools.bench.server_process import ServerProcess
from tools.bench.sse_client import Stream, load

STREAMS, PROMPT, NEW, PAGE = (1, 8, 32), 64, 96, 16
SEQUENCES, LENGTH = 32, PROMPT + NEW
REQUESTS, SHORT = 100, 32  # of the open loop at half load: how many, and new tokens of each
BURST = 64  # requests at once, to find how many a second the engine can serve
COMPLETIONS = "/v1/completions"
Prompt = list[int]


def serving_http(model_names: Sequence[str] = ("small", "big"), turns: int = 5) -> dict:
    """The figures of chapter 17 about the server, JSON values in SI units.

    Args:
        model_names: from models.RANDOM.
        turns: of the server in each case, beside one that warms up.
    """
    return {"models": [_of_model(name, turns) for name in model_names]}


def lines(found: dict) -> Iterator[str]:
    """What was found, for people."""
    for model in found["models"]:
        for row in model["rows"]:
            yield (f"{model['model']} model, {row['streams']} streams: {row['server_rate']:.0f} tokens/s, "
                   f"{row['server_over_engine']['median']:.3f}× the engine alone")  # fmt: skip
        added = model["half_load"]["added"]
        yield f"{model['model']} model, added at half load: p50 {si(added['p50'], 's')}, p99 {si(added['p99'], 's')}"


def our_server(folder: Path, sequences: int, length: int, environment: dict[str, str]) -> ServerProcess:
    """Our server, with room for so many sequences of a length, on a port of its own; a context manager."""
    pages = sequences * ceil_div(length, PAGE)
    options = {"--max-sequences": sequences, "--num-pages": pages, "--page-size": PAGE}
    command = [sys.executable, "-m", "minilib.serving.server", "--model", str(folder), "--port", "{port}"]
    command += [str(part) for option in options.items() for part in option]
    return ServerProcess(command, "/ready", LOADING, environment)


def _of_model(name: str, turns: int) -> dict:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    BUILD.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads)}
    numbers = [str(number) for number in (threads, SEQUENCES, LENGTH)]
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        folder = Path(place)
        model = models.save(name, folder)
        alone = [sys.executable, "-m", "tools.bench.peers.ours", str(folder), *numbers]
        with (
            Worker(alone, LOADING, environment) as engine,
            our_server(folder / "hf", SEQUENCES, LENGTH, environment) as server,
        ):
            watch = Watch()
            rows = [_rates(engine, server, model.config.vocab_size, streams, turns) for streams in STREAMS]
            added = _added_at_half_load(engine, server, model.config.vocab_size)
            return {"model": name, "parameters": model.config.num_parameters, "threads": threads,
                    "rows": rows, "half_load": added, "busy": watch.busy}  # fmt: skip


def _rates(engine: Worker, server: ServerProcess, vocabulary: int, streams: int, turns: int) -> dict:
    """Output tokens a second of both, from the first request's arrival to the last token."""
    prompts = _prompts(vocabulary, streams)
    by_engine: list[float] = []
    by_server: list[float] = []
    for _ in tqdm(range(turns + 1), desc=f"{streams} streams", leave=False):
        by_engine.append(_engine_rate(engine, prompts))
        found = _asked(server, prompts, NEW)
        by_server.append(streams * NEW / (max(each.last for each in found) - min(each.sent for each in found)))
    by_engine.append(_engine_rate(engine, prompts))
    trios = list(zip(by_engine, by_server, by_engine[1:], strict=False))[1:]  # the first one warms up
    ratios = tuple(2 * there / (before + after) for before, there, after in trios)
    return {"streams": streams, "prompt": PROMPT, "new": NEW, "engine_rate": statistics.median(by_engine[1:]),
            "server_rate": statistics.median(by_server[1:]), "events_per_token": _events(found),
            "server_over_engine": {"median": statistics.median(ratios), "quartiles": quartiles(ratios)}}  # fmt: skip


def _added_at_half_load(engine: Worker, server: ServerProcess, vocabulary: int) -> dict:
    """Times to the first token of the same requests at the same times, at half of the rate that the engine serves."""
    burst = engine.ask([[0.0, prompt, SHORT] for prompt in _prompts(vocabulary, BURST)], TURN)["times"]
    rate = 0.5 * BURST / max(row[-1] for row in burst)
    chances = random.Random(0)
    arrivals = list(accumulate(chances.expovariate(rate) for _ in range(REQUESTS)))
    prompts = _prompts(vocabulary, REQUESTS)
    requests = [[arrival, prompt, SHORT] for arrival, prompt in zip(arrivals, prompts, strict=True)]
    firsts = [row[0] - arrival for row, arrival in
              zip(engine.ask(requests, TURN)["times"], arrivals, strict=True)]  # fmt: skip
    found = [each.first - each.sent for each in _asked(server, prompts, SHORT, arrivals)]
    quantiles = {f"p{q}": [float(np.quantile(times, q / 100)) for times in (firsts, found)] for q in (50, 99)}
    return {"requests": REQUESTS, "rate": rate, "new": SHORT, "engine_and_server": quantiles,
            "added": {name: server - engine for name, (engine, server) in quantiles.items()}}  # fmt: skip


def _engine_rate(engine: Worker, prompts: Sequence[Prompt]) -> float:
    times = engine.ask([[0.0, prompt, NEW] for prompt in prompts], TURN)["times"]
    return len(prompts) * NEW / max(row[-1] for row in times)


def _asked(
    server: ServerProcess, prompts: Sequence[Prompt], new: int, arrivals: Sequence[float] | None = None
) -> list[Stream]:
    """A completion of each prompt, of so many tokens: all at once, or each at its time."""
    server.resume()
    name = server.get("/v1/models")[1]["data"][0]["id"]
    body = {"model": name, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
    found = load(server.port, COMPLETIONS, [{**body, "prompt": prompt} for prompt in prompts], arrivals)
    server.pause()
    assert all(len(each.text.split()) == new for each in found), "a token of a model of words is a word"
    return found


def _events(found: Sequence[Stream]) -> float:
    """Events with text a token: 1 where each token is sent alone."""
    return sum(each.num_events for each in found) / (len(found) * NEW)


def _prompts(vocabulary: int, count: int) -> list[Prompt]:
    return np.random.default_rng(count).integers(vocabulary, size=(count, PROMPT)).tolist()
