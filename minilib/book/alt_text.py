"""Alt text of figures: what somebody is told who cannot see the picture.

It is put together from what a figure says in words: its titles, what is along the axes, and what is drawn. Jupyter
keeps it with the picture, as metadata "alt" of image/png, from which nbconvert's template "classic" makes the alt
attribute. (Its template "lab" leaves it out, up to 7.17 at least; see findings/.)
"""

from __future__ import annotations

import sys
from functools import partial

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure


def alt_text(figure: Figure) -> str:
    """Titles, axes and keys of a figure in sentences."""
    heading = [figure.get_suptitle()] if figure.get_suptitle() else []
    return " ".join(_sentence(part) for part in [*heading, *map(_panel, figure.axes)] if part)


def describe_figures() -> None:
    """Let Jupyter keep alt text with the picture of every figure; without Jupyter nothing happens."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    formatter = shell.display_formatter.formatters["image/png"]
    try:
        known = formatter.lookup_by_type(Figure)
    except KeyError:  # figures are not shown as pictures
        return
    if getattr(known, "func", None) is not _described:
        formatter.for_type(Figure, partial(_described, known))


def _described(known, figure: Figure):
    """The picture as before, and metadata with it."""
    found = known(figure)
    if found is None:
        return None
    data, metadata = found if isinstance(found, tuple) else (found, {})
    return data, metadata | {"alt": alt_text(figure)}


def _panel(ax: Axes) -> str:
    legend = ax.get_legend()
    keys = [text.get_text() for text in legend.get_texts()] if legend is not None else []
    along = [f"{name}: {words}" for name, axis in (("across", ax.xaxis), ("up", ax.yaxis)) if (words := _along(axis))]
    return "; ".join(filter(None, [_title(ax), *along, f"drawn: {', '.join(keys)}" if keys else ""]))


def _title(ax: Axes) -> str:
    return next((title for place in ("left", "center", "right") if (title := ax.get_title(loc=place))), "")


def _along(axis: Axis) -> str:
    """The label, or what is written at the ticks where they are words."""
    if label := axis.get_label_text():
        return label
    written = [tick.get_text() for tick in axis.get_ticklabels()]
    return ", ".join(text for text in written if any(map(str.isalpha, text)))


def _sentence(words: str) -> str:
    words = " ".join(words.split())
    return words if words.endswith((".", "?", "!")) else f"{words}."
