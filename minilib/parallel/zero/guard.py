"""Refusals of stage 3: between forwards and backwards the model's parameters are empty, and the ranks own the values.

    model.state_dict()                                  ParametersElsewhere: … call zero.full_state_dict() …
    model.load_state_dict(state)                        … zero.load_full_state_dict(state) …
    copy.deepcopy(model), pickle, torch.save(model)     … zero.full_state_dict(), or zero.close() first …

Without these refusals the first would return empty tensors, and nobody would notice before the weights are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minilib.parallel.zero.row import Row


class ParametersElsewhere(RuntimeError):
    """A call would read or write parameters of a model whose values are with their owners; the message names the
    call to make instead."""


class Guard:
    """Hooks that refuse to read, write or copy a model's parameters while their rows are released.

    `model.state_dict(keep_vars=True)` asks for the parameters themselves, empty or not, and is let through.

    Args:
        model: of stage 3; its modules are guarded, too.
        rows: which hold its parameters.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self._model = model
        self._row = {parameter: row for row in rows for parameter in row.parameters}
        self._hooks = []
        for module in model.modules():
            self._hooks.append(module.register_state_dict_pre_hook(self._refuse_state_dict))
            self._hooks.append(module.register_load_state_dict_pre_hook(self._refuse_load_state_dict))
            # Looked up on the instance by copy and by pickle.
            module.__reduce_ex__ = self._refuse_copy

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for module in self._model.modules():
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
