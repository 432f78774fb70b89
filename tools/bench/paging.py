"""Measure the paged engine: against transformers on the same weights, against its own model, and against the memory.

Called by `make bench`. Every ratio comes from alternated runs in one process.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch
from tqdm import tqdm

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers.machine import Machine
from minilib.numbers.measure import compare, measure, quartiles
from minilib.serving.cache.paged_attention import PagedAttention, Work
from minilib.serving.cpu.packing import pack
from minilib.serving.engine import Engine
from minilib.serving.load.request_lengths import long_tailed
from minilib.serving.request import SamplingParams

PAGE = 16
MODEL = ModelConfig(8192, 512, 1408, num_layers=7, num_heads=8, num_kv_heads=4, head_dim=64, max_position=1024)
BIG = ModelConfig(8192, 2048, 5632, num_layers=3, num_heads=16, num_kv_heads=4, head_dim=128, max_position=1024)


def paging(machine: Machine) -> dict:
    """The figures of chapter 12, JSON values in SI units.

    Raises:
        ModuleNotFoundError: if transformers, the peer, is not installed (it comes with the `test` extra).
    """
    from transformers import AutoModelForCausalLM

    model = Decoder(MODEL).eval()
    with tempfile.TemporaryDirectory() as folder:
        weights.save(model, folder, torch.float32)
        peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    pack(model)
    bar = tqdm((1, 8, 32), desc="paged engine", leave=False)
    return {
        "parameters": MODEL.num_parameters,
        "kv": _counts(),
        "equal_lengths": [_equal(model, peer, batch) for batch in bar],
        "mixed_lengths": _mixed(model, peer),
        "steps": [_step(model, machine, batch) for batch in (1, 8, 32)],
        "big_step": _step(pack(Decoder(BIG)), machine, 1),
    }


def _counts() -> dict:
    """Slots taken and wasted on the chapter's trace, and requests that fit: counted, not timed."""
    lengths, longest = long_tailed(200, mean=250, longest=1024), 1024
    paged = [ceil_div(n, PAGE) * PAGE for n in lengths]
    budget = 32 * longest
    return {
        "mean_length": float(np.mean(lengths)),
        "waste_paged": 1 - sum(lengths) / sum(paged),
        "waste_reserved": 1 - sum(lengths) / (len(lengths) * longest),
        "fit_paged": int((np.cumsum(paged) <= budget).sum()),
        "fit_reserved": budget // longest,
    }


def _equal(model: Decoder, peer, batch: int, prompt: int = 32, new: int = 96) -> dict:
    """Output tokens per second of `batch` requests of one length, ours and transformers'."""
    prompts = torch.randint(MODEL.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch))
    engine = Engine(model, num_pages=batch * ceil_div(prompt + new, PAGE))

    def ours() -> list[int]:
        for row in range(batch):
            engine.add_request(str(row), prompts[row].tolist(), _greedy(new))
        tokens = []
        while engine.has_unfinished:
            tokens += [output.token_id for output in engine.step() if output.request_id == "0"]
        return tokens

    def theirs() -> list[int]:
        return _generate(peer, prompts, torch.ones_like(prompts), new)[0, prompt:].tolist()

    same = ours() == theirs()
    ratio = compare(theirs, ours, budget=12, min_pairs=3)
    return {
        "batch": batch,
        "same_tokens": same,
        "ours": batch * new / ratio.b.seconds,
        "transformers": batch * new / ratio.a.seconds,
        "ratio": ratio.ratio,
        "quartiles": quartiles(ratio.ratios),
    }


def _mixed(model: Decoder, peer, rows: int = 4, longest: int = 512, gap: float = 0.01) -> dict:
    """Long-tailed requests that arrive one by one, in the same bytes of KV: transformers reserves, we page.

    transformers serves whoever has arrived, at most `rows` at once, until the longest of them is done.
    """
    generator = np.random.default_rng(1)
    lengths = long_tailed(40, mean=100, longest=longest - 32, seed=2)
    requests = [(generator.integers(MODEL.vocab_size, size=1 + n // 4).tolist(), 1 + n - n // 4) for n in lengths]
    tokens = sum(new for _, new in requests)

    def ours() -> None:
        engine = Engine(model, num_pages=rows * longest // PAGE)
        started, arrived = time.perf_counter(), 0
        while arrived < len(requests) or engine.has_unfinished:
            while arrived < len(requests) and time.perf_counter() - started >= arrived * gap:
                prompt, new = requests[arrived]
                engine.add_request(str(arrived), prompt, _greedy(new))
                arrived += 1
            engine.step()

    def theirs() -> None:
        started, served = time.perf_counter(), 0
        while served < len(requests):
            arrived = min(len(requests), 1 + int((time.perf_counter() - started) / gap))
            batch = requests[served : min(arrived, served + rows)]
            if not batch:
                continue
            width = max(len(prompt) for prompt, _ in batch)
            ids, mask = torch.zeros(len(batch), width, dtype=torch.int64), torch.zeros(len(batch), width).long()
            for row, (prompt, _) in enumerate(batch):
                ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
            _generate(peer, ids, mask, max(new for _, new in batch))
            served += len(batch)

    ratio = compare(theirs, ours, budget=20, min_pairs=2)
    return {
        "requests": len(requests),
        "slots": rows * longest,
        "ours": tokens / ratio.b.seconds,
        "transformers": tokens / ratio.a.seconds,
        "ratio": ratio.ratio,
        "quartiles": quartiles(ratio.ratios),
    }


def _step(model: Decoder, machine: Machine, batch: int, context: int = 128) -> dict:
    """One decoding step: the engine's against its bare model's forward pass, and the bytes that it reads per second."""
    config = model.config
    engine = Engine(model, num_pages=batch * config.max_position // PAGE)
    for row in range(batch):
        engine.add_request(str(row), list(range(1, context + 1)), _greedy(config.max_position - context - 1))
    engine.step()

    def bare() -> None:
        running = engine.scheduler.running
        work = [Work(sequence.table, 1) for sequence in running]
        ids = torch.tensor([sequence.token_ids[-2] for sequence in running])
        places = torch.tensor([sequence.num_computed_tokens - 1 for sequence in running])
        with torch.inference_mode():
            engine.model(ids, places, PagedAttention(engine.cache, work))

    engine.step()
    ratio = compare(engine.step, bare, budget=1.5)
    step = measure(engine.step, budget=0.3)
    length = engine.scheduler.running[0].num_computed_tokens
    moved = 4 * config.num_parameters + 4 * batch * length * config.kv_values_per_token
    return {
        "parameters": config.num_parameters,
        "batch": batch,
        "seconds": step.seconds,
        "over_bare_forward": ratio.ratio,
        "quartiles": quartiles(ratio.ratios),
        "bytes_per_second": moved / step.seconds,
        "share_of_read_bandwidth": moved / step.seconds / machine.bandwidths["memory_read"],
    }


def _greedy(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)


def _generate(peer, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    return peer.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
