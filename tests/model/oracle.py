"""Small models of transformers with weights that make every part matter: the oracle of the tests beside this file."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minilib.model.ops import causal_attention

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
# Stretched from 32 positions; with a head of 8 one frequency is kept, one divided and the others are interpolated.
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**changes):
    return _random(LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})))


def qwen3(**changes):
    return _random(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **changes})))


def _random(model):
    """Logits of order one, and norm weights away from one: a wrong norm, scale or layout then shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                scale = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0, scale, generator=generator)
    return model.eval()


def tokens(count=40, batch=2, vocab=97, seed=0):
    return torch.randint(vocab, (batch, count), generator=torch.Generator().manual_seed(seed))


def places(token_ids):
    return torch.arange(token_ids.shape[-1]).expand_as(token_ids)


@torch.no_grad()
def logits(model, token_ids):
    """What minilib's decoder says of a batch."""
    return model(token_ids, places(token_ids), causal_attention)


@torch.no_grad()
def expected(model, token_ids):
    """What transformers' model says of it."""
    return model(token_ids).logits
