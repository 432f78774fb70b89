"""Goodput: how often to save, what fails, a job simulated and priced against reports, and a run that is killed."""

from minilib.operations.goodput.drill import DrillPlan, DrillTrial, Kill, carry_out, rehearse
from minilib.operations.goodput.failures import (
    FailureCause,
    Fleet,
    InterruptionTable,
    LemonHosts,
    interruptions_per_hour,
    llama_3_interruptions,
    mtbf_seconds,
)
from minilib.operations.goodput.interval import (
    CheckpointCosts,
    ImpossibleCosts,
    ImpossibleInterval,
    availability_interval,
    best_interval,
    daly_interval,
    expected_goodput,
    expected_segment_seconds,
    first_order_overhead,
    young_interval,
)
from minilib.operations.goodput.plan import CheckpointLevel, JobPlan, RecoveryPlan, memory_level
from minilib.operations.goodput.reports import PricedReport, price_reports, published_mttf_hours, scaled_mttf_hours
from minilib.operations.goodput.simulation import GoodputRun, simulate_job
from minilib.operations.goodput.timeline import DrillEvent, DrillTimeline

__all__ = [
    "CheckpointCosts",
    "CheckpointLevel",
    "DrillEvent",
    "DrillPlan",
    "DrillTimeline",
    "FailureCause",
    "Fleet",
    "GoodputRun",
    "ImpossibleCosts",
    "ImpossibleInterval",
    "InterruptionTable",
    "JobPlan",
    "Kill",
    "LemonHosts",
    "PricedReport",
    "RecoveryPlan",
    "DrillTrial",
    "availability_interval",
    "best_interval",
    "carry_out",
    "daly_interval",
    "expected_goodput",
    "expected_segment_seconds",
    "first_order_overhead",
    "interruptions_per_hour",
    "llama_3_interruptions",
    "memory_level",
    "mtbf_seconds",
    "price_reports",
    "published_mttf_hours",
    "rehearse",
    "scaled_mttf_hours",
    "simulate_job",
    "young_interval",
]
