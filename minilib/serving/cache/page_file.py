"""Pages in a file: keys and values that outlast the process that computed them.

    header    model, shape of a page, dtype, number of slots: whoever opens the file must agree
    slot      key │ parent's key │ tokens │ checksum │ keys and values of one page

The file has its whole size from the start, so a disk that is full says so when it is opened. A slot is trusted by its
checksum: one that was half written, cut off or changed is no hit, and its tokens are computed anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import struct
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minilib.mechanisms.basics.checks import check_whole
from minilib.mechanisms.content_addressing import block_key

MAGIC = b"minilib pages 1\n"
HEADER_BYTES = 4096
_EMPTY = bytes(32)  # the key of a slot that holds nothing

logger = logging.getLogger(__name__)


class PageFileError(ValueError):
    """The file cannot serve this engine; the message says what it is and how to mend it."""


@dataclass(frozen=True)
class PageName:
    """Which page: the tokens in it and, through its parent's key, all before them.

    Args:
        key: see `block_key`.
        parent: key of the page before.
        tokens: in the page.
    """

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, parent: bytes, tokens: tuple[int, ...], extras: tuple[tuple[str, str], ...]) -> PageName:
        """The name of the page with these tokens behind the page `parent`."""
        return cls(block_key(parent, tokens, extras), parent, tokens)

    def packed(self) -> bytes:
        """As bytes of a length that the number of tokens decides."""
        return self.key + self.parent + struct.pack(f"<{len(self.tokens)}q", *self.tokens)


class PageFile:
    """Slots for pages in one file; the page used longest ago makes room for a new one.

    Args:
        path: the file; it is made if it is missing.
        num_pages: slots.
        model: fingerprint of the model whose keys and values they are.
        page: shape of a page, (2, num_layers, num_kv_heads, page_size, head_dim).
        dtype: of keys and values.

    Attributes:
        num_slots: pages that fit.

    Raises:
        PageFileError: if the file is none of pages, is cut, is of another model, shape or dtype, is used by another
            engine, or has no room on the disk.
        ValueError: if num_pages is no whole number ≥ 1.
    """

    def __init__(self, path: Path, num_pages: int, model: str, page: tuple[int, ...], dtype: torch.dtype) -> None:
        check_whole("num_pages", num_pages, 1)
        self.path, self.num_slots, self._page, self._dtype = path, num_pages, page, dtype
        self._name_bytes = 64 + 8 * page[3]
        self._content_bytes = torch.Size(page).numel() * dtype.itemsize
        self._slot_bytes = self._name_bytes + 32 + self._content_bytes
        header = {"model": model, "page": list(page), "dtype": str(dtype), "num_pages": num_pages}
        self._handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        weakref.finalize(self, self._handle.close)  # whoever drops an engine gives its file to the next one
        self._file = self._handle.fileno()
        try:
            self._open(header)
        except BaseException:
            self._handle.close()
            raise
        self._slots = self._scan()
        self._free = sorted(set(range(num_pages)) - set(self._slots.values()), reverse=True)

    def __len__(self) -> int:
        """Pages held."""
        return len(self._slots)

    def __contains__(self, name: PageName) -> bool:
        """Whether a page seems to be there; `get` looks whether it is whole."""
        return name.key in self._slots

    def put(self, name: PageName, content: Tensor) -> bool:
        """Write a page, in the place of another if there is no free slot.

        Returns:
            Whether it is there. The disk may fail, or the file be closed: then the page is lost, and nothing else.
        """
        if self._handle.closed:
            return False
        if name in self:
            self._slots.move_to_end(name.key)
            return True
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        raw = content.contiguous().view(torch.uint8).numpy().tobytes()
        packed = name.packed()
        try:
            self._write(slot, 0, _EMPTY)  # a write that breaks off must not leave an old name above new content
            self._write(slot, len(packed), hashlib.sha256(packed + raw).digest() + raw)
            self._write(slot, 0, packed)
        except OSError as error:
            logger.warning("%s: a page could not be written: %s", self.path.name, error)
            self._free.append(slot)
            return False
        self._slots[name.key] = slot
        return True

    def get(self, name: PageName) -> Tensor | None:
        """A page as (2, num_layers, num_kv_heads, page_size, head_dim); None if it is not there, or not whole."""
        if name not in self:
            return None
        slot = self._slots[name.key]
        try:
            raw = os.pread(self._file, self._slot_bytes, self._offset(slot))
        except OSError as error:
            logger.warning("%s: a page could not be read: %s", self.path.name, error)
            raw = b""
        packed, checksum, content = raw[: self._name_bytes], raw[self._name_bytes :][:32], raw[self._name_bytes + 32 :]
        if packed != name.packed() or hashlib.sha256(packed + content).digest() != checksum:
            del self._slots[name.key]
            self._free.append(slot)
            return None
        self._slots.move_to_end(name.key)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(self._dtype).view(self._page)

    def close(self) -> None:
        """Give the file back to the system. Pages stay in it, and are found when it is opened again."""
        self._handle.close()  # from here on its number may be that of another file
        self._free, self._slots = list(range(self.num_slots)), OrderedDict()

    def check_invariants(self) -> None:
        """Every slot is free or holds one page."""
        slots = sorted([*self._free, *self._slots.values()])
        assert slots == list(range(self.num_slots)), "a slot was lost, or is taken twice"

    def _offset(self, slot: int) -> int:
        return HEADER_BYTES + slot * self._slot_bytes

    def _write(self, slot: int, at: int, data: bytes) -> None:
        if os.pwrite(self._file, data, self._offset(slot) + at) != len(data):
            raise OSError("the disk took a part of it alone")

    def _open(self, header: dict) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PageFileError(f"{self.path.name} is used by another engine; give each a file of its own") from error
        if os.fstat(self._file).st_size:
            self._check(header)
        else:
            self._create(header)

    def _create(self, header: dict) -> None:
        size = self._offset(self.num_slots)
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            os.truncate(self._file, 0)
            raise PageFileError(f"{self.path.name} takes {size:,} bytes: {error}; give it fewer pages") from error
        os.pwrite(self._file, MAGIC + json.dumps(header).encode(), 0)

    def _check(self, header: dict) -> None:
        name, start = self.path.name, os.pread(self._file, HEADER_BYTES, 0)
        if not start.startswith(MAGIC):
            raise PageFileError(f"{name} is no file of pages; give another path, or remove it")
        try:
            found = json.loads(start[len(MAGIC) :].rstrip(b"\0"))
            differ = [key for key in header if found[key] != header[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise PageFileError(f"the header of {name} cannot be read: {error}; remove the file") from error
        if differ:
            what = ", ".join(f"{key} is {found[key]!r} and {header[key]!r} is needed" for key in differ)
            raise PageFileError(f"{name} was written by another engine: {what}; give another path, or remove it")
        size, expected = os.fstat(self._file).st_size, self._offset(self.num_slots)
        if size != expected:
            raise PageFileError(f"{name} has {size:,} bytes and should have {expected:,}: it was cut; remove it")

    def _scan(self) -> OrderedDict[bytes, int]:
        """Key → slot of what seems to be there."""
        keys = (os.pread(self._file, 32, self._offset(slot)) for slot in range(self.num_slots))
        return OrderedDict((key, slot) for slot, key in enumerate(keys) if key != _EMPTY)
