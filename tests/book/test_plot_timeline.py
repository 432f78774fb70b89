import matplotlib as mpl
from matplotlib.patches import Rectangle

from minilib.book import plot
from minilib.book.plot_timeline import draw_timeline
from minilib.mechanisms.pipelining import flow, timeline_of
from minilib.parallel.pipeline import SCHEDULES, StageTimes, price_schedule


def boxes(ax):
    return [(*box.get_xy(), box.get_width(), mpl.colors.to_hex(box.get_facecolor())) for box in ax.patches
            if isinstance(box, Rectangle)]  # fmt: skip


def test_a_box_an_operation_and_a_colour_a_kind():
    timeline = price_schedule(SCHEDULES["zero-bubble"](2, 3), StageTimes(1, 2, 3)).timeline
    names = ["rank 0", "rank 1"]
    ax = draw_timeline(timeline, "A finding", names, lambda key: key.kind, lambda key: str(key.microbatch))
    expected = [(span.start, span.worker - 0.42, span.end - span.start, plot.SERIES["FIW".index(span.key.kind)])
                for span in timeline]  # fmt: skip
    assert boxes(ax) == expected
    assert [text.get_text() for text in ax.texts] == [str(span.key.microbatch) for span in timeline]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["F", "I", "W"]
    assert [text.get_text() for text in ax.get_yticklabels()] == names
    assert ax.get_title(loc="left") == "A finding"


def test_nothing_to_draw():
    ax = draw_timeline(timeline_of(flow(0, 2), lambda key: 1), "Nothing", ["a", "b"], str)
    assert boxes(ax) == []
