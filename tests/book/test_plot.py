import matplotlib
from matplotlib.colors import to_rgb

from minilib.book import plot


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio as WCAG 2 defines it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_series_can_be_read_on_the_card():
    assert contrast(plot.INK, plot.CARD) >= 7
    assert contrast(plot.QUIET, plot.CARD) >= 4.5
    assert all(contrast(color, plot.CARD) >= 3 for color in plot.SERIES)


def test_series_differ_in_more_than_colour():
    assert len(set(plot.MARKERS)) == len(plot.MARKERS) >= len(plot.SERIES)


def test_every_figure_is_a_card_of_its_own_and_the_style_does_not_leak():
    before = dict(matplotlib.rcParams)
    ax = plot.axes("A finding")
    assert matplotlib.colors.same_color(ax.figure.get_facecolor(), plot.CARD)
    assert ax.get_title(loc="left") == "A finding"
    assert dict(matplotlib.rcParams) == before


def test_a_ladder_shows_each_rung_and_leaves_a_gap_for_what_is_not_known():
    ax = plot.ladder([("fast", 1e-9, plot.CLASSIC), ("unknown", None, plot.AI), ("slow", 1.0, plot.AI)], "Nine decades")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fast", "unknown", "slow"]
    assert [text.get_text() for text in ax.texts] == ["1.00 ns", "1.00 s"]
