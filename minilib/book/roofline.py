"""The roofline: what a machine allows at each arithmetic intensity, and where operations lie under it.

Source: Williams, Waterman and Patterson, "Roofline", CACM 2009.
"""

from __future__ import annotations

import numpy as np

from minilib.book import plot
from minilib.mechanisms.basics.format import si
from minilib.numbers.machine import Machine
from minilib.numbers.price import Prediction


def ceilings(
    machine: Machine,
    dtype: str = "fp32",
    ax=None,
    title: str | None = None,
    span: tuple[float, float] = (1e-2, 1e4),
):
    """The two ceilings of a machine: memory bandwidth on the left of the ridge, arithmetic on its right.

    Args:
        machine: whose ceilings.
        dtype: which arithmetic ceiling.
        ax: draw on these axes instead of making a figure.
        title: the finding; by default where the ridge lies.
        span: the intensities that are shown.

    Returns:
        The matplotlib axes: x is FLOPs per byte, y is FLOP/s.
    """
    ridge = machine.ridge(dtype)
    ax = plot.axes(title or f"Below {ridge:.0f} FLOPs per byte, memory sets the pace", width=9.5, ax=ax)
    intensity = np.sort(np.append(np.geomspace(*span, 200), ridge))  # the two areas meet at the ridge
    ceiling = np.minimum(intensity * machine.memory_bandwidth, machine.peak(dtype))
    ax.loglog(intensity, ceiling, color=plot.INK, linewidth=2.2)
    low, high = machine.peak(dtype) / (span[1] / span[0]), machine.peak(dtype) * 3
    ax.plot([ridge, ridge], [low, machine.peak(dtype)], color=plot.QUIET, linewidth=1, linestyle=":")
    ax.fill_between(intensity, ceiling, 1e3, where=intensity <= ridge, color=plot.CLASSIC, alpha=0.06, linewidth=0)
    ax.fill_between(intensity, ceiling, 1e3, where=intensity >= ridge, color=plot.AI, alpha=0.06, linewidth=0)
    ax.set_ylim(low, high)
    ax.set_xlim(intensity[0], intensity[-1])
    words = {"fontsize": 9, "color": plot.INK}
    left, peak, bandwidth = 1.2 * span[0], machine.peak(dtype), machine.memory_bandwidth
    ax.text(left, 1.25 * peak, f"{machine.title}: {si(peak, 'FLOP/s')} {dtype}", **words)
    ax.text(left, 2 * span[0] * bandwidth, f"{si(bandwidth, 'B/s')}", rotation=27, **words)
    ax.set_xlabel("arithmetic intensity, FLOPs per byte moved")
    ax.set_ylabel("FLOP/s")
    return ax


def mark(ax, operations: list[tuple[str, float, float]], expected: list[float] | None = None):
    """Number operations on a roofline and list their names beside it.

    Args:
        ax: from `ceilings`.
        operations: (name, FLOPs per byte, FLOP/s reached).
        expected: FLOP/s predicted for each; a line leads from it to what was reached.
    """
    places: list[tuple[float, float, list[int]]] = []  # operations too close to tell apart share one label
    for number, (name, intensity, rate) in enumerate(operations, 1):
        if expected is not None:
            ax.plot([intensity] * 2, [expected[number - 1], rate], color=plot.QUIET, linewidth=1)
            ax.plot([intensity], [expected[number - 1]], marker="_", color=plot.CLASSIC, markersize=11)
        ax.plot(
            [intensity], [rate], marker="o", color=plot.AI, markersize=5, linestyle="none", label=f"{number}  {name}"
        )
        near = [place for place in places if _close(place[0], intensity) and _close(place[1], rate)]
        if near:
            near[0][2].append(number)
        else:
            places.append((intensity, rate, [number]))
    for x, y, numbers in places:
        others = [(other, other_y) for other, other_y, _ in places if (other, other_y) != (x, y)]
        left = any(other > x and _close(x, other, 0.3) and _close(y, other_y) for other, other_y in others)
        below = not left and any(_close(x, other, 0.3) and other_y > y for other, other_y in others)
        text = ", ".join(map(str, numbers))
        place = (-18, -12) if left else (10 + 8 * below, -12 - 9 * below)
        line = {"arrowstyle": "-", "color": plot.QUIET, "linewidth": 0.6}
        ax.annotate(text, (x, y), xytext=place, textcoords="offset points", fontsize=9, color=plot.INK, arrowprops=line)
    if expected is not None:
        ax.plot([], [], marker="_", color=plot.CLASSIC, markersize=11, linestyle="none", label="–  predicted")
    with plot.style():
        ax.legend(
            handlelength=0, handletextpad=0, markerscale=0, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9
        )


def place(prediction: Prediction, ax=None):
    """Mark a priced operation on its machine's roofline; returns the matplotlib axes.

    Raises:
        ValueError: for a sum of predictions, or an operation that moves no bytes: it has no place on a roofline.
    """
    cost = prediction.cost
    if cost is None or not cost.bytes or not cost.flops:
        raise ValueError("only an operation with FLOPs and bytes has a place on a roofline, not a sum of several")
    ax = ceilings(prediction.machine, cost.dtype, ax)
    mark(ax, [("predicted", cost.intensity, cost.flops / prediction.seconds)])
    return ax


def _close(one: float, other: float, decades: float = 0.12) -> bool:
    return bool(abs(np.log10(one / other)) < decades)
