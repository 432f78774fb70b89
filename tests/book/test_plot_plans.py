import pytest
from matplotlib.patches import Rectangle

from minilib.book import plot
from minilib.book.plot_plans import draw, draw_messages
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


def test_columns_are_numbered_as_the_chunks_are():
    panel = draw(plans.ring("all_reduce", 3), "A finding").axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["chunk 0", "1", "2"]


@pytest.mark.parametrize("plan", [plans.ring("all_reduce", 4), plans.tree("broadcast", 5), plans.halving_doubling(8)])
def test_an_arrow_a_message_labelled_with_its_chunks(plan):
    ax = draw_messages(plan, "A finding")
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    sent = [(number, t) for number, transfers in enumerate(plan.rounds) for t in transfers]
    assert ax.get_title(loc="left") == "A finding"
    for arrow, (number, t) in zip(arrows, sent, strict=True):
        assert (int(arrow.xyann[0]), arrow.xyann[1], arrow.xy[1]) == (number, t.src, t.dst)
        assert arrow.arrow_patch.get_linestyle() == ("-" if t.reduce else "--")
    labels = [text.get_text() for text in ax.texts if getattr(text, "arrow_patch", None) is None]
    named = {1: "{0}", 2: "{0},{1}", 4: "{0}–{1}"}
    assert labels == [named[t.count].format(t.chunks[0], t.chunks[-1]) for _, t in sent]


def test_no_message_is_an_empty_diagram():
    assert not draw_messages(plans.ring("all_reduce", 1), "A finding", key=False).texts
