"""Prompts in, texts out; whoever leaves early, or brings what cannot be served, leaves nothing behind."""

import functools
import itertools
import json
import signal

import numpy as np
import pytest
import torch

from minilib.model import tokenizer, weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.llm import LLM
from minilib.serving.request import InvalidRequest, SamplingParams
from tests.model.random_weights import randomize
from tests.serving.served import assert_idle, finish
from tests.serving.test_detokenizer import CUT, TRAINED

CONFIG = ModelConfig(TRAINED.get_vocab_size(), 16, 24, 1, 2, 1, 8, max_position=64)
PROMPTS = ["def forward(", "for x in range(10):", "x"]
DRAWN = SamplingParams(max_tokens=12, temperature=2.0, seed=5, n=2)


@functools.cache
def model():
    return randomize(Decoder(CONFIG).double(), seed=5)


@pytest.fixture
def llm():
    return LLM(model(), TRAINED)


def expected(llm, prompt, params):
    """Tokens of each sample, from an engine that was asked directly."""
    llm.engine.add_request("direct", TRAINED.encode(prompt).ids, params)
    results = finish(llm.engine)
    return [list(results.tokens["direct", sample]) for sample in range(params.n)]


def certain(text):
    """Without an unfinished character at the end."""
    return text.rstrip(CUT)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=9, temperature=0), DRAWN, None])
def test_every_prompt_gets_its_samples_in_order(llm, params):
    completions = llm.generate(PROMPTS, params)
    samples = params.n if params else 1
    assert [len(row) for row in completions] == [samples] * 3
    for prompt, row in zip(PROMPTS, completions, strict=True):
        for sample, completion in enumerate(row):
            if params:
                assert completion.token_ids == expected(llm, prompt, params)[sample]
            assert certain(completion.text) == certain(TRAINED.decode(completion.token_ids))
            assert completion.finish_reason in ("length", "stop")
    assert_idle(llm.engine)


def test_token_ids_and_texts_are_the_same_prompts(llm):
    rows = [TRAINED.encode(prompt).ids for prompt in PROMPTS]
    assert llm.generate(rows, DRAWN) == llm.generate(PROMPTS, DRAWN) == llm.generate(list(map(tuple, rows)), DRAWN)
    assert llm.generate([], DRAWN) == []


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_gives_the_text_of_its_tokens(llm, seed):
    outputs = list(llm.stream(PROMPTS[0], SamplingParams(max_tokens=30, temperature=1.5, seed=seed)))
    assert certain("".join(output.text for output in outputs)) == certain(TRAINED.decode([o.token_id for o in outputs]))
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason == ("length" if len(outputs) == 30 else "stop")
    assert_idle(llm.engine)


def test_stop_strings_end_each_sample_where_its_text_has_them(llm):
    free = llm.generate(PROMPTS, SamplingParams(max_tokens=25, temperature=2.0, seed=9, n=3))
    text = max((completion.text for row in free for completion in row), key=len)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    held = llm.generate(PROMPTS, SamplingParams(max_tokens=25, temperature=2.0, seed=9, n=3, stop=(stop, "never seen")))
    ended = 0
    for before, after in zip(sum(free, []), sum(held, []), strict=True):
        if stop in before.text:
            ended += 1
            assert after.text == before.text[: before.text.index(stop)] and after.finish_reason == "stop"
            assert after.token_ids == before.token_ids[: len(after.token_ids)]
            assert stop in TRAINED.decode(after.token_ids) and stop not in TRAINED.decode(after.token_ids[:-1])
        else:
            assert after == before
    assert 0 < ended < 9


def test_the_end_token_ends_a_text_and_is_not_seen(llm):
    end = TRAINED.token_to_id(tokenizer.END)
    assert llm.engine.eos_token_ids == {end}
    heated = SamplingParams(max_tokens=60, temperature=50.0, seed=1, n=40)
    row = llm.generate([PROMPTS[2]], heated)[0]
    stopped = [completion for completion in row if completion.finish_reason == "stop"]
    assert stopped and all(completion.token_ids.index(end) == len(completion.token_ids) - 1 for completion in stopped)
    assert all(tokenizer.END not in completion.text for completion in row)


@pytest.mark.parametrize("bad", ["", [], [10**6], [-1], [None], [0] * 65])
def test_one_bad_prompt_among_good_ones_adds_none(llm, bad):
    for prompts in ([*PROMPTS, bad], [bad, *PROMPTS], [PROMPTS[0], bad, PROMPTS[1]]):
        with pytest.raises(InvalidRequest):
            llm.generate(prompts, DRAWN)
        assert_idle(llm.engine)
    with pytest.raises(InvalidRequest):
        next(llm.stream(bad))
    assert_idle(llm.engine)
    assert llm.generate(PROMPTS, DRAWN)


@pytest.mark.parametrize("bad", [5, None])
def test_a_prompt_that_is_none_at_all_adds_none_either(llm, bad):
    with pytest.raises((TypeError, InvalidRequest)):
        llm.generate([*PROMPTS, bad], DRAWN)
    assert_idle(llm.engine)


@pytest.mark.parametrize("one", ["def", [1, 2, 3], np.array([1, 2]), torch.tensor([1, 2]), 5, None])
def test_one_prompt_that_is_not_in_a_list_is_refused(llm, one):
    with pytest.raises(InvalidRequest, match="list of prompts"):
        llm.generate(one, DRAWN)
    assert_idle(llm.engine)


def test_arrays_and_tensors_of_token_ids_are_prompts(llm):
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = llm.generate(rows, DRAWN)
    for prompts in (np.array(rows), torch.tensor(rows), [np.array(row) for row in rows], map(torch.tensor, rows)):
        assert llm.generate(prompts, DRAWN) == expected
    assert [output.token_id for output in llm.stream(np.array(rows[0]), DRAWN) if output.sample == 0] == (
        expected[0][0].token_ids
    )


def test_one_stop_string_needs_no_tuple(llm):
    (free,), (held,) = (llm.generate(["x"], SamplingParams(9, 0, stop=stop))[0] for stop in ((), "w"))
    assert "w" in free.text and held.text == free.text[: free.text.index("w")]


def test_a_request_that_fails_says_so_and_keeps_what_it_has(monkeypatch, llm):
    expected = llm.generate(PROMPTS, SamplingParams(9, 0))
    forward, calls = model().unembed.forward, itertools.count(1)

    def unembed(x):
        logits = forward(x)
        if next(calls) == 4:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(model().unembed, "forward", unembed)
    completions = llm.generate(PROMPTS, SamplingParams(9, 0))
    failed = completions.pop(1)[0]
    before = expected.pop(1)[0]
    assert completions == expected
    assert (failed.finish_reason, failed.token_ids) == ("error", before.token_ids[:3]) and "NaN" in failed.error
    assert before.text.startswith(failed.text.rstrip(CUT)) and failed.text
    assert_idle(llm.engine)


@pytest.mark.parametrize("generation, config, ends", [
    ({"eos_token_id": [23, 30]}, {"eos_token_id": 5}, {23, 30}),
    ({"eos_token_id": 23}, {}, {23}),
    ({"temperature": 0.6}, {"eos_token_id": 5}, {5}),
    (None, {"eos_token_id": [5, 6]}, {5, 6}),
    (None, {"eos_token_id": 0}, {0}),
    (None, {"eos_token_id": None}, {TRAINED.token_to_id(tokenizer.END)}),
    (None, {}, {TRAINED.token_to_id(tokenizer.END)}),
])  # fmt: skip
def test_end_tokens_of_a_checkpoint_are_those_of_its_files(tmp_path, generation, config, ends):
    weights.save(model(), tmp_path, torch.float32)
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert LLM.load(tmp_path, num_pages=8).engine.eos_token_ids == ends
    assert LLM.load(tmp_path, num_pages=8, eos_token_id=7).engine.eos_token_ids == {7}


@pytest.mark.parametrize("end", ["13", -1, 10**9, True, [5, "13"]])
def test_end_tokens_that_are_none_are_refused_by_name(tmp_path, end):
    weights.save(model(), tmp_path, torch.float32)
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(ValueError, match="eos_token_id"):
        LLM.load(tmp_path, num_pages=8)


def test_a_checkpoint_without_a_tokenizer_is_refused_before_its_weights_are_read(tmp_path):
    weights.save(model(), tmp_path, torch.float32).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        LLM.load(tmp_path)


def test_prompts_may_come_from_a_generator(llm):
    assert llm.generate((prompt for prompt in PROMPTS), DRAWN) == llm.generate(PROMPTS, DRAWN)


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_leaving_a_stream_early_aborts_it(llm, taken):
    stream = llm.stream(PROMPTS[1], DRAWN)
    for _ in range(taken):
        next(stream)
    assert llm.engine.has_unfinished
    stream.close()
    assert_idle(llm.engine)
    for _ in llm.stream(PROMPTS[1], DRAWN):
        break
    assert_idle(llm.engine)


def test_a_stream_that_nobody_listens_to_asks_for_nothing(llm):
    llm.stream(PROMPTS[1], DRAWN)
    assert_idle(llm.engine)


def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch):
    def interrupted(*inputs, **names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model().norm, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, DRAWN)
    assert_idle(llm.engine)


@pytest.mark.parametrize("other", ["generate", "stream"])
def test_a_stream_loses_nothing_to_another_caller(llm, other):
    alone = [output.token_id for output in llm.stream(PROMPTS[1], SamplingParams(max_tokens=9, temperature=0))]
    stream = llm.stream(PROMPTS[1], SamplingParams(max_tokens=9, temperature=0))
    got = [next(stream).token_id]
    if other == "generate":
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=3, temperature=0))
    else:
        list(llm.stream(PROMPTS[0], SamplingParams(max_tokens=3, temperature=0)))
    got += [output.token_id for output in stream]
    assert got == alone


@pytest.mark.parametrize("step", [1, 2, 3])  # the third makes the stream's last token
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_loses_nothing_if_another_caller_is_interrupted(llm, monkeypatch, step, n):
    params = SamplingParams(max_tokens=4, temperature=0, n=n)
    alone = list(llm.stream(PROMPTS[1], params))
    stream, calls, charge = llm.stream(PROMPTS[1], params), itertools.count(1), llm.engine.scheduler.charge
    got = [next(stream)]

    def interrupted(members):
        charge(members)
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)  # held until the step has made its outputs

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.engine.scheduler, "charge", interrupted)
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=9, temperature=0))
    assert [tuple(output)[1:] for output in got + list(stream)] == [tuple(output)[1:] for output in alone]
    assert_idle(llm.engine)


def test_requests_of_others_are_served_beside_and_not_mixed_in(llm):
    llm.engine.add_request("mine", TRAINED.encode(PROMPTS[1]).ids, SamplingParams(max_tokens=30, temperature=0))
    completions = llm.generate(PROMPTS, DRAWN)
    assert list(llm.engine.requests) == ["mine"]
    llm.engine.abort("mine")
    assert completions == llm.generate(PROMPTS, DRAWN)


def test_without_a_tokenizer_token_ids_go_in_and_out():
    llm = LLM(model())
    rows = [TRAINED.encode(prompt).ids for prompt in PROMPTS]
    plain = llm.generate(rows, SamplingParams(max_tokens=6, temperature=0))
    assert all(completion.text == "" and len(completion.token_ids) == 6 for (completion,) in plain)
    with pytest.raises(InvalidRequest, match="token ids"):
        llm.generate(PROMPTS)
    assert_idle(llm.engine)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"page_size": 0}, "page_size"),
        ({"num_pages": 0}, "num_pages"),
        ({"num_pages": -1}, "num_pages"),
        ({"page_size": -1}, "page_size"),
        ({"page_size": 0, "num_pages": 4}, "page_size"),
        ({"preemption": "none"}, "preemption"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        LLM(model(), **options)


def test_a_checkpoint_is_loaded_with_its_tokenizer(tmp_path):
    weights.save(model(), tmp_path, torch.float32)
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    llm = LLM.load(tmp_path, torch.float64, num_pages=30, page_size=2, max_sequences=3)
    assert (llm.engine.cache.num_slots, llm.engine.scheduler.max_sequences) == (60, 3)
    greedy = SamplingParams(max_tokens=9, temperature=0)
    mine = [completion.token_ids for (completion,) in llm.generate(PROMPTS, greedy)]
    assert mine == [expected(LLM(model(), TRAINED), prompt, greedy)[0] for prompt in PROMPTS]
