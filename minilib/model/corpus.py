"""Text to train on that every reader already has: the source of the Python standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "encodings")
VALIDATION_SHARE = 20  # one file in so many is held out


@dataclass(frozen=True)
class Corpus:
    """Source files, split into those to train on and those held out.

    Args:
        train: texts.
        validation: texts.
        digest: SHA-256 over names and contents; two corpora with the same digest are the same.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    digest: str


def standard_library(root: Path | None = None) -> Corpus:
    """Read the running interpreter's standard library, without its tests (which not every installation has).

    Args:
        root: another folder of Python files.

    Raises:
        FileNotFoundError: if the folder holds no Python source, as in some embedded interpreters.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(LEFT_OUT))
    digest = hashlib.sha256()
    train, validation = [], []
    for path in paths:
        name, content = path.relative_to(root).as_posix(), path.read_bytes()
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        text = content.decode("utf-8", errors="ignore")
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0
        if text.strip():
            (validation if held_out else train).append(text)
    if not train:
        raise FileNotFoundError(f"no Python source under {root.name}/; is the standard library installed as source?")
    return Corpus(tuple(train), tuple(validation), digest.hexdigest())
