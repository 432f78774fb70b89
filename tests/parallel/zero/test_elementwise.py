"""Which optimizers ZeRO takes: those that treat every element alike, and each steps once a step."""

import inspect
from functools import partial

import pytest
import torch

from minilib.parallel.zero import NotElementwise, Zero
from minilib.parallel.zero.elementwise import check_elementwise
from minilib.parallel.zero.ledger import STAGES
from minilib.ranks import collectives, launch
from tests.parallel.zero.models import ADAMW, Odd, communicator, odd_zero, train

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
REFUSED = {
    "Adafactor": "takes 3 steps to other values when a tensor is cut into slices",
    "Muon": "only supports 2D parameters",
    "LBFGS": "closure",
    "SparseAdam": "does not support dense gradients",
}


def check(optimizer, groups=({},), dtype=torch.float32):
    check_elementwise(optimizer, groups, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_of_torch(name, dtype):
    if name in REFUSED:
        with pytest.raises(NotElementwise, match=f"^{name} .*{REFUSED[name]}.*AdamW or SGD"):
            check(OPTIMIZERS[name], dtype=dtype)
    else:
        check(OPTIMIZERS[name], dtype=dtype)


class Lamb(torch.optim.SGD):
    """SGD whose step is as long as its tensor's norm."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(parameter.norm() / parameter.grad.norm())
        super().step(closure)


class ByFirstDimension(torch.optim.SGD):
    """Treats elements of one row alike, as a factored optimizer does with matrices."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(1 + parameter.grad.norm(dim=-1, keepdim=True))
        super().step(closure)


@pytest.mark.parametrize("optimizer", [Lamb, ByFirstDimension])
def test_norms_of_tensors_and_of_rows_are_noticed(optimizer):
    with pytest.raises(NotElementwise, match=optimizer.__name__):
        check(optimizer)


@pytest.mark.parametrize("rate", [0.0, 1e-12, torch.tensor(0.0)])
def test_a_rate_of_zero_hides_nothing(rate):
    with pytest.raises(NotElementwise, match="Adafactor"):
        check(partial(torch.optim.Adafactor, lr=rate))
    check(partial(torch.optim.AdamW, lr=rate))
    with pytest.raises(NotElementwise, match="Adafactor"):
        check(partial(torch.optim.Adafactor, lr=1.0), groups=[{"lr": 0.0}, {"lr": 0.0, "weight_decay": 0.1}])


def test_an_option_that_makes_no_sense_is_the_optimizers_to_refuse():
    with pytest.raises(ValueError, match="Invalid learning rate") as error:
        check(partial(torch.optim.AdamW, lr=-1.0))
    assert error.type is ValueError


def test_zero_refuses_them_in_every_stage():
    def on_rank():
        comm = communicator("group")
        for stage in STAGES:
            with pytest.raises(NotElementwise, match="Adafactor"):
                Zero(Odd(), comm, stage, torch.optim.Adafactor)

    launch.run(on_rank, 1)


# Once a step


def test_the_optimizer_steps_once_a_step():
    """Its hooks and its count of steps are those of one process, in every stage and with two groups."""

    def on_rank():
        comm, found = communicator("shared"), []
        for stage in STAGES:
            zero, seen = odd_zero(comm, stage), []
            zero.optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))  # noqa: B023
            zero.optimizer.register_step_post_hook(lambda *_: seen.append("post"))  # noqa: B023
            scheduler = torch.optim.lr_scheduler.LambdaLR(zero.optimizer, lambda step: 1 / (1 + step))
            for step in range(3):
                train(zero, [step])
                scheduler.step()
            counts = {int(state["step"]) for state in zero.optimizer.state.values()}
            assert all(part.values.grad is None for row in zero.rows for part in row.parts)
            found.append((seen, counts, [group["lr"] for group in zero.optimizer.param_groups]))
        return found

    for found in launch.run(on_rank, 2):
        for seen, counts, rates in found:
            assert seen == ["pre", "post"] * 3 and counts == {3}
            assert rates == pytest.approx([ADAMW.keywords["lr"] / 4, 2e-2 / 4])


def test_a_ring_is_planned_once():
    def on_rank():
        zero = odd_zero(communicator("group"), 0)
        train(zero, [0])
        first = collectives.ring_plan.cache_info()
        train(zero, range(1, 4))
        later = collectives.ring_plan.cache_info()
        return first.misses, later.misses, later.hits - first.hits, len(zero.gradients)

    for first, later, hits, units in launch.run(on_rank, 2):
        assert later == first, "a plan was made anew"
        assert hits >= 3 * units
