"""A backward in two halves: the same gradients, each half's own work and no more, and nothing that stays behind."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib.parallel.pipeline.split_backward import ParameterUsedTwice, SplitBackward
from minilib.parallel.pipeline.stage import DecoderStage
from minilib.parallel.pipeline.stage_work import StageWork
from tests.parallel.pipeline.models import EXPERTS, Saved, decoder, largest_difference, microbatches


def stage_and_input(**other):
    model = decoder(**other)
    stage = DecoderStage(model, [len(model.layers)], 0)
    batch = microbatches(1, 1)[0]
    x = stage.embed(batch.token_ids).detach().requires_grad_()
    return stage, x, batch


def run(stage, x, batch, loss):
    output = stage(x, batch.positions)
    return (stage.loss(output, batch.targets), None) if loss else (output, torch.ones_like(output).cumsum(-1))


def gradients(stage):
    found = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    for parameter in stage.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("other", [{}, {"moe": EXPERTS}, {"qk_norm": False, "qkv_bias": False}], ids=str)
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("frozen", [(), ("layers.1.qkv.weight", "norm.weight", "layers.0.down.weight")])
def test_both_halves_give_what_one_backward_gives(other, loss, frozen):
    stage, x, batch = stage_and_input(**other)
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(name not in frozen)
    output, gradient = run(stage, x, batch, loss)
    torch.autograd.backward(output, gradient)
    expected, of_input = gradients(stage), x.grad
    counted = Counter()
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: counted.update([name]))
    leaf = x.detach().requires_grad_()
    output, gradient = run(stage, leaf, batch, loss)
    split = SplitBackward(output, leaf)
    assert torch.allclose(split.input_gradient(gradient), of_input, rtol=1e-12, atol=1e-14)
    assert not gradients(stage) and leaf.grad is None, "weights have gradients after the first half"
    split.weight_gradients()
    found = gradients(stage)
    assert largest_difference(found, expected) < 1e-13
    assert set(counted) == set(expected) and set(counted.values()) == {1}, "hooks of parameters did not run once"
    split.weight_gradients()  # there is nothing left to do
    assert not gradients(stage)


def products(step) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_each_half_multiplies_only_what_is_its_own():
    """Of linear layers a backward is two products, each as large as the forward's; no half does both."""
    stage = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3)))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    forward = products(lambda: stage(x))
    output = stage(x)
    split = SplitBackward(output, x)
    assert products(lambda: split.input_gradient(torch.ones_like(output))) == forward
    assert products(split.weight_gradients) == forward


def test_activations_stay_for_the_second_half_and_go_with_it():
    stage, x, batch = stage_and_input()
    with Saved(stage.parameters()) as saved:
        output, gradient = run(stage, x, batch, True)
        held = saved.now
        split = SplitBackward(output, x)
        del output
        split.input_gradient(gradient)
        assert 0.9 * held < saved.now < held, "only what stands above the last weight, the loss's own, is gone"
        split.weight_gradients()
        assert saved.now == 0


def test_a_stage_lets_go_of_what_its_next_half_does_not_need():
    stage, _, batch = stage_and_input()
    work = StageWork(stage)
    with Saved(stage.parameters()) as saved:
        work.forward(7, None, batch, 1.0)
        held = saved.now
        assert work.input_gradient(7, None) is not None and work.num_held == 1
        assert 0.9 * held < saved.now < held
        work.weight_gradients(7)
        assert (saved.now, work.num_held) == (0, 0)


def test_a_parameter_of_two_operations_is_refused():
    layer = nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ParameterUsedTwice, match=r"of shape \(3.*\) is used by .*; use a schedule that does not split"):
        SplitBackward(layer(layer(x)).sum(), x)


def test_a_graph_without_weights():
    x = torch.ones(2, 3, requires_grad=True)
    split = SplitBackward((x * x).sum(), x)
    assert torch.equal(split.input_gradient(None), 2 * torch.ones(2, 3))
    split.weight_gradients()
