"""The tensors of one or many safetensors files, each read once, into the place that waits for it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilib.model.files import CheckpointError, read_json, refuse_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_IGNORED = "rotary_emb.inv_freq"  # old checkpoints carry what is computed from the config
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


class Shards:
    """What a checkpoint's folder stores.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and its shards; if it has both, the single file
            counts, as transformers decides.
        files: closes what is opened here.

    Raises:
        CheckpointError: if a file is missing, truncated, a Git LFS pointer, or not what the index says.
    """

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self._place: dict[str, object] = {}  # a tensor's name → the open file that it counts from
        if (folder / SINGLE).is_file():
            shard = _open(folder / SINGLE, files)
            self._place = dict.fromkeys(shard.keys(), shard)
        else:
            self._open_all(_weight_map(folder), files)
        self._left = set(self._place)

    def _open_all(self, weight_map: dict[str, str], files: ExitStack) -> None:
        """Of each tensor, the copy in the shard that the index names; a stale one in another shard does not count."""
        for name in sorted(set(weight_map.values())):
            shard = _open(self.folder / name, files)
            stored, assigned = set(shard.keys()), {tensor for tensor in weight_map if weight_map[tensor] == name}
            if assigned - stored:
                raise CheckpointError(
                    f"{INDEX} says that {name} holds tensor {min(assigned - stored)}, and it does not; "
                    "download the index and its shards from one version of the checkpoint"
                )
            self._place |= dict.fromkeys(assigned | (stored - weight_map.keys()), shard)

    def read(self, name: str, target: Tensor, tied: bool = False) -> None:
        """Copy a stored tensor into `target`, whose dtype it takes.

        Args:
            name: of the stored tensor.
            target: of the shape that config.json asks for.
            tied: whether the output projection is the embedding table, so that either is stored for both.

        Raises:
            CheckpointError: if it is missing, of another shape, or of no floating-point dtype that counts by itself.
        """
        if tied and name == _TABLE and name not in self._place and _HEAD in self._place:
            name = _HEAD
        if name not in self._place:
            raise CheckpointError(f"tensor {name} is missing; {self._hint(name)}")
        stored = self._place[name].get_slice(name)
        if stored.get_dtype() not in _FLOATS:
            raise CheckpointError(
                f"tensor {name} is stored as {stored.get_dtype()}: its values are quantized and mean nothing without "
                f"their scales; use the checkpoint that is stored as one of {', '.join(_FLOATS)}"
            )
        found, expected = tuple(stored.get_shape()), tuple(target.shape)
        if found != expected:
            raise CheckpointError(f"tensor {name} has shape {found}, and config.json asks for {expected}")
        target.copy_(self._place[name].get_tensor(name))
        self._left.discard(name)

    def refuse_leftovers(self, tied: bool) -> None:
        """A tensor that nobody asked for means that the model computes something else than this decoder.

        Raises:
            CheckpointError: if there is one, save the embedding table's twin in a tied model.
        """
        if tied and {_HEAD, _TABLE} <= self._place.keys() and torch.equal(self._tensor(_HEAD), self._tensor(_TABLE)):
            self._left.discard(_HEAD)
        left = sorted(name for name in self._left if not name.endswith(_IGNORED))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(f"tensor {left[0]}{more} has no place in the model that config.json describes")

    def _tensor(self, name: str) -> Tensor:
        return self._place[name].get_tensor(name)

    def _hint(self, name: str) -> str:
        if name == _HEAD:
            return "the output projection is the embedding table only if config.json says tie_word_embeddings"
        return f"{self.folder.name} holds {len(self._place)} others, such as {min(self._place, default='none')}"


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


def _open(path: Path, files: ExitStack) -> object:
    """An open safetensors file."""
    refuse_pointer(path)
    try:
        return files.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be read, it may be truncated: {error}") from error
