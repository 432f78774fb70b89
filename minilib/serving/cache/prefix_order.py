"""Cache-aware order of the queue: whoever has the longest kept prefix is let in first, before its pages leave.

Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, section 3
(longest shared prefix first). There a request may starve; here each is overtaken a bounded number of times.
"""

from __future__ import annotations

from minilib.serving.cache.prefix import PrefixCache
from minilib.serving.sequence import Sequence, Status

LOOKED_AT = 32  # of the queue: to look tokens up takes time, too


def longest_prefix_first(waiting: list[Sequence], prefix: PrefixCache, most_overtakes: int) -> Sequence:
    """Who of a queue is let in next. A sequence that was swapped out has all that it computed.

    Args:
        waiting: in the order in which they came; at least one.
        prefix: what is kept.
        most_overtakes: how often a sequence may be let in before one that came earlier; 0 is first come, first served.

    Returns:
        The one for which most tokens are kept, the earliest of several, among those that overtake nobody who was
        overtaken so often already. So one at place p is let in after at most p + most_overtakes others.

    Cost: the tokens of up to LOOKED_AT sequences are looked up.
    """
    allowed = []
    for sequence in waiting[:LOOKED_AT]:
        allowed.append(sequence)
        if sequence.num_overtaken >= most_overtakes:
            break
    if len(allowed) == 1:
        return allowed[0]

    def kept(sequence: Sequence) -> int:
        swapped = sequence.status is Status.SWAPPED
        return sequence.num_computed_tokens if swapped else prefix.num_matching(sequence)

    return max(allowed, key=kept)


def count_overtaken(waiting: list[Sequence], admitted: Sequence) -> None:
    """Note that a sequence of the queue is let in before those that came earlier."""
    for sequence in waiting[: waiting.index(admitted)]:
        sequence.num_overtaken += 1
