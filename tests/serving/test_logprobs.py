"""Log-probabilities of tokens: those of transformers' model, whatever the tokens were drawn from."""

import math

import pytest
import torch

from minilib.serving import engine as engine_module
from minilib.serving.request import InvalidRequest, SamplingParams
from minilib.serving.sampling import NO_LOGPROBS, log_probabilities
from tests.serving import faults
from tests.serving.served import VOCAB, engine, finish, likeliest, models, prompt

ROUNDING = 3e-6  # transformers computes norms and rotary angles in fp32


def outputs_of(served, text, params, request_id="a"):
    served.add_request(request_id, text, params)
    made = []
    while served.has_unfinished:
        made += served.step()
    return made


def expected(text, tokens):
    """(len(tokens), VOCAB): log-probabilities at each place, by transformers and torch."""
    with torch.no_grad():
        logits = models()[0](torch.tensor([[*text, *tokens]])).logits[0]
    return logits[len(text) - 1 : -1].log_softmax(-1)


KINDS = {
    "greedy": likeliest(6, logprobs=5),
    "hot": SamplingParams(6, temperature=2.0, seed=1, logprobs=3),
    "cold": SamplingParams(6, temperature=0.3, seed=2, logprobs=3),
    "top_k": SamplingParams(6, top_k=2, seed=3, logprobs=7),
    "top_p": SamplingParams(6, top_p=0.2, seed=4, logprobs=7),
    "the chosen token alone": SamplingParams(6, seed=5, logprobs=0),
    "all tokens": SamplingParams(2, seed=6, logprobs=VOCAB),
    "three samples": SamplingParams(6, n=3, seed=7, logprobs=2),
    "a stop token": SamplingParams(40, seed=8, logprobs=2, stop_token_ids=tuple(range(0, VOCAB, 7))),
}


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 5}, {"prefix_cache": "radix"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_untempered_distribution(kind, options):
    params, text = KINDS[kind], prompt(23)
    made = outputs_of(engine(**options), text, params)
    for sample in range(params.n):
        own = [output for output in made if output.sample == sample]
        tokens = [output.token_id for output in own]
        table = expected(text, tokens)
        for output, row in zip(own, table, strict=True):
            assert output.logprob == pytest.approx(row[output.token_id].item(), abs=ROUNDING)
            values, ids = row.sort(descending=True)
            assert [token for token, _ in output.top_logprobs] == ids[: params.logprobs].tolist()
            assert [score for _, score in output.top_logprobs] == pytest.approx(
                values[: params.logprobs].tolist(), abs=ROUNDING
            )


def test_tokens_are_the_same_with_and_without():
    for params in KINDS.values():
        plain = SamplingParams(**{name: value for name, value in vars(params).items() if name != "logprobs"})
        with_, without = (outputs_of(engine(), prompt(23), given) for given in (params, plain))
        assert [(o.sample, o.token_id, o.finish_reason) for o in with_] == [
            (o.sample, o.token_id, o.finish_reason) for o in without
        ]
        assert all((o.logprob, o.top_logprobs) == NO_LOGPROBS for o in without)


def test_who_does_not_ask_pays_nothing(monkeypatch):
    rows = []

    def counting(logits, params, tokens):
        rows.append(sum(p.logprobs is not None for p in params))
        return log_probabilities(logits, params, tokens)

    monkeypatch.setattr(engine_module, "log_probabilities", counting)
    served = engine()
    outputs_of(served, prompt(9), likeliest(4))
    assert rows == []
    served.add_request("plain", prompt(10), likeliest(6))
    made = outputs_of(served, prompt(11), likeliest(2, logprobs=1), "asks")
    assert rows == [1, 1]
    assert [o.request_id for o in made if o.logprob is not None] == ["asks", "asks"]


def test_a_token_without_a_probability_is_not_named():
    row = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    ((score, top),) = log_probabilities(row, [likeliest(1, logprobs=4)], [2])
    assert [token for token, _ in top] == [2, 0]
    assert score == pytest.approx(-math.log1p(math.exp(-1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_in_fp32_or_wider(dtype):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = log_probabilities(logits, [likeliest(1, logprobs=500), likeliest(1), likeliest(1, logprobs=0)], [7, 7, 9])
    exact = logits.double().log_softmax(-1)
    assert found[1] == NO_LOGPROBS and found[2][1] == ()
    assert found[0][0] == pytest.approx(exact[0, 7].item(), abs=1e-5)
    assert found[2][0] == pytest.approx(exact[2, 9].item(), abs=1e-5)
    assert sum(math.exp(score) for _, score in found[0][1]) == pytest.approx(1, abs=1e-5)


def test_a_sample_that_ends_by_an_error_has_none():
    served = faults.faulty_engine(40, 4)
    served.add_request("good", (9, 10), likeliest(3, logprobs=1))
    (bad,) = [
        o for o in outputs_of(served, (9, faults.ONE_NAN), likeliest(3, logprobs=1), "bad") if o.request_id == "bad"
    ]
    assert (bad.finish_reason, bad.logprob, bad.top_logprobs) == ("error", None, ())
    finish(served)


@pytest.mark.parametrize("count", [-1, 1.5, "2", True, VOCAB + 1])
def test_counts_that_make_no_sense_are_refused(count):
    with pytest.raises(InvalidRequest, match="logprobs"):
        engine().add_request("a", prompt(3), likeliest(1, logprobs=count))
