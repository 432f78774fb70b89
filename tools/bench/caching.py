"""Measure what a KV cache saves, and where prefill and decode turn from memory to arithmetic.

Called by `make bench`, on a CPU in fp32 and on a GPU in bf16. Every ratio comes from alternated runs in one process.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.numbers.measure import Check, compare
from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.cpu.packing import pack
from minilib.serving.generation import generate, tokens_with_cache, tokens_without_cache
from minilib.serving.phases import decode_phase, prompt_phase, rows_at_the_ridge

SMALL = ModelConfig(8192, 512, 1408, num_layers=7, num_heads=8, num_kv_heads=4, head_dim=64, max_position=1024)
LARGE = ModelConfig(32768, 4096, 14336, num_layers=8, num_heads=32, num_kv_heads=8, head_dim=128, max_position=1024)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXT = 64
PROMPT, NEW = 32, (16, 64, 128)


def caching(
    machine: Machine,
    rows: tuple[int, ...] = ROWS,
    new: tuple[int, ...] = NEW,
    budget: float = 0.5,
    config: ModelConfig | None = None,
) -> dict:
    """The figures of chapter 11, JSON values in SI units.

    Args:
        machine: whose device is measured.
        rows: sequences of a decode step and tokens of a prompt.
        new: tokens generated with and without a cache.
        budget: seconds spent on each.
        config: of the model; by default one that is larger on a GPU.
    """
    gpu = machine.kind == "gpu"
    config = config or (LARGE if gpu else SMALL)
    dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    model = Decoder(config).eval().to(device, dtype)
    if not gpu:
        pack(model)
    found = {"parameters": config.num_parameters, "dtype": "bf16" if gpu else "fp32", "context": CONTEXT}
    for phase, workload in (("decode", lambda count: decode_phase(model, count, CONTEXT)),
                            ("prompt", lambda count: prompt_phase(model, count))):  # fmt: skip
        bar = tqdm(rows, desc=phase, leave=False)
        checks = {count: workload(count).check(machine, device, budget) for count in bar}
        found[phase] = [_row(count, check) for count, check in checks.items()]
        one, many = (checks[count].measurement.seconds / count for count in (rows[0], rows[-1]))
        found[f"{phase}_ridge"] = one / many * rows[0]
    found["predicted_ridge"] = rows_at_the_ridge(machine, found["dtype"])
    found["generation"] = [_generation(model, count, budget) for count in new]
    return found


def _row(count: int, check: Check) -> dict:
    return {
        "rows": count,
        "bound": check.prediction.bound,
        "flops": check.prediction.cost.flops,
        "bytes": check.prediction.cost.bytes,
        "predicted": check.prediction.seconds,
        "seconds": check.measurement.seconds,
        "quartiles": check.measurement.quartiles,
    }


def _generation(model: Decoder, new: int, budget: float) -> dict:
    """Generate without a cache and with one: tokens computed, counted, and seconds, in turns."""
    prompt = list(range(1, PROMPT + 1))

    def cached():
        return generate(model, [prompt], new, ContiguousCache.for_model(model)).tokens_computed

    def naive():
        return generate(model, [prompt], new).tokens_computed

    counts = naive(), cached()
    assert counts == (tokens_without_cache(PROMPT, new), tokens_with_cache(PROMPT, new))
    ratio = compare(naive, cached, budget=4 * budget, min_pairs=3)
    return {
        "new": new,
        "computed_without": counts[0],
        "computed_with": counts[1],
        "seconds_without": ratio.a.seconds,
        "seconds_with": ratio.b.seconds,
        "ratio": ratio.ratio,
        "quartiles": ratio.quartiles,
    }
