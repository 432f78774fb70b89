import pytest
from matplotlib.patches import Rectangle

from minilib.book import plot
from minilib.book.plot_plans import draw
from minilib.mechanisms.replication import plans


@pytest.mark.parametrize("plan", [plans.ring("all_reduce", 4), plans.tree("broadcast", 5), plans.all_to_all(2)])
def test_a_panel_a_round_and_an_arrow_a_transfer(plan):
    figure = draw(plan, "A finding")
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert len(panels) == len(plan.rounds) + 1
    arrows = [sum(text.arrow_patch is not None for text in ax.texts if hasattr(text, "arrow_patch")) for ax in panels]
    assert arrows == [len(transfers) for transfers in plan.rounds] + [0]
    assert figure.get_suptitle() == "A finding"


def test_what_a_rank_must_hold_in_the_end_is_filled():
    last = [ax for ax in draw(plans.ring("reduce_scatter", 4), "A finding").axes if ax.get_title(loc="left")][-1]
    cells = [patch for patch in last.patches if isinstance(patch, Rectangle)]
    filled = [cell.get_xy() for cell in cells if plot.mpl.colors.to_hex(cell.get_facecolor()) == plot.AI]
    assert sorted(filled) == [(rank, rank) for rank in range(4)]


def test_one_rank_has_nothing_to_do():
    assert len([ax for ax in draw(plans.ring("all_reduce", 1), "A finding").axes if ax.get_title(loc="left")]) == 1
