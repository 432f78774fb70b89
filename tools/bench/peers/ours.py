"""This library's engine behind the pipe of worker.py.

Usage: python -m tools.bench.peers.ours FOLDER THREADS SEQUENCES LENGTH [DESIGN]

As worker.py has it; with a design, "hash" or "radix", the engine keeps pages for prompts that begin alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.model import weights
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tools.bench.peers.worker import BATCH_TOKENS, answer, own_pipe

PAGE = 16


class Ours:
    """The paged engine over packed weights, fp32."""

    def __init__(self, folder: Path, threads: int, sequences: int, length: int, design: str | None = None) -> None:
        torch.set_num_threads(threads)
        pages = sequences * ceil_div(length, PAGE)
        self.engine = Engine(weights.load(folder / "hf"), pages, PAGE, max_batch_tokens=BATCH_TOKENS,
                             max_sequences=sequences, pack=True, prefix_cache=design)  # fmt: skip
        self.settings = {"threads": threads, "dtype": "float32", "page_size": PAGE, "pack": True,
                         "prefix_cache": design}  # fmt: skip

    def add(self, request: int, prompt: list[int], new: int) -> None:
        self.engine.add_request(str(request), prompt, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))

    def step(self) -> list[tuple[int, int]]:
        return [(int(output.request_id), output.token_id) for output in self.engine.step()]


def main() -> None:
    folder, threads, sequences, length, *design = sys.argv[1:]
    numbers = int(threads), int(sequences), int(length)
    answer(lambda: Ours(Path(folder), *numbers, *design), ("torch",), own_pipe())


if __name__ == "__main__":
    main()
