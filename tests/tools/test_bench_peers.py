"""The benchmark beside other engines, with stubs in their places: the protocol, and what becomes of peers that fail."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from tools.bench import peers
from tools.bench.peers import environments, models
from tools.bench.peers.cases import Case, cases
from tools.bench.peers.process import Unable, Worker, WorkerFailed
from tools.bench.peers.worker import serve, told
from tools.bench.still_process import last_line

STUB = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
from worker import Unable, answer, own_pipe

class Stub:
    settings = {{"kind": "stub"}}
    def __init__(self):
        self.left = {{}}
    def add(self, request, prompt, new):
        if {what!r} == "unable" and len(prompt) > 3:
            raise Unable("prompts of four are too much")
        self.left[request] = [prompt[-1], new]
    def step(self):
        if {what!r} == "dies":
            os._exit(3)
        if {what!r} == "hangs":
            time.sleep(1000)
        if {what!r} == "raises":
            raise ValueError("no such file: /somewhere/else/model.bin")
        print("noise on standard output")
        made = []
        for request in list(self.left):
            token, left = self.left[request]
            token = (token + (2 if {what!r} == "other tokens" else 1)) % 50
            made.append((request, token))
            self.left[request] = [token, left - 1]
            if left == 1:
                del self.left[request]
        return made

if {what!r} == "not loaded":
    sys.exit("the library is not there")
answer(Stub, ("pytest",), own_pipe())
"""
SHORT = [[0.0, [1, 2], 3], [0.0, [7], 3]]
CONFIG = ModelConfig(50, 16, 16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=32)


def stub(what="well"):
    return [sys.executable, "-c", STUB.format(folder=str(environments.HERE), what=what)]


def is_alive(pid):
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip() != ""


def test_a_worker_says_what_it_loaded_and_serves():
    with Worker(stub(), timeout=60) as worker:
        assert worker.loaded["settings"] == {"kind": "stub"} and worker.loaded["versions"]["pytest"]
        found = worker.ask(SHORT, timeout=60)
        assert found["tokens"] == [[3, 4, 5], [8, 9, 10]] and found["peak_bytes"] > 0
        assert [len(row) for row in found["times"]] == [3, 3] and found["times"][0] == sorted(found["times"][0])
        assert worker.ask(SHORT, timeout=60)["tokens"] == found["tokens"]


def test_a_worker_stands_still_until_it_is_asked():
    with Worker(stub(), timeout=60) as worker:
        pid = worker._process.pid
        for _ in range(2):
            state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
            assert state.startswith("T")
            worker.ask(SHORT, timeout=60)
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("dies", "ended with 3"), ("hangs", "no answer within 1 s"), ("raises", "ValueError: no such file: …/model.bin")],
)
def test_a_worker_that_fails_says_why(what, reason):
    with Worker(stub(what), timeout=60) as worker:
        pid = worker._process.pid
        with pytest.raises(WorkerFailed, match=reason):
            worker.ask(SHORT, timeout=1 if what == "hangs" else 60)
    assert not is_alive(pid)


def test_a_worker_that_does_not_load_says_why():
    with pytest.raises(WorkerFailed, match="ended with 1: the library is not there"):
        Worker(stub("not loaded"), timeout=60)


def test_what_an_engine_does_not_offer_costs_that_case_alone():
    with Worker(stub("unable"), timeout=60) as worker:
        with pytest.raises(Unable, match="prompts of four"):
            worker.ask([[0.0, [1, 2, 3, 4], 1]], timeout=60)
        assert worker.ask(SHORT, timeout=60)["tokens"] == [[3, 4, 5], [8, 9, 10]]


def test_nothing_is_left_when_the_user_interrupts():
    code = f"""
import sys
from tools.bench.peers.process import Worker
with Worker({stub("hangs")!r}, timeout=60) as worker:
    print(worker._process.pid, flush=True)
    worker.ask({SHORT!r}, timeout=600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, cwd=environments.ROOT)  # fmt: skip
    with parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(signal.SIGINT)
        try:
            assert parent.wait(60) != 0
        finally:
            parent.kill()
    assert not is_alive(pid)


def test_peers_beside_ours():
    model = Decoder(CONFIG).eval()
    what = [Case("two", "decoded tokens/s", SHORT), Case("long", "prompt tokens/s", [[0.0, [1, 2, 3, 4], 1]]),
            Case("later", "output tokens/s", [[0.0, [1], 2], [0.05, [5], 3]])]  # fmt: skip
    commands = {"ours": stub()} | {name: stub(name) for name in ("other tokens", "dies", "not loaded", "unable")}
    found = peers.beside(commands, model, what, turns=2, threads=1)
    json.dumps(found)
    assert found["failed"] == {"not loaded": "not loaded: ended with 1: the library is not there",
                               "dies": "ended with 3: no message"}  # fmt: skip
    rows = {(row["case"], row["worker"]): row for row in found["rows"]}
    assert set(rows) == {(case.name, name) for case in what for name in ("ours", "other tokens", "unable")}
    assert rows["long", "unable"]["unable"] == "prompts of four are too much"
    assert rows["two", "unable"]["same_tokens"] and rows["later", "unable"]["same_tokens"]
    for case in what:
        row = rows[case.name, "other tokens"]
        assert not row["same_tokens"] and [each["position"] for each in row["differences"]] == [0] * len(case.requests)
        assert row["quartiles"][0] <= row["ours_over_this"] <= row["quartiles"][1] and row["turns"] == 2
    assert all(peers.line(row) for row in found["rows"])
    assert set(found["workers"]) == {"ours", "other tokens", "dies", "unable"}


def test_ours_must_not_fail():
    with pytest.raises(WorkerFailed, match="ended with 3"):
        peers.beside({"ours": stub("dies")}, Decoder(CONFIG), [Case("two", "output tokens/s", SHORT)], 1, 1)


def test_this_library_serves_behind_the_pipe(tmp_path, monkeypatch):
    monkeypatch.setitem(models.RANDOM, "small", CONFIG)
    model = models.save("small", tmp_path)
    command = [sys.executable, "-m", "tools.bench.peers.ours", str(tmp_path), "1", "4", "16"]
    with Worker(command, timeout=120, environment={"PYTHONPATH": str(environments.ROOT)}) as worker:
        found = worker.ask([[0.0, [1, 2, 3], 5], [0.0, [4], 2]], timeout=60)
    for (prompt, new), tokens in zip((([1, 2, 3], 5), ([4], 2)), found["tokens"], strict=True):
        assert len(tokens) == new and tokens == greedy(model, prompt, new)
        assert models.first_difference(model, prompt, tokens, list(tokens)) is None


@torch.inference_mode()
def greedy(model, prompt, new):
    ids = list(prompt)
    for _ in range(new):
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], model.ops.causal_attention)
        ids.append(logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_the_first_difference_tells_a_tie_from_a_mistake(monkeypatch):
    monkeypatch.setitem(models.RANDOM, "small", CONFIG)
    model = models.random_model(CONFIG)
    ours = greedy(model, [1, 2], 4)
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, *ours[:2]]]), torch.arange(4)[None], model.ops.causal_attention)[0, -1]
    second = logits.topk(2).indices[1].item()
    found = models.first_difference(model, [1, 2], ours, [*ours[:2], second, 0])
    gap = (logits.max() - logits[second]).item()
    assert found["position"] == 2 and found["logit_gap"] == pytest.approx(gap) and gap > 0
    assert models.first_difference(model, [1, 2], ours, ours[:3]) == {"position": 3, "lengths": [4, 3]}


def test_requests_wait_for_their_arrival():
    class Engine:
        def __init__(self):
            self.begun, self.waiting, self.seen = time.perf_counter(), [], {}

        def add(self, request, prompt, new):
            self.seen[request] = time.perf_counter() - self.begun
            self.waiting.append(request)

        def step(self):
            made, self.waiting = [(request, 0) for request in self.waiting], []
            return made

    engine = Engine()
    found = serve(engine, [[0.0, [1], 1], [0.03, [1], 1], [0.03, [1], 1]])
    assert found["tokens"] == [[0], [0], [0]]
    assert engine.seen[1] >= 0.03 and engine.seen[2] >= 0.03 and found["times"][1][0] >= 0.03


def test_rates():
    requests = [[0.0, [1, 2, 3], 2], [0.0, [1], 3]]
    times = told([(1.0, 0, 5), (2.0, 1, 5), (3.0, 0, 5), (3.0, 1, 5), (4.0, 1, 5)], 2)["times"]
    assert times == [[1.0, 3.0], [2.0, 3.0, 4.0]]
    assert Case("", "decoded tokens/s", requests).rate(times) == 3 / 2  # three tokens after both had their first
    assert Case("", "prompt tokens/s", requests).rate(times) == 4 / 2
    assert Case("", "output tokens/s", requests).rate(times) == 5 / 4


def test_cases_fit_into_what_every_engine_has_room_for():
    made = cases(100)
    assert [case.name for case in made] == ["decode, B = 1", "decode, B = 8", "decode, B = 32", "prompt of 512",
                                            "mixed lengths, with arrivals"]  # fmt: skip
    for case in made:
        assert len(case.requests) <= peers.SEQUENCES
        for _, prompt, new in case.requests:
            assert len(prompt) + new <= peers.LENGTH and new >= 1 and set(prompt) <= set(range(100))
        arrivals = [arrival for arrival, *_ in case.requests]
        assert arrivals == sorted(arrivals)
    assert cases(100)[0] == made[0]


def test_random_models_do_not_repeat_one_token():
    tokens = greedy(models.random_model(CONFIG), [3, 1], 8)
    assert len(set(tokens)) > 2


def test_an_environment_that_cannot_be_made_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setitem(environments.PEERS, "openvino", environments.Peer("none", ("no such requirement !",), "none"))
    with pytest.raises(environments.Unavailable, match="no such requirement"):
        environments.python_of("openvino", tmp_path)
    assert environments.python_of("transformers", tmp_path) == environments.Path(sys.executable)


def test_every_package_is_pinned():
    assert all("==" in package for peer in environments.PEERS.values() for package in peer.packages)


def test_reasons_name_no_path_of_this_machine():
    assert last_line("first\n  Error in /home/someone/x/model.bin\n\n") == "Error in …/model.bin"
    assert last_line(" \n") == "no message"
    assert len(last_line("x" * 1000)) == 300
    assert last_line("2/3 of a/b") == "2/3 of a/b" and os.sep == "/"
