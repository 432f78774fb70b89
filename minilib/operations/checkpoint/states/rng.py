"""Random number generators of a rank, as tensors: Python's, NumPy's old global one, torch's on the CPU and on its GPU.

Each rank has its own, so what was saved on 4 ranks says nothing to a fifth; see `RngState`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch, StoredTensor

PREFIX = "rng."


class RngState:
    """The generators of this process, saved for its rank.

    Args:
        rank, world_size: of the run.
        other_ranks: "refuse" to load what other numbers of ranks saved, or "seed": ranks then keep the generators that
            they have, which the caller seeds. A run that draws numbers on its ranks cannot go on exactly otherwise.

    Raises:
        ValueError: for another choice.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, other_ranks: str = "refuse") -> None:
        if other_ranks not in ("refuse", "seed"):
            raise ValueError(f"other_ranks is 'refuse' or 'seed', got {other_ranks!r}")
        self._rank, self._world_size, self._other_ranks = rank, world_size, other_ranks
        self._loading: dict[str, Tensor] | None = None

    def fragments(self) -> list[Fragment]:
        """See `Saveable`."""
        tensors = _captured() if self._loading is None else self._loading
        names = ((f"{PREFIX}{self._rank}.{kind}", x) for kind, x in tensors.items())
        return [Fragment(name, tuple(x.shape), Box.whole(x.shape), x) for name, x in names]

    def values(self) -> dict:
        """How many ranks have generators."""
        return {"world_size": self._world_size}

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        """Get ready to load.

        Raises:
            StateMismatch: if another number of ranks saved, and that is refused.
        """
        names = {name for name in stored if name.startswith(PREFIX)}
        ranks = {int(name.split(".")[1]) for name in names}
        if ranks == set(range(self._world_size)):
            self._loading = _captured()
            return set()
        if self._other_ranks == "refuse":
            raise StateMismatch(f"random number generators of {len(ranks)} ranks were saved, and here are "
                                f"{self._world_size}: no run on these ranks goes on with the same numbers; load with "
                                "RngState(…, other_ranks='seed') and seed them, or without an RngState")  # fmt: skip
        self._loading = {}
        return names

    def accept(self, values: Mapping) -> None:
        """Set the generators."""
        loaded, self._loading = self._loading, None
        if loaded:
            _restore(loaded)


def _captured() -> dict[str, Tensor]:
    version, words, gauss = random.getstate()
    assert version == 3, "Python's generator keeps its state otherwise"
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert kind == "MT19937", "NumPy's global generator is another one"
    found = {
        "python": torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss, _bits(cached)], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _restore(tensors: Mapping[str, Tensor]) -> None:
    *words, has_gauss, gauss = tensors["python"].tolist()
    random.setstate((3, tuple(words), _number(gauss) if has_gauss else None))
    *keys, position, has_gauss, cached = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, _number(cached)))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
