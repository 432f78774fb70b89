"""What tensor parallelism sends and holds, as formulas: collectives, bytes on the wire, activations.

    a layer, forward            2 all-reduces                                   2 · 2(n-1)/n · S sent by a rank
    with sequence parallelism   2 all-gathers and 2 reduce-scatters, half each  2 · 2(n-1)/n · S
    a layer, backward           the same once more

S are the bytes of one activation, tokens · hidden_size · itemsize. The embedding adds one such exchange in forward, and
the output projection one in backward; with sequence parallelism each adds its half in both.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", sections 4.1 and 4.2;
there ranks `regather`: they keep their own tokens alone of what enters a layer's products.
"""

from __future__ import annotations

from minilib.mechanisms.basics.arithmetic import round_up
from minilib.model.config import ModelConfig


def stream_collectives(
    config: ModelConfig, sequence_parallel: bool = False, chunks: int = 1, regather: bool = False
) -> dict[str, int]:
    """How many collectives of the stream one forward and one backward call, without those of the loss.

    Args:
        config: of the whole decoder.
        sequence_parallel: whether ranks have a part of the tokens between layers.
        chunks, regather: see `TensorParallel`; every product by rows calls as many as there are chunks in forward.
    """
    halves = 2 * config.num_layers + 1
    forward_chunks = 2 * config.num_layers * (chunks - 1)
    if sequence_parallel:
        again = 2 * config.num_layers if regather else 0
        return {"all_gather": 2 * halves + again, "reduce_scatter": 2 * halves + forward_chunks}
    return {"all_reduce": 2 * halves + forward_chunks}


def wire_bytes(
    config: ModelConfig,
    tokens: int,
    world_size: int,
    sequence_parallel: bool = False,
    regather: bool = False,
    itemsize: int = 4,
) -> dict[str, int]:
    """Bytes that all ranks together send in a step, in "forward", "backward" and "finish".

    Args:
        config: of the whole decoder.
        tokens: of the batch; with sequence parallelism padded to a multiple of world_size.
        world_size: ranks.
        sequence_parallel: whether ranks have a part of the tokens between layers.
        regather: see `TensorParallel`.
        itemsize: bytes of a value; the loss computes in 4 or more.
    """
    padded = round_up(tokens, world_size) if sequence_parallel else tokens
    all_reduced = 2 * (world_size - 1)  # times a tensor's bytes, whatever the plan
    activation = padded * config.hidden_size * itemsize
    stream = (2 * config.num_layers + 1) * all_reduced * activation
    again = 2 * config.num_layers * (world_size - 1) * activation if regather else 0
    loss = 4 * all_reduced * tokens * max(4, itemsize)
    return {
        "forward": stream + loss,
        "backward": stream + again,
        "finish": all_reduced * itemsize * _summed_values(config, world_size, sequence_parallel),
    }


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    world_size: int,
    sequence_parallel: bool = False,
    regather: bool = False,
    itemsize: int = 4,
) -> int:
    """Bytes that a rank keeps for the backward of one layer, computed by plain torch.

    Args:
        config: of the whole decoder, without norms of queries and keys.
        tokens: of the batch; a multiple of world_size with sequence parallelism.
        world_size: ranks.
        sequence_parallel: whether ranks have a part of the tokens between layers.
        regather: see `TensorParallel`.
        itemsize: bytes of a value.
    """
    norms = 2 * (2 * config.hidden_size + 1)  # input, normalised input and root of each
    inputs = 2 * config.hidden_size  # of qkv and of gate_up
    q, kv = config.num_heads // world_size, max(1, config.num_kv_heads // world_size)
    heads = 3 * (q + kv) * config.head_dim + q  # qkv, q and k turned, mixed values, log of the sum of each query
    feed_forward = 4 * config.intermediate_size // world_size  # gate and up, silu(gate), their product
    own = tokens // world_size if sequence_parallel else tokens
    return itemsize * (
        (norms + inputs) * own + (heads + feed_forward) * tokens + (0 if regather else inputs * (tokens - own))
    )


def _summed_values(config: ModelConfig, world_size: int, sequence_parallel: bool) -> int:
    """Values whose gradients `TensorParallel.finish` adds up."""
    values = 2 * config.num_layers * config.head_dim if config.qk_norm else 0
    if sequence_parallel:
        values += (2 * config.num_layers + 1) * config.hidden_size
    if config.num_kv_heads < world_size:
        columns = 2 * config.num_kv_heads * config.head_dim * config.num_layers
        values += columns * (config.hidden_size + (1 if config.qkv_bias else 0))
    return values
