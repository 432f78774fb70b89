"""Decoders and batches for tests of tensor parallelism: other weights on every rank, the same tokens."""

from functools import cache

import torch
from torch import Tensor

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder

VOCABULARY = 37  # no multiple of 2 or 4: the last rank's part is padded
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,  # fewer than ranks, where there are 4
    "head_dim": 6,
    "max_position": 32,
}
SHAPES = {
    "as many KV heads as heads, own output": {"num_kv_heads": 4, "tie_embeddings": False},
    "grouped KV heads, tied": {},
    "one KV head, all norms and biases": {"num_kv_heads": 1, "qk_norm": True, "qkv_bias": True},
}
STREAMS = (
    {},
    {"sequence_parallel": True},
    {"chunks": 3},
    {"sequence_parallel": True, "chunks": 3},
    {"sequence_parallel": True, "regather": True},
)


def config_of(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def decoder(seed: int, **changes) -> Decoder:
    """In float64, every parameter of random values, norms and biases, too."""
    model, generator = Decoder(config_of(**changes)).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    return model


def tokens_of(step: int, sequences: int = 3, context: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and targets; 21 tokens are no multiple of 2 or 4."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (sequences, context + 1), generator=generator)
    return tokens[:, :-1], torch.arange(context).expand(sequences, context), tokens[:, 1:]


def adamw(model: Decoder) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


CLIP = 0.5


@cache
def alone(shape: str, steps: int) -> dict:
    """What one process does: the first gradients, norms, losses, and the parameters after some steps."""
    model = decoder(0, **SHAPES[shape])
    optimizer, losses, norms, gradients = adamw(model), [], [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(*tokens_of(step))
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return {"state": model.state_dict(), "gradients": gradients, "norms": norms, "losses": losses}
