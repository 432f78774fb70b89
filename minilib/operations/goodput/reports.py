"""Published runs, simulated from what their reports give, beside what the reports say came out. Nothing is fitted.

    for row in price_reports():
        row.what, row.predicted, row.published

A report that leaves an input out gets two simulations, with a plausible value for the worse and for the better, which
reports.toml names with what it rests on. So a prediction is a range, and says something where the range is narrow.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean

from minilib.mechanisms.basics.checks import check_whole
from minilib.operations.goodput.failures import (
    DAY,
    HOUR,
    REPORTS,
    FailureCause,
    Fleet,
    llama_3_interruptions,
    mtbf_seconds,
)
from minilib.operations.goodput.interval import CheckpointCosts, best_interval
from minilib.operations.goodput.plan import CheckpointLevel, JobPlan, RecoveryPlan, memory_level
from minilib.operations.goodput.simulation import GoodputRun, simulate_job

FAILURES, SAVES = 3000, 200_000  # in each simulation about as many of the one, or of the other if that is sooner


@dataclass(frozen=True)
class PricedReport:
    """One published run.

    Args:
        name: in reports.toml.
        what: the run.
        predicted: the lower and the higher goodput, from the assumed inputs' worse and better ends.
        published: goodput, as its report has it.
        at_least: whether the report says "more than".
        rests_on: what the assumed inputs rest on.
        source: of the published figures.
        checked: where they were read.
        worse: a simulation with the worse inputs, for where its time went.
    """

    name: str
    what: str
    predicted: tuple[float, float]
    published: float
    at_least: bool
    rests_on: str
    source: str
    checked: str
    worse: GoodputRun

    @property
    def residual(self) -> float:
        """Published less the nearest end of the predicted range; 0 within it, or where "more than" reaches into it."""
        low, high = self.predicted
        if self.published > high:
            return self.published - high
        return 0.0 if self.at_least else min(0.0, self.published - low)


def price_reports(seeds: int = 3) -> list[PricedReport]:
    """Simulate every report that gives goodput.

    Args:
        seeds: simulations of each end of a range, of which the mean is taken.

    Cost: about two seconds a seed.
    """
    check_whole("seeds", seeds, 1)
    return [_priced(name, seeds) for name in _PLANS]


def scaled_mttf_hours(gpus: int) -> dict[str, float]:
    """Mean time to failure of a job on Meta's research clusters, from two published rates; they disagree.

    Args:
        gpus: of the job.

    Returns:
        Hours, "from jobs of 8 GPUs" by the jobs' own mean time to failure, and "from host failures" by the rate of
        failures per host and day.
    """
    rsc, fleet = _reports()["rsc"], Fleet(gpus)
    return {
        "from jobs of 8 GPUs": rsc["mttf_days_of_8_gpus"] * 24 * 8 / gpus,
        "from host failures": 1000 * 24 / rsc["per_1000_host_days"] / fleet.hosts,
    }


def published_mttf_hours() -> dict[int, float]:
    """The same as published, by GPUs: measured for 1,024, and projected for 16,384."""
    rsc = _reports()["rsc"]
    return {1024: rsc["mttf_hours_of_1024_gpus"], 16384: rsc["mttf_hours_of_16384_gpus"]}


def _reports() -> dict:
    return tomllib.loads(REPORTS.read_text(encoding="utf-8"))


def _priced(name: str, seeds: int) -> PricedReport:
    report = _reports()["priced"][name]
    ends: list[list[GoodputRun]] = []
    for end in (0, 1):
        inputs = report["given"] | report["assumed"]
        plan = _PLANS[name]({key: value[end] if isinstance(value, list) else value for key, value in inputs.items()})
        saved_by = SAVES * min((level.every for level in plan.levels), default=math.inf)
        seconds = min(FAILURES * mtbf_seconds(plan.causes, plan.fleet), saved_by)
        ends.append([simulate_job(plan, seconds / HOUR, seed) for seed in range(seeds)])
    low, high = (mean(_SHARES.get(name, _goodput)(run) for run in runs) for runs in ends)
    return PricedReport(
        name, report["what"], (low, high), report["published"], report.get("at_least", False), report["rests_on"],
        report["source"], report["checked"], ends[0][0],
    )  # fmt: skip


def _llama_3(inputs: Mapping[str, float]) -> JobPlan:
    table = llama_3_interruptions()
    causes = table.causes(planned=True)
    recovery = RecoveryPlan(restart=inputs["restart"])
    return JobPlan(10.0, [_disk(inputs["save"], mtbf_seconds(causes, table.fleet))], recovery, table.fleet, causes)


def _synchronous(inputs: Mapping[str, float]) -> JobPlan:
    recovery = RecoveryPlan(restart=inputs["restart"])
    levels = [_disk(inputs["save"], inputs["mtbf"])]
    return JobPlan(10.0, levels, recovery, Fleet(inputs["gpus"]), [_any_failure(inputs["mtbf"])])


def _replicas(inputs: Mapping[str, float]) -> JobPlan:
    recovery = RecoveryPlan(replicas=inputs["replicas"], stall=inputs["stall"], rejoin=inputs["rejoin"])
    return JobPlan(inputs["step"], [], recovery, Fleet(inputs["gpus"]), [_any_failure(inputs["mtbf"])])


def _every_step(inputs: Mapping[str, float]) -> JobPlan:
    step = inputs["step"]
    levels = [memory_level(step, step * (1 / inputs["speed_with_saves"] - 1), apart="rack")]
    recovery = RecoveryPlan(detection=inputs["detection"], restart=inputs["restart"])
    causes = [_any_failure(inputs["days"] * DAY / inputs["incidents"])]
    return JobPlan(step, levels, recovery, Fleet(inputs["gpus"]), causes)


def _slices(inputs: Mapping[str, float]) -> JobPlan:
    replicas = round(1 / (1 - inputs["throughput_without_a_slice"]))
    recovery = RecoveryPlan(replicas=replicas, stall=inputs["stall"], rejoin=inputs["rejoin"])
    return JobPlan(inputs["step"], [], recovery, Fleet(8960), [_any_failure(HOUR / inputs["per_hour"])])


def _disk(save: float, mtbf: float) -> CheckpointLevel:
    return CheckpointLevel("disk", best_interval(CheckpointCosts(save, 0, mtbf)), save)


def _any_failure(mtbf: float) -> FailureCause:
    return FailureCause("any", "job", HOUR / mtbf, "host")


def _goodput(run: GoodputRun) -> float:
    return run.goodput


def _not_stalled(run: GoodputRun) -> float:
    """Share of the time in which the job computes, be it with fewer replicas, and be it lost later."""
    return 1 - run.badput["stall"] / run.wall


_PLANS: dict[str, Callable[[Mapping[str, float]], JobPlan]] = {
    "llama_3": _llama_3,
    "ft_hsdp_synchronous": _synchronous,
    "ft_hsdp": _replicas,
    "byterobust": _every_step,
    "gemini_2_5": _slices,
}
_SHARES = {"gemini_2_5": _not_stalled}  # what a report's figure is the share of, where it is another
