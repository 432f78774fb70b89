"""Every family of checkpoints through the engine, packed for this CPU: the tokens are those of transformers."""

import pytest
import torch

from minilib.model import weights
from minilib.model.families import FAMILIES
from minilib.serving.engine import Engine
from tests.model import oracle
from tests.serving.served import likeliest

PROMPTS = (3, 17, 1, 30)


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(kind, tmp_path):
    theirs = oracle.of_family(kind)
    theirs.save_pretrained(tmp_path)
    engine = Engine(weights.load(tmp_path), num_pages=64, page_size=16)
    prompts = [oracle.tokens(length, batch=1, seed=length) for length in PROMPTS]
    found = {}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt[0].tolist(), likeliest(32))
    while engine.has_unfinished:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output.token_id)
    for number, prompt in enumerate(prompts):
        assert found[str(number)] == oracle.greedy(theirs, prompt, 32)[0].tolist()


def test_biases_matter():
    """Else the comparison above would say nothing of Qwen2's."""
    theirs, text = oracle.of_family("qwen2"), oracle.tokens(20)
    before = oracle.expected(theirs, text)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert (oracle.expected(theirs, text) - before).abs().max() > 0.1
