import pytest

from minilib import notebook, price


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


def test_controls_are_widgets_for_a_reader(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "chapters/01_numbers.ipynb")
    box = notebook.controls(lambda a, b, c: (a, b, c), a=(1, 0, 9, 1), b=("x", ["x", "y"]), c=(0.5, 0.0, 1.0, 0.1))
    assert [type(child).__name__ for child in box.children[:3]] == ["IntSlider", "Dropdown", "FloatSlider"]
    assert box.kwargs_widgets[0].value == 1
