"""Prefix hits beside other engines, with stubs in their places, and this library behind the pipe, keeping pages."""

import json
import sys

import pytest

from tests.tools.test_bench_peers import CONFIG, greedy, stub
from tools.bench.peers import environments, models
from tools.bench.peers.prefix import HITS, TAIL, hits_beside
from tools.bench.peers.process import Worker, WorkerFailed
from tools.bench.peers.worker import ENGINES, KEEPING


def test_each_turn_is_a_whole_prompt_and_hits():
    commands = {"ours": stub()} | {name: stub(name) for name in ("other tokens", "dies", "not loaded")}
    found = hits_beside(commands, 50, (3, 40), turns=2, threads=1)
    json.dumps(found)
    assert found["failed"] == {"not loaded": "not loaded: ended with 1: the library is not there",
                               "dies": "ended with 3: no message"}  # fmt: skip
    assert [(row["worker"], row["cached"], row["tail"]) for row in found["rows"]] == [
        ("ours", 3, TAIL), ("other tokens", 3, TAIL), ("ours", 40, TAIL), ("other tokens", 40, TAIL)
    ]  # fmt: skip
    for row in found["rows"]:
        low, high = row["whole_over_hit"]["quartiles"]
        assert 0 < low <= row["whole_over_hit"]["median"] <= high and row["hit"]["median"] > 0 < row["whole"]["median"]
    assert found["prompts"] == 3 * 2 * (1 + HITS)  # with the turn that warms up
    assert found["same_first_tokens"] == {"ours": found["prompts"], "other tokens": 0}


def test_ours_must_not_fail():
    for what in ("dies", "not loaded"):
        with pytest.raises(WorkerFailed):
            hits_beside({"ours": stub(what)}, 50, (3,), turns=1, threads=1)


def test_this_library_keeps_pages_behind_the_pipe(tmp_path, monkeypatch):
    monkeypatch.setitem(models.RANDOM, "small", CONFIG)
    model = models.save("small", tmp_path)
    command = [sys.executable, "-m", "tools.bench.peers.ours", str(tmp_path), "1", "2", "32", "hash"]
    with Worker(command, timeout=120, environment={"PYTHONPATH": str(environments.ROOT)}) as worker:
        assert worker.loaded["settings"]["prefix_cache"] == "hash"
        prompt = list(range(20))
        first, again = (worker.ask([[0.0, prompt, 3]], timeout=60)["tokens"] for _ in range(2))
    assert first == again == [greedy(model, prompt, 3)]


def test_engines_that_keep_pages_differ_in_that_alone():
    for name, engine in KEEPING.items():
        assert engine.keeps and not ENGINES[name].keeps and issubclass(engine, ENGINES[name])
        assert ENGINES[f"{name}, keeping"] is engine and name in environments.PEERS
