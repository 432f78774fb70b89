"""Which tensors of Hugging Face's layout each parameter of the decoder is made of.

    minilib's parameter          Hugging Face's tensors
    layers.0.qkv                 model.layers.0.self_attn.{q,k,v}_proj, one below the other
    layers.0.gate_up             model.layers.0.mlp.{gate,up}_proj, one below the other
    layers.0.moe.router          model.layers.0.mlp.gate                                     block_sparse_moe.gate
    layers.0.moe.gate_up         model.layers.0.mlp.experts.{e}.{gate,up}_proj               …experts.{e}.{w1,w3}
    layers.0.moe.down            model.layers.0.mlp.experts.{e}.down_proj                    …experts.{e}.w2
    the others                   one each, under the names in `_ONE_TO_ONE` and `_OUTSIDE`

Experts lie behind one another in one parameter, and transposed: (num_experts, in_features, out_features). Their names
in the right column are Mixtral's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder

_ONE_TO_ONE = {
    "attention_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "project": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
}
_OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}


@dataclass(frozen=True)
class Placement:
    """One parameter and the stored tensors that it is made of.

    Args:
        parameter: its name in the decoder.
        shape: its shape there.
        experts: for each expert, or for the only one, the stored tensors one below the other, with their rows.
        transposed: the parameter has experts as its first dimension and the stored matrices' transposes behind it.
    """

    parameter: str
    shape: torch.Size
    experts: list[list[tuple[str, int]]]
    transposed: bool

    def slices(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each stored tensor's name, and the view of the parameter's `tensor` that has its shape and its values."""
        rows_of = tensor.mT if self.transposed else tensor[None]
        for rows, parts in zip(rows_of, self.experts, strict=True):
            for (name, _), part in zip(parts, rows.split([count for _, count in parts]), strict=True):
                yield name, part


class _NoInit(TorchFunctionMode):
    """Leave parameters as they are made: random numbers on the meta device load SymPy, which takes 140 MiB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def without_weights(config: ModelConfig) -> Decoder:
    """A decoder on the meta device: every shape, and no value."""
    with torch.device("meta"), _NoInit():
        return Decoder(config)


def placements(config: ModelConfig) -> Iterator[Placement]:
    """Of every parameter, tied ones once.

    Raises:
        UnsupportedModel: if no supported family of Hugging Face has such a model.
    """
    head_rows = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for name, parameter in without_weights(config).named_parameters():
        *path, kind = name.split(".")
        experts, transposed = [[]], False
        if path[0] != "layers":
            experts = [[(f"{_OUTSIDE[path[0]]}.{kind}", parameter.shape[0])]]
        else:
            prefix = f"model.layers.{path[1]}"
            if path[2] == "qkv":
                names = [f"{prefix}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                experts = [list(zip(names, head_rows, strict=True))]
            elif path[2] == "gate_up":
                experts = [[(f"{prefix}.mlp.{part}_proj.{kind}", config.intermediate_size) for part in ("gate", "up")]]
            elif path[2] == "moe":
                experts, transposed = _of_mixture(prefix, path[3], parameter.shape, config)
            else:
                experts = [[(f"{prefix}.{_ONE_TO_ONE[path[2]]}.{kind}", parameter.shape[0])]]
        yield Placement(name, parameter.shape, experts, transposed)


def _of_mixture(prefix: str, part: str, shape: torch.Size, config: ModelConfig) -> tuple[list, bool]:
    """What a router or the experts of a layer are made of, and whether transposed."""
    block, gate, up, down = config.family.experts
    if part == "router":
        return [[(f"{prefix}.{block}.gate.weight", shape[0])]], False
    stored = {"gate_up": (gate, up), "down": (down,)}[part]
    rows = shape[2] // len(stored)
    return [
        [(f"{prefix}.{block}.experts.{expert}.{name}.weight", rows) for name in stored] for expert in range(shape[0])
    ], True
