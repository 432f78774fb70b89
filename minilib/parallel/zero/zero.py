"""ZeRO: data parallelism in which each rank owns a slice of the training state, and sends it to where it is used.

    zero = Zero(model, comm, stage=3, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    loss = model(inputs); loss.backward()            stage 3: a unit's parameters are gathered before it is used, and
                                                     released after; gradients are averaged and sent to their owners
    zero.clip_grad_norm(1.0)
    zero.step(); zero.zero_grad()

A step has three phases, in this order:

    1. reduce     during backward: a unit's gradients are averaged over ranks, each slice of them at its owner
    2. update     the optimizer updates this rank's slices
    3. publish    updated slices are gathered: at once in stages 1 and 2, in stage 3 unit by unit in the next forward

    stage    cut into slices         a rank's bytes for Ψ parameters, bf16 with fp32 Adam on n ranks
    0        nothing                 2Ψ + 2Ψ + 12Ψ
    1        optimizer state         2Ψ + 2Ψ + 12Ψ/n
    2        and gradients           2Ψ + (2Ψ + 12Ψ)/n
    3        and parameters          (2Ψ + 2Ψ + 12Ψ)/n

What a unit is and how it is cut: layout.py. In what order ranks gather and reduce: plan.py, and when: schedule.py.
The tensors: row.py, gradients.py. Bytes held and sent, in closed form: ledger.py. Saved states: saving.py. What is
refused: elementwise.py (optimizers), guard.py (calls on the model in stage 3).

In production: DeepSpeed; FSDP2 (`fully_shard`), which cuts each parameter by its first dimension instead of a row.
Sources: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"; Zhao et al.
2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minilib.parallel.zero import saving
from minilib.parallel.zero.elementwise import check_elementwise
from minilib.parallel.zero.gradients import Buckets, Gradients
from minilib.parallel.zero.guard import Guard
from minilib.parallel.zero.layout import check_parameters, group_of, layouts_of, units_of
from minilib.parallel.zero.ledger import bytes_of, check_precision, check_stage
from minilib.parallel.zero.row import Row
from minilib.parallel.zero.schedule import Held, Schedule
from minilib.ranks.agreement import same_shapes
from minilib.ranks.collectives import Communicator

NUM_BUCKETS = 2  # one fills while another is on its way


class StepWithoutBackward(RuntimeError):
    """There are no averaged gradients; the message says why."""


class Zero:
    """A model whose training state is cut over ranks, its optimizer, and the hooks that gather and reduce.

    All ranks call the model as they would without ZeRO, the same number of times. A parameter or a block that one rank
    does not use has a gradient of zero there. After backward every .grad is None, since owners have the averages: use
    `clip_grad_norm` here, and not torch.nn.utils.clip_grad_norm_, which would find nothing to clip.

    In stage 3 parameters are empty between forwards and backwards: p.numel() is 0, and `num_parameters` counts them.
    Calls on the model that would read, write or copy them raise ParametersElsewhere (guard.py). New weights are loaded
    by `load_full_state_dict`: in stage 3 and with "bf16" what is written to the model does not reach the optimizer.

    Args:
        model: dense float32 parameters (float64 for "fp64") on comm.device; ranks begin with the values of rank 0.
            Buffers are left alone. Parameters must not be added, frozen or unfrozen later.
        comm: between the ranks that share each batch.
        stage: 0, 1, 2 or 3.
        optimizer: makes one from groups of parameters, which are flat slices. It must treat every element alike, as
            SGD and Adam do, and Adafactor and Muon do not. Called twice more to check that, with a few small tensors.
        param_groups: called with the model, returns groups as torch.optim takes them; one of everything if left out.
        precision: "fp32"; "bf16" for parameters and gradients in bfloat16 and a float32 master copy; or "fp64".
        blocks: modules that are gathered and reduced as one, in the order in which the forward uses them; entries of
            the topmost ModuleLists and Sequentials if left out. In stage 3 parameters in no block are whole from the
            beginning of a forward to the end of its backward.
        methods: names of the model's methods that run a forward; in stage 3 parameters are whole in no others.

    Attributes:
        optimizer: for schedules, such as optimizer.param_groups[0]["lr"] = 1e-4. Its hooks run once in each `step`.

    Raises:
        UnsuitableModel: if the model cannot be cut so.
        NotElementwise: if the optimizer treats a slice otherwise than the tensor that it was cut from.
        RanksDiffer: if ranks have built different models.
        ValueError: if the stage or the precision is unknown.

    Cost: `expected_bytes` and `expected_traffic`. For a time also NUM_BUCKETS buffers of the largest unit's gradients
    (stages 2, 3), the parameters of the outer unit and two blocks (stage 3), and during `step` with "bf16" a float32
    copy of this rank's gradients. Buffers that the communicator allocates live as long as the communicator.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        stage: int = 3,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        param_groups: Callable[[nn.Module], Iterable[Mapping]] | None = None,
        precision: str = "fp32",
        blocks: Collection[nn.Module] | None = None,
        methods: Sequence[str] = ("forward", "loss"),
    ) -> None:
        check_stage(stage)
        dtypes = check_precision(precision)
        check_parameters(model, dtypes.masters, comm.device)
        same_shapes(model, comm)
        self.model, self.comm, self.stage = model, comm, stage
        groups = list(param_groups(model)) if param_groups else [{"params": list(model.parameters())}]
        number = group_of(model, groups)
        check_elementwise(optimizer, groups, dtypes.masters, comm.device)
        units = units_of(model, blocks)
        layouts = [layouts_of(unit, number, comm.world_size) for unit in units]
        rows = [[Row(layout, parameters, comm, stage, dtypes) for layout, parameters in each] for each in layouts]
        self.rows = [row for each in rows for row in each]
        trained = [row for row in self.rows if row.trained]
        count = NUM_BUCKETS if stage >= 2 else 0
        self._buckets = Buckets(comm, max(row.layout.length for row in trained), dtypes.gradients, count)
        self.gradients = {row.layout.name: Gradients(row, comm, self._buckets) for row in trained}
        parts = [part for row in trained for part in row.parts]
        cut = [[part.values for part in parts if part.group == index] for index in range(len(groups))]
        self.optimizer = optimizer([{**group, "params": mine} for group, mine in zip(groups, cut, strict=True)])
        held = [Held(unit.module, mine, self.gradients.get(unit.name)) for unit, mine in zip(units, rows, strict=True)]
        self._schedule = Schedule(model, [name for name in methods if hasattr(model, name)], held, stage)
        self._guard = Guard(model, self.rows)

    @property
    def num_parameters(self) -> int:
        """Elements of all the model's parameters, frozen ones included, tied ones counted once."""
        return sum(row.layout.numel for row in self.rows)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A backward in this context adds gradients up on each rank; the next one outside averages the sum.

        Cost: memory for all gradients of this rank until then. Without it each backward adds its average to the
        owners' slices, and sends gradients each time.
        """
        self._schedule.syncing, before = False, self._schedule.syncing
        try:
            yield
        finally:
            self._schedule.syncing = before

    def grad_norm(self) -> float:
        """Norm of the averaged gradients of all parameters, tied ones counted once. A collective.

        Raises:
            StepWithoutBackward: if there are none.
        """
        norms = [torch.linalg.vector_norm(each.slice, dtype=each.row.dtypes.masters) for each in self._averaged()]
        total = torch.stack(norms).double().square().sum()
        self.comm.all_reduce(total)
        return math.sqrt(total)

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale gradients down if their norm is larger, as torch.nn.utils.clip_grad_norm_ does. A collective.

        Returns:
            The norm before.

        Raises:
            StepWithoutBackward: if there are none.
        """
        norm = self.grad_norm()
        if not norm + 1e-6 <= max_norm:  # a NaN spoils all parts: no rank may take its own of a step that others cannot
            for each in self.gradients.values():
                each.own.mul_(max_norm / (norm + 1e-6))
        return norm

    def step(self) -> None:
        """Update this rank's slices by one step of the optimizer, and publish them. A collective.

        Raises:
            StepWithoutBackward: if there are no averaged gradients.
            ParametersElsewhere: if a parameter was written to where the optimizer has another copy.
        """
        self._guard.check_unwritten()
        # 1. Reduce: wait until every gradient is averaged.
        gradients = self._averaged()
        # 2. Update this rank's slices.
        for each in gradients:
            for part in each.row.parts:
                part.values.grad = each.own[part.span].to(part.values.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # 3. Publish: while one row is converted to the parameters' dtype, the row before it is gathered.
        for each in gradients:
            each.row.publish()
        self.use_anew()

    def zero_grad(self) -> None:
        """Forget all gradients, averaged or not."""
        for each in self.gradients.values():
            each.zero()
        self._schedule.forget()

    def full_state_dict(self, rank: int | None = None) -> dict[str, Tensor]:
        """The whole model's weights, with the keys of model.state_dict(). A collective.

        Args:
            rank: the only one to get it, others get an empty dict; all ranks if None.

        Returns:
            Copies, parameters as the optimizer has them: with "bf16" its float32 masters.
        """
        return saving.save_full(self, rank)

    def load_full_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Take over weights and buffers that `full_state_dict` or model.state_dict() gave. A collective.

        Args:
            state: read on rank 0 only; others may pass None. The optimizer's state is left alone.

        Raises:
            OtherModel: if a key is missing, unknown, or of another shape.
        """
        saving.load_full(self, state)
        self.use_anew()

    def state_dict(self) -> dict:
        """This rank's slices of parameters and optimizer state, and the optimizer's options.

        Returns:
            Copies, in what torch.load(weights_only=True) reads: {"slice": …, "num_slices": …, "rows": …, …}.
        """
        return saving.save_slices(self)

    def load_state_dict(self, states: Sequence[Mapping]) -> None:
        """Go on where others stopped, on any number of ranks and in any stage; gradients are forgotten. A collective.

        Args:
            states: what every rank of one run saved; torch.load(..., mmap=True) reads only what this rank will own.

        Raises:
            OtherModel: if it was saved from another model, or other units or groups.
            IncompleteStates: if a rank's is missing.
        """
        self.zero_grad()
        saving.load_slices(self, states)
        self.use_anew()

    def load_by_name(
        self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping], param_groups: Sequence[Mapping]
    ) -> None:
        """Go on from one whole model's state, as every rank has it before it; gradients are forgotten. A collective.

        Args:
            values: each parameter's; a rank reads what it will own and nothing else, so they may be mapped files.
            moments: of each trained parameter, as the optimizer keeps them; read likewise.
            param_groups: the optimizer's options.

        Raises:
            OtherModel: if a parameter is missing or of another shape.
        """
        self.zero_grad()
        saving.load_by_name(self, values, moments, param_groups)
        self.use_anew()

    def bytes_per_rank(self) -> dict[str, int]:
        """Bytes of the tensors that this rank holds now, by what they are for.

        Returns:
            "parameters", "gradients" and "optimizer" as in `expected_bytes`; "buckets"; "gathered" (stage 3).
        """
        rows, gradients = self.rows, self.gradients.values()
        masters = [row.master for row in rows if row.master is not row.own]
        moments = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        leased = [each.full for each in gradients if self.stage >= 2 and each.full is not None]
        cut = self.stage == 3
        return {
            "parameters": bytes_of(row.own if cut else row.full for row in rows),
            "gradients": bytes_of(each.own if self.stage >= 2 else each.full for each in gradients),
            "optimizer": bytes_of([*masters, *moments]),
            "buckets": bytes_of([*self._buckets.tensors, *leased]),
            "gathered": bytes_of(row.full for row in rows if cut),
        }

    def close(self) -> None:
        """Give the model back with whole parameters and without hooks, for instance to wrap it anew. A collective."""
        for row in self.rows:
            for parameter, value in zip(row.parameters, row.values(), strict=True):
                parameter.data = value
        self._schedule.close()
        self._guard.close()

    def check_invariants(self) -> None:
        """Between steps: every parameter is in one row, rows hold what their stage says, and nothing is on its way."""
        held = [parameter for row in self.rows for parameter in row.parameters]
        assert len(held) == len(set(held)) and set(held) == set(self.model.parameters()), "in no row, or in two"
        for row in self.rows:
            row.check_invariants()
        for each in self.gradients.values():
            each.check_invariants()

    def use_anew(self) -> None:
        """Parameters have changed: drop what was gathered before, and wait for what is being gathered."""
        self._schedule.reset()
        for row in self.rows:
            row.ready()
        self._guard.accept()

    def _averaged(self) -> list[Gradients]:
        """All rows' gradients, each averaged over ranks; waits for reductions that are under way."""
        gradients = list(self.gradients.values())
        for each in gradients:
            each.settle()
        if not all(each.reduced for each in gradients):
            raise StepWithoutBackward("no gradients have come since zero_grad() or the beginning: call loss.backward()")
        if self._schedule.local:
            raise StepWithoutBackward(
                "the last backward was within no_sync(), so its gradients are this rank's alone: "
                "leave the last of several outside"
            )
        return gradients
