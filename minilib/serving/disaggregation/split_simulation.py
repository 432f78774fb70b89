"""The same load on mixed replicas and on a split, at a price instead of a model: the schedulers decide as ever.

A split is simulated one side after the other: prompts are computed without regard to what happens to them later, so
the times at which pages have arrived are known before the first token is. In practice a decode worker that is full
makes prefill workers hold pages for longer, and then wait; here they have room for all that they computed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace

from minilib.model.config import ModelConfig
from minilib.serving.disaggregation.pricing import StepPrice
from minilib.serving.load.arrivals import Arrival
from minilib.serving.load.clock import VirtualClock
from minilib.serving.load.metrics import RequestTimes
from minilib.serving.load.open_loop import run_open_loop
from minilib.serving.load.simulation import SimulatedEngine
from minilib.serving.request import SamplingParams, TokenOutput


class SimulatedDecodeEngine(SimulatedEngine):
    """A simulated engine whose prompts have been computed elsewhere when they are added."""

    def add_request(self, request_id, prompt_token_ids, params=None, scheduling=None) -> None:
        """As `Engine.add_request`; all but the prompt's last token is in pages as soon as there is room for them."""
        super().add_request(request_id, prompt_token_ids, params, scheduling)
        if len(prompt_token_ids) > 1:
            self.scheduler.expect(self.requests[request_id][0])

    def step(self) -> list[TokenOutput]:
        """One step, after everybody who has room was given pages."""
        for sequence in self.scheduler.policy.order(self.scheduler.arriving):
            if self.scheduler.reserve(sequence) is None:
                break
            self.scheduler.arrive(sequence)
        return super().step()


@dataclass(frozen=True)
class SimulatedWorkers:
    """Workers of one kind, all alike.

    Args:
        config: of the model.
        price: seconds of a step.
        num_pages: of each worker.
        options: of `Engine`, such as max_batch_tokens.
    """

    config: ModelConfig
    price: StepPrice
    num_pages: int
    options: dict

    def mixed(self, load: Row[Arrival], replicas: int) -> list[RequestTimes]:
        """Serve a load on replicas that compute prompts and answers, in turns."""
        return self._serve(SimulatedEngine, load, replicas)

    def split(
        self,
        load: Row[Arrival],
        prefill_workers: int,
        decode_workers: int,
        exposed: Callable[[int], float] = lambda num_prompt_tokens: 0.0,
    ) -> list[RequestTimes]:
        """Serve a load with prompts computed apart.

        Args:
            load: requests of two tokens or more.
            prefill_workers: they compute prompts.
            decode_workers: they compute all tokens of the answers.
            exposed: seconds from the end of a prompt's computing to its last page's arrival, see `price_move`.
        """
        one = SamplingParams(1, temperature=0, ignore_eos=True)
        prompts = [replace(each, prompt_token_ids=each.prompt_token_ids[:-1], params=one) for each in load]
        computed = self._serve(SimulatedEngine, prompts, prefill_workers)
        there = [
            replace(each, due=times.ended + exposed(len(each.prompt_token_ids)))
            for each, times in zip(load, computed, strict=True)
        ]
        served = self._serve(SimulatedDecodeEngine, there, decode_workers)
        return [replace(times, due=each.due) for each, times in zip(load, served, strict=True)]

    def _serve(self, kind: type[SimulatedEngine], load: Row[Arrival], count: int) -> list[RequestTimes]:
        """Deal a load out in turns, in the order in which it is due."""
        if count < 1:
            raise ValueError(f"a load needs one worker or more, got {count}")
        times: dict[int, RequestTimes] = {}
        order = sorted(range(len(load)), key=lambda number: load[number].due)
        for worker in range(count):
            mine, clock = order[worker::count], VirtualClock()
            engine = kind(self.config, self.price, clock, self.num_pages, **self.options)
            times |= zip(mine, run_open_loop(engine, [load[number] for number in mine], clock), strict=True)
        return [times[number] for number in range(len(load))]
