"""The one house style for figures: a light card that reads the same in a light and a dark JupyterLab.

Colours are Okabe and Ito's, darkened where needed to reach a contrast of 3:1 on the card; every series also differs in
marker or line style, so that no figure depends on colour alone. Titles state the finding.
"""

from __future__ import annotations

from contextlib import contextmanager

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from minilib.format import si
from minilib.machine import Machine

CARD = "#fbfaf7"
INK = "#22272e"
QUIET = "#6b7280"
RULE = "#d9d6cf"
CLASSIC = "#0072b2"  # everything an infrastructure engineer already knows
AI = "#b8470f"  # its counterpart
SERIES = (CLASSIC, AI, "#00735a", "#a8447f", "#8a6d00", "#4a4a4a")
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE = {
    "figure.facecolor": CARD,
    "savefig.facecolor": CARD,
    "axes.facecolor": CARD,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": RULE,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": mpl.cycler(color=SERIES),
}


@contextmanager
def style():
    """Use the house style inside a ``with`` block, and nowhere else."""
    with mpl.rc_context(STYLE):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # a backend that started inside has turned this on, and rc_context turned it off


def axes(title: str, width: float = 8.0, height: float = 4.0, ax=None):
    """Axes in the house style with a title that states the finding; returns them.

    Args:
        title: the finding, in a sentence.
        width: inches.
        height: inches.
        ax: draw on these axes instead of making a figure.
    """
    with style():
        if ax is None:
            _, ax = plt.subplots(figsize=(width, height))
        ax.set_title(title)
        return ax


def roofline(machine: Machine, dtype: str = "fp32", ax=None, title: str | None = None):
    """The two ceilings of a machine: memory bandwidth on the left of the ridge, arithmetic on its right.

    Args:
        machine: whose ceilings.
        dtype: which arithmetic ceiling.
        ax: draw on these axes instead of making a figure.
        title: the finding; by default where the ridge lies.

    Returns:
        The matplotlib axes: x is FLOPs per byte, y is FLOP/s.
    """
    ridge = machine.ridge(dtype)
    ax = axes(title or f"Below {ridge:.0f} FLOPs per byte, memory sets the pace", width=9.5, ax=ax)
    intensity = np.logspace(-2, 4, 200)
    ceiling = np.minimum(intensity * machine.memory_bandwidth, machine.peak(dtype))
    ax.loglog(intensity, ceiling, color=INK, linewidth=2.2)
    ax.axvline(ridge, color=QUIET, linewidth=1, linestyle=":")
    ax.fill_between(intensity, ceiling, 1e3, where=intensity <= ridge, color=CLASSIC, alpha=0.06, linewidth=0)
    ax.fill_between(intensity, ceiling, 1e3, where=intensity >= ridge, color=AI, alpha=0.06, linewidth=0)
    ax.set_ylim(machine.peak(dtype) / 1e6, machine.peak(dtype) * 3)
    ax.set_xlim(intensity[0], intensity[-1])
    ax.text(
        0.012, machine.peak(dtype) * 1.25, f"{machine.title}: {si(machine.peak(dtype), 'FLOP/s')} {dtype}", fontsize=9
    )
    ax.text(0.012, 0.02 * machine.memory_bandwidth, f"{si(machine.memory_bandwidth, 'B/s')}", fontsize=9, rotation=27)
    ax.set_xlabel("arithmetic intensity, FLOPs per byte moved")
    ax.set_ylabel("FLOP/s")
    return ax


def mark(ax, operations: list[tuple[str, float, float]], expected: list[float] | None = None):
    """Number operations on a roofline and list their names beside it.

    Args:
        ax: from `roofline`.
        operations: (name, FLOPs per byte, FLOP/s reached).
        expected: FLOP/s predicted for each; a line leads from it to what was reached.
    """
    places: list[tuple[float, float, list[int]]] = []  # operations too close to tell apart share one label
    for number, (name, intensity, rate) in enumerate(operations, 1):
        if expected is not None:
            ax.plot([intensity] * 2, [expected[number - 1], rate], color=QUIET, linewidth=1)
            ax.plot([intensity], [expected[number - 1]], marker="_", color=CLASSIC, markersize=11)
        ax.plot([intensity], [rate], marker="o", color=AI, markersize=5, linestyle="none", label=f"{number}  {name}")
        near = [place for place in places if _close(place[0], intensity) and _close(place[1], rate)]
        if near:
            near[0][2].append(number)
        else:
            places.append((intensity, rate, [number]))
    for x, y, numbers in places:
        below = any(_close(x, other, 0.3) and other_y > y for other, other_y, _ in places)
        text = ", ".join(map(str, numbers))
        place = (10 + 8 * below, -12 - 9 * below)
        line = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.6}
        ax.annotate(text, (x, y), xytext=place, textcoords="offset points", fontsize=9, color=INK, arrowprops=line)
    if expected is not None:
        ax.plot([], [], marker="_", color=CLASSIC, markersize=11, linestyle="none", label="–  predicted")
    with style():
        ax.legend(
            handlelength=0, handletextpad=0, markerscale=0, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9
        )


def block_map(owners: list[list[int]], names: list[str], title: str, ax=None, height: float = 3.2):
    """Who owns which frame: a row for every moment, a column for every frame.

    Args:
        owners: per moment, per frame: index into `names`, or −1 for a free frame.
        names: of the owners; at most as many as there are series colours.
        title: the finding.
        ax: draw on these axes instead of making a figure.
        height: inches.
    """
    grid = np.array(owners)
    ax = axes(title, width=9.0, height=height, ax=ax)
    colors = mpl.colors.ListedColormap([CARD, *SERIES[: len(names)]])
    ax.pcolormesh(grid, cmap=colors, vmin=-1.5, vmax=len(names) - 0.5, edgecolors=RULE, linewidth=0.4)
    if grid.size <= 400:  # letters, so that nobody has to tell colours apart
        for (row, column), owner in np.ndenumerate(grid):
            if owner >= 0:
                place = (column + 0.5, row + 0.5)
                ax.annotate(names[owner][:1], place, ha="center", va="center", color=CARD, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("frame")
    ax.set_ylabel("moment")
    with style():
        keys = [mpl.patches.Patch(color=SERIES[k], label=name) for k, name in enumerate(names)]
        ax.legend(handles=keys, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax


def ladder(rungs: list[tuple[str, float, str]], title: str, ax=None, unit: str = "s"):
    """Named quantities on one logarithmic axis, one row each, in the colour of their world.

    Args:
        rungs: (name, value, colour) from top to bottom; a value of None leaves a gap marked "not measured here".
        title: the finding.
        ax: draw on these axes instead of making a figure.
        unit: of the values.
    """
    ax = axes(title, height=0.9 + 0.29 * len(rungs), ax=ax)
    for row, (_, value, color) in enumerate(rungs):
        if value is None:
            continue
        ax.plot([value], [row], marker="o" if color == CLASSIC else "s", color=color, markersize=7)
        ax.annotate(si(value, unit), (value, row), textcoords="offset points", xytext=(9, -3.5), fontsize=9)
        ax.axhline(row, color=RULE, linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    ax.set_yticks(range(len(rungs)), [name for name, _, _ in rungs])
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("seconds" if unit == "s" else unit)
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * 12)  # room for the figure written right of the last marker
    return ax


def _close(one: float, other: float, decades: float = 0.12) -> bool:
    return bool(abs(np.log10(one / other)) < decades)
