"""Draw a timeline: a row for each worker, a box for each operation, as wide as it takes; gaps are bubbles."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import matplotlib as mpl

from minilib.book import plot
from minilib.mechanisms.pipelining import Timeline


def draw_timeline(
    timeline: Timeline,
    title: str,
    names: Sequence[str],
    kind: Callable[[Hashable], str],
    label: Callable[[Hashable], str] = str,
    unit: str = "ticks",
    ax=None,
):
    """Rows of boxes.

    Args:
        timeline: predicted or measured; readable up to about 40 operations a worker.
        title: the finding.
        names: of the workers, from top to bottom.
        kind: of an operation by its key, which gives the box its colour; at most as many kinds as series colours.
        label: what stands in the box of a key, such as the number of an item.
        unit: of time.
        ax: draw on these axes instead of making a figure.

    Returns:
        The axes.
    """
    kinds = list(dict.fromkeys(kind(span.key) for span in sorted(timeline, key=lambda span: span.start)))
    color = dict(zip(kinds, plot.SERIES, strict=False))
    ax = plot.axes(title, width=9.5, height=1.1 + 0.36 * len(names), ax=ax)
    for span in timeline:
        width = span.end - span.start
        box = mpl.patches.Rectangle((span.start, span.worker - 0.42), width, 0.84, facecolor=color[kind(span.key)],
                                    edgecolor=plot.CARD, linewidth=1)  # fmt: skip
        ax.add_patch(box)
        middle = (span.start + width / 2, span.worker)
        ax.annotate(label(span.key), middle, ha="center", va="center", color=plot.CARD, fontsize=7)
    ax.set_xlim(0, timeline.makespan or 1)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(unit)
    with plot.style():
        keys = [mpl.patches.Patch(color=color[each], label=each) for each in kinds]
        ax.legend(handles=keys, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return ax
