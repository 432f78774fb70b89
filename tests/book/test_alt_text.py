"""What a figure says to somebody who cannot see it, and that Jupyter keeps it with the picture."""

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from minilib.book import plot
from minilib.book.alt_text import alt_text, describe_figures


def test_titles_axes_and_keys_are_told():
    ax = plot.axes("Reads are cheap")
    ax.plot([1, 2], [1, 2], label="reads")
    ax.plot([1, 2], [2, 1], label="writes")
    ax.set(xlabel="bytes", ylabel="seconds,\nlogarithmic")
    ax.legend()
    expected = "Reads are cheap; across: bytes; up: seconds, logarithmic; drawn: reads, writes."
    assert alt_text(ax.figure) == expected
    plot.plt.close(ax.figure)


def test_panels_follow_each_other_and_words_at_ticks_are_read():
    with plot.style():
        figure, panels = plot.plt.subplots(1, 2)
    figure.suptitle("What happens?")
    plot.axes("pods", ax=panels[0])
    panels[0].set_yticks([0, 1], ["before", "after"])
    assert alt_text(figure) == "What happens? pods; up: before, after."
    plot.plt.close(figure)


def test_without_jupyter_nothing_happens():
    assert describe_figures() is None


def test_a_notebook_keeps_it_and_its_page_shows_it(tmp_path):
    source = "from minilib.book import plot\nax = plot.axes('Half < whole')\nax.plot([1, 2])\nax.set_xlabel('share')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in notebook.cells:
        (picture,) = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert picture.metadata["image/png"]["alt"] == "Half < whole; across: share."
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)
    assert page.count('alt="Half &lt; whole; across: share."') == 2
