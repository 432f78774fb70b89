"""Checkpoints in Hugging Face's layout: config.json, one or many safetensors shards, tokenizer.json.

What config.json may say is decided in minilib/model/families.py, which tensors a parameter is made of in
minilib/model/stored/layout.py, and which stored copy of a tensor counts in minilib/model/stored/shards.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minilib.mechanisms.basics.files import written_whole
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.families import whole_number
from minilib.model.moe import Router
from minilib.model.stored.files import PRETRAINED as PRETRAINED
from minilib.model.stored.files import CheckpointError, read_json
from minilib.model.stored.layout import placements, without_weights
from minilib.model.stored.shards import SINGLE, Shards


def load(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu", kernels: str = "torch"
) -> Decoder:
    """Load a checkpoint of a family in `minilib.model.families.FAMILIES`.

    Args:
        folder: with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        dtype: of the weights in memory, whatever they are stored in.
        device: where they go.
        kernels: who computes, see `ModelConfig`.

    Raises:
        ValueError: for other kernels.
        CheckpointError: if a file is missing or no such file, or if a tensor is missing, left over, quantized or of
            another shape.
        UnsupportedModel: if it is another kind of model.
    """
    folder = Path(folder)
    config = replace(ModelConfig.from_hugging_face(read_json(folder / "config.json")), kernels=kernels)
    model, shards = without_weights(config), Shards(folder, config.tie_embeddings)
    weights: dict[str, Tensor] = {}
    for placement in placements(config):
        weights[placement.parameter] = torch.empty(placement.shape, dtype=dtype)
        shards.read(placement.slices(weights[placement.parameter]))
    shards.refuse_leftovers()
    for name, module in model.named_modules():
        if isinstance(module, Router):  # its bias is added where experts are balanced; no family stores one
            weights[f"{name}.bias"] = torch.zeros(module.bias.shape, dtype=dtype)
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tie_embeddings:
        model.unembed.weight = model.embed.weight
    model.reset_buffers()
    return model.to(device).eval()


def save(
    model: Decoder, folder: Path | str, dtype: torch.dtype = torch.bfloat16, eos_token_ids: Sequence[int] = ()
) -> Path:
    """Write config.json and model.safetensors, as transformers reads them; all of it or nothing.

    Args:
        model: of a shape that a supported family has; Mistral's is written as Llama's, which computes the same.
        folder: made if there is none; its other files stay.
        dtype: of the stored weights.
        eos_token_ids: for config.json, as `eos_token_ids` reads them.

    Returns:
        The path of the weights.

    Raises:
        UnsupportedModel: if no supported family computes this model.
        CheckpointError: if parameters are not whole, as under ZeRO-3, with experts dealt to ranks, or packed, if a
            router's bias has no place in the layout, or for ids that are no tokens; nothing is written then.
    """
    folder = Path(folder)
    config = model.config.to_hugging_face()
    eos = _token_ids(list(eos_token_ids), model.config.vocab_size, "save")
    config["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    parameters = dict(model.named_parameters())
    _refuse_what_is_not_whole(model, parameters)
    tensors = {}
    for placement in placements(model.config):
        for name, part in placement.slices(parameters[placement.parameter].detach()):
            tensors[name] = part.to("cpu", dtype, copy=True).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    path, described = folder / SINGLE, folder / "config.json"
    with written_whole(described) as new_config, written_whole(path) as new_weights:
        save_file(tensors, new_weights, metadata={"format": "pt"})
        new_weights.chmod(0o644)  # safetensors makes it readable to its owner alone
        new_config.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        # The weights move first. Whatever interrupts the moves, nobody finds new weights under the old config.json.
        described.unlink(missing_ok=True)
    return path


def eos_token_ids(folder: Path | str) -> tuple[int, ...]:
    """Tokens that end a text: those that generation_config.json names, else those of config.json.

    Returns:
        Ids without repetition; empty if neither file names one.

    Raises:
        CheckpointError: if a file is no JSON object, or names what is no token of the vocabulary.
        UnsupportedModel: if config.json does not say vocab_size.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    vocab_size = whole_number(config, "vocab_size")
    generation = folder / "generation_config.json"
    sources = {generation.name: read_json(generation) if generation.is_file() else {}, "config.json": config}
    for name, content in sources.items():
        if ids := _token_ids(content.get("eos_token_id"), vocab_size, name):
            return tuple(dict.fromkeys(ids))
    return ()


def _token_ids(value: object, vocab_size: int, source: str) -> list[int]:
    """One token id, a list of them, or None for none, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{source} has {token!r} as eos_token_id, and token ids are whole numbers from 0 to {vocab_size - 1}; "
                "give one, a list of them, or null for none"
            )
    return ids


def _refuse_what_is_not_whole(model: Decoder, parameters: dict[str, Tensor]) -> None:
    for placement in placements(model.config):
        if placement.parameter not in parameters:
            raise CheckpointError(f"parameter {placement.parameter} is missing; save the model before it is packed")
        found = parameters[placement.parameter].shape
        if found != placement.shape:
            raise CheckpointError(
                f"parameter {placement.parameter} has shape {tuple(found)} in place of {tuple(placement.shape)}: this "
                "rank holds a part of the model; load full_state_dict(), of Zero or of a training Strategy, into a "
                "Decoder of the same config, and save that"
            )
    for name, module in model.named_modules():
        if isinstance(module, Router) and module.bias.any():
            raise CheckpointError(f"{name}.bias is not zero and has no place in this layout; use Trainer.save")
