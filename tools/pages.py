"""Write what is made from chapters/curriculum.toml: the table in README.md, and the figure of the mappings.

Usage: python tools/pages.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minilib.book import curriculum
from tools import figures

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- curriculum: made by make chapters -->\n", "\n<!-- end of curriculum -->"


def readme() -> str:
    """README.md with its table as curriculum.toml has it now.

    Raises:
        ValueError: if README.md has lost one of the two markers.
    """
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"README.md needs the lines {BEGIN.strip()!r} and {END.strip()!r} around its table of chapters"
        )
    head, rest = text.split(BEGIN, 1)
    return head + BEGIN + curriculum.markdown("chapters/") + END + rest.split(END, 1)[1]


def write() -> None:
    """Bring README.md and the figure up to date."""
    README.write_text(readme(), encoding="utf-8")
    figures.draw()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
