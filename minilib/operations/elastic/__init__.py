"""Training that outlasts the loss of processes: all begin again from a checkpoint, or the others go on without one."""

from minilib.operations.elastic.progress import report_step, restart_count
from minilib.operations.elastic.restarts import (
    JobAttempt,
    ElasticFailed,
    ElasticRun,
    NoProgress,
    RestartsExhausted,
    TooFewRanks,
    run_elastic,
)
from minilib.operations.elastic.resuming import resume_and_train

__all__ = [
    "JobAttempt",
    "ElasticFailed",
    "ElasticRun",
    "NoProgress",
    "RestartsExhausted",
    "TooFewRanks",
    "report_step",
    "restart_count",
    "resume_and_train",
    "run_elastic",
]
