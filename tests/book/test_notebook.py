from dataclasses import replace
from types import SimpleNamespace

import pytest

from minilib.book import notebook
from minilib.numbers import price
from minilib.numbers.machine import Machine
from minilib.numbers.measure import Comparison, Measurement
from minilib.numbers.neighbours import Watch


def test_show_gives_source_and_a_link_that_leads_to_it(tmp_path, monkeypatch):
    shown = notebook.show(price.price).data
    assert "def price(cost: Cost" in shown
    link = shown.split("](")[1].split(")")[0]
    assert link.endswith("price.py")


def test_show_dedents_a_method():
    assert "\ndef intensity" in notebook.show(price.Cost.intensity.fget).data.replace("@property\n", "")


def test_a_builtin_has_no_source():
    with pytest.raises(TypeError):
        notebook.show(len)


def test_controls_call_once_with_plain_values_when_nobody_is_there(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert notebook.controls(lambda a, b: (a, b), a=(1, 0, 9, 1), b=("x", ["x", "y"])) == (1, "x")


def test_controls_are_widgets_for_a_reader_and_show_what_comes_out(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setenv("JPY_SESSION_NAME", "chapters/01_numbers.ipynb")
    ranges = {"a": (1, 0, 9, 1), "b": ("x", ["x", "y"]), "c_d": (0.5, 0.0, 1.0, 0.1)}
    box = notebook.controls(lambda a, b, c_d: (a, b, c_d), **ranges)
    assert [type(child).__name__ for child in box.children[:3]] == ["IntSlider", "Dropdown", "FloatSlider"]
    assert [child.description for child in box.children[:3]] == ["a", "b", "c d"]
    box.children[0].value = 4
    assert shown[-1] == (4, "x", 0.5)


@pytest.mark.parametrize(
    ("shares", "busy"), [((0.0,), False), ((0.1, None), False), ((0.0, 0.11), True), ((1.0,), True)]
)
def test_a_clock_is_doubted_only_if_others_were_at_work(shares, busy, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle["text/plain"]))
    assert notebook.too_busy(*(SimpleNamespace(busy=share) for share in shares)) is busy
    assert [text.startswith(notebook.TOO_BUSY) for text in shown] == [True] * busy


def test_all_that_measures_knows_how_busy_it_was():
    one = Measurement((1.0,), busy=0.4)
    assert notebook.too_busy(one)
    assert notebook.too_busy(Comparison((1.0,), Measurement((1.0,)), one))
    assert notebook.too_busy(replace(Machine.datasheet("h100-sxm"), busy=0.4))
    assert not notebook.too_busy(Machine.datasheet("h100-sxm"))  # nobody watched
    assert notebook.too_busy(Watch()) in (False, True)
