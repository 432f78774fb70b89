"""Trees of files in a store that names everything by its content, so that what two trees share is stored once.

    tree  ── name, key ──► tree ── name, key ──► file, in one of three layouts

    files     one object a file                                     a changed byte stores the file anew
    blocks    one object a block, and a list of their keys          …stores the block anew; an insertion, all behind it
    chain     as blocks, but a block's key hashes the one before    …stores all blocks behind it anew

In the first two a key is git's own: SHA-256 over kind, length and content, as `git init --object-format=sha256` counts.
A tree's object holds the keys below it, so one key stands for the whole tree, and an edit changes the keys on its path
to the root, and no others. A chained key stands for its past as well: layers of container images are named so
(image_layers.py), and pages of keys and values (serving/cache/prefix.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from minilib.mechanisms.basics.files import written_whole
from minilib.mechanisms.content_addressing import ORIGIN, block_key

LAYOUTS = ("files", "blocks", "chain")
_FOLDER, _FILE = b"40000", b"100644"  # modes, as git writes them
_KEY_BYTES = 32


class ObjectDamaged(ValueError):
    """An object is missing or does not hold what its name says; the message says which, and of which file."""


def object_key(kind: str, content: bytes) -> bytes:
    """The name that git gives an object: SHA-256 over its kind, its length and its content."""
    return hashlib.sha256(f"{kind} {len(content)}\0".encode() + content).digest()


def read_tree(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The files below a folder, by their paths from there, in order; links are left out, and so are caches of Python.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder.name} is no folder")
    paths = (path for path in folder.rglob(pattern) if path.is_file() and not path.is_symlink())
    found = {path.relative_to(folder).as_posix(): path for path in paths if "__pycache__" not in path.parts}
    return {name: found[name].read_bytes() for name in sorted(found)}


class ContentStore:
    """Objects in a folder, each in a file that is named by its key.

    Args:
        folder: where they are; it is made if it is missing, and may hold objects from before.
        layout: how a file is stored: "files", "blocks" or "chain".
        block_size: bytes of a block.

    Attributes:
        bytes_stored: bytes of all objects.
        num_objects: how many there are.

    Raises:
        ValueError: if the layout is unknown, or block_size below 1.
    """

    def __init__(self, folder: Path, layout: str = "files", block_size: int = 4096) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}; got {layout!r}")
        if block_size < 1:
            raise ValueError(f"a block has 1 byte or more, got {block_size!r}")
        self.folder, self.layout, self.block_size = folder, layout, block_size
        folder.mkdir(parents=True, exist_ok=True)
        sizes = [path.stat().st_size for path in folder.glob("??/*") if not path.name.endswith(".partial")]
        self.bytes_stored, self.num_objects = sum(sizes), len(sizes)

    def save(self, tree: Mapping[str, bytes]) -> str:
        """Store a tree; what is there already takes no room.

        Args:
            tree: content by path, such as {"json/decoder.py": b"…"}.

        Returns:
            The key of the whole tree, in hexadecimal digits.

        Raises:
            ValueError: if a path is no path of a file in a tree, or a file where another path needs a folder.
        """
        return self._save_folder(_nested(tree)).hex()

    def load(self, key: str) -> dict[str, bytes]:
        """The tree that `save` gave this key for, checked byte by byte.

        Raises:
            ObjectDamaged: if an object on the way is missing or changed.
        """
        return dict(self._files(bytes.fromhex(key), ""))

    def damaged(self, key: str) -> list[str]:
        """The paths of a tree that cannot be loaded; a folder stands for all below it."""
        return list(self._damaged(bytes.fromhex(key), ""))

    def folders(self, key: str) -> dict[str, str]:
        """The keys of a tree and of all folders in it, by path; the tree's own path is empty."""
        found = {"": key}
        for name, is_folder, below in self._entries(bytes.fromhex(key), ""):
            if is_folder:
                found |= {f"{name}/{path}".rstrip("/"): other for path, other in self.folders(below.hex()).items()}
        return found

    def path_of(self, key: bytes) -> Path:
        """The file of an object."""
        digits = key.hex()
        return self.folder / digits[:2] / digits[2:]

    def _put(self, key: bytes, content: bytes) -> bytes:
        path = self.path_of(key)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as partial:
                partial.write_bytes(content)
            self.bytes_stored += len(content)
            self.num_objects += 1
        return key

    def _get(self, key: bytes, kind: str, name: str) -> bytes:
        """The content of an object that is needed for the file or folder of this name."""
        content = self._read(key, name)
        if object_key(kind, content) != key:
            raise ObjectDamaged(f"object {key.hex()} of {name or 'the tree'} was changed; restore it from a copy")
        return content

    def _read(self, key: bytes, name: str) -> bytes:
        try:
            return self.path_of(key).read_bytes()
        except FileNotFoundError as error:
            raise ObjectDamaged(f"object {key.hex()} of {name or 'the tree'} is missing") from error

    def _save_folder(self, folder: dict) -> bytes:
        entries = []
        for name, below in folder.items():
            encoded = name.encode("utf-8", "surrogateescape")
            if isinstance(below, dict):  # git sorts a folder as if its name ended with a slash
                entries.append((encoded + b"/", _FOLDER + b" " + encoded + b"\0" + self._save_folder(below)))
            else:
                entries.append((encoded, _FILE + b" " + encoded + b"\0" + self._save_file(below)))
        content = b"".join(entry for _, entry in sorted(entries))
        return self._put(object_key("tree", content), content)

    def _save_file(self, content: bytes) -> bytes:
        if self.layout == "files":
            return self._put(object_key("blob", content), content)
        keys, key = [], ORIGIN
        for start in range(0, len(content), self.block_size):
            block = content[start : start + self.block_size]
            key = self._key_of_block(key, block)
            keys.append(self._put(key, block))
        listed = b"".join(keys)
        return self._put(object_key("blocks", listed), listed)

    def _key_of_block(self, parent: bytes, block: bytes) -> bytes:
        return block_key(parent, block) if self.layout == "chain" else object_key("blob", block)

    def _entries(self, key: bytes, name: str) -> Iterator[tuple[str, bool, bytes]]:
        """(name, whether it is a folder, key) of what a folder holds."""
        content, at = self._get(key, "tree", name), 0
        while at < len(content):
            end = content.index(b"\0", at)
            mode, encoded = content[at:end].split(b" ", 1)
            at = end + 1 + _KEY_BYTES
            yield encoded.decode("utf-8", "surrogateescape"), mode == _FOLDER, content[end + 1 : at]

    def _files(self, key: bytes, prefix: str) -> Iterator[tuple[str, bytes]]:
        for name, is_folder, below in self._entries(key, prefix.rstrip("/")):
            if is_folder:
                yield from self._files(below, f"{prefix}{name}/")
            else:
                yield prefix + name, self._load_file(below, prefix + name)

    def _load_file(self, key: bytes, name: str) -> bytes:
        if self.layout == "files":
            return self._get(key, "blob", name)
        listed, blocks, parent = self._get(key, "blocks", name), [], ORIGIN
        for start in range(0, len(listed), _KEY_BYTES):
            key = listed[start : start + _KEY_BYTES]
            block = self._read(key, name)
            if self._key_of_block(parent, block) != key:
                raise ObjectDamaged(f"block {len(blocks)} of {name}, object {key.hex()}, was changed")
            blocks.append(block)
            parent = key
        return b"".join(blocks)

    def _damaged(self, key: bytes, prefix: str) -> Iterator[str]:
        try:
            entries = list(self._entries(key, prefix))
        except ObjectDamaged:
            yield prefix
            return
        for name, is_folder, below in entries:
            if is_folder:
                yield from self._damaged(below, f"{prefix}{name}/")
                continue
            try:
                self._load_file(below, prefix + name)
            except ObjectDamaged:
                yield prefix + name


def _nested(tree: Mapping[str, bytes]) -> dict:
    """Folders in folders: a dictionary for each, with the content of its files."""
    root: dict = {}
    for path, content in tree.items():
        *folders, name = parts = path.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ValueError(f"{path!r} is no path of a file in a tree; write it as 'folder/file'")
        at = root
        for folder in folders:
            at = at.setdefault(folder, {})
            if not isinstance(at, dict):
                raise ValueError(f"{path!r} needs a folder where the tree has a file, {folder!r}")
        if name in at:
            raise ValueError(f"{path!r} is a folder as well")
        at[name] = bytes(content)
    return root
