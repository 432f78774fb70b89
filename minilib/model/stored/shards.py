"""The tensors of one or many safetensors files, each read once, into the tensor that waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilib.model.stored.files import CheckpointError, read_json, refuse_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_IGNORED = "rotary_emb.inv_freq"  # old checkpoints carry what is computed from the config
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


class Shards:
    """What a checkpoint's folder stores.

    Files are open while one parameter is read, no longer: what was read of a file that stays open counts as memory of
    this process, beside the weights themselves.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and its shards; if it has both, the single file
            counts, as transformers decides.
        tied: whether the output projection is the embedding table, so that either may be stored for both.

    Raises:
        CheckpointError: if a file is missing, truncated, a Git LFS pointer, or not what the index says.
    """

    def __init__(self, folder: Path, tied: bool) -> None:
        self.folder, self.tied = folder, tied
        self._path_of: dict[str, Path] = {}  # a tensor's name → the file that it counts from
        if (folder / SINGLE).is_file():
            self._path_of = dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
        else:
            self._assign(_weight_map(folder))
        self._left = set(self._path_of)

    def read(self, parts: Iterable[tuple[str, Tensor]]) -> None:
        """Copy stored tensors to where they belong.

        Args:
            parts: each one's name, and the tensor of the shape that config.json asks for which takes its values.

        Raises:
            CheckpointError: if one is missing, of another shape, or of no floating-point dtype that counts by itself.
        """
        with ExitStack() as files:
            shards: dict[Path, object] = {}
            for name, target in parts:
                if self.tied and name == _TABLE and name not in self._path_of and _HEAD in self._path_of:
                    name = _HEAD
                if name not in self._path_of:
                    raise CheckpointError(f"tensor {name} is missing; {self._hint(name)}")
                path = self._path_of[name]
                if path not in shards:
                    shards[path] = files.enter_context(_open(path))
                _check(name, shards[path].get_slice(name), target)
                target.copy_(shards[path].get_tensor(name))
                self._left.discard(name)

    def refuse_leftovers(self) -> None:
        """A tensor that nobody asked for means that the model computes something else than this decoder.

        Raises:
            CheckpointError: if there is one, save the embedding table's twin in a tied model.
        """
        twins = self.tied and {_HEAD, _TABLE} <= self._path_of.keys()
        if twins and torch.equal(self._tensor(_HEAD), self._tensor(_TABLE)):
            self._left.discard(_HEAD)
        left = sorted(name for name in self._left if not name.endswith(_IGNORED))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(f"tensor {left[0]}{more} has no place in the model that config.json describes")

    def _assign(self, weight_map: dict[str, str]) -> None:
        """Of each tensor, the copy in the shard that the index names; a stale one in another shard does not count."""
        for name in sorted(set(weight_map.values())):
            stored = _names(self.folder / name)
            assigned = {tensor for tensor, shard in weight_map.items() if shard == name}
            if assigned - stored:
                raise CheckpointError(
                    f"{INDEX} says that {name} holds tensor {min(assigned - stored)}, and it does not; "
                    "download the index and its shards from one version of the checkpoint"
                )
            self._path_of |= dict.fromkeys(assigned | (stored - weight_map.keys()), self.folder / name)

    def _tensor(self, name: str) -> Tensor:
        with _open(self._path_of[name]) as shard:
            return shard.get_tensor(name)

    def _hint(self, name: str) -> str:
        if name == _HEAD:
            return "the output projection is the embedding table only if config.json says tie_word_embeddings"
        return f"{self.folder.name} holds {len(self._path_of)} others, such as {min(self._path_of, default='none')}"


def _weight_map(folder: Path) -> dict[str, str]:
    """Each tensor's shard, as the index names it."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder.name} has neither {SINGLE} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        kind = type(weight_map).__name__
        raise CheckpointError(f"{INDEX} has a weight_map that does not lead from tensors to file names, but is {kind}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{INDEX} names the shards {names}, and these are missing: {missing}")
    return weight_map


def _check(name: str, stored: object, target: Tensor) -> None:
    """Whether a stored tensor, not read yet, is what `target` waits for."""
    if stored.get_dtype() not in _FLOATS:
        raise CheckpointError(
            f"tensor {name} is stored as {stored.get_dtype()}: its values are quantized and mean nothing without "
            f"their scales; use the checkpoint that is stored as one of {', '.join(_FLOATS)}"
        )
    found, expected = tuple(stored.get_shape()), tuple(target.shape)
    if found != expected:
        raise CheckpointError(f"tensor {name} has shape {found}, and config.json asks for {expected}")


def _names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file."""
    refuse_pointer(path)
    with _open(path) as shard:
        return set(shard.keys())


def _open(path: Path) -> AbstractContextManager:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be read, it may be truncated: {error}") from error
