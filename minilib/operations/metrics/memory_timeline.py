"""What a training process holds in memory, phase by phase and step by step, and what of it grows.

    timeline = MemoryTimeline(memory_reader())
    trainer = Trainer(…, phases=timeline.phase)
    trainer.run(after_step=timeline.step_ended)
    timeline.growth("resident")        bytes a step, and whether chance explains them
    timeline.kept_by_phase("tensors")  which phase takes what it does not give back

A run takes memory until its first steps are over: allocators keep what they got, and the optimizer makes its state.
So growth counts as growth only if the second half of the steps grows as well.
"""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from minilib.operations.metrics.trend import robust_slope, trend_significance

SIGNIFICANT = 3.0  # standard deviations
FEWEST_STEPS = 16  # that a verdict needs: of fewer than 8 numbers in a half no order is SIGNIFICANT

MemoryReader = Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class MemorySample:
    """What was held at one moment.

    Args:
        step: number of the step.
        phase: of the step; "" at its end.
        moment: "begin" or "end" of the phase.
        held: bytes by kind.
    """

    step: int
    phase: str
    moment: str
    held: Mapping[str, int]


@dataclass(frozen=True)
class MemoryGrowth:
    """How one kind of memory went over the steps.

    Args:
        kind: of memory.
        bytes_per_step: the robust slope.
        significance: of the trend, in standard deviations; of the half of the steps where it is smaller.
        steps: that were seen.
        grows: whether there is a trend in all steps and in the second half of them, and more than `floor` a step.
    """

    kind: str
    bytes_per_step: float
    significance: float
    steps: int
    grows: bool


class MemoryTimeline:
    """Samples of memory at the edges of phases and at the ends of steps.

    Args:
        read: what to sample, bytes by kind; see `memory_reader`.
        capacity: newest samples to keep.

    Raises:
        ValueError: if capacity is below 1.
    """

    def __init__(self, read: MemoryReader, capacity: int = 20_000) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is a number of samples, 1 or more; got {capacity!r}")
        self._read = read
        self._step = 0
        self.samples: deque[MemorySample] = deque(maxlen=capacity)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Sample where a phase begins and where it ends; a `StepPhases` of training/phases.py."""
        self._sample(name, "begin")
        try:
            yield
        finally:
            self._sample(name, "end")

    def step_ended(self, trainer: object = None) -> None:
        """Sample at the end of a step; fits `after_step` of Trainer.run."""
        self._sample("", "end")
        self._step += 1

    def series(self, kind: str, phase: str = "", moment: str = "end") -> tuple[list[int], list[int]]:
        """Steps and the bytes held in each, at one moment of one phase: what a figure draws.

        Raises:
            ValueError: if no sample holds this kind of memory.
        """
        chosen = [each for each in self.samples if (each.phase, each.moment) == (phase, moment)]
        self._check(kind)
        return [each.step for each in chosen], [each.held[kind] for each in chosen]

    def growth(self, kind: str, phase: str = "", floor: float = 0.0) -> MemoryGrowth:
        """Whether memory grows from step to step, seen at the end of a phase, or of the step.

        Args:
            kind: of memory.
            phase: after which it is looked at.
            floor: bytes a step up to which growth is none.
        """
        steps, held = self.series(kind, phase)
        half = len(steps) // 2
        late = steps[half:], held[half:]
        slope = robust_slope(steps, held)
        certainty = min(trend_significance(steps, held), trend_significance(*late))
        grows = len(steps) >= FEWEST_STEPS and certainty > SIGNIFICANT and min(slope, robust_slope(*late)) > floor
        return MemoryGrowth(kind, slope, certainty, len(steps), bool(grows))

    def kept_by_phase(self, kind: str) -> dict[str, float]:
        """Bytes by which each phase changes what is held, median over steps. Of phases that take turns, as forward and
        backward do, one gives back what the other took; a phase whose bytes nobody gives back leaks them."""
        self._check(kind)
        changes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for sample in self.samples:
            if sample.phase:
                sign = 1 if sample.moment == "end" else -1
                changes[sample.phase][sample.step] += sign * sample.held[kind]
        return {phase: statistics.median(of_step.values()) for phase, of_step in changes.items()}

    def _check(self, kind: str) -> None:
        known = self.samples[-1].held if self.samples else {}
        if kind not in known:
            raise ValueError(f"kinds of memory sampled here: {', '.join(known) or 'none yet'}; got {kind!r}")

    def _sample(self, phase: str, moment: str) -> None:
        self.samples.append(MemorySample(self._step, phase, moment, dict(self._read())))


def memory_reader(device: torch.device | str = "cpu", tensors: bool = False) -> MemoryReader:
    """A reader of this process's memory.

        resident    bytes of the process in main memory (RSS)
        allocated   bytes in tensors on a GPU; reserved, what torch's allocator keeps for them
        tensors     bytes of tensors that Python can reach: the same number for the same program, but one walk over all
                    its objects a sample, some ten milliseconds

    Args:
        device: of the model.
        tensors: whether to count tensors; on a CPU, whose allocator keeps no count, there is no other exact number.
    """
    process, on_gpu = psutil.Process(), torch.device(device).type == "cuda"

    def read() -> dict[str, int]:
        held = {"resident": process.memory_info().rss}
        if on_gpu:
            held["allocated"] = torch.cuda.memory_allocated(device)
            held["reserved"] = torch.cuda.memory_reserved(device)
        return held | ({"tensors": live_tensor_bytes()} if tensors else {})

    return read


def live_tensor_bytes() -> int:
    """Bytes of storages of all tensors that Python's garbage collector knows; each storage counts once."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
