"""Draw a plan: who holds how much of every chunk, round by round, or who sends what to whom."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

from minilib.book import plot
from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.replication import Plan, simulate

LABEL_AT = 0.24  # rows from the sender: in the middle the labels of an exchange would meet


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
            ax.text(chunk + 0.42, rank + 0.5, text, ha="center", va="center", fontsize=6.5, color=ink)
    for t in plan.rounds[number] if number < len(plan.rounds) else ():
        place = t.chunk + t.count - 0.09
        bend = -0.1 * (1 if t.dst > t.src else -1) / max(1, abs(t.dst - t.src))  # to the right, away from the numbers
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
    ax.xaxis.tick_top()
    ax.set_xticks([chunk + 0.5 for chunk in range(plan.num_chunks)], _chunk_names(plan.num_chunks))
    ax.tick_params(length=0, labelsize=8)
    ax.tick_params(axis="x", labelsize=7, pad=1)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _chunk_names(num_chunks: int) -> list[str]:
    return ["chunk 0", *map(str, range(1, num_chunks))]


def draw_messages(plan: Plan, title: str, ax=None, color: str = plot.INK, key: bool = True):
    """Who sends what to whom, round after round: a row a rank, an arrow a message, labelled with its chunks.

    Arrows are dashed where the receiver copies instead of adding.

    Args:
        plan: what to draw; readable up to about 8 ranks.
        title: the finding.
        ax: draw on these axes instead of making a figure.
        color: of the arrows.
        key: say in a legend what a dashed arrow means.

    Returns:
        The axes.
    """
    num_rounds = len(plan.rounds)
    ax = plot.axes(title, width=1.6 + 1.1 * num_rounds, height=1.1 + 0.5 * plan.world_size, ax=ax)
    paper = {"facecolor": plot.CARD, "edgecolor": "none", "pad": 0.8}
    ax.hlines(range(plan.world_size), 0, num_rounds, color=plot.RULE, linewidth=1, zorder=0)
    for number, transfers in enumerate(plan.rounds):
        for t in transfers:
            ax.annotate(
                "", (number + 0.92, t.dst), (number + 0.08, t.src),
                arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.2, "mutation_scale": 9,
                            "shrinkA": 0, "shrinkB": 0, "linestyle": "-" if t.reduce else "--"},
            )  # fmt: skip
            way = LABEL_AT / abs(t.dst - t.src)  # of the arrow's length
            place = (number + 0.08 + 0.84 * way, t.src + way * (t.dst - t.src))
            ax.text(*place, _numbers(t.chunks), ha="center", va="center", fontsize=8, color=color, bbox=paper, zorder=5)
    ax.set_xlim(0, max(1, num_rounds))
    ax.set_ylim(plan.world_size - 0.6, -0.4)
    ax.set_xticks([number + 0.5 for number in range(num_rounds)], range(1, num_rounds + 1))
    ax.set_yticks(range(plan.world_size), [f"rank {rank}" for rank in range(plan.world_size)])
    ax.tick_params(length=0)
    ax.set_xlabel("round")
    for spine in ax.spines.values():
        spine.set_visible(False)
    if key:
        ways = [mpl.lines.Line2D([], [], color=color, linewidth=1.2, linestyle=style) for style in ("-", "--")]
        with plot.style():
            ax.legend(ways, ["added", "copied"], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax


def _numbers(chunks: range) -> str:
    if len(chunks) > 2 and chunks.step == 1:
        return f"{chunks[0]}–{chunks[-1]}"
    return ",".join(map(str, chunks))
