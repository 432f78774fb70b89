"""Rotary position embeddings: how fast each pair of a head turns, and how checkpoints slow that for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minilib.model.families import UnsupportedModel, flag, number, whole_number


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor`, which puts positions closer together.

    Source: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation".
    """

    factor: float

    attention_factor = 1.0

    def scale(self, inv_freq: Tensor, theta: float) -> Tensor:
        """The frequencies to use in place of these: (head_dim / 2,) → the same."""
        return inv_freq / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches rotary embeddings to contexts longer than those it was pretrained on.

    Frequencies whose wavelength exceeds original_max_position / low_freq_factor positions are divided by `factor`,
    those below original_max_position / high_freq_factor are kept, and the ones between are interpolated.

    Source: Llama 3.1, `apply_scaling` in meta-llama/llama-models.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    attention_factor = 1.0

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must exceed low_freq_factor; got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def scale(self, inv_freq: Tensor, theta: float) -> Tensor:
        """See `LinearScaling.scale`."""
        turns = self.original_max_position * inv_freq / (2 * math.pi)  # over the original context
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * inv_freq / self.factor


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: pairs that turn at least `beta_fast` times over the original context keep their frequency, those that turn
    at most `beta_slow` times have it divided by `factor`, and a ramp over the pairs leads from the ones to the others.

    Args:
        attention_factor: what cosines and sines are multiplied by, so that its square multiplies all scores.
        truncate: let the ramp begin and end at whole pairs.

    Source: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models", section 3.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, inv_freq: Tensor, theta: float) -> Tensor:
        """See `LinearScaling.scale`."""
        pairs = len(inv_freq)
        first, last = self._pair(self.beta_fast, pairs, theta), self._pair(self.beta_slow, pairs, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        ramp = ((torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / ((last - first) or 0.001)).clamp(
            0, 1
        )
        return inv_freq / self.factor * ramp + inv_freq * (1 - ramp)

    def _pair(self, turns: float, pairs: int, theta: float) -> float:
        """Number of the pair that turns so many times over the original context; between two pairs a fraction."""
        return pairs * math.log(self.original_max_position / (turns * 2 * math.pi)) / math.log(theta)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's attention factor for a context that is `factor` times as long.

    Source: Peng et al. 2023, equation 22; with both mscales DeepSeek-AI 2024, "DeepSeek-V2", section 3.1.4.
    """

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth(1.0)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians that each pair of a head turns per position: (head_dim / 2,) float32, on the CPU."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    return inv_freq if scaling is None else scaling.scale(inv_freq, theta)


def rotation(
    positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `ops.rotate` needs for each position: the cosine, and the sine with the first half's sign turned.

    Args:
        positions: (...) int64.
        inv_freq: (head_dim / 2,), see `inverse_frequencies`.
        dtype: of the result.
        attention_factor: what both are multiplied by; other than 1 for YaRN alone.

    Returns:
        Two tensors (..., 1, head_dim).
    """
    angles = positions[..., None, None].to(inv_freq.dtype) * inv_freq
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


_SCALINGS = {  # rope_type → the keys beside it that count
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
}


def read(config: Mapping, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling that a config.json names, in rope_scaling, as transformers 4 writes them, or in rope_parameters,
    as transformers 5 does; in both, rope_scaling counts, as transformers decides.

    Raises:
        UnsupportedModel: for a scaling that is not computed here, or for values that are none.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), Mapping | None):
            raise UnsupportedModel(
                f"config.json's {name} is {config[name]!r}, and an object such as "
                '{"rope_type": "linear", "factor": 2.0} is expected, or null'
            )
    older, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    rope = {name: value for name, value in (older or newer).items() if value is not None}
    theta = number(rope, "rope_theta", number(config, "rope_theta", default_theta))
    if older and number(newer, "rope_theta", theta) != theta:
        raise UnsupportedModel(
            f"config.json's rope_scaling goes with a rope_theta of {theta}, and its rope_parameters say "
            f"{newer['rope_theta']}; write rope_theta into rope_scaling"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModel(f"config.json has rotary embeddings for each kind of layer, and one is computed: {rope}")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported are: {', '.join(_SCALINGS)}")
    unknown = rope.keys() - {"rope_theta", "rope_type", "type"} - _SCALINGS[kind]
    if rope.get("partial_rotary_factor") == 1:
        unknown -= {"partial_rotary_factor"}
    if unknown:
        raise UnsupportedModel(f"config.json's {kind} rope scaling has {', '.join(sorted(unknown))}, not known here")
    return theta, _scaling(kind, rope, whole_number(config, "max_position_embeddings"))


def _scaling(kind: str, rope: Mapping, max_position: int) -> RopeScaling | None:
    """Of one rope_type, from its keys."""
    if kind == "default":
        return None
    factor = number(rope, "factor")
    if kind == "linear":
        return LinearScaling(factor)
    original = whole_number(rope, "original_max_position_embeddings", max_position)  # as transformers fills it in
    if kind == "llama3":
        return Llama3Scaling(factor, number(rope, "low_freq_factor"), number(rope, "high_freq_factor"), original)
    mscales = (number(rope, name, None) if name in rope else None for name in ("mscale", "mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original_max_position=original,
        attention_factor=number(rope, "attention_factor", yarn_attention_factor(factor, *mscales)),
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=flag(rope, "truncate", True),
    )


def written(scaling: RopeScaling | None) -> dict | None:
    """A scaling as config.json has it: what `read` reads."""
    if scaling is None:
        return None
    names = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
    content = {"rope_type": names[type(scaling)], **asdict(scaling)}
    if "original_max_position" in content:
        content["original_max_position_embeddings"] = content.pop("original_max_position")
    return content
