"""The bytes of small processes, in frames that `PageTable` hands out: what an operating system does with memory.

    ProcessMemory   reserve, read, write, append, fork, exit      one address space, from address 0 on
    PhysicalMemory  frames (RAM) and a swap file behind a `Pager`   shared by all processes

The page table and the pool are those that hold the KV cache of a language model (serving); memory_trace.py replays one
trace through both. Rules as on Linux: a page reads as zeros before its first write and takes no
frame; fork copies nothing; the first write to a shared page copies it, a read never does; memory outside of what was
reserved is a segmentation fault.

Source: Bach, "The Design of the UNIX Operating System", 1986, chapters 7 and 9 (fork, sbrk, swapping, demand paging).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from typing import IO

from minilib.classic.swapping import Pager
from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.caching import Clock, EvictionPolicy
from minilib.mechanisms.paging import Copy, FramePool, PageTable


class SegmentationFault(IndexError):
    """An access outside the memory that a process has reserved; nothing was changed."""


class PhysicalMemory:
    """Frames of bytes, and a file for pages that do not fit.

    Args:
        num_frames: frames of memory, at least 1.
        page_size: bytes in a page and a frame.
        num_swap_frames: pages that the swap file has room for; one of them stays free. 0 means no swap.
        swap_file: a binary file, open for reading and writing; a temporary file if left out. `close` closes it.
        order: how a victim is chosen; the clock if left out.

    Raises:
        ValueError: if num_frames or page_size is below 1, or num_swap_frames below 0.
    """

    def __init__(
        self,
        num_frames: int,
        page_size: int = 4096,
        num_swap_frames: int = 0,
        swap_file: IO[bytes] | None = None,
        order: EvictionPolicy | None = None,
    ) -> None:
        if num_frames < 1 or page_size < 1:
            raise ValueError(f"num_frames and page_size must be at least 1, got {num_frames!r} and {page_size!r}")
        self.page_size = page_size
        pools = FramePool(num_frames), FramePool(num_swap_frames)
        self.pager = Pager(*pools, Clock() if order is None else order, self._swap_out, self._swap_in)
        self._frames = memoryview(bytearray(num_frames * page_size))
        self._swap_file = tempfile.TemporaryFile() if swap_file is None else swap_file  # noqa: SIM115

    def __enter__(self) -> PhysicalMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def new_process(self) -> ProcessMemory:
        """A process that has reserved nothing yet."""
        return ProcessMemory(self, self.pager.new_table(self.page_size))

    @property
    def pool(self) -> FramePool:
        """The frames of memory."""
        return self.pager.fast

    @property
    def num_copies(self) -> int:
        """Pages copied because they were shared when they were written."""
        return self.pager.counts["copy"]

    def frame(self, number: int) -> memoryview:
        """The bytes of a frame, to be read or written."""
        return self._frames[number * self.page_size :][: self.page_size]

    def swapped(self, number: int) -> bytes:
        """Read the bytes of a page from the swap file.

        Raises:
            OSError: if they cannot be read.
        """
        content = os.pread(self._swap_file.fileno(), self.page_size, number * self.page_size)
        if len(content) < self.page_size:
            raise OSError(errno.EIO, f"the swap file ends within frame {number}")
        return content

    def close(self) -> None:
        """Close the swap file; what is there is lost."""
        self._swap_file.close()

    def check_invariants(self) -> None:
        """Frames and swap are held by the processes that run, each as often as counted."""
        self.pager.check_invariants()

    def _swap_out(self, copy: Copy) -> None:
        content, position = self.frame(copy.source), copy.target * self.page_size
        while content:
            written = os.pwrite(self._swap_file.fileno(), content, position)
            content, position = content[written:], position + written

    def _swap_in(self, copy: Copy) -> None:
        self.frame(copy.target)[:] = self.swapped(copy.source)


class ProcessMemory:
    """The memory of one process: bytes from address 0 up to what it has reserved, rounded up to whole pages.

    `PhysicalMemory.new_process` and `fork` make one.

    Attributes:
        table: its page table; `table.length` is the break, the end of what was reserved, in bytes.
    """

    def __init__(self, memory: PhysicalMemory, table: PageTable) -> None:
        self.memory, self.table = memory, table

    def reserve(self, count: int) -> int:
        """Reserve `count` more bytes, as sbrk does. They read as zeros, and take no frame before they are written.

        Returns:
            The address of the first of them.

        Raises:
            ValueError: if count is below 0.
            ProcessLookupError: if the process has exited.
        """
        self._check_runs()
        if count < 0:
            raise ValueError(f"a process reserves 0 bytes or more, got {count!r}")
        address, end = self.table.length, self.table.length + count
        self.table.reserve(ceil_div(end, self.memory.page_size) - len(self.table.frames))
        self.table.length = end
        return address

    def read(self, address: int, count: int) -> bytes:
        """Read `count` bytes. Copies no page, and takes no frame for a page that was never written.

        Raises:
            SegmentationFault: if they are not all inside the reserved pages; 0 bytes are, wherever they are.
            ValueError: if count is below 0.
            OSError: if the swap file cannot be read, or not be written to make room.
            ProcessLookupError: if the process has exited.
        """
        return b"".join(bytes(self._read_page(page)[inside]) for page, inside, _ in self._parts(address, count))

    def write(self, address: int, data: bytes) -> None:
        """Write bytes, all or none of them.

        Raises:
            SegmentationFault: if they are not all inside the reserved pages; no bytes are, wherever they are.
            SwapFull, OutOfFrames: if memory is full, with and without a swap file; or if more pages are written at once
                than there are frames.
            OSError: if the swap file cannot be written, for instance because its disk is full, or not be read.
            ProcessLookupError: if the process has exited.
            TypeError: if data are not bytes.
        """
        pager, table, data = self.memory.pager, self.table, memoryview(data).tobytes()
        parts = list(self._parts(address, len(data)))
        pager.make_room(table, (page for page, _, _ in parts))
        fresh = {page: self._content(page) for page, _, _ in parts if not pager.is_private(table, page)}
        for page, inside, of_data in parts:  # from here on nothing can fail
            frame = self.memory.frame(pager.write(table, page))
            if page in fresh:
                frame[:] = fresh[page]
            frame[inside] = data[of_data]

    def append(self, data: bytes) -> int:
        """Reserve room for bytes at the end, and write them there; both or neither.

        Returns:
            The address of the first of them.

        Raises:
            As `write`.
        """
        data, num_pages = memoryview(data).tobytes(), len(self.table.frames)
        address = self.reserve(len(data))
        try:
            self.write(address, data)
        except BaseException:
            self.table.length = address
            del self.table.frames[num_pages:]
            raise
        return address

    def fork(self) -> ProcessMemory:
        """A child with the same content. No page is copied before one of the two writes to it.

        Raises:
            ProcessLookupError: if the process has exited.
        """
        self._check_runs()
        return ProcessMemory(self.memory, self.memory.pager.fork(self.table))

    def exit(self) -> None:
        """Give all frames and all room in the swap file back.

        Raises:
            ProcessLookupError: if the process has exited before.
        """
        self._check_runs()
        self.memory.pager.release(self.table)

    def _check_runs(self) -> None:
        if self.table not in self.memory.pager.swapped:
            raise ProcessLookupError(errno.ESRCH, "this process has exited; its memory is gone")

    def _parts(self, address: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        """For each page of a range of addresses: page, the range inside the page, the range of the bytes asked for."""
        self._check_runs()
        size, end = self.memory.page_size, len(self.table.frames) * self.memory.page_size
        if count < 0:
            raise ValueError(f"0 bytes or more can be read, got {count!r}")
        if count and not 0 <= address <= end - count:
            raise SegmentationFault(
                f"addresses {address} to {address + count - 1} are not all reserved; this process has 0 to {end - 1}"
            )
        done = 0
        while done < count:
            page, first = divmod(address + done, size)
            length = min(size - first, count - done)
            yield page, slice(first, first + length), slice(done, done + length)
            done += length

    def _read_page(self, page: int) -> bytes | memoryview:
        frame = self.memory.pager.read(self.table, page)
        return bytes(self.memory.page_size) if frame is None else self.memory.frame(frame)

    def _content(self, page: int) -> bytes:
        """The bytes of a page, wherever it is; the page stays there."""
        if page in self.memory.pager.swapped[self.table]:
            return self.memory.swapped(self.memory.pager.swapped[self.table][page])
        frame = self.table.frames[page]
        return bytes(self.memory.page_size) if frame is None else bytes(self.memory.frame(frame))
