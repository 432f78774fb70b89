"""How much of an NVLink domain jobs can use that come in segments: whole trays that must lie in one domain.

Slurm's block topology asks for a segment size. Large segments keep more ranks together, and strand what does not
divide: of 18 trays, 2 beside a segment of 16, and after one failure 8 beside one of 9.

Source: Slurm, "Topology Guide", topology/block, https://slurm.schedmd.com/topology.html.
"""

from __future__ import annotations

from math import comb

from minilib.mechanisms.basics.checks import check_quantity, check_whole

TRAYS = 18  # of an NVL72, four GPUs each


def usable_trays(segment: int, failed: int = 0, trays: int = TRAYS) -> int:
    """Trays of a domain that whole segments take, if some have failed.

    Raises:
        ValueError: if there are no such numbers of trays.
    """
    check_whole("segment", segment, 1)
    check_whole("trays", trays, 1)
    check_whole("failed", failed)
    if failed > trays:
        raise ValueError(f"of {trays} trays at most {trays} fail, got {failed}")
    return (trays - failed) // segment * segment


def usable_share(segment: int, failing: float, trays: int = TRAYS) -> float:
    """Expected share of healthy trays that whole segments take, if each tray has failed by itself with a probability.

    Args:
        segment: trays that lie in one domain together.
        failing: probability that a tray is out of use.
        trays: of a domain.

    Raises:
        ValueError: if it is no probability below 1, or there are no such trays.
    """
    check_quantity("failing", failing)
    if failing >= 1:
        raise ValueError(f"failing is a probability below 1, got {failing!r}")
    chances = [comb(trays, k) * failing**k * (1 - failing) ** (trays - k) for k in range(trays + 1)]
    taken = sum(chance * usable_trays(segment, k, trays) for k, chance in enumerate(chances))
    return taken / (trays * (1 - failing))
