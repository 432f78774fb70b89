"""What a chapter needs beyond its subject: library source on the page, and controls for a reader who is there."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from minilib.numbers.neighbours import BUSY

TOO_BUSY = "too busy to judge"  # how the output begins that makes tools/busy_cells.py report a cell as skipped


class Watched(Protocol):
    """A measurement, comparison, machine or watch, each of which knows how busy others kept the cores meanwhile."""

    busy: float | None


def show(obj: object):
    """Display the source of a function, class or module under a link to its file.

    Args:
        obj: anything that `inspect.getsource` can read, or a Triton kernel.

    Returns:
        Markdown that JupyterLab renders with highlighting; the link opens the file in JupyterLab.

    Raises:
        TypeError: if the object has no Python source, such as a built-in.
    """
    from IPython.display import Markdown

    obj = getattr(obj, "fn", obj)  # a kernel wraps its function
    source = inspect.cleandoc("\n" + inspect.getsource(obj))
    path = Path(inspect.getsourcefile(obj))
    link = Path(os.path.relpath(path)).as_posix()
    name = getattr(obj, "__qualname__", path.stem)
    return Markdown(f"**`{name}`** in [{path.parent.name}/{path.name}]({link})\n\n```python\n{source}\n```")


def too_busy(*watched: Watched) -> bool:
    """True, and said below the cell, if others were at work while something was measured: its clocks tell nothing then.

    For what a clock decides, and nothing else: ``assert fused.ratio > 1.3 or too_busy(fused)``. The claim holds, fails,
    or is left open, in which case a test of the notebook is reported as skipped.

    Args:
        watched: what the claim rests on.
    """
    busy = max(one.busy or 0.0 for one in watched)
    if busy <= BUSY:
        return False
    from IPython.display import display

    said = f"{TOO_BUSY}: others took {busy:.0%} of the cores while this was measured; run it again when they are done"
    display({"text/plain": said}, raw=True)
    return True


def controls(fn: Callable, **ranges):
    """Call `fn` with plain values, and again whenever a reader moves a slider.

    A notebook that runs by itself (CI, `make chapters`) has nobody to move anything: there `fn` runs once, with the
    first value of each range, and what it returns is displayed.

    Args:
        fn: called with one keyword argument per range; returns something to display.
        ranges: name=(value, low, high, step), or name=(value, [choices]).
    """
    values = {name: spec[0] for name, spec in ranges.items()}
    if not someone_is_there():
        return fn(**values)
    import ipywidgets
    from IPython.display import display

    def shown(**chosen) -> None:
        display(fn(**chosen))

    return ipywidgets.interactive(shown, **{name: _widget(ipywidgets, name, spec) for name, spec in ranges.items()})


def someone_is_there() -> bool:
    """True in a kernel that a Jupyter server started for a person; False under nbval, nbclient and plain Python."""
    return "JPY_SESSION_NAME" in os.environ


def _widget(ipywidgets, name: str, spec: tuple):
    looks = {"description": name.replace("_", " "), "style": {"description_width": "14em"}}
    if len(spec) == 2:
        value, choices = spec
        return ipywidgets.Dropdown(value=value, options=choices, **looks)
    value, low, high, step = spec
    slider = ipywidgets.FloatSlider if any(isinstance(x, float) for x in spec) else ipywidgets.IntSlider
    return slider(value=value, min=low, max=high, step=step, continuous_update=False, **looks)
