"""The one house style for figures: a light card that reads the same in a light and a dark JupyterLab.

Colours are Okabe and Ito's, darkened where needed to reach a contrast of 3:1 on the card; every series also differs in
marker or line style, so that no figure depends on colour alone. Titles state the finding.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from minilib.book.alt_text import describe_figures
from minilib.mechanisms.basics.format import si

CARD = "#fbfaf7"
INK = "#22272e"
QUIET = "#6b7280"
RULE = "#d9d6cf"
CLASSIC = "#0072b2"  # everything an infrastructure engineer already knows
AI = "#b8470f"  # its counterpart
SERIES = (CLASSIC, AI, "#00735a", "#a8447f", "#8a6d00", "#4a4a4a")
MARKERS = ("o", "s", "^", "D", "v", "P")
FEW_CELLS = 400  # of a block map: up to here each has room for a letter

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
        describe_figures()
        return ax


def block_map(owners: list[list[int]], names: list[str], title: str, ax=None, height: float = 3.2):
    """Who owns which frame: a row for every moment, a column for every frame.

    Cells carry a letter of their owner's name, the first or, where several names begin alike, the last, so that nobody
    has to tell colours apart. Moment m and frame f lie around the ticks m and f.

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
    x, y = (np.arange(count + 1) - 0.5 for count in grid.shape[::-1])
    lines = {"edgecolors": RULE if grid.size <= FEW_CELLS else "none", "linewidth": 0.4}
    ax.pcolormesh(x, y, grid, cmap=colors, vmin=-1.5, vmax=len(names) - 0.5, **lines)
    if grid.size > FEW_CELLS:  # lines between many low rows would hide their colours
        ax.vlines(x, y[0], y[-1], color=RULE, linewidth=0.4)
    letters = [name[:1] for name in names]
    if len(set(letters)) < len(letters):
        letters = [name[-1:] for name in names]
    for row, column, owner in _lettered(grid):
        ax.annotate(letters[owner], (column, row), ha="center", va="center", color=CARD, fontsize=8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    ax.invert_yaxis()
    ax.set_xlabel("frame")
    ax.set_ylabel("moment")
    with style():
        keys = [mpl.patches.Patch(color=SERIES[k], label=name) for k, name in enumerate(names)]
        ax.legend(handles=keys, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax


def _lettered(grid: np.ndarray) -> list[tuple[float, int, int]]:
    """(row, column, owner) of each letter: in every cell or, of many cells, once in each tall run of one owner."""
    if grid.size <= FEW_CELLS:
        return [(row, column, owner) for (row, column), owner in np.ndenumerate(grid) if owner >= 0]
    places = []
    for column, owners in enumerate(grid.T):
        edges = [0, *(np.flatnonzero(np.diff(owners)) + 1), len(owners)]
        for first, stop in pairwise(edges):
            if owners[first] >= 0 and stop - first >= len(owners) / 15:
                places.append(((first + stop - 1) / 2, column, owners[first]))
    return places


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
        paper = {"facecolor": CARD, "edgecolor": "none", "pad": 1}  # the rule would strike the text through
        place = {"xytext": (9, -3.5), "textcoords": "offset points"}
        ax.annotate(si(value, unit), (value, row), **place, fontsize=9, color=INK, bbox=paper)
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
