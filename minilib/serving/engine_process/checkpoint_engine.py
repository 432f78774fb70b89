"""An engine that is made elsewhere: what to load, without loading anything here, not even torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilib.serving.engine import Engine


@dataclass(frozen=True)
class CheckpointEngine:
    """Makes the engine of a checkpoint, when and where it is called.

    Args:
        folder: of the checkpoint.
        dtype: of the weights, by torch's name.
        num_threads: that compute; as torch chooses if left out.
        options: more arguments of `LLM.load`.
    """

    folder: Path
    dtype: str = "float32"
    num_threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Engine:
        import torch  # here, so that the process that only names a checkpoint stays small

        from minilib.serving.llm import LLM

        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        return LLM.load(self.folder, getattr(torch, self.dtype), **self.options).engine
