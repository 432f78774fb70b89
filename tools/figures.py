"""Draw the figures that stand outside any notebook: chapters/figures/mappings.svg, for the README and the map.

Usage: python tools/figures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from minilib.book import plot

TARGET = Path(__file__).resolve().parents[1] / "chapters" / "figures" / "mappings.svg"

# (title, labels of the left boxes, label of the thing between, labels of the right boxes) for each world
SHARDING = (
    ("Sharding", ["rows 0–9", "rows 10–19", "rows 20–29"], "range of keys", ["shard 0", "shard 1", "shard 2"]),
    (
        "Data parallelism",
        ["samples 0–9", "samples 10–19", "samples 20–29"],
        "range of samples",
        ["GPU 0", "GPU 1", "GPU 2"],
    ),
)
BALANCING = (
    ("Load balancer", ["request a", "request b", "request c"], "proxy", ["backend 0", "backend 1", "backend 2"]),
    ("MoE router", ["token a", "token b", "token c"], "router", ["expert 0", "expert 1", "expert 2"]),
)
PAGING = (
    ("OS paging", ["page 0", "page 1", "page 2"], "page table", ["frame 7", "frame 2", "frame 5"]),
    ("Paged KV cache", ["block 0", "block 1", "block 2"], "block table", ["HBM slot 7", "HBM slot 2", "HBM slot 5"]),
)
STRAIGHT, CROSSED, UNEVEN = [(0, 0), (1, 1), (2, 2)], [(0, 2), (1, 0), (2, 1)], [(0, 1), (1, 0), (2, 1)]


def draw() -> None:
    """Three mechanisms in two vocabularies: the drawings in a column differ in nothing but their labels."""
    with plot.style(), matplotlib.rc_context({"svg.hashsalt": "infra-rephrased", "svg.fonttype": "path"}):
        figure, grid = plt.subplots(2, 3, figsize=(11.6, 5.2))
        figure.get_layout_engine().set(wspace=0.07, hspace=0.08)
        for column, (worlds, links) in enumerate(((SHARDING, STRAIGHT), (BALANCING, UNEVEN), (PAGING, CROSSED))):
            for row, (world, color) in enumerate(zip(worlds, (plot.CLASSIC, plot.AI), strict=True)):
                _mechanism(grid[row, column], *world, links, color)
        figure.text(-0.012, 0.76, "what you know", rotation=90, va="center", color=plot.CLASSIC, weight="bold", size=12)
        figure.text(-0.012, 0.26, "what AI calls it", rotation=90, va="center", color=plot.AI, weight="bold", size=12)
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(TARGET, metadata={"Date": None})
        plt.close(figure)


def _mechanism(ax, title: str, left: list[str], middle: str, right: list[str], links, color: str) -> None:
    ax.set(xlim=(0, 10), ylim=(-0.2, 6.4))
    ax.axis("off")
    ax.set_title(title, color=color, loc="center", fontsize=13)
    ys = (4.9, 2.9, 0.9)
    for y, label in zip(ys, left, strict=True):
        _box(ax, 0.1, y, 2.9, label, color, filled=False)
    for y, label in zip(ys, right, strict=True):
        _box(ax, 7.0, y, 2.9, label, color, filled=True)
    for source, target in links:
        ax.annotate(
            "", (6.9, ys[target]), (3.1, ys[source]), arrowprops={"arrowstyle": "-|>", "color": plot.QUIET, "lw": 1.3}
        )
    ax.text(5, 6.1, middle, ha="center", va="center", fontsize=10, style="italic", color=plot.INK)


def _box(ax, x: float, y: float, width: float, label: str, color: str, *, filled: bool) -> None:
    face = color if filled else plot.CARD
    ink = plot.CARD if filled else color
    box = FancyBboxPatch(
        (x, y - 0.62), width, 1.24, boxstyle="round,pad=0,rounding_size=0.25", fc=face, ec=color, lw=1.6
    )
    ax.add_patch(box)
    ax.text(x + width / 2, y, label, ha="center", va="center", color=ink, fontsize=9)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw()
