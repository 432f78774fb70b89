"""Files of a checkpoint's folder, read so that the name of a bad one, and what is wrong with it, reaches the reader."""

from __future__ import annotations

import json
from pathlib import Path

PRETRAINED = Path(__file__).parents[1] / "pretrained"  # the checkpoint that comes with this library

_POINTER = b"version https://git-lfs"


class CheckpointError(ValueError):
    """The checkpoint cannot be loaded or saved; the message says which file or tensor, and why."""


def refuse_pointer(path: Path) -> None:
    """Git leaves a few lines of text in place of a large file that Git LFS has not fetched.

    Raises:
        CheckpointError: if that is what the file holds.
    """
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise CheckpointError(
            f"{path.name} is a Git LFS pointer of {path.stat().st_size} bytes, not the file that it stands for; "
            "run `git lfs pull` in its folder, or download the file"
        )


def read_json(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: if the file is missing, a Git LFS pointer, empty, cut, not UTF-8, or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent.name} has no {path.name}")
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path.name} is not JSON in UTF-8: {error}; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path.name} is not JSON: {error}; it has {size} bytes, download it anew") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds no JSON object, but {type(content).__name__}")
    return content
