"""Measure what kept pages save: the time to the first token behind a prefix that was computed before, pages that come
back from a second tier, and what it costs to keep pages that nobody asks for.

Called by `make bench`. Every ratio comes from alternated runs in one process; the tokens computed are counted.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers.measure import quartiles
from minilib.numbers.neighbours import Watch
from minilib.serving.cache.prefix import DESIGNS
from minilib.serving.cache.tiers import SecondTier
from minilib.serving.cpu.packing import pack
from minilib.serving.engine import Engine
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.simulation import SimulatedEngine, TimedEngine
from minilib.serving.request import SamplingParams, TokenOutput
from tools.bench.paging import BIG, MODEL

PAGE = 16
LONG = replace(BIG, max_position=2048)
CACHED = (512, 1536)  # tokens of a prompt that were computed before
TAILS = (16, 64)  # tokens behind them: what a chat adds
TURNS, HITS = 3, 3  # whole prompts of each kind, and hits behind each of them
LOADS = {"decode": (16, 16, 24), "prompt": (1, 512, 1)}  # requests at once, tokens of each prompt, new tokens of each


def prefix_hits(
    big: ModelConfig = LONG,
    small: ModelConfig = MODEL,
    cached: tuple[int, ...] = CACHED,
    loads: dict[str, tuple[int, int, int]] = LOADS,
    turns: int = TURNS,
) -> dict:
    """The figures of chapter 14 that need a model, JSON values in SI units.

    Args:
        big: shape of the model whose first tokens are timed.
        small: shape of the one that keeps pages in vain: the shorter a step, the larger the share that this takes.
        cached: tokens that were computed before, whole pages.
        loads: requests at once, tokens of each prompt and new tokens of each, without hits.
        turns: whole prompts of each kind; loads without hits have four times as many turns.
    """
    watch, model = Watch(), pack(Decoder(big).eval())
    bar = tqdm([(design, tokens) for design in DESIGNS for tokens in cached], desc="hits", leave=False)
    hits = [row for design, tokens in bar for row in _hits(model, design, tokens, turns)]
    tiers = [_tier(model, where, cached[0], turns) for where in ("memory", "file")]
    model = pack(Decoder(small).eval())
    bar = tqdm(loads.items(), desc="no hits", leave=False)
    no_hits = [row for load, sizes in bar for row in _no_hits(model, load, *sizes, 4 * turns)]
    return {
        "parameters": big.num_parameters,
        "page_size": PAGE,
        "hits": hits,
        "tiers": tiers,
        "no_hits_parameters": small.num_parameters,
        "no_hits": no_hits,
        "busy": watch.busy,
    }


@dataclass
class _Seconds:
    """Times to the first token of one kind of prompt: whole, behind kept pages, and when it is sent once more."""

    whole: list[float] = field(default_factory=list)
    hit: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def _hits(model: Decoder, design: str, cached: int, turns: int) -> list[dict]:
    """Prompts of which so many tokens are kept, against the same length computed whole; a row for each tail.

    A turn is a prompt that nobody sent before, then HITS prompts that begin alike and end with other tokens, then the
    last of them once more, whose last token alone is computed.
    """
    new = _random_tokens(model)
    engine = TimedEngine(model, 4 * ceil_div(cached + max(TAILS), PAGE), PAGE, prefix_cache=design)
    found = {tail: _Seconds() for tail in TAILS}
    prompt = new(2 * PAGE)
    for kept in (0, 2 * PAGE - 1):
        first_token(engine, prompt, kept)  # warms up
    for _ in range(turns):
        for tail, seconds in found.items():
            head = new(cached)
            whole = first_token(engine, head + new(tail), 0)
            prompts = [head + new(tail) for _ in range(HITS)]
            hits = [first_token(engine, prompt, cached) for prompt in prompts]
            seconds.whole.append(whole)
            seconds.hit += hits
            seconds.again.append(first_token(engine, prompts[-1], cached + tail - 1))
            seconds.ratios += [whole / hit for hit in hits]
    return [
        {"design": design, "cached": cached, "tail": tail, "whole": _of(seconds.whole), "hit": _of(seconds.hit),
         "again": _of(seconds.again), "whole_over_hit": _of(seconds.ratios)}
        for tail, seconds in found.items()
    ]  # fmt: skip


def _tier(model: Decoder, where: str, cached: int, turns: int) -> dict:
    """Pages that come back from host memory or from a file, against pages that are there and pages that are not.

    What was written to the file is still in the operating system's memory: no disk is waited for.
    """
    new, tail, pages = _random_tokens(model), TAILS[0], cached // PAGE
    times: dict[str, list[float]] = {"whole": [], "back": [], "there": []}
    with tempfile.TemporaryDirectory() as folder:
        own = 4 * ceil_div(cached + tail, PAGE)
        file = SecondTier(path=Path(folder, "pages"), num_pages=own)
        room = {"num_swap_pages": own, "second_tier": SecondTier()} if where == "memory" else {"second_tier": file}
        engine = TimedEngine(model, own, PAGE, prefix_cache="hash", **room)
        for turn in range(turns + 1):
            head, pool = new(cached), engine.cache.pool
            taken = [first_token(engine, head + new(tail), 0)]
            while pool.num_idle:
                pool.reclaim()
            loaded = engine.prefix.tokens_loaded
            taken += [first_token(engine, head + new(tail), cached) for _ in range(2)]
            assert engine.prefix.tokens_loaded - loaded == cached, "pages did not come back"
            for name, seconds in zip(times, taken, strict=True):
                times[name] += [seconds] if turn else []
        engine.prefix.clear()  # closes the file
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "where": where,
        "cached": cached,
        "tail": tail,
        "page_bytes": engine.cache.page_bytes,
        **{name: _of(seconds) for name, seconds in times.items()},
        "back_seconds_per_page": (middle["back"] - middle["there"]) / pages,
        "computed_seconds_per_page": (middle["whole"] - middle["there"]) / pages,
    }


def _no_hits(model: Decoder, load: str, requests: int, prompt: int, new: int, turns: int) -> list[dict]:
    """One load on engines that keep nothing and on those that keep pages, against the first; nothing is hit.

    The second one that keeps nothing tells how far clocks can be trusted here. So the load is served once more without
    a model, and the seconds that keeping pages adds there are held against those that the load takes with one.
    """
    num_pages = requests * ceil_div(prompt + new, PAGE)  # from the second turn on kept pages must leave
    designs = (None, None, *DESIGNS)
    engines = [Engine(model, num_pages, PAGE, prefix_cache=design) for design in designs]
    nothing = model.config, lambda counts: 0.0, VirtualClock(), num_pages
    without_model = [SimulatedEngine(*nothing, page_size=PAGE, prefix_cache=design) for design in designs]
    made = _random_tokens(model)
    prompts = [[made(prompt) for _ in range(requests)] for _ in range(turns + 1)]
    seconds, alone = (_in_turns(each, prompts, new) for each in (engines, without_model))
    rows = []
    for design, engine, taken, added in zip(designs[1:], engines[1:], seconds[1:], alone[1:] - alone[0], strict=True):
        rows.append({
            "load": load, "design": design or "none", "requests": requests, "prompt": prompt, "new": new,
            "evictions": engine.prefix.index.evictions if engine.prefix else 0, "seconds": _of(taken.tolist()),
            "over_none": _of((taken / seconds[0]).tolist()), "added_seconds": _of(added.tolist()),
            "added_share": float(np.median(added) / np.median(seconds[0])),
        })  # fmt: skip
    return rows


def _in_turns(engines: list[Engine], prompts: list[list[list[int]]], new: int) -> np.ndarray:
    """Seconds of each engine in each turn, (engines, turns); the first turn warms up and is left out."""
    return np.array([_alternated(engines, each, new) for each in prompts])[1:].sum(-1).T


def _alternated(engines: list[Engine], prompts: list[list[int]], new: int) -> list[list[float]]:
    """Seconds of each step of each engine for these requests; what goes before, adding them, is a step as well."""
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    spent: list[list[float]] = [[] for _ in engines]
    made: list[list[TokenOutput]] = [[] for _ in engines]
    for step in range(new + 1):
        for number in range(step, step + len(engines)):  # another one comes first at each step
            at = number % len(engines)
            started = time.perf_counter()
            if step:
                made[at] += engines[at].step()
            else:
                for row, prompt in enumerate(prompts):
                    engines[at].add_request(str(row), prompt, params)
            spent[at].append(time.perf_counter() - started)
    assert not any(engine.has_unfinished for engine in engines)
    assert all(outputs == made[0] for outputs in made) and not any(output.cached_tokens for output in made[0])
    return spent


def first_token(engine: TimedEngine, prompt: list[int], cached: int) -> float:
    """Seconds from a request to its only token; asserts that so many tokens of it were kept, and the rest computed."""
    steps, started = len(engine.history), time.perf_counter()
    engine.add_request("prompt", prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    while not (outputs := engine.step()):
        continue
    seconds = time.perf_counter() - started
    computed = sum(sum(step.counts.counts) for step in engine.history[steps:])
    assert (outputs[0].cached_tokens, computed) == (cached, len(prompt) - cached), f"{computed} tokens were computed"
    return seconds


def _random_tokens(model: Decoder) -> Callable[[int], list[int]]:
    choices = random.Random(0)
    return lambda count: choices.choices(range(model.config.vocab_size), k=count)


def _of(samples: list[float]) -> dict:
    return {"median": statistics.median(samples), "quartiles": quartiles(tuple(samples)), "samples": len(samples)}
