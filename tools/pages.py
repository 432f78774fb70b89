"""Write what is made from chapters/*.toml: the table in README.md, the paths in chapters/README.md, a figure.

Usage: python tools/pages.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minilib.book import curriculum, reading
from tools import figures

README = Path(__file__).resolve().parents[1] / "README.md"
PATHS = README.parent / "chapters" / "README.md"
BEGIN, END = "<!-- {}: made by make chapters -->\n", "\n<!-- end of {} -->"


def readme() -> str:
    """README.md with its table as curriculum.toml has it now.

    Raises:
        ValueError: if README.md has lost one of the two markers.
    """
    return _filled(README, "curriculum", curriculum.markdown("chapters/"))


def paths() -> str:
    """chapters/README.md with the paths of paths.toml, and their hours as the notebooks are now.

    Raises:
        ValueError: if the page has lost one of the two markers.
    """
    return _filled(PATHS, "paths", reading.paths_markdown())


def write() -> None:
    """Bring both pages and the figure up to date."""
    README.write_text(readme(), encoding="utf-8")
    PATHS.write_text(paths(), encoding="utf-8")
    figures.draw()


def _filled(page: Path, name: str, made: str) -> str:
    text, begin, end = page.read_text(encoding="utf-8"), BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise ValueError(f"{page.name} needs the lines {begin.strip()!r} and {end.strip()!r} around its {name}")
    head, rest = text.split(begin, 1)
    return head + begin + made + end + rest.split(end, 1)[1]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
