"""The shape of a decoder, as a frozen dataclass, and how it reads from a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from minilib.model import families, rope
from minilib.model.families import FAMILIES, Family, UnsupportedModel, flag, number, whole_number
from minilib.model.moe.config import MoEConfig
from minilib.model.rope import RopeScaling

KERNELS = ("torch", "triton", "interpreted")  # who computes; see minilib/model/ops.py


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
        rope_theta: base of the rotary frequencies.
        rope_scaling: how frequencies are stretched to a longer context, None for plain rotary embeddings.
        norm_eps: added under the root in RMSNorm.
        qk_norm: RMSNorm over each query and key head, as Qwen3 has it.
        qkv_bias: biases on the projections to queries, keys and values, as Qwen2 has them.
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
    qkv_bias: bool = False
    tie_embeddings: bool = True
    moe: MoEConfig | None = None
    kernels: str = field(default="torch", compare=False)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, so that each serves as many queries; "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, rotary embeddings turn pairs of values; got {self.head_dim}")
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a finite number > 1, so that pairs differ; got {self.rope_theta!r}")
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
        attention += (heads + self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
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
            UnsupportedModel: if the model computes something that this decoder does not, or if a field is missing or
                no value of its kind; see minilib/model/families.py.
        """
        family = families.family_of(config)
        families.check(config, family)
        heads, width = whole_number(config, "num_attention_heads"), whole_number(config, "hidden_size")
        kv_heads = config.get("num_key_value_heads", family.fields.get("num_key_value_heads"))
        kv_heads = heads if kv_heads is None else kv_heads
        theta, scaling = rope.read(config, family.fields.get("rope_theta", 10_000.0))
        return cls(
            vocab_size=whole_number(config, "vocab_size"),
            hidden_size=width,
            intermediate_size=whole_number(config, "intermediate_size"),
            num_layers=whole_number(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=whole_number({"num_key_value_heads": kv_heads}, "num_key_value_heads"),
            head_dim=whole_number(config, "head_dim", family.fields.get("head_dim", width // heads)),
            max_position=whole_number(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=number(config, "rms_norm_eps"),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            tie_embeddings=flag(config, "tie_word_embeddings", False),
            moe=_moe(config, family) if family.moe else None,
        )

    @property
    def family(self) -> Family:
        """The family of Hugging Face that computes what this config says; Llama's for what was read as Mistral's.

        Raises:
            UnsupportedModel: if none does.
        """
        moe, plain = self.moe, True
        if moe:
            usual = MoEConfig(moe.num_experts, moe.top_k, moe.intermediate_size, normalize=moe.normalize)
            plain = moe == usual and (moe.normalize or self.qk_norm)  # Mixtral always normalises
        computed = (self.qk_norm, self.qkv_bias, moe is not None)
        for family in FAMILIES.values():
            if plain and computed == (family.qk_norm, family.qkv_bias, family.moe):
                return family
        raise UnsupportedModel(
            f"no supported family of Hugging Face computes this model (qk_norm={self.qk_norm}, "
            f"qkv_bias={self.qkv_bias}, moe={moe}); use Trainer.save"
        )

    def to_hugging_face(self) -> dict:
        """The content of a config.json that transformers reads as the same model.

        Raises:
            UnsupportedModel: if no supported family computes it.
        """
        family = self.family
        scaling = rope.written(self.rope_scaling)
        content = {
            "architectures": [family.architecture],
            "model_type": next(kind for kind, known in FAMILIES.items() if known is family),
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
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},  # 5 this one
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": None,  # else transformers takes its class's own
            "eos_token_id": None,
        }
        if self.moe:
            content |= {"num_experts_per_tok": self.moe.top_k}
            if self.qk_norm:
                content |= {"num_experts": self.moe.num_experts, "norm_topk_prob": self.moe.normalize}
                content |= {"moe_intermediate_size": self.moe.intermediate_size}
            else:
                content |= {"num_local_experts": self.moe.num_experts, "intermediate_size": self.moe.intermediate_size}
        return content


def _moe(config: Mapping, family: Family) -> MoEConfig:
    """Of Mixtral, whose experts are as wide as intermediate_size says, or of Qwen3's mixtures."""
    counts = {whole_number(config, name) for name in families.NUM_EXPERTS if config.get(name) is not None}
    if len(counts) != 1:
        raise UnsupportedModel(
            f"config.json's {' and '.join(families.NUM_EXPERTS)} are {sorted(counts)}, and one number is expected"
        )
    fields = family.fields
    return MoEConfig(
        num_experts=counts.pop(),
        top_k=whole_number(config, "num_experts_per_tok", fields["num_experts_per_tok"]),
        intermediate_size=whole_number(
            config, "moe_intermediate_size" if "moe_intermediate_size" in fields else "intermediate_size"
        ),
        normalize=flag(config, "norm_topk_prob", fields["norm_topk_prob"]) if "norm_topk_prob" in fields else True,
    )
