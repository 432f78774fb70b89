"""Checkpoints for others: in the layout of Hugging Face, and in that of torch.distributed.checkpoint, both ways.

All of it runs on one process, which reads whole tensors from whatever parts many ranks wrote.

    export_hugging_face(folder, target, config)     config.json and model.safetensors, as transformers reads them
    export_dcp(folder, target)                      a folder that dcp.load reads; names are torch's
    import_dcp(source, folder, step)                what dcp.save wrote, from any ranks, as a checkpoint of ours
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.checkpoint.checkpointer import Checkpointer
from minilib.operations.checkpoint.format.boxes import Box
from minilib.operations.checkpoint.format.folder import CheckpointFolder, Committed, read_committed
from minilib.operations.checkpoint.format.reading import PartReader
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch, StoredTensor, check_fits
from minilib.operations.checkpoint.states.model_state import MODEL, persistent_buffers

VALUES = "values.json"  # name of a uint8 tensor: pickles are neither written nor read


class NotImported(ValueError):
    """A checkpoint of torch's holds objects that are no tensors; they are pickled, and are not read."""


class _Tensors:
    """Tensors and values as they are, as a `Saveable`."""

    def __init__(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        self._tensors, self._values = tensors, values

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, tuple(x.shape), Box.whole(x.shape), x) for name, x in self._tensors.items()]

    def values(self) -> dict:
        return dict(self._values)

    def prepare(self, stored: Mapping[str, StoredTensor], values: Mapping) -> set[str]:
        return set()

    def accept(self, values: Mapping) -> None:
        pass


def load_weights(model: nn.Module, folder: Path | str, step: int | None = None) -> int:
    """Fill a whole model from a checkpoint, and leave all else; returns the step.

    Raises:
        NoCheckpoint, ManifestDamaged, PartDamaged: see `Checkpointer.load`.
        StateMismatch: if the checkpoint has another model.
    """
    disk = CheckpointFolder(Path(folder))
    committed = read_committed(disk, step)
    tensors = dict(model.named_parameters()) | dict(persistent_buffers(model))
    fragments = _Tensors({MODEL + name: x.detach() for name, x in tensors.items()}, {}).fragments()
    check_fits(fragments, committed.table)
    left = sorted(n for n in committed.table if n.startswith(MODEL) and n.removeprefix(MODEL) not in tensors)
    if left:
        raise StateMismatch(f"the checkpoint holds {left[0]}, for which this model has no place")
    _reader(disk, committed).read(fragments, committed.table)
    return committed.step


def export_hugging_face(
    folder: Path | str,
    target: Path | str,
    config: ModelConfig,
    step: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    eos_token_ids: Sequence[int] = (),
) -> Path:
    """Write a checkpoint's model as transformers reads it; returns the path of the weights.

    Args:
        folder: of checkpoints, whatever ranks wrote them.
        target: see `weights.save`, as for the others.
        config: of the model.
        step: which; the newest if left out.

    Raises:
        NoCheckpoint, ManifestDamaged, PartDamaged, StateMismatch: see `load_weights`.
        UnsupportedModel, CheckpointError: see `weights.save`.
    """
    model = Decoder(config)
    load_weights(model, folder, step)
    return weights.save(model, target, dtype, eos_token_ids)


def export_dcp(folder: Path | str, target: Path | str, step: int | None = None) -> int:
    """Write a checkpoint as torch.distributed.checkpoint does; returns the step.

    `dcp.load({"model": model.state_dict()}, checkpoint_id=target)` reads it.

    Raises:
        NoCheckpoint, ManifestDamaged, PartDamaged: see `Checkpointer.load`.

    Cost: memory of the whole state.
    """
    disk = CheckpointFolder(Path(folder))
    committed = read_committed(disk, step)
    tensors = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in committed.table.items()}
    _reader(disk, committed).read(_Tensors(tensors, {}).fragments(), committed.table)
    said = json.dumps(dict(committed.values)).encode()
    dcp.save(
        {**tensors, VALUES: torch.frombuffer(bytearray(said), dtype=torch.uint8)}, checkpoint_id=target, no_dist=True
    )
    return committed.step


def import_dcp(
    source: Path | str,
    folder: Path | str,
    step: int,
    values: Mapping[str, Mapping] | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Save what torch.distributed.checkpoint has written, from any number of ranks, as a checkpoint of ours.

    Args:
        source: folder that dcp.save wrote.
        folder: of our checkpoints; see `Checkpointer`.
        step: of the run.
        values: of each state, by its name, such as {"run": {"param_groups": […]}}; those that `export_dcp` wrote if
            left out.
        ignore: names of pickled objects to leave out.

    Raises:
        NotImported: if there are other pickled objects.
        AlreadySaved, DiskInUse: see `Checkpointer`.

    Cost: memory of the whole state.
    """
    entries = FileSystemReader(source).read_metadata().state_dict_metadata
    pickled = [name for name, x in entries.items() if not isinstance(x, TensorStorageMetadata) and name not in ignore]
    if pickled:
        raise NotImported(f"{pickled[0]} and {len(pickled) - 1} more are pickled objects, which may run any code when "
                          "they are read: pass their values, and their names in ignore=")  # fmt: skip
    shapes = {name: x for name, x in entries.items() if isinstance(x, TensorStorageMetadata)}
    tensors = {name: torch.zeros(x.size, dtype=x.properties.dtype) for name, x in shapes.items()}
    dcp.load(tensors, checkpoint_id=source, no_dist=True)
    said = tensors.pop(VALUES, None)
    if values is None:
        values = json.loads(bytes(said.tolist())) if said is not None else {"tensors": {}}
    first, *others = values
    states = {first: _Tensors(tensors, values[first])} | {name: _Tensors({}, values[name]) for name in others}
    with Checkpointer(folder, keep=2**31) as checkpointer:
        checkpointer.save(states, step, wait=True)


def _reader(disk: CheckpointFolder, committed: Committed) -> PartReader:
    return PartReader(disk, committed.checksums, committed.sizes, committed.block_bytes)
