"""Measure the engine beside the engines that people use on a CPU: same weights, same requests, fp32, greedy.

Called by `make bench ARGS="--only peers"`. Every engine is a process of its own that stands still while another one
works. Turns alternate, ours, a peer, ours, the next peer, …, ours: a ratio is ours, just before and just after, over
the peer's.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from minilib.model.decoder import Decoder
from minilib.numbers.measure import quartiles
from minilib.numbers.neighbours import Watch
from tools.bench.peers import models
from tools.bench.peers.cases import LENGTH, SEQUENCES, Case, cases
from tools.bench.peers.environments import BUILD, HERE, PEERS, ROOT, Unavailable, convert, python_of
from tools.bench.peers.process import Unable, Worker, WorkerFailed

LOADING, TURN = 1800, 600  # seconds until a model is loaded (vLLM compiles it), and for one turn
OURS = "ours"


def peers(
    names: Sequence[str] = tuple(PEERS), model_names: Sequence[str] = models.NAMES, turns: int = 5
) -> Iterator[dict]:
    """The figures of chapter 12 about other engines, JSON values in SI units, one model after the other.

    Args:
        names: of the peers, from PEERS.
        model_names: from models.NAMES.
        turns: of each peer in each case; the first one, which warms up, is left out.

    Yields:
        For each model what `beside` returns.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    BUILD.mkdir(parents=True, exist_ok=True)
    pythons, missing = {}, {}
    for name in tqdm(names, desc="installing peers", leave=False):
        try:
            pythons[name] = python_of(name)
        except Unavailable as reason:
            missing[name] = f"not installed: {reason}"
    for model_name in model_names:
        with tempfile.TemporaryDirectory(dir=BUILD) as place:
            folder, failed = Path(place), dict(missing)
            model = models.save(model_name, folder)
            commands = {OURS: [sys.executable, "-m", "tools.bench.peers.ours", str(folder)]}
            for name in tqdm(pythons, desc=f"{model_name} model: converting", leave=False):
                try:
                    convert(name, pythons[name], folder)
                    commands[name] = [str(pythons[name]), str(HERE / "worker.py"), name, str(folder)]
                except Unavailable as reason:
                    failed[name] = f"not converted: {reason}"
            numbers = [str(number) for number in (threads, SEQUENCES, LENGTH)]
            commands = {name: [*command, *numbers] for name, command in commands.items()}
            found = beside(commands, model, cases(model.config.vocab_size), turns, threads)
            found["failed"] = {**failed, **found["failed"]}
            yield {"model": model_name, **found}


def beside(commands: dict[str, list[str]], model: Decoder, what: Sequence[Case], turns: int, threads: int) -> dict:
    """Ours and peers over every case.

    Args:
        commands: how each worker is started; ours is among them.
        model: the one that all of them load, to judge where tokens differ.
        what: the cases.
        turns: of each peer in each case, beside one that warms up.
        threads: that each worker was told to use.

    Returns:
        "parameters"; "workers": versions, settings and peak memory of each; "failed": reasons by name; "rows".

    Raises:
        WorkerFailed: if ours fails.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
    failed, rows = {}, []
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, command in tqdm(commands.items(), desc="loading", leave=False):
            own = environment if name == OURS else {**environment, "PYTHONPATH": ""}
            try:
                workers[name] = stack.enter_context(Worker(command, LOADING, own))
            except WorkerFailed as reason:
                _only_a_peer(name, reason)
                failed[name] = f"not loaded: {reason}"
        told = {name: {**worker.loaded, "threads": threads} for name, worker in workers.items()}
        for case in tqdm(what, desc="peers", leave=False):
            found = _in_turns(case, workers, turns, failed)
            for name in found.rates:
                told[name]["peak_bytes"] = found.peaks[name]
            rows += _rows(case, found, model)
    return {"parameters": model.config.num_parameters, "workers": told, "failed": failed, "rows": rows}


class _Turns:
    """What turns of one case brought: by name the rates, the tokens of the first turn, and peak memory."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.changed: set[str] = set()
        self.peaks: dict[str, int] = {}
        self.unable: dict[str, str] = {}
        self.busy = 0.0


def _in_turns(case: Case, workers: dict[str, Worker], turns: int, failed: dict[str, str]) -> _Turns:
    """Alternate; who fails goes from `workers` to `failed`."""
    found = _Turns()

    def ask(name: str) -> float:
        answer = workers[name].ask(case.requests, TURN)
        if found.tokens.setdefault(name, answer["tokens"]) != answer["tokens"]:
            found.changed.add(name)
        found.peaks[name] = answer["peak_bytes"]
        return case.rate(answer["times"])

    ask(OURS)
    for name in [name for name in workers if name != OURS]:
        _unless_it_fails(ask, name, workers, found, failed)
    watch = Watch()
    for _ in range(turns):
        before = ask(OURS)
        found.rates.setdefault(OURS, []).append(before)
        for name in [name for name in workers if name != OURS and name not in found.unable]:
            theirs = _unless_it_fails(ask, name, workers, found, failed)
            after = ask(OURS)
            found.rates[OURS].append(after)
            if theirs is not None:
                found.rates.setdefault(name, []).append(theirs)
                found.ratios.setdefault(name, []).append(math.sqrt(before * after) / theirs)
            before = after
    found.busy = watch.busy
    return found


def _unless_it_fails(ask, name: str, workers: dict[str, Worker], found: _Turns, failed: dict[str, str]) -> float | None:
    """A peer's rate, or None and the reason is noted."""
    try:
        return ask(name)
    except Unable as reason:
        found.unable[name] = str(reason)
    except WorkerFailed as reason:
        failed[name] = str(reason)
        workers.pop(name).close()
    return None


def _only_a_peer(name: str, reason: WorkerFailed) -> None:
    if name == OURS:
        raise reason


def _rows(case: Case, found: _Turns, model: Decoder) -> Iterator[dict]:
    """A row for ours and for each peer that this case measured; weights are read once a step, which B = 1 shows."""
    ours = found.tokens[OURS]
    for name, rates in found.rates.items():
        row = {"case": case.name, "unit": case.unit, "worker": name, "rate": statistics.median(rates),
               "rate_quartiles": quartiles(tuple(rates)), "busy": found.busy,
               "same_every_turn": name not in found.changed}  # fmt: skip
        if case.unit == "decoded tokens/s" and len(case.requests) == 1:
            row["weight_bytes_per_second"] = 4 * model.config.num_parameters * row["rate"]
        if name != OURS:
            ratios = tuple(found.ratios[name])
            row |= {"ours_over_this": statistics.median(ratios), "quartiles": quartiles(ratios), "turns": len(ratios)}
            differences = _differences(case, ours, found.tokens[name], model)
            row |= {"same_tokens": not differences, "differences": differences}
        yield row
    yield from ({"case": case.name, "worker": name, "unable": reason} for name, reason in found.unable.items())


def _differences(case: Case, ours: list[list[int]], theirs: list[list[int]], model: Decoder) -> list[dict]:
    """Each request whose tokens are not ours, with what `first_difference` says."""
    pairs = enumerate(zip(case.requests, ours, theirs, strict=True))
    found = (
        (place, models.first_difference(model, prompt, one, other)) for place, ((_, prompt, _), one, other) in pairs
    )
    return [{"request": place, **difference} for place, difference in found if difference]


def line(row: dict) -> str:
    """A row for people."""
    what = f"{row['case']}: {row['worker']}"
    if "unable" in row:
        return f"{what}: {row['unable']}"
    if row["worker"] == OURS:
        return f"{what} {row['rate']:.0f} {row['unit']}"
    low, high = row["quartiles"]
    tokens = "same tokens" if row["same_tokens"] else f"other tokens in {len(row['differences'])} requests"
    return f"{what} {row['rate']:.0f}, ours over this {row['ours_over_this']:.2f} ({low:.2f}–{high:.2f}), {tokens}"
