"""The roofline is drawn where the machine's figures put it, and operations lie where their price does."""

import pytest

from minilib.book import roofline
from minilib.numbers.machine import Machine
from minilib.numbers.price import Cost, price


def test_a_roofline_has_its_ridge_where_the_ceilings_meet():
    machine = Machine.datasheet("h100-sxm")
    ax = roofline.ceilings(machine, "bf16")
    intensity, ceiling = ax.lines[0].get_data()
    assert max(ceiling) == machine.peak("bf16")
    assert ceiling[0] == pytest.approx(intensity[0] * machine.memory_bandwidth)
    assert ax.lines[1].get_xdata()[0] == machine.ridge("bf16")


def test_marks_are_numbered_and_named_beside_the_figure():
    ax = roofline.ceilings(Machine.datasheet("h100-sxm"), "bf16")
    roofline.mark(ax, [("sum", 0.25, 1e11), ("matmul", 1000, 5e14)], expected=[2e11, 9e14])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1  sum", "2  matmul", "–  predicted"]
    assert {text.get_text() for text in ax.texts} >= {"1", "2"}


def test_marks_that_lie_on_each_other_share_a_label():
    ax = roofline.ceilings(Machine.datasheet("h100-sxm"), "bf16")
    roofline.mark(ax, [("sum", 0.25, 1e11), ("dot", 0.26, 1.1e11), ("matmul", 1000, 5e14)])
    assert {text.get_text() for text in ax.texts} >= {"1, 2", "3"}


def test_a_prediction_is_marked_where_it_has_a_place():
    machine = Machine.datasheet("h100-sxm")
    prediction = price(Cost(flops=1e12, bytes=1e10, dtype="bf16"), machine)
    marked = roofline.place(prediction).lines[-1]
    assert (marked.get_xdata()[0], marked.get_ydata()[0]) == (100.0, 1e12 / prediction.seconds)
    with pytest.raises(ValueError, match="place on a roofline"):
        roofline.place(price(Cost(bytes=10), machine))
    with pytest.raises(ValueError, match="place on a roofline"):
        roofline.place(prediction + prediction)


def test_the_ridge_ends_at_the_ceiling_and_leaves_the_title_of_the_machine_alone():
    machine = Machine.datasheet("h100-sxm")
    ax = roofline.ceilings(machine, "bf16")
    assert max(ax.lines[1].get_ydata()) == machine.peak("bf16")


def test_of_two_neighbours_on_the_ceiling_one_is_labelled_on_each_side():
    ax = roofline.ceilings(Machine.datasheet("h100-sxm"), "bf16")
    roofline.mark(ax, [("prefill", 512, 9e14), ("matmul", 341, 9e14)])
    place = {text.get_text(): text.xyann for text in ax.texts if text.get_text() in ("1", "2")}
    assert place["2"][0] < 0 < place["1"][0]
