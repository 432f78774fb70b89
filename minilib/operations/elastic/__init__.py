"""Training that outlasts the loss of processes: all begin again from a checkpoint, or the others go on without one."""

from minilib.operations.elastic.progress import report_step, restart_count
from minilib.operations.elastic.quorum import CommittedStep, Quorum, VoidedStep
from minilib.operations.elastic.replica import CoordinatorLost, ElasticReplica, NoQuorum, StepNeverCommits
from minilib.operations.elastic.replica_trainer import ReplicaTrainer
from minilib.operations.elastic.replicas import Replicas
from minilib.operations.elastic.restarts import (
    ElasticAttempt,
    ElasticFailed,
    ElasticRun,
    NoProgress,
    RestartsExhausted,
    TooFewRanks,
    run_elastic,
)
from minilib.operations.elastic.resuming import resume_and_train

__all__ = [
    "ElasticAttempt",
    "CommittedStep",
    "CoordinatorLost",
    "ElasticFailed",
    "ElasticRun",
    "NoProgress",
    "NoQuorum",
    "Quorum",
    "ElasticReplica",
    "ReplicaTrainer",
    "Replicas",
    "RestartsExhausted",
    "StepNeverCommits",
    "TooFewRanks",
    "VoidedStep",
    "report_step",
    "restart_count",
    "resume_and_train",
    "run_elastic",
]
