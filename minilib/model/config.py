"""The shape of a decoder, as a frozen dataclass, and how it reads from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minilib.model.moe.config import MoEConfig

MODEL_TYPES = {"llama": False, "qwen3": True}  # Hugging Face's model_type → whether queries and keys are normalised
KERNELS = ("torch", "triton", "interpreted")  # who computes; see minilib/model/ops.py


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind that this decoder does not compute; the message says what is in the way."""


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches rotary embeddings to contexts longer than those it was pretrained on.

    Frequencies whose wavelength exceeds original/low_freq_factor positions are divided by `factor`, those below
    original/high_freq_factor are kept, and the ones between are interpolated.

    Source: Llama 3.1, `apply_scaling` in meta-llama/llama-models.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder.

    Args:
        vocab_size: tokens that it knows.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layer; unused where `moe` takes its place.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; each serves num_heads / num_kv_heads query heads.
        head_dim: width of one head; num_heads · head_dim need not be hidden_size.
        max_position: longest sequence, in tokens.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: Llama 3.1's stretching, None for plain rotary embeddings.
        norm_eps: added under the root in RMSNorm.
        qk_norm: RMSNorm over each query and key head, as Qwen3 has it.
        tie_embeddings: the output projection is the embedding table.
        moe: experts in place of every layer's feed-forward network; None for a dense model.
        kernels: who computes all but the matrix products: "torch"; "triton" for this library's kernels, which
            on a CPU are plain torch too; "interpreted" for the kernels in Triton's interpreter, slowly. No part of the
            shape: configs that differ in it alone are equal, and no checkpoint holds it.

    Raises:
        ValueError: if the sizes do not fit together, or for other kernels.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = False
    tie_embeddings: bool = True
    moe: MoEConfig | None = None
    kernels: str = field(default="torch", compare=False)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, so that each serves as many queries; "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, rotary embeddings turn pairs of values; got {self.head_dim}")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels is one of {', '.join(KERNELS)}; got {self.kernels!r}")

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache, all layers together; times the dtype's size for bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return self._parameters(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of a layer's experts, those that it is routed to."""
        return self._parameters(self.moe.top_k if self.moe else 0)

    def _parameters(self, experts: int) -> int:
        """With so many routed experts a layer."""
        heads = self.num_heads + self.num_kv_heads
        attention = 2 * self.hidden_size * heads * self.head_dim + (2 * self.head_dim if self.qk_norm else 0)
        width, router = self.intermediate_size, 0
        if self.moe:
            width, router = self.moe.intermediate_size * (experts + self.moe.num_shared_experts), self.moe.num_experts
        layer = attention + self.hidden_size * (3 * width + router + 2)
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + self.hidden_size * (tables * self.vocab_size + 1)

    @classmethod
    def from_hugging_face(cls, config: Mapping) -> ModelConfig:
        """Read the content of a config.json.

        Raises:
            UnsupportedModel: if the model computes something that this decoder does not.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise UnsupportedModel(f"model_type {kind!r} is not supported; supported are: {', '.join(MODEL_TYPES)}")
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise UnsupportedModel(f"{name} is set, and this decoder's linear layers have no bias")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act is {config['hidden_act']!r}, and this decoder computes 'silu'")
        if config.get("use_sliding_window"):
            raise UnsupportedModel("use_sliding_window is set, and this decoder attends to the whole context")
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        lost = [n for n in (*names, "max_position_embeddings", "rms_norm_eps") if config.get(n) is None]
        if lost:
            raise UnsupportedModel(f"config.json does not say {', '.join(lost)}")
        heads = config["num_attention_heads"]
        theta, scaling = _rope(config)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position=config["max_position_embeddings"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config["rms_norm_eps"],
            qk_norm=MODEL_TYPES[kind],
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def to_hugging_face(self) -> dict:
        """The content of a config.json that transformers reads as the same model.

        Raises:
            UnsupportedModel: for a mixture of experts.
        """
        if self.moe:
            raise UnsupportedModel("a mixture of experts is not written in Hugging Face's layout; use Trainer.save")
        rope: dict[str, object] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_position,
            }
        kind = "qwen3" if self.qk_norm else "llama"
        return {
            "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[kind]],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,  # transformers 4 reads these two,
            "rope_scaling": None if not self.rope_scaling else {k: v for k, v in rope.items() if k != "rope_theta"},
            "rope_parameters": rope,  # and transformers 5 this one
            "tie_word_embeddings": self.tie_embeddings,
        }


def _rope(config: Mapping) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from where transformers 5 writes them (rope_parameters) or where transformers 4 did."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported are: default, llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    lost = [name for name in names if rope.get(name) is None]
    if lost:
        raise UnsupportedModel(f"the llama3 rope scaling in config.json does not say {', '.join(lost)}")
    return float(theta), RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )
