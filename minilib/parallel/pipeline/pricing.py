"""What a schedule costs: its timeline, its bubble, and the activations that each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from minilib.mechanisms.pipelining import Interval, Timeline, timeline_of
from minilib.mechanisms.pipelining.plan import checked_time
from minilib.parallel.pipeline.checking import check_schedule
from minilib.parallel.pipeline.schedule import Action, PipelineSchedule


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch on one stage.

    Args:
        forward: F.
        input_gradient: I.
        weight_gradient: W; an unsplit backward B takes I + W.

    Raises:
        ValueError: if a time is no finite number of 0 or more.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    def __post_init__(self) -> None:
        for name, time in asdict(self).items():
            checked_time(name, time)

    def of(self, kind: str) -> float:
        """Seconds of an action of that kind."""
        return {
            "F": self.forward,
            "I": self.input_gradient,
            "W": self.weight_gradient,
            "B": self.input_gradient + self.weight_gradient,
        }[kind]


@dataclass(frozen=True)
class SchedulePrice:
    """What a step costs by a schedule.

    Args:
        timeline: when each rank does each action.
        activations: for each rank the most pairs of a stage and a microbatch whose activations it holds at a time,
            from the end of the forward to the end of the backward, or of the weight gradient.
    """

    timeline: Timeline
    activations: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return self.timeline.makespan

    @property
    def bubble(self) -> float:
        """Fraction of the ranks' time in which they wait."""
        return self.timeline.bubble

    @property
    def longest_rank(self) -> float:
        """The longest time from a rank's first action to its last: what a step takes once steps overlap.

        A rank that starts late and ends late in one step, such as the last, costs nothing if it does so in every step.
        """
        return max((spans[-1].end - spans[0].start for spans in self.timeline.workers if spans), default=0.0)


def price_schedule(
    schedule: PipelineSchedule, times: StageTimes | Sequence[StageTimes], transfer: float = 0.0
) -> SchedulePrice:
    """Predict a step.

    Args:
        schedule: who does what.
        times: of a microbatch on every stage, or on each.
        transfer: seconds until another rank has a result, while which the sender goes on.

    Raises:
        UnsoundSchedule: if the schedule is not sound.
        TypeError: for times that are no StageTimes.
        ValueError: for times of another number of stages, or a transfer that is no finite time of 0 or more.
    """
    check_schedule(schedule)
    each = times_of_stages(times, schedule.num_stages)
    timeline = timeline_of(schedule.plan(), lambda action: each[action.stage].of(action.kind), transfer)
    return SchedulePrice(timeline, tuple(map(most_activations, schedule.actions)))


def times_of_stages(times: StageTimes | Sequence[StageTimes], num_stages: int) -> list[StageTimes]:
    """Times of each stage, from those of all alike or of each.

    Raises:
        TypeError: for what is no StageTimes.
        ValueError: for another number of them.
    """
    each = [times] * num_stages if isinstance(times, StageTimes) else list(times)
    if len(each) != num_stages:
        raise ValueError(f"needs times of {num_stages} stages, or of one for all; got {len(each)}")
    other = next((one for one in each if not isinstance(one, StageTimes)), None)
    if other is not None:
        raise TypeError(f"the times of a stage are StageTimes, got {other!r}")
    return each


def measured_timeline(ranks: Sequence[Sequence[Interval]]) -> Timeline:
    """The timeline of a step from what each rank has noted in it, in seconds since the first action began.

    Args:
        ranks: `PipelineParallel.spans` of every rank, all on one host, whose ranks share a clock.
    """
    origin = min((span.start for spans in ranks for span in spans), default=0.0)
    return Timeline(tuple(
        tuple(span._replace(start=span.start - origin, end=span.end - origin) for span in spans) for spans in ranks
    ))  # fmt: skip


def most_activations(actions: Sequence[Action]) -> int:
    """The most pairs of a stage and a microbatch whose activations a rank holds at a time."""
    held = most = 0
    for action in actions:
        held += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        most = max(most, held)
    return most


def expected_bubble(schedule: PipelineSchedule, times: StageTimes) -> float:
    """Most seconds that a rank waits between its first action and its last, in closed form.

    For equal stages and free messages. See `SchedulePrice.longest_rank`.

    Args:
        schedule: "gpipe" or "1f1b"; or "breadth-first", "interleaved" or "zero-bubble" (one stage a rank), of at least
            as many microbatches as ranks, a multiple of them for "interleaved".
        times: of a microbatch on each stage; for "zero-bubble" W takes no longer than F.

    Raises:
        ValueError: if there is no closed form for that schedule or these times.

    Source: Narayanan et al. 2021, section 2.2; Qi et al. 2023, table 1.
    """
    p, per_rank = schedule.num_ranks, schedule.num_stages // schedule.num_ranks
    m, whole = schedule.num_microbatches, times.forward + times.of("B")
    if schedule.name in ("gpipe", "1f1b") or (schedule.name == "breadth-first" and m >= p):
        return (p - 1) * whole
    if schedule.name == "interleaved" and m % p == 0:
        return (p - 1) * whole
    short = times.weight_gradient <= times.forward  # a longer W fills more than the time in which its rank would wait
    if schedule.name == "zero-bubble" and per_rank == 1 and m >= p and short:
        return (p - 1) * (whole - 2 * times.weight_gradient)
    raise ValueError(f"there is no closed form here for {schedule.name} with {per_rank} stages a rank, {m} "
                     f"microbatches over {p} ranks and {times}; price_schedule simulates any schedule")  # fmt: skip
