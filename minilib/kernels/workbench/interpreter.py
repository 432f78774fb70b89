"""Switch Triton's interpreter on where there is no GPU: before Triton is imported, so this module imports nothing."""

from __future__ import annotations

import os
import sys


class TooLate(RuntimeError):
    """Triton was imported before it was told to interpret: restart the Python process."""


def device_for_kernels() -> str:
    """Where kernels of this process run: "cuda" compiled, or "cpu" under the interpreter, which this switches on.

    Raises:
        TooLate: if there is no GPU and Triton was imported earlier without the interpreter.
    """
    import torch  # does not import Triton

    if torch.cuda.is_available():
        return "cuda"
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise TooLate("Triton is already loaded for a GPU, and there is none: restart the kernel and call this first")
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"
