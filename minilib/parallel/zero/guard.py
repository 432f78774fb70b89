"""Refusals: calls on the model that would read, write or copy parameters whose values the optimizer has elsewhere.

    in stage 3, whose parameters are empty between forwards and backwards          ParametersElsewhere:
    model.state_dict()                                                             … call zero.full_state_dict() …
    model.load_state_dict(state)                                                   … zero.load_full_state_dict(state) …
    copy.deepcopy(model), pickle, torch.save(model)                                … or zero.close() first …

    in stage 3 and, with masters, in every stage
    a write into a parameter, then zero.step()                                     … zero.load_full_state_dict(state) …

Without these refusals the first would return empty tensors, and the last would be overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minilib.parallel.zero.row import Row


class ParametersElsewhere(RuntimeError):
    """A call would read or write parameters of a model whose values are with their owners; the message names the
    call to make instead."""


class Guard:
    """Refuses such calls on a model and its modules, in stage 3 by hooks.

    `model.state_dict(keep_vars=True)` asks for the parameters themselves, empty or not, and is let through. Writes
    through a parameter's .data are not noticed.

    Args:
        model: what is trained.
        rows: which hold its parameters.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self._row = {parameter: row for row in rows for parameter in row.parameters}
        # Where the optimizer updates other memory than the forward reads, a write into a parameter is lost.
        self._copies = [row for row in rows if row.trained and (row.stage == 3 or row.master is not row.own)]
        self._hooks = []
        self._modules = list(model.modules()) if any(row.stage == 3 for row in rows) else []
        for module in self._modules:
            self._hooks.append(module.register_state_dict_pre_hook(self._refuse_state_dict))
            self._hooks.append(module.register_load_state_dict_pre_hook(self._refuse_load_state_dict))
            # Looked up on the instance by copy and by pickle.
            module.__reduce_ex__ = self._refuse_copy
        self.accept()

    def accept(self) -> None:
        """Parameters have the optimizer's values now."""
        self._versions = [parameter._version for row in self._copies for parameter in row.parameters]

    def check_unwritten(self) -> None:
        """Raise ParametersElsewhere if a parameter was written to since `accept`."""
        named = [pair for row in self._copies for pair in zip(row.layout.names, row.parameters, strict=True)]
        for (name, parameter), version in zip(named, self._versions, strict=True):
            if parameter._version != version:
                raise ParametersElsewhere(
                    f"{name} was written to on the model, in place or by load_state_dict(), and step() would overwrite "
                    "it, since the optimizer has another copy: call zero.load_full_state_dict(state) on all ranks"
                )

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            del module.__reduce_ex__

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        name = None if keep_vars else self._released(module)
        if name is not None:
            raise ParametersElsewhere(
                f"state_dict() would return {prefix}{name} empty: in stage 3 ranks own slices of parameters; call "
                "zero.full_state_dict() on all ranks for the whole model's, or zero.state_dict() for this rank's"
            )

    def _refuse_load_state_dict(self, module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        name = self._released(module)
        if name is not None:
            raise ParametersElsewhere(
                f"load_state_dict() cannot write {prefix}{name}: in stage 3 ranks own slices of parameters; call "
                "zero.load_full_state_dict(state) on all ranks"
            )

    def _refuse_copy(self, protocol: int) -> None:
        raise ParametersElsewhere(
            "a copy of this model would have empty parameters: in stage 3 ranks own slices of them; load "
            "zero.full_state_dict() into a new model, or call zero.close() first, which gives the model back whole"
        )

    def _released(self, module: nn.Module) -> str | None:
        """Name of a parameter whose values are elsewhere."""
        named = ((name, self._row.get(parameter)) for name, parameter in module.named_parameters())
        return next((name for name, row in named if row is not None and not row.gathered), None)
