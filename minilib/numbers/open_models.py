"""Open models as published (minilib/numbers/open_models.toml): what a token of each costs, and how many a GPU holds."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minilib.mechanisms.basics.format import Table, si
from minilib.numbers.machine import Machine
from minilib.numbers.token_state import LATENT, SLIDING, TokenState

OPEN_MODELS = Path(__file__).with_name("open_models.toml")
ITEMSIZE = 2  # bytes of a number of state, in bf16


@dataclass(frozen=True)
class OpenModel:
    """One published model.

    Args:
        title: as its makers write it.
        year: of its release.
        config: the fields of its config.json that count here.
        weight_bytes: bytes of its weights in the dtype that they are published in.
        weights: how that number comes about, with its source.
        config_source: address of the config.json, or of the file that has the same fields.
    """

    title: str
    year: int
    config: Mapping
    weight_bytes: float
    weights: str
    config_source: str

    @property
    def state(self) -> TokenState:
        """What a token costs."""
        return TokenState.from_config(self.config)

    @property
    def max_position(self) -> int:
        """Longest sequence, in tokens."""
        return self.config["max_position_embeddings"]

    @property
    def attention(self) -> str:
        """What its layers are, in words."""
        kinds = [layer.kind for layer in self.state.layers]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        words = "grouped-query" if kv_heads > 1 else "multi-query"
        words = "multi-head" if kv_heads == heads else words
        words = "latent" if LATENT in kinds else f"{words}, {heads} : {kv_heads}"
        return f"{words}, {kinds.count(SLIDING)} of {len(kinds)} layers slide" if SLIDING in kinds else words

    def gpus(self, memory_bytes: float) -> int:
        """Fewest GPUs of this memory, a power of two, whose memory is larger than the weights."""
        if not memory_bytes > 0:
            raise ValueError(f"memory_bytes must be above 0, got {memory_bytes!r}")
        count = 1
        while count * memory_bytes <= self.weight_bytes:
            count *= 2
        return count

    def tokens_per_gpu(self, memory_bytes: float, length: int) -> float:
        """Tokens whose state fits beside the weights, in whole sequences of this length, divided by the GPUs.

        Weights and state are there once, spread over `gpus(memory_bytes)`; nothing is set aside for activations.

        Args:
            memory_bytes: of one GPU.
            length: tokens of each sequence; where layers slide, longer sequences take fewer bytes a token.

        Raises:
            ValueError: if the model takes no sequences of this length.
        """
        if not 1 <= length <= self.max_position:
            raise ValueError(f"{self.title} takes sequences of 1 to {self.max_position:,} tokens, got {length}")
        count = self.gpus(memory_bytes)
        free = count * memory_bytes - self.weight_bytes
        return self.state.sequences_that_fit(free, length, ITEMSIZE) * length / count


def open_models() -> dict[str, OpenModel]:
    """All models of the file by name, in its order."""
    content = tomllib.loads(OPEN_MODELS.read_text(encoding="utf-8"))
    models = {}
    for name, entry in content["model"].items():
        site, _, file = entry["config_source"].partition("/")
        config = dict(entry["config"])
        if period := config.pop("layer_period", None):
            config["layer_types"] = period * (config["num_hidden_layers"] // len(period))
        models[name] = OpenModel(**entry | {"config": config, "config_source": content["sources"][site] + file})
    return models


def state_table(length: int = 8192, gpu: str = "h200") -> Table:
    """Cost of a token, of the last token of a sequence this long, and tokens per GPU, of all models that take such.

    Args:
        length: tokens of each sequence.
        gpu: a machine with a data sheet.
    """
    memory = Machine.datasheet(gpu).memory_bytes
    rows = []
    for model in open_models().values():
        if length > model.max_position:
            continue
        first, last = (model.state.bytes_per_token(before, ITEMSIZE) for before in (0, length - 1))
        tokens = f"{model.tokens_per_gpu(memory, length):,.0f}"
        cost = (f"{first:,.0f}", f"{last:,.0f}", si(model.state.nbytes(length, ITEMSIZE), "B"))
        rows.append((model.title, model.year, model.attention, *cost, model.gpus(memory), tokens))
    columns = ("model", "year", "attention", "bytes, first token", f"bytes, token {length:,}")
    return Table((*columns, f"{length:,} tokens", f"{gpu}s", f"tokens per {gpu}"), rows)
