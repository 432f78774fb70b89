"""What cannot be served is refused by a named error, and whoever is being served does not notice."""

import copy
import math

import numpy as np
import pytest
import torch

from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.serving.engine import Engine
from minilib.serving.llm import LLM
from minilib.serving.request import InvalidRequest, SamplingParams
from tests.serving.served import POSITIONS, VOCAB, assert_idle, engine, finish, greedy, likeliest, models, prompt

COUNT = 10
BAD_PARAMS = {
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens below 0": {"max_tokens": -1},
    "max_tokens a fraction": {"max_tokens": 2.0},
    "max_tokens None": {"max_tokens": None},
    "n 0": {"n": 0},
    "n a text": {"n": "2"},
    "top_k below 0": {"top_k": -1},
    "top_k a fraction": {"top_k": 1.5},
    "temperature below 0": {"temperature": -0.1},
    "temperature NaN": {"temperature": math.nan},
    "temperature infinite": {"temperature": math.inf},
    "top_p 0": {"top_p": 0.0},
    "top_p above 1": {"top_p": 1.0001},
    "top_p NaN": {"top_p": math.nan},
    "stop an empty string": {"stop": ""},
    "stop empty": {"stop": ("end", "")},
}
BAD_KINDS = {  # what JSON may bring
    "temperature a text": {"temperature": "hot"},
    "temperature None": {"temperature": None},
    "temperature huge": {"temperature": 10**400},
    "top_p a text": {"top_p": "0.5"},
    "top_p None": {"top_p": None},
    "stop None": {"stop": None},
    "stop a number": {"stop": (5,)},
    "stop bytes": {"stop": b"end"},
    "stop_token_ids None": {"stop_token_ids": None},
    "stop_token_ids one number": {"stop_token_ids": 5},
    "max_tokens True": {"max_tokens": True},
    "n True": {"n": True},
    "seed a text": {"seed": "7"},
    "seed True": {"seed": True},
}
BAD_REQUESTS = {
    "empty prompt": ("b", (), {}, "empty"),
    "token id beyond the vocabulary": ("b", (1, VOCAB), {}, "token ids"),
    "token id below 0": ("b", (1, -1), {}, "token ids"),
    "token id a fraction": ("b", (1, 2.0), {}, "token ids"),
    "token id a text": ("b", "abc", {}, "token ids"),
    "token id None": ("b", (None,), {}, "token ids"),
    "stop token beyond the vocabulary": ("b", (1,), {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
    "as long as the model": ("b", (1,) * POSITIONS, {}, f"at most {POSITIONS}, the generated included"),
    "stop token True": ("b", (1,), {"stop_token_ids": (True,)}, "stop_token_ids"),
    "two rows at once": ("b", np.ones((2, 3), int), {}, "token ids"),
    "one number": ("b", 5, {}, "row of token ids"),
    "one number in an array": ("b", np.array(5), {}, "row of token ids"),
    "longer than the pool": ("b", (1,) * 129, {}, "128"),
    "an id being served": ("a", (1,), {}, "'a'"),
    "more samples than may run": ("b", (1,), {"n": 5}, "max_sequences"),
    "stop strings without a tokenizer": ("b", (1,), {"stop": ("end",)}, "tokenizer"),
}


def busy():
    """One request running, one waiting."""
    served = engine(8, 16, max_sequences=4)
    served.add_request("a", prompt(17), likeliest(COUNT, n=2))
    served.add_request("waits", prompt(33), likeliest(COUNT, n=4))
    served.step()
    return served


def assert_undisturbed(served):
    served.check_invariants()
    results = finish(served)
    assert {results.tokens["a", sample] for sample in range(2)} == {greedy(prompt(17), COUNT)[1:]}
    assert {results.tokens["waits", sample] for sample in range(4)} == {greedy(prompt(33), COUNT)}
    assert len(results.tokens) == 6


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_parameters_that_make_no_sense_are_refused_by_name(case):
    (name,) = BAD_PARAMS[case]
    with pytest.raises(InvalidRequest, match="empty stop" if "empty" in case else name):
        SamplingParams(**BAD_PARAMS[case])


@pytest.mark.parametrize("case", BAD_KINDS)
def test_parameters_of_the_wrong_kind_are_refused_by_name(case):
    (name,) = BAD_KINDS[case]
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**BAD_KINDS[case])


@pytest.mark.parametrize("params", [{"temperature": 0, "top_p": 1}, {"top_p": 5e-324, "top_k": 1}, {"top_k": 10**18}])
def test_parameters_at_the_limits_are_served(params):
    served = engine()
    served.add_request("a", prompt(3), SamplingParams(max_tokens=1, n=1, stop=[], stop_token_ids=[0], **params))
    assert len(finish(served).tokens["a", 0]) == 1


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_cannot_be_served_disturbs_nobody(case):
    served = busy()
    request_id, tokens, params, message = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequest, match=message):
        served.add_request(request_id, tokens, SamplingParams(**params))
    assert set(served.requests) == {"a", "waits"}
    assert_undisturbed(served)


@pytest.mark.parametrize(
    "tokens",
    [
        list(prompt(9)),
        np.array(prompt(9)),
        torch.tensor(prompt(9)),
        iter(prompt(9)),
        range(3),
        [*map(np.int64, prompt(9))],
        list(torch.tensor(prompt(9))),
        np.array(prompt(9), dtype=np.uint8),
    ],
    ids=["list", "numpy", "torch", "iterator", "range", "numpy's numbers", "torch's numbers", "bytes"],
)
def test_prompts_of_any_kind_are_served(tokens):
    served, expected = busy(), greedy((0, 1, 2) if isinstance(tokens, range) else prompt(9), COUNT)
    served.add_request("b", tokens, likeliest(COUNT))
    results = finish(served)
    assert results.tokens["b", 0] == expected and {type(token) for token in results.tokens["b", 0]} == {int}


@pytest.mark.parametrize("tokens", [np.array([True, False]), [True], torch.tensor([1.0, 2.0]), [np.float64(1)]])
def test_what_is_no_token_id_is_refused(tokens):
    served = busy()
    with pytest.raises(InvalidRequest, match="prompt holds"):
        served.add_request("b", tokens, likeliest(COUNT))
    assert_undisturbed(served)


def test_parameters_of_numpy_and_one_stop_string_mean_the_same():
    one = SamplingParams(np.int64(3), top_k=np.int32(2), n=np.int8(1), stop="end", stop_token_ids=np.array([5, 6]))
    assert one == SamplingParams(3, top_k=2, n=1, stop=("end",), stop_token_ids=(5, 6))


@pytest.mark.parametrize("end", ["13", -1, 10**9, True, VOCAB, 2.0, [13, -1], (VOCAB,), ["13"], [True], [[13]]])
def test_an_end_token_that_is_none_is_refused_by_name(end):
    with pytest.raises(ValueError, match="eos_token_id"):
        engine(eos_token_id=end)
    with pytest.raises(ValueError, match="eos_token_id"):
        LLM(models()[1], num_pages=4, eos_token_id=end)


@pytest.mark.parametrize("end", [13, np.int64(13), [13], (13, 14), {13}, np.array([13]), torch.tensor([13]), None, ()])
def test_one_end_token_several_or_none(end):
    assert engine(eos_token_id=end).eos_token_ids <= {13, 14}


@pytest.mark.parametrize("stop", [(5,), b"end"])
def test_no_request_that_was_taken_breaks_the_steps_of_others(stop):
    served = busy()
    served.tokenizer = _Words()
    with pytest.raises(InvalidRequest):
        served.add_request("b", (1, 2), SamplingParams(stop=stop))


class _Words:
    """Enough of a tokenizer for `add_request`."""


def test_a_top_k_beyond_all_floats_is_served():
    served = engine()
    served.add_request("a", prompt(3), SamplingParams(max_tokens=1, top_k=10**400))
    assert len(finish(served).tokens["a", 0]) == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-46, 5e-324, 1e30, 1e39, 1e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures_are_served(temperature, dtype):
    """Nearly greedy, or nearly uniform; never a step that fails for everybody."""
    served = Engine(copy.deepcopy(models()[1]).to(dtype), 8)
    served.add_request("b", prompt(17), SamplingParams(max_tokens=3, temperature=temperature, seed=0))
    served.add_request("a", prompt(9), likeliest(3))
    results = finish(served)
    assert results.tokens["a", 0] == greedy(prompt(9), 3)
    if temperature < 1:
        assert results.tokens["b", 0] == greedy(prompt(17), 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": -1}, "page_size"),
        ({"num_pages": 0}, "num_pages"),
        ({"num_pages": -1}, "num_pages"),
        ({"num_swap_pages": -1}, "num_swap_pages is a whole number ≥ 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"preemption": "drop"}, "recompute, swap"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        engine(**options)


def test_an_idle_engine_has_nothing_to_do():
    served = engine()
    assert not served.has_unfinished and served.step() == []
    assert_idle(served)


@pytest.mark.parametrize("moe", [{"capacity_factor": 1.0}, {"choice": "expert", "capacity_factor": 2.0}])
def test_a_model_whose_answers_depend_on_its_batch_is_refused(moe):
    shape = {**models()[1].config.__dict__, "moe": MoEConfig(4, 1, 16, **moe)}
    with pytest.raises(ValueError, match="depend on who else is in the batch.*choice='token' and capacity_factor=None"):
        Engine(Decoder(type(models()[1].config)(**shape)), num_pages=4)
