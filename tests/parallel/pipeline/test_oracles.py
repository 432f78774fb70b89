"""A checkpoint of transformers, cut into stages: loss and gradients are those that transformers computes.

In a file of its own, since loading transformers takes seconds.
"""

import pytest
import torch
from torch.nn import functional as F

from minilib.model import weights
from minilib.parallel.pipeline import SCHEDULES, PipelineParallel, cut_batch
from minilib.ranks import launch
from tests.model import oracle
from tests.parallel.pipeline.models import DoubleLoss, communicator


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_a_checkpoint_of_transformers(schedule, tmp_path):
    """Four stages on two ranks, rotary frequencies stretched as Llama 3.1's."""
    theirs = oracle.llama(num_hidden_layers=4, rope_parameters=oracle.LLAMA_31).double()
    theirs.save_pretrained(tmp_path)
    batch = oracle.tokens(count=33, batch=4)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    dtype, parts = torch.float64, cut_batch(inputs, oracle.places(inputs), targets, 4)

    def on_rank():
        model = weights.load(tmp_path, dtype)
        model.ops = DoubleLoss()
        pipeline = PipelineParallel(model, communicator(), SCHEDULES[schedule](2, 4))
        loss = pipeline.step(parts)
        return loss, pipeline.grad_norm(), {name: p.grad for name, p in pipeline.named_parameters()}

    ranks = launch.run(on_rank, 2, timeout=100)
    loss = F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    [found] = [loss for loss, _, _ in ranks if loss is not None]
    assert found == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm().item()
    assert [norm for _, norm, _ in ranks] == pytest.approx([norm] * 2, rel=1e-5)
    gradients = ranks[0][2] | ranks[1][2]
    body = theirs.model
    same = {"embed": body.embed_tokens, "layers.2.down": body.layers[2].mlp.down_proj, "norm": body.norm}
    for name, their in (same | {"unembed": theirs.lm_head}).items():
        expected = their.weight.grad
        assert torch.allclose(gradients[f"{name}.weight"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
