"""Which replica is no copy of the others any more, from checksums that every rank records of its own parameters."""

from __future__ import annotations

from collections import Counter

from minilib.operations.diagnosis.finding import Finding
from minilib.operations.diagnosis.stragglers import Steps


def odd_replicas(steps: Steps) -> list[Finding]:
    """Ranks whose parameters differ from those of most ranks, judged at the first step at which any do.

    An update of its own changes every tensor that a rank has. A flipped bit changes one: replicas average gradients, so
    that all other tensors go on being updated alike. With two ranks nobody knows who is wrong, and both are named.
    """
    for records in steps:
        names = set.intersection(*(set(record.checksums) for record in records))
        differ = {record.rank: 0 for record in records}
        for name in names:
            sums = [record.checksums[name] for record in records]
            [(usual, votes), *_] = Counter(sums).most_common(1)
            for record, checksum in zip(records, sums, strict=True):
                differ[record.rank] += checksum != usual or 2 * votes <= len(records)
        if any(differ.values()):
            step, count = records[0].step, len(names)
            return [_found(rank, odd, count, step) for rank, odd in differ.items() if odd]
    return []


def _found(rank: int, odd: int, count: int, step: int) -> Finding:
    evidence = f"{odd} of {count} parameters differ from those of most ranks, from step {step} on"
    return Finding("flipped_bit" if odd == 1 and count > 1 else "desynchronised_replica", rank, evidence)
