"""Name the fault of a training job from what its instruments have seen."""

from __future__ import annotations

from minilib.operations.diagnosis.collectives import stopped_collectives
from minilib.operations.diagnosis.finding import Finding
from minilib.operations.diagnosis.links import slow_links
from minilib.operations.diagnosis.liveness import full_disks, lost_heartbeats, unexplained_errors
from minilib.operations.diagnosis.numbers import loss_spikes, memory_leaks, nan_ranks
from minilib.operations.diagnosis.replicas import odd_replicas
from minilib.operations.diagnosis.stragglers import slow_ranks, starved_loaders
from minilib.operations.drills.training.drill import Evidence


def diagnose(evidence: Evidence) -> list[Finding]:
    """The findings of the first of four groups that has any, in this order:

    lost       a rank is gone: what the others report is its consequence
    stopped    the job ended in an error, or hangs: its pace says nothing
    corrupted  numbers are wrong: the loss may spike because of them
    slow       it goes on, and takes longer or more than it should
    symptoms   something is wrong, and nobody knows where
    """
    groups = {
        "lost": lambda: lost_heartbeats(evidence.pulses, evidence.silent, evidence.died),
        "stopped": lambda: full_disks(evidence.errors) or stopped_collectives(evidence.dumps),
        "corrupted": lambda: nan_ranks(evidence.steps) or odd_replicas(evidence.steps),
        "slow": lambda: [
            *slow_ranks(evidence.steps),
            *starved_loaders(evidence.steps),
            *slow_links(evidence.links),
            *memory_leaks(evidence.steps),
        ],
        "symptoms": lambda: loss_spikes(evidence.steps) + unexplained_errors(evidence.errors),
    }
    return next((found for find in groups.values() if (found := find())), [])
