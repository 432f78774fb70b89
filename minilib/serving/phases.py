"""The two phases of generation, priced and run: a prompt at once, and one token for each of many sequences.

    prefill   one sequence, p tokens     weights read once, used p times; keys and values written
    decode    B sequences, a token each  weights read once, used B times; the state of all B contexts read

    FLOPs     see step_cost.py; a row of logits a sequence
    bytes     weights, keys and values; what the layers pass to each other is not counted

Source: Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2.
"""

from __future__ import annotations

import torch

from minilib.kernels.workbench.dispatch import DTYPES
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.numbers.price import BYTES, Cost
from minilib.numbers.workloads import Workload
from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.step_cost import pair_flops, pairs_behind, product_flops, weights_read


def prompt_phase(model: Decoder, tokens: int) -> Workload:
    """Compute a prompt of so many tokens, and the logits of its last.

    Raises:
        ValueError: for no token, or more than the model has positions; for a model with experts, or in a dtype that is
            not in DTYPES.
    """
    return _phase(f"prompt of {tokens}", model, batch=1, new=tokens, context=0)


def decode_phase(model: Decoder, batch: int, context: int) -> Workload:
    """Compute one token for each of `batch` sequences that hold `context` tokens already.

    Raises:
        ValueError: for no sequence, or if the token has no position; for a model with experts, or in a dtype that is
            not in DTYPES.
    """
    return _phase(f"decode {batch} × {context}", model, batch, new=1, context=context)


def rows_at_the_ridge(machine: Machine, dtype: str = "fp32") -> float:
    """Rows from which on products with the weights are bound by arithmetic: tokens of a prompt, or sequences.

    A weight takes BYTES[dtype] to read and 2 FLOPs a row. Keys and values are left out; sequences bring their own, so
    with long contexts there may be no such batch.
    """
    return machine.ridge(dtype) * BYTES[dtype] / 2


def _phase(name: str, model: Decoder, batch: int, new: int, context: int) -> Workload:
    config = model.config
    if batch < 1 or new < 1 or not 0 <= context <= config.max_position - new:
        raise ValueError(
            f"batch ≥ 1, new tokens ≥ 1 and at most {config.max_position} positions are needed, got a batch of "
            f"{batch}, {new} new tokens and {context} before them"
        )
    weight = model.norm.weight
    if weight.dtype not in DTYPES or config.moe is not None:
        experts = ", with experts" if config.moe else ""
        raise ValueError(f"a dense model in {', '.join(DTYPES.values())} has a price here, got {weight.dtype}{experts}")
    dtype = DTYPES[weight.dtype]
    flops = product_flops(config, batch * new, batch) + batch * pair_flops(config, pairs_behind(context, new))
    moved = weights_read(config, batch * new, batch) + batch * (context + new) * config.kv_values_per_token

    def make(device: str):
        cache = ContiguousCache.for_model(model, batch, context + new)
        cache.attention([context] * batch)  # makes room
        cache.commit([[0] * context for _ in range(batch)])
        ids = torch.arange(batch * new, device=weight.device) % config.vocab_size
        positions = torch.arange(context, context + new, device=weight.device).repeat(batch)
        last = torch.arange(new - 1, batch * new, new, device=weight.device)

        @torch.inference_mode()
        def run():
            return model(ids, positions, cache.attention([new] * batch), logits_indices=last)

        return run

    cost = Cost(flops=flops, bytes=BYTES[dtype] * moved, dtype=dtype)
    return Workload(name, "2 a parameter and token, 4 a pair and width; weights and state read", cost, make)
