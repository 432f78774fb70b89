"""Checkpoints in Hugging Face's layout: config.json, one or many safetensors shards, tokenizer.json.

minilib's parameter        Hugging Face's tensors, one below the other
layers.0.qkv               model.layers.0.self_attn.{q,k,v}_proj
layers.0.gate_up           model.layers.0.mlp.{gate,up}_proj
the others                 one each, under the names in `_ONE_TO_ONE`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder

PRETRAINED = Path(__file__).with_name("pretrained")
_ONE_TO_ONE = {
    "attention_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "project": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
}
_STACKED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
_OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}
_IGNORED = ("rotary_emb.inv_freq",)  # old checkpoints carry what is computed from the config


class CheckpointError(ValueError):
    """The checkpoint cannot be loaded; the message says which file or tensor, and why."""


def load(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu", kernels: str = "torch"
) -> Decoder:
    """Load a Llama or Qwen3 checkpoint.

    Args:
        folder: with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        dtype: of the weights in memory, whatever they are stored in.
        device: where they go.
        kernels: who computes, see `ModelConfig`.

    Raises:
        ValueError: for other kernels.
        CheckpointError: if a file is missing or truncated, or a tensor is missing, left over or of another shape.
        UnsupportedModel: if it is another kind of model.
    """
    folder = Path(folder)
    config = replace(ModelConfig.from_hugging_face(_json(folder / "config.json")), kernels=kernels)
    with torch.device("meta"), _NoInit():
        model = Decoder(config)
    stored = _Stored(folder)
    weights = {name: stored.read(parts, shape, dtype) for name, parts, shape in _wanted(model)}
    stored.refuse_leftovers(config)
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tie_embeddings:
        model.unembed.weight = model.embed.weight
    model.reset_buffers()
    return model.to(device).eval()


def eos_token_ids(folder: Path | str) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json has them, else config.json; none if neither says.

    Raises:
        CheckpointError: if a file is no JSON object.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        ends = _json(path).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            return tuple(ends) if isinstance(ends, list) else (ends,)
    return ()


def save(model: Decoder, folder: Path | str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write config.json and model.safetensors, as transformers reads them; return the path of the weights.

    Raises:
        CheckpointError: if the model does not have all its parameters, as one that was packed for serving.
    """
    held, expected = sum(p.numel() for p in model.parameters()), model.config.num_parameters
    if held != expected:
        raise CheckpointError(f"the model holds {held:,} of its {expected:,} parameters; save it before it is packed")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hugging_face(), indent=1) + "\n")
    tensors = {}
    parameters = dict(model.named_parameters())
    for name, parts, _ in _wanted(model):
        pieces = parameters[name].detach().split([rows for _, rows in parts]) if len(parts) > 1 else [parameters[name]]
        for (part, _), piece in zip(parts, pieces, strict=True):
            tensors[part] = piece.detach().to("cpu", dtype).contiguous().clone()
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable to its owner alone
    return path


def _wanted(model: Decoder) -> Iterator[tuple[str, list[tuple[str, int]], torch.Size]]:
    """Each parameter's name, the stored tensors that it is made of with their rows, and its shape."""
    config = model.config
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    rows = {"qkv": [n * config.head_dim for n in heads], "gate_up": [config.intermediate_size] * 2}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] != "layers":
            parts = [(f"{_OUTSIDE[words[0]]}.weight", parameter.shape[0])]
        else:
            prefix, part = f"model.layers.{words[1]}", words[2]
            if part in _STACKED:
                parts = [(f"{prefix}.{p}.weight", n) for p, n in zip(_STACKED[part], rows[part], strict=True)]
            else:
                parts = [(f"{prefix}.{_ONE_TO_ONE[part]}.weight", parameter.shape[0])]
        yield name, parts, parameter.shape


class _NoInit(TorchFunctionMode):
    """Leave parameters as they are made: random numbers on the meta device load SymPy, which takes 140 MiB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _Stored:
    """The tensors of one or many safetensors files, read once each.

    Files are opened for one parameter at a time: what was read of a file that stays open counts as memory of this
    process, and would double that of the weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place: dict[str, Path] = {}
        self.left: set[str] = set()
        for path in _shards(folder):
            try:
                with safe_open(path, framework="pt") as shard:
                    self.place |= dict.fromkeys(shard.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path.name} cannot be read, it may be truncated: {error}") from error
        self.left = set(self.place)

    def read(self, parts: list[tuple[str, int]], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One parameter from the stored tensors that it is made of, each checked for its shape."""
        parameter, first = torch.empty(shape, dtype=dtype), 0
        for name, rows in parts:
            if name not in self.place:
                raise CheckpointError(f"tensor {name} is missing; {self._hint(name)}")
            expected = (rows, *shape[1:])
            with safe_open(self.place[name], framework="pt") as shard:
                found = tuple(shard.get_slice(name).get_shape())
                if found != expected:
                    raise CheckpointError(f"tensor {name} has shape {found}, and config.json asks for {expected}")
                parameter[first : first + rows] = shard.get_tensor(name)  # a copy: this one is the mapped file itself
            first += rows
            self.left.discard(name)
        return parameter

    def refuse_leftovers(self, config: ModelConfig) -> None:
        """A tensor that nobody asked for means that the model computes something else than this decoder."""
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        tied = config.tie_embeddings and head in self.left and torch.equal(self._tensor(head), self._tensor(table))
        left = sorted(name for name in self.left - ({head} if tied else set()) if not name.endswith(_IGNORED))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(f"tensor {left[0]}{more} has no place in the model that config.json describes")

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.place[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def _hint(self, name: str) -> str:
        if name == "lm_head.weight":
            return "the output projection is the embedding table only if config.json says tie_word_embeddings"
        return f"{self.folder.name} holds {len(self.place)} others, such as {min(self.place, default='none')}"


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # first, as transformers looks
        return [single]
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"{index.name} names the shards {names}, and these are missing: {missing}")
        return [folder / name for name in names]
    raise CheckpointError(f"{folder.name} has neither {single.name} nor {index.name}")


def _json(path: Path) -> Mapping:
    if not path.is_file():
        raise CheckpointError(f"{path.parent.name} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds no JSON object")
    return content
