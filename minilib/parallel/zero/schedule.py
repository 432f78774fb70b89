"""When ZeRO's ranks gather parameters and reduce gradients: hooks on forward and backward that walk through a plan.

    used once each, in order      the plans of plan.py: gathers run ahead, reductions start early
    in any other way              gathers on demand, reductions when backward is over: right, but slower

The second way is for a forward that uses a block twice or out of order, or for several forwards before one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from minilib.parallel.zero.gradients import Gradients
from minilib.parallel.zero.plan import Op, Walk, backward_plan, forward_plan
from minilib.parallel.zero.row import Row


@dataclass(frozen=True)
class Held:
    """One unit on one rank.

    Args:
        module: None for the outer unit.
        rows: one, or two where some of its parameters are frozen, or none.
        gradients: of the row that is trained.
    """

    module: nn.Module | None
    rows: Sequence[Row]
    gradients: Gradients | None

    @property
    def gathered(self) -> bool:
        """Whether its parameters are here, or on their way."""
        return all(row.gathered for row in self.rows)

    def gather(self) -> None:
        """Begin to fill its rows; see `Row`."""
        for row in self.rows:
            row.gather()

    def ready(self) -> None:
        """Wait for them."""
        for row in self.rows:
            row.ready()

    def release(self) -> None:
        """Let go of them."""
        for row in self.rows:
            row.release()


class Schedule:
    """The hooks of one model.

    Args:
        model: whose forward and backward they follow.
        methods: names of its methods that bracket a forward.
        units: the outer one first.
        stage: of ZeRO; gathers happen in stage 3 only.

    Attributes:
        syncing: whether a backward reduces gradients.
        local: whether gradients have come that are not reduced.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str], units: Sequence[Held], stage: int) -> None:
        self.syncing, self.local = True, False
        self._model, self._units, self._cut = model, units, stage == 3
        self._walk = Walk((), self._do)
        self._inside = self._in_backward = False
        self._in_order, self._graphs = True, 0
        self._methods = methods if self._cut else ()
        for name in self._methods:
            setattr(model, name, self._bracketed(getattr(model, name)))
        self._hooks = list(self._hook_gradients())
        if self._cut:
            for number, unit in enumerate(units):
                if unit.module is not None:
                    self._hooks.append(unit.module.register_forward_pre_hook(partial(self._before, number)))
                    self._hooks.append(unit.module.register_forward_hook(partial(self._after, number)))

    def reset(self) -> None:
        """Parameters have changed: what was gathered is out of date."""
        self._in_order, self._graphs = True, 0
        if self._cut:
            self._release_all_but()

    def forget(self) -> None:
        """No gradients are left, not even of a backward that failed."""
        self.local = self._in_backward = False

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for name in self._methods:
            delattr(self._model, name)

    def _do(self, op: Op) -> None:
        unit = self._units[op.unit]
        if op.what == "gather":
            unit.gather()
        else:
            unit.gradients.reduce()

    def _release_all_but(self, *kept: int) -> None:
        for number, unit in enumerate(self._units):
            if number not in kept:
                unit.release()

    # Forward, stage 3

    def _bracketed(self, method: Callable) -> Callable:
        @wraps(method)
        def bracketed(*args, **kwargs):
            if self._inside or self._recomputing:
                return method(*args, **kwargs)
            with self._forward():
                output = method(*args, **kwargs)
            self._hook_output(0, output)
            return output

        return bracketed

    @contextmanager
    def _forward(self) -> Iterator[None]:
        self._in_backward = False
        if torch.is_grad_enabled():
            self._graphs += 1
            self._in_order &= self._graphs == 1
        self._walk = Walk(forward_plan(len(self._units)), self._do)
        self._need(0, 1)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        self._walk.finish()
        self._release_all_but(*self._kept)

    @property
    def _kept(self) -> tuple[int, ...]:
        """Units that a backward needs first, after a forward that leads to one."""
        return (0, len(self._units) - 1) if torch.is_grad_enabled() else ()

    @property
    def _recomputing(self) -> bool:
        """Whether a forward now is part of a backward, which computes checkpointed activations again."""
        return self._in_backward and torch._C._current_graph_task_id() >= 0

    def _before(self, number: int, *_: object) -> None:
        """A block's forward begins."""
        if self._recomputing:  # at times several blocks in a row
            self._units[number].gather()
            self._units[number].ready()
            return
        self._release_all_but(0, number, number + 1)
        self._need(number, number + 1)

    def _need(self, number: int, ahead: int) -> None:
        """Have a unit's parameters here now, and another's come while it computes."""
        unit = self._units[number]
        self._walk.through(Op("gather", number))
        if not unit.gathered:
            self._in_order &= not torch.is_grad_enabled()
            unit.gather()
        self._walk.through(Op("gather", ahead))
        unit.ready()

    def _after(self, number: int, module: nn.Module, inputs: object, output: object) -> None:
        """A block's forward is done."""
        self._hook_output(number, output)
        if not self._recomputing and number not in self._kept:
            self._units[number].release()

    def _hook_output(self, number: int, output: object) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._before_backward, number))

    # Backward

    def _hook_gradients(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for unit in self._units:
            if unit.gradients is not None:
                for index, parameter in enumerate(unit.gradients.row.parameters):
                    yield parameter.register_post_accumulate_grad_hook(partial(self._arrived, unit.gradients, index))

    def _begin_backward(self) -> None:
        if self._in_backward:
            return
        self._in_backward = True
        trained = [number for number, unit in enumerate(self._units) if unit.gradients is not None]
        for number in trained:
            self._units[number].gradients.expect()
        plan = backward_plan(len(self._units), self._cut and self._in_order, trained if self.syncing else ())
        self._walk = Walk(plan, self._do)
        Variable._execution_engine.queue_callback(self._end_backward)  # as DDP and FSDP do; torch has no public way

    def _before_backward(self, number: int, *_: object) -> None:
        """A unit's backward begins: the gradient of its output is known."""
        self._begin_backward()
        ahead = number - 1 if number else len(self._units) - 1
        self._release_all_but(0, number, ahead)
        self._need(number, ahead)

    def _arrived(self, gradients: Gradients, index: int, *_: object) -> None:
        """Autograd has added to a parameter's gradient for the last time in this backward."""
        self._begin_backward()
        gradients.take(index)
        self.local = True
        while self._in_order and self._is_complete(self._walk.next):
            self._walk.step()

    def _is_complete(self, op: Op | None) -> bool:
        return op is not None and op.what == "reduce" and not self._units[op.unit].gradients.missing

    def _end_backward(self) -> None:
        self._walk.finish()
        if self._cut:
            self._release_all_but()
        self._in_backward, self._graphs = False, 0
        self.local &= not self.syncing


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
