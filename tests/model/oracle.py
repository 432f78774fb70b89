"""Small models of transformers with weights that make every part matter: the oracle of the tests beside this file."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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


# model_type → what its config needs beside the sizes; a window as long as max_position_embeddings is no window
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
}
SMALL = {**SIZES, "hidden_size": 64, "num_attention_heads": 4}


def of_family(kind, **changes):
    """A random model of a family, 64 wide, with 2 layers."""
    config = CONFIG_MAPPING[kind](**{**SMALL, **FAMILIES[kind], **changes})
    return _random(AutoModelForCausalLM.from_config(config))


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
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
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


@torch.no_grad()
def greedy(model, token_ids, count):
    """The `count` tokens that transformers' model finds likeliest behind each row."""
    whole = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return whole[:, token_ids.shape[1] :]
