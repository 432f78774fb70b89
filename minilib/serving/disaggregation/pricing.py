"""What it costs to compute a prompt in one place and its answer in another, and when that pays.

    bytes      2 · layers · kv_heads · head_dim · itemsize a token, in whole pages
    time       each layer's pages travel while later layers are computed: what is left to wait for is exposed

    mixed      every replica spends P seconds on a request's prompt and D on its answer: a token waits for prompts, too
    split      x workers spend P, y workers spend D: a token waits for tokens alone

N workers do N / (P + D) requests a second mixed, and min(x / P, y / D) split, which is never more: a split shortens the
time between tokens, and pays for that wherever x : y is not P : D.

Sources: Zhong et al., "DistServe", OSDI 2024, sections 2 and 3 (interference, placement); Pope et al. 2022,
"Efficiently Scaling Transformer Inference" (prices of both phases).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from minilib.model.config import ModelConfig
from minilib.numbers import quoted
from minilib.numbers.machine import Link, Machine
from minilib.numbers.price import BYTES
from minilib.serving.disaggregation.page_format import pages_to_move
from minilib.serving.load.simulation import StepCounts

StepPrice = Callable[[StepCounts], float]  # seconds of a step: MachinePrice, FittedPrice


@dataclass(frozen=True)
class Move:
    """One prompt, computed here and moved there.

    Args:
        nbytes: of the pages that move.
        messages: one a layer and chunk.
        prefill: seconds to compute the prompt.
        travel: seconds that the pages are on their way, if nothing else was done meanwhile.
        exposed: seconds from the end of the computing to the arrival of the last page, sent layer by layer.
    """

    nbytes: int
    messages: int
    prefill: float
    travel: float
    exposed: float


def kv_links(gpu: str = "h100-sxm") -> dict[str, Link]:
    """The ways that pages may take between two GPUs, in one direction, from data sheets and quoted figures.

    A link to a network is one port, of one GPU.
    """
    infiniband, ethernet = (quoted.value("network", f"{name}_bandwidth") for name in ("infiniband", "ethernet"))
    latency, round_trip = (quoted.value("network", name) for name in ("infiniband_latency", "datacenter_round_trip"))
    return {
        "NVLink": Machine.datasheet(gpu).link("nvlink"),
        "InfiniBand, 400 Gb/s": Link(infiniband, latency),
        "Ethernet, 100 Gb/s": Link(ethernet, round_trip / 2),
    }


def several(machine: Machine, count: int) -> Machine:
    """GPUs that share every layer, as if what they tell each other took no time; each has its own links.

    Raises:
        ValueError: for fewer than one.
    """
    if count < 1:
        raise ValueError(f"one GPU or more, got {count!r}")
    return replace(
        machine,
        title=f"{count} × {machine.title}",
        flops={dtype: count * rate for dtype, rate in machine.flops.items()},
        memory_bandwidth=count * machine.memory_bandwidth,
        memory_bytes=count * machine.memory_bytes,
        links={name: wider(link, count) for name, link in machine.links.items()},
    )


def wider(link: Link, count: int) -> Link:
    """So many links side by side, each with its part of the heads."""
    return Link(count * link.bandwidth, link.latency)


def kv_page_bytes(config: ModelConfig, num_prompt_tokens: int, page_size: int = 16, dtype: str = "bf16") -> int:
    """Bytes that move for a prompt: whole pages of all its tokens but the last."""
    return pages_to_move(num_prompt_tokens, page_size) * page_size * config.kv_values_per_token * BYTES[dtype]


def price_move(
    config: ModelConfig,
    num_prompt_tokens: int,
    price: StepPrice,
    link: Link,
    page_size: int = 16,
    dtype: str = "bf16",
    chunk: int = 2048,
) -> Move:
    """Compute a prompt in chunks, and send each layer's full pages while the next layer is computed.

    Args:
        config: of the model.
        num_prompt_tokens: at least 2; the last one is computed where the answer is.
        price: seconds of a step of the prefill worker.
        link: between the workers.
        page_size: tokens in a page.
        dtype: of keys and values.
        chunk: most tokens in a step.

    Raises:
        ValueError: for fewer tokens, or no chunk.
    """
    if num_prompt_tokens < 2 or chunk < 1:
        raise ValueError(f"2 tokens or more and a chunk ≥ 1 are needed, got {num_prompt_tokens} and {chunk}")
    total, layers = num_prompt_tokens - 1, config.num_layers
    layer_page_bytes = kv_page_bytes(config, 2, page_size, dtype) / layers
    computed = arrived = travel = 0.0  # seconds; a link carries one message after another
    messages = sent = 0
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        layer_seconds = price(StepCounts((stop - start,), (stop,), int(stop == total))) / layers
        pages = (pages_to_move(num_prompt_tokens, page_size) if stop == total else stop // page_size) - sent
        sent += pages
        for _ in range(layers):
            computed += layer_seconds
            if pages:
                seconds = link.latency + pages * layer_page_bytes / link.bandwidth
                arrived, travel, messages = max(arrived, computed) + seconds, travel + seconds, messages + 1
    nbytes = kv_page_bytes(config, num_prompt_tokens, page_size, dtype)
    return Move(nbytes, messages, computed, travel, arrived - computed)


@dataclass(frozen=True)
class Phases:
    """What a request of a load costs a worker in each phase.

    Args:
        prefill: seconds on its prompt.
        decode: seconds on its answer: its share of the steps of a batch.
        step: seconds of such a step.
    """

    prefill: float
    decode: float
    step: float

    @property
    def prefill_share(self) -> float:
        """Of the workers, those that should compute prompts: P / (P + D)."""
        return self.prefill / (self.prefill + self.decode)

    @property
    def slowdown(self) -> float:
        """Mean time between tokens of busy mixed replicas, over that of a worker that only decodes: 1 + P / D."""
        return 1 + self.prefill / self.decode

    def rate(self, prefill_workers: int, decode_workers: int) -> float:
        """Requests a second that a split can do.

        Raises:
            ValueError: if there is no worker of a kind.
        """
        if min(prefill_workers, decode_workers) < 1:
            raise ValueError(f"one worker or more of each kind, got {prefill_workers} and {decode_workers}")
        return min(prefill_workers / self.prefill, decode_workers / self.decode)

    def mixed_rate(self, replicas: int) -> float:
        """Requests a second that so many mixed replicas can do."""
        return replicas / (self.prefill + self.decode)

    def best_split(self, workers: int) -> tuple[int, int]:
        """Prefill and decode workers, together so many, that can do the most.

        Raises:
            ValueError: for fewer than two.
        """
        if workers < 2:
            raise ValueError(f"a split takes two workers or more, got {workers}")
        splits = [(count, workers - count) for count in range(1, workers)]
        return max(splits, key=lambda split: self.rate(*split))


def price_phases(
    num_prompt_tokens: int, num_output_tokens: int, batch: int, price: StepPrice, chunk: int = 2048
) -> Phases:
    """Of a load whose requests all have these lengths, with so many sequences decoding at once.

    Args:
        num_prompt_tokens: of each request.
        num_output_tokens: of each request.
        batch: sequences in a decode step; each holds its prompt and half its answer.
        price: seconds of a step.
        chunk: most tokens of a prompt in a step.

    Raises:
        ValueError: for a number below 1.
    """
    if min(num_prompt_tokens, num_output_tokens, batch, chunk) < 1:
        raise ValueError(
            f"numbers ≥ 1 are needed, got {num_prompt_tokens}, {num_output_tokens}, batch {batch} and chunk {chunk}"
        )
    stops = [*range(chunk, num_prompt_tokens, chunk), num_prompt_tokens]
    starts = [0, *stops[:-1]]
    prefill = sum(
        price(StepCounts((stop - start,), (stop,), int(stop == num_prompt_tokens)))
        for start, stop in zip(starts, stops, strict=True)
    )
    step = price(StepCounts((1,) * batch, (num_prompt_tokens + num_output_tokens // 2,) * batch, batch))
    return Phases(prefill, num_output_tokens * step / batch, step)


def token_gap(batch: int, context: int, price: StepPrice, chunk: int = 0, chunk_context: int = 0) -> float:
    """Seconds between two tokens of sequences that decode, while a chunk of somebody's prompt is in the same step.

    Args:
        batch: sequences that decode.
        context: tokens that each holds.
        price: seconds of a step.
        chunk: tokens of the prompt in this step; 0 for a worker that only decodes.
        chunk_context: tokens of that prompt that came before.
    """
    counts, contexts = (1,) * batch, (context,) * batch
    if chunk:
        counts, contexts = (*counts, chunk), (*contexts, chunk_context + chunk)
    return price(StepCounts(counts, contexts, batch))


def moves_over(
    links: Mapping[str, Link], config: ModelConfig, num_prompt_tokens: int, price: StepPrice, **options
) -> dict[str, Move]:
    """`price_move` for each of some links, by their names."""
    return {name: price_move(config, num_prompt_tokens, price, link, **options) for name, link in links.items()}
