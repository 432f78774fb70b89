"""What the tests beside this file serve: one random model that transformers computes too, and engines over it."""

import functools
import tempfile

import torch

from minilib.model import weights
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.model import oracle

VOCAB = 97
POSITIONS = 256


@functools.cache
def models():
    """transformers' model and ours on the same weights; in float64 no rounding decides which token is likeliest."""
    theirs = oracle.llama(max_position_embeddings=POSITIONS).double()
    theirs.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, weights.load(folder, torch.float64)


def prompt(length, seed=None):
    """Random tokens; prompts of different lengths share no prefix."""
    return tuple(oracle.tokens(length, 1, VOCAB, 1000 + length if seed is None else seed)[0].tolist())


@functools.cache
def greedy(tokens, count):
    """The `count` tokens that transformers generates behind these."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        text = models()[0].generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return tuple(text[0, len(tokens) :].tolist())


def engine(num_pages=64, page_size=16, **options):
    return Engine(models()[1], num_pages, page_size, **options)


def likeliest(count, **options):
    return SamplingParams(max_tokens=count, temperature=0, **options)


def watch_preemptions(served):
    """A list that grows by the status that each sequence ended up in when it had to give way."""
    seen = []
    preempt = served.scheduler.preempt

    def watched(sequence):
        preempt(sequence)
        seen.append(sequence.status.value)

    served.scheduler.preempt = watched
    return seen


class Results:
    """What came out so far: `tokens` and `reasons` by (request id, sample)."""

    def __init__(self):
        self.tokens, self.reasons, self.texts = {}, {}, {}

    def take(self, outputs):
        for output in outputs:
            name = (output.request_id, output.sample)
            assert name not in self.reasons, f"{name} is finished and got one more token"
            assert (output.token_id is None) == (output.finish_reason == "error") == (output.error is not None)
            if output.token_id is not None:
                self.tokens[name] = (*self.tokens.get(name, ()), output.token_id)
            self.texts[name] = self.texts.get(name, "") + output.text
            if output.finish_reason:
                self.reasons[name] = output.finish_reason


def step(served, results):
    results.take(served.step())
    served.check_invariants()


def finish(served, results=None, limit=5000):
    """Step until nothing is unfinished; everything must be free then."""
    results = results or Results()
    for _ in range(limit):
        if not served.has_unfinished:
            break
        step(served, results)
    assert not served.has_unfinished, f"still unfinished after {limit} steps: {list(served.requests)}"
    assert_idle(served)
    return results


def assert_idle(served):
    """Nothing held, queued or remembered."""
    served.check_invariants()
    assert served.cache.pool.num_used == 0
    assert served.cache.swap_pool.num_used == 0
    assert not served.scheduler.running and not served.scheduler.waiting
    assert not served.requests and not served._texts


def alone(tokens, params, **options):
    """The tokens of each sample of a request that an ample engine serves by itself."""
    served = engine(**options)
    served.add_request("alone", tokens, params)
    results = finish(served)
    return [results.tokens["alone", sample] for sample in range(params.n)]
