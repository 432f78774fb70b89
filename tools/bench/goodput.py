"""Measure what failures cost: runs that are killed on a schedule, their goodput predicted first; and killed saves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from minilib.operations.checkpoint.crashes.kills import kill_saves
from minilib.operations.goodput.drill import DrillPlan, carry_out, rehearse

SEEDS = range(10)
MODES = ((1, False), (1, True), (2, False), (2, True))  # ranks, and whether the steps wait for the save


def goodput(seeds: range = SEEDS, kills: int = 100) -> dict:
    """Everything.

    Args:
        seeds: of the drills, each with a trial before it.
        kills: of ranks amid saves, in each mode.

    Returns:
        "drills": predicted and counted goodput of each; "kills": what was lost or torn in each mode.
    """
    return {
        "drills": [drill(seed) for seed in tqdm(seeds, desc="drills", leave=False)],
        "kills": [killed(*mode, kills) for mode in tqdm(MODES, desc="kills", leave=False)],
    }


def drill(seed: int) -> dict:
    """One run that is killed six times, and the prediction that was made before."""
    plan = DrillPlan(kills=6, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trial = rehearse(plan, Path(folder) / "trial")
        predicted = trial.predicted(plan)
        timeline = carry_out(plan, Path(folder) / "drill", trial)
    timeline.check_invariants()
    counts = {"executed": timeline.executed, "lost": timeline.lost, "kills": len(timeline.kills)}
    found = {"predicted": predicted, "counted": timeline.counted, "by_clock": timeline.by_clock}
    return {"seed": seed, "trial": asdict(trial), **counts, **found}


def killed(world_size: int, wait: bool, kills: int) -> dict:
    """Saves amid which a rank is killed, again and again."""
    with tempfile.TemporaryDirectory() as folder:
        return {"ranks": world_size, "wait": wait, **asdict(kill_saves(Path(folder), kills, world_size, wait))}


def lines(found: dict) -> Iterator[str]:
    """What was found, a line each."""
    for row in found["drills"]:
        yield (f"drill {row['seed']}: {row['lost']} of {row['executed']} steps lost, predicted {row['predicted']:.3f}, "
               f"counted {row['counted']:.3f}, ratio {row['predicted'] / row['counted']:.2f}")  # fmt: skip
    for row in found["kills"]:
        yield (f"{row['kills']} kills, {row['ranks']} ranks, {'waited for' if row['wait'] else 'behind the steps'}: "
               f"{row['acknowledged']} acknowledged, {row['lost']} lost, {row['torn']} torn")  # fmt: skip
