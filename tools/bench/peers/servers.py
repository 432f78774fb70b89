"""Measure our server beside servers that people run on a CPU: same weights, threads and load, fp32, greedy.

Called by `make bench ARGS="--only servers"`. Each server is a process of its own that stands still while another one
works. Turns alternate as those of `peers` do: ours, a peer, ours, …; a ratio is ours, just before and just after, over
the peer's.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minilib.numbers.measure import quartiles
from minilib.numbers.neighbours import Watch
from tools.bench.peers import LOADING, OURS, models
from tools.bench.peers.environments import BUILD, Unavailable, convert, python_of
from tools.bench.peers.process import WorkerFailed
from tools.bench.server_process import ServerProcess
from tools.bench.serving_http import COMPLETIONS, our_server
from tools.bench.sse_client import Stream, StreamFailed, load

STREAMS, PROMPT, NEW, SEQUENCES = (1, 8), 128, 128, 32
PAGE = 64  # tokens, of transformers' cache


@dataclass(frozen=True)
class Server:
    """One server to stand beside ours.

    Args:
        converted: the engine, from PEERS, whose format of a checkpoint it reads; None for Hugging Face's.
        module: what its Python runs.
        options: behind the module; "{folder}", "{threads}" and "{port}" are filled in.
        ready: path of a GET that is answered when it can be asked.
        model: the name of the model in a request, with "{folder}".
        extra: fields of a request that make it do what the others do.
    """

    converted: str | None
    module: str
    options: tuple[str, ...]
    ready: str
    model: str
    extra: dict


SERVERS = {
    "llama-cpp-python": Server(
        "llama.cpp",
        "llama_cpp.server",
        ("--model", "{folder}/f32.gguf", "--n_ctx", str(PROMPT + NEW), "--n_threads", "{threads}",
         "--n_threads_batch", "{threads}", "--verbose", "False", "--interrupt_requests", "False",
         "--host", "127.0.0.1", "--port", "{port}"),
        "/v1/models",
        "default",
        {"repeat_penalty": 1.0},
    ),
    "transformers serve": Server(
        None,
        "transformers.cli.transformers",
        ("serve", "{folder}/hf", "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu", "--dtype", "float32",
         "--continuous-batching", "--cb-block-size", str(PAGE), "--cb-num-blocks",
         str(SEQUENCES * (PROMPT + NEW) // PAGE), "--cb-max-batch-tokens", "4096", "--format", "quiet"),
        "/health",
        "{folder}/hf",
        {},
    ),
}  # fmt: skip


def servers(names: Sequence[str] = tuple(SERVERS), turns: int = 5) -> dict:
    """The figures of chapter 17 about other servers, JSON values in SI units.

    Args:
        names: of the peers, from SERVERS.
        turns: of each peer at each number of streams, beside one that warms up.

    Returns:
        "rows"; "failed": reasons by name; "same_texts": of each peer's texts, how many are ours; "busy".

    Raises:
        WorkerFailed: if ours fails.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    BUILD.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=BUILD) as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        model = models.random_model(models.RANDOM["small"])
        model.embed.weight.data[0] = 0.0  # the end token is never the likeliest: every answer has NEW tokens
        models.write_with_letters(model, folder)
        running = {OURS: stack.enter_context(our_server(folder / "hf", SEQUENCES, PROMPT + NEW, environment))}
        bodies = {OURS: {"model": "hf", "ignore_eos": True}}  # the folder's name
        for name in tqdm(names, desc="installing and starting", leave=False):
            try:
                running[name] = stack.enter_context(_started(name, folder, threads, environment))
                bodies[name] = {"model": SERVERS[name].model.format(folder=folder), **SERVERS[name].extra}
            except (Unavailable, WorkerFailed) as reason:
                failed[name] = str(reason)
        watch, rows, same = Watch(), [], dict.fromkeys(running, 0)
        for streams in STREAMS:
            rows += _beside(running, bodies, model.config.vocab_size, streams, turns, failed, same)
        told = {"parameters": model.config.num_parameters, "threads": threads, "prompt": PROMPT, "new": NEW}
        same_of = {"same_texts": same, "texts": sum(STREAMS)}
        return {**told, "rows": rows, **same_of, "failed": failed, "busy": watch.busy}


def lines(found: dict) -> Iterator[str]:
    """What was found, for people."""
    for row in found["rows"]:
        rate, first = row["ours_over_theirs"]["median"], row["first_over_theirs"]["median"]
        yield (f"{row['server']}, {row['streams']} streams: {row['output_rate']['ours']:.0f} tokens/s, "
               f"{rate:.2f}× theirs; first token after {first:.2f}× their time")  # fmt: skip
    for name, reason in found["failed"].items():
        yield f"{name}: {reason}"


def _started(name: str, folder: Path, threads: int, environment: dict[str, str]) -> ServerProcess:
    server, python = SERVERS[name], python_of(name)
    if server.converted:
        convert(server.converted, python, folder)
    filled = [option.replace("{folder}", str(folder)).replace("{threads}", str(threads)) for option in server.options]
    command = [str(python), "-m", server.module, *filled]
    return ServerProcess(command, server.ready, LOADING, {**environment, "PYTHONPATH": ""})


def _beside(
    running: dict[str, ServerProcess],
    bodies: dict[str, dict],
    vocabulary: int,
    streams: int,
    turns: int,
    failed: dict[str, str],
    same: dict[str, int],
) -> list[dict]:
    """One row a peer that answers; notes the others, and whose texts are ours."""
    letters, draws = models.letters(vocabulary), np.random.default_rng(streams)
    peers = [name for name in running if name != OURS]
    taken: dict[str, list[list[Stream]]] = {name: [] for name in running}
    for _ in tqdm(range(turns + 1), desc=f"{streams} streams", leave=False):
        ids = draws.integers(1, vocabulary, size=(streams, PROMPT))  # new ones: a kept prompt is of no use
        prompts = ["".join(letters[token] for token in row) for row in ids]
        for name in (each for peer in peers for each in (OURS, peer)):
            if name in failed:
                continue
            try:
                taken[name].append(_asked(running[name], bodies[name], prompts))
            except (OSError, StreamFailed) as reason:
                if name == OURS:
                    raise WorkerFailed(str(reason)) from reason
                failed[name] = f"{streams} streams: {reason}"
    taken[OURS].append(_asked(running[OURS], bodies[OURS], prompts))
    alive = [peer for peer in peers if peer not in failed]
    texts = [each.text for each in taken[OURS][0]]
    for name in (OURS, *alive):
        same[name] += sum(each.text == text for each, text in zip(taken[name][0], texts, strict=True))
    return [_row(peer, streams, taken[peer], _around(taken[OURS], peers.index(peer), len(peers))) for peer in alive]


def _around(ours: list[list[Stream]], place: int, peers: int) -> list[tuple[list[Stream], list[Stream]]]:
    """Ours just before and just after each turn of the peer at a place."""
    befores = range(place, len(ours) - 1, peers)
    return [(ours[before], ours[before + 1]) for before in befores]


def _row(peer: str, streams: int, theirs: list[list[Stream]], ours: list) -> dict:
    rates = tuple((_rate(before) + _rate(after)) / 2 / _rate(turn)
                  for turn, (before, after) in zip(theirs, ours, strict=True))[1:]  # fmt: skip
    firsts = tuple((_first(before) + _first(after)) / 2 / _first(turn)
                   for turn, (before, after) in zip(theirs, ours, strict=True))[1:]  # fmt: skip
    middle = statistics.median
    return {
        "server": peer,
        "streams": streams,
        "output_rate": {"ours": middle(_rate(turn) for turn, _ in ours[1:]),
                        "theirs": middle(map(_rate, theirs[1:]))},
        "ours_over_theirs": {"median": middle(rates), "quartiles": quartiles(rates)},
        "first_token": {"ours": middle(_first(turn) for turn, _ in ours[1:]),
                        "theirs": middle(map(_first, theirs[1:]))},
        "first_over_theirs": {"median": middle(firsts), "quartiles": quartiles(firsts)},
    }  # fmt: skip


def _asked(server: ServerProcess, body: dict, prompts: Sequence[str]) -> list[Stream]:
    """One completion of each prompt, all at once.

    Raises:
        StreamFailed: if one is not of NEW letters.
    """
    body = {**body, "max_tokens": NEW, "temperature": 0, "stream": True}
    server.resume()
    found = load(server.port, COMPLETIONS, [{**body, "prompt": prompt} for prompt in prompts])
    server.pause()
    for each in found:
        if len(each.text) != NEW:
            raise StreamFailed(f"{len(each.text)} letters came for {NEW} tokens")
    return found


def _rate(found: Sequence[Stream]) -> float:
    """Output tokens a second, from the first request to the last token."""
    return sum(len(each.text) for each in found) / (max(each.last for each in found) - min(e.sent for e in found))


def _first(found: Sequence[Stream]) -> float:
    """Median of the times to the first token."""
    return statistics.median(each.first - each.sent for each in found)
