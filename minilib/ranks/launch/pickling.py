"""Pickle for ranks: what pickle can do, and functions and classes that only a notebook cell or a main script has."""

from __future__ import annotations

import importlib
import io
import sys
import types
from collections import ChainMap
from collections.abc import Callable


def dumps(value: object) -> bytes:
    """Pickle by cloudpickle; tensors go by value. `pickle.loads` reads it.

    Raises:
        Exception: of whatever kind the object that does not pickle chooses.
    """
    import cloudpickle

    reduce_code = cloudpickle.Pickler.dispatch_table[types.CodeType]

    def reduce_code_with_file(code: types.CodeType) -> tuple:
        return _code, (code.co_filename, *reduce_code(code))

    class Pickler(cloudpickle.Pickler):
        dispatch_table = ChainMap({types.CodeType: reduce_code_with_file}, cloudpickle.Pickler.dispatch_table)

        def reducer_override(self, value: object):
            # A module of its own kind, such as torch.ops, which comes along with `torch` and any attribute named "ops".
            special = isinstance(value, types.ModuleType) and type(value) is not types.ModuleType
            if special and sys.modules.get(value.__name__) is value:
                return importlib.import_module, (value.__name__,)
            return super().reducer_override(value)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _code(filename: str, build: Callable, fields: tuple) -> types.CodeType:
    """Cloudpickle's code object with the name of its file, which cloudpickle drops and a traceback needs."""
    return build(*fields).replace(co_filename=filename)
