"""Draw a plan: who holds how much of every chunk, round by round, and what travels."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

from minilib.book import plot
from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.replication import Plan, simulate


def draw(plan: Plan, title: str, columns: int = 4):
    """A panel a round: ranks as rows, chunks as columns, and whose contributions a chunk holds.

    A chunk that holds all it should is filled; an arrow is a transfer of the round to come, dashed where it copies.

    Args:
        plan: what to draw; readable up to about 8 ranks and 8 chunks.
        title: the finding.
        columns: panels side by side.

    Returns:
        The matplotlib figure.
    """
    moments: list[list[dict[int, frozenset[int]]]] = []
    simulate(plan, lambda number, state: moments.append([dict(holds) for holds in state]))
    rows = ceil_div(len(moments), columns)
    with plot.style():
        size = (0.9 + 2.3 * columns, 0.5 + rows * (0.75 + 0.34 * plan.world_size))
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for number, ax in enumerate(grid.flat):
            ax.set_axis_off()
            if number < len(moments):
                _panel(ax, plan, number, moments[number])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def _panel(ax, plan: Plan, number: int, state: list[dict[int, frozenset[int]]]) -> None:
    halo = withStroke(linewidth=2.8, foreground=plot.CARD)
    done = "after the last round" if number == len(plan.rounds) else f"before round {number + 1}"
    ax.set_title(done, fontsize=9, fontweight="normal")
    for rank, holds in enumerate(state):
        wanted = plan.promises(rank)
        for chunk in range(plan.num_chunks):
            ranks = holds.get(chunk, frozenset())
            complete = chunk in wanted and ranks == wanted[chunk]
            color = plot.AI if complete else (plot.RULE if ranks else plot.CARD)
            ax.add_patch(mpl.patches.Rectangle((chunk, rank), 1, 1, facecolor=color, edgecolor=plot.CARD, linewidth=2))
            ink = plot.CARD if complete else plot.INK
            text = "all" if len(ranks) == plan.world_size > 1 else "+".join(map(str, sorted(ranks)))
            ax.text(chunk + 0.4, rank + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
    for t in plan.rounds[number] if number < len(plan.rounds) else ():
        place = t.chunk + t.count - 0.12
        bend = 0.25 / max(1, abs(t.dst - t.src))  # a long arrow stays in its chunk, too
        ax.annotate(
            "", (place, t.dst + 0.5), (place, t.src + 0.5),
            arrowprops={"arrowstyle": "-|>", "color": plot.INK, "linewidth": 1.2, "shrinkA": 2, "shrinkB": 2,
                        "linestyle": "-" if t.reduce else "--", "connectionstyle": f"arc3,rad={bend}",
                        "mutation_scale": 8, "path_effects": [halo]},
        )  # fmt: skip
    ax.set_xlim(0, 1.08 * plan.num_chunks)
    ax.set_ylim(plan.world_size, 0)
    ax.set_axis_on()
    ax.set_yticks([rank + 0.5 for rank in range(plan.world_size)], [f"rank {rank}" for rank in range(plan.world_size)])
    ax.set_xticks([])
    ax.tick_params(length=0, labelsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)
