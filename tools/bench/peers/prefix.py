"""Measure prefix hits beside other engines that keep pages: the time to the first token, of whole prompts and of hits.

Called by `make bench ARGS="--only prefix-peers"`. Engines are processes of their own, as in `peers`; each turn asks one
after the other, with the same prompts, and a ratio is that of an engine's own whole prompt to the hit right behind it.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minilib.numbers.measure import quartiles
from minilib.numbers.neighbours import Watch
from tools.bench.peers import LOADING, OURS, TURN, models
from tools.bench.peers.environments import BUILD, HERE, ROOT, Unavailable, convert, python_of
from tools.bench.peers.process import Worker, WorkerFailed
from tools.bench.peers.worker import KEEPING
from tools.bench.prefix_hits import CACHED, LONG, TAILS

SEQUENCES, LENGTH = 4, LONG.max_position
TAIL, HITS = TAILS[0], 2


def prefix_peers(names: Sequence[str] = tuple(KEEPING), turns: int = 3) -> dict:
    """The figures of chapter 14 about other engines, JSON values in SI units.

    Args:
        names: of the peers, from KEEPING.
        turns: whole prompts of each length; one more of each warms up.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    BUILD.mkdir(parents=True, exist_ok=True)
    numbers = [str(number) for number in (threads, SEQUENCES, LENGTH)]
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        folder, failed = Path(place), {}
        models.write(models.random_model(LONG), folder)
        commands = {OURS: [sys.executable, "-m", "tools.bench.peers.ours", str(folder), *numbers, "hash"]}
        for name in tqdm(names, desc="installing and converting", leave=False):
            try:
                python = python_of(name)
                convert(name, python, folder)
            except Unavailable as reason:
                failed[name] = str(reason)
            else:
                commands[name] = [str(python), str(HERE / "worker.py"), f"{name}, keeping", str(folder), *numbers]
        found = hits_beside(commands, LONG.vocab_size, CACHED, turns, threads)
    return {"parameters": LONG.num_parameters, **found, "failed": {**failed, **found["failed"]}}


def hits_beside(
    commands: dict[str, list[str]], vocabulary: int, cached: Sequence[int], turns: int, threads: int
) -> dict:
    """Ours and peers over every number of cached tokens.

    Args:
        commands: how each worker is started; ours is among them.
        vocabulary: how many token ids there are.
        cached: tokens that a prompt shares with the one before.
        turns: whole prompts of each, beside one that warms up.
        threads: that each worker was told to use.

    Returns:
        "workers": versions and settings of each; "failed": reasons by name; "rows"; "busy".

    Raises:
        WorkerFailed: if ours fails.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, command in tqdm(commands.items(), desc="loading", leave=False):
            own = {**environment, "PYTHONPATH": str(ROOT) if name == OURS else ""}
            try:
                workers[name] = stack.enter_context(Worker(command, LOADING, own))
            except WorkerFailed as reason:
                if name == OURS:
                    raise
                failed[name] = f"not loaded: {reason}"
        told = {name: worker.loaded for name, worker in workers.items()}
        watch, choices = Watch(), random.Random(0)
        taken: dict[tuple[str, int], list[list[float]]] = {}
        first_tokens: dict[str, list[int]] = {}
        for turn in tqdm(range(turns + 1), desc="turns", leave=False):
            for tokens in cached:
                head = choices.choices(range(vocabulary), k=tokens)
                prompts = [head + choices.choices(range(vocabulary), k=TAIL) for _ in range(1 + HITS)]
                for name in list(workers):
                    try:
                        answers = [workers[name].ask([[0.0, prompt, 1]], TURN) for prompt in prompts]
                    except WorkerFailed as reason:
                        if name == OURS:
                            raise
                        failed[name] = str(reason)
                        workers.pop(name).close()
                        continue
                    first_tokens.setdefault(name, []).extend(answer["tokens"][0][0] for answer in answers)
                    if turn:
                        taken.setdefault((name, tokens), []).append([answer["times"][0][0] for answer in answers])
        busy = watch.busy
    rows = [_row(name, tokens, seconds) for (name, tokens), seconds in taken.items() if name in workers]
    same = {name: sum(a == b for a, b in zip(first_tokens[OURS], first_tokens[name], strict=True)) for name in workers}
    return {"workers": told, "failed": failed, "rows": rows, "same_first_tokens": same,
            "prompts": len(first_tokens[OURS]), "busy": busy}  # fmt: skip


def _row(name: str, cached: int, seconds: list[list[float]]) -> dict:
    """Of one worker: seconds of each turn are those of the whole prompt, and then of the hits."""
    ratios = tuple(whole / hit for whole, *hits in seconds for hit in hits)
    found = {"whole": [whole for whole, *_ in seconds], "hit": [hit for _, *hits in seconds for hit in hits]}
    medians = {name: {"median": statistics.median(each), "quartiles": quartiles(tuple(each))}
               for name, each in (*found.items(), ("whole_over_hit", ratios))}  # fmt: skip
    return {"worker": name, "cached": cached, "tail": TAIL, **medians}
