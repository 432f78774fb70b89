"""Which replica is no copy of the others any more, from checksums that every rank records of its own parameters."""

from __future__ import annotations

from collections import Counter

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.diagnosis.stragglers import Steps
from minilib.operations.integrity.verdict import suspects_of


def odd_replicas(steps: Steps) -> list[Finding]:
    """Ranks whose parameters differ from those of most ranks, judged at the first step at which any do.

    An update of its own changes every tensor that a rank has. A flipped bit changes one: replicas average gradients, so
    that all other tensors go on being updated alike. With two ranks nobody knows who is wrong, and both are named.
    `integrity.ReplicaCheck` compares all of the state, while the job runs, by a collective.
    """
    for records in steps:
        ranks = [record.rank for record in records]
        names = set.intersection(*(set(record.checksums) for record in records))
        suspects = [suspects_of([record.checksums[name] for record in records], ranks)[0] for name in names]
        odd = Counter(rank for found in suspects for rank in found)
        if odd:
            return [_found(rank, odd[rank], len(names), records[0].step) for rank in sorted(odd)]
    return []


def _found(rank: int, odd: int, count: int, step: int) -> Finding:
    evidence = f"{odd} of {count} parameters differ from those of most ranks, from step {step} on"
    return Finding("flipped_bit" if odd == 1 and count > 1 else "desynchronised_replica", rank, evidence)
