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


def lettered(ax) -> list[tuple[str, tuple[float, float]]]:
    return [(text.get_text(), tuple(map(float, text.xy))) for text in ax.texts]


def test_each_cell_of_a_small_block_map_names_its_owner():
    ax = plot.block_map([[0, 1, -1], [2, 2, 0]], ["A", "B", "shared"], "A finding")
    assert lettered(ax) == [("A", (0, 0)), ("B", (1, 0)), ("s", (0, 1)), ("s", (1, 1)), ("A", (2, 1))]


def test_names_that_begin_alike_are_told_apart_by_their_last_letter():
    ax = plot.block_map([[0, 1]], ["rank 0", "rank 1"], "A finding")
    assert [letter for letter, _ in lettered(ax)] == ["0", "1"]


def test_many_cells_of_one_owner_share_a_letter():
    tall, short = [0] * 201 + [-1] * 99, [1] * 10 + [-1] * 290
    ax = plot.block_map([list(row) for row in zip(tall, short, strict=True)], ["A", "B"], "A finding")
    assert lettered(ax) == [("A", (0, 100))]


def test_a_cell_lies_around_the_tick_that_names_it():
    ax = plot.block_map([[0, 1, -1], [1, 1, 0]], ["A", "B"], "A finding")
    assert ax.get_xlim() == (-0.5, 2.5) and ax.get_ylim() == (1.5, -0.5)
    assert all(tick == int(tick) for tick in (*ax.get_xticks(), *ax.get_yticks()))
