"""Count what a kernel reads and writes, and catch what goes wrong unseen: Triton's interpreter with a meter on it.

A GPU kernel that races with itself, or reads past the end of a tensor, mostly gives the right answer on the day it is
tested. The interpreter runs programs one after another and sees every address, so here each of these is counted:
bytes loaded and stored, accesses outside of every tensor, reads of what was never written, and places that two programs
touch of which at least one writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from minilib.kernels.workbench.dispatch import interpreted

_NOBODY = -1


@dataclass
class Traffic:
    """What the kernels inside one `count_traffic` block did.

    Args:
        loaded: bytes read, every read counted, as if there were no cache.
        stored: bytes written, every write counted.
        loads: load instructions, one for each program that executes it.
        stores: store instructions.
        programs: programs launched.
        outside: accesses outside of the watched tensor that they are meant for; they are not carried out.
        unwritten: elements read from a tensor given as `fresh` before anything was written there.
        races: elements that one program wrote and another of the same launch read or wrote, other than atomically.
        touched: distinct bytes of the watched tensors that were read or written, by tensor name.
    """

    loaded: int = 0
    stored: int = 0
    loads: int = 0
    stores: int = 0
    programs: int = 0
    outside: int = 0
    unwritten: int = 0
    races: int = 0
    touched: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Read and written together."""
        return self.loaded + self.stored


@contextmanager
def count_traffic(fresh: tuple[str, ...] = (), /, **tensors: Tensor) -> Iterator[Traffic]:
    """Meter every kernel that runs inside the block; the counts are complete when it ends.

    Args:
        fresh: names of tensors whose content must not be read before it was written, such as an output.
        tensors: every tensor that the kernels may touch, by a name of your choice, on the CPU.

    Yields:
        Traffic, filled as kernels run.

    Raises:
        RuntimeError: if Triton's interpreter is not on: compiled kernels cannot be watched.
        ValueError: if no tensor is given, or one is not on the CPU.
    """
    if not interpreted():
        raise RuntimeError("traffic is counted in Triton's interpreter: call interpreter.device_for_kernels() first")
    if not tensors or any(x.device.type != "cpu" for x in tensors.values()):
        raise ValueError("name at least one tensor to watch, all of them on the CPU")
    from triton.runtime import interpreter

    traffic = Traffic()
    meter = _Meter(traffic, [_Watched(name, x, name in fresh) for name, x in tensors.items()])
    with meter.installed(interpreter.interpreter_builder):
        yield traffic
    meter.finish()


class _Watched:
    """One tensor's storage, and for each of its elements the last program that read it and that wrote it."""

    def __init__(self, name: str, x: Tensor, fresh: bool) -> None:
        storage = x.untyped_storage()
        self.name, self.fresh, self.size = name, fresh, x.element_size()
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        count = storage.nbytes() // self.size
        self.reader = np.full(count, _NOBODY, dtype=np.int64)
        self.writer = np.full(count, _NOBODY, dtype=np.int64)
        self.raced = np.zeros(count, dtype=bool)


class _Meter:
    """Stands between the interpreter and memory."""

    def __init__(self, traffic: Traffic, watched: list[_Watched]) -> None:
        self.traffic, self.watched = traffic, watched
        self.launch = 0  # number of the first program of the launch that runs now: launches wait for one another
        self.programs: dict[tuple, int] = {}

    @contextmanager
    def installed(self, builder) -> Iterator[None]:
        """Every access of the interpreter goes through this meter inside the block."""
        self.builder = builder
        original_load, original_store = builder.create_masked_load, builder.create_masked_store
        atomic, begin = builder.create_atomic_rmw, builder.set_grid_dim

        def load(pointers, mask, *rest):
            self.traffic.loads += 1
            return original_load(pointers, self._inside(pointers, mask, reads=True), *rest)

        def store(pointers, value, mask, *rest):
            self.traffic.stores += 1
            return original_store(pointers, value, self._inside(pointers, mask, writes=True), *rest)

        def modify(operation, pointers, value, mask, *rest):
            mask = self._inside(pointers, mask, reads=True, writes=True)
            return atomic(operation, pointers, value, mask, *rest)

        def launched(*grid):
            self.launch, self.programs = self.launch + len(self.programs), {}
            self.traffic.programs += grid[0] * grid[1] * grid[2]
            begin(*grid)

        replaced = {"create_masked_load": load, "create_masked_store": store}
        replaced |= {"create_atomic_rmw": modify, "set_grid_dim": launched}
        vars(builder).update(replaced)
        try:
            yield
        finally:
            for name in replaced:
                delattr(builder, name)  # the class's own show again

    def finish(self) -> None:
        self.traffic.races = sum(int(w.raced.sum()) for w in self.watched)
        for w in self.watched:
            self.traffic.touched[w.name] = w.size * int(((w.reader != _NOBODY) | (w.writer != _NOBODY)).sum())

    def _inside(self, pointers, mask, reads: bool = False, writes: bool = False):
        """Book one access; returns its mask without the lanes that point nowhere."""
        program = self.launch + self.programs.setdefault(self.builder.grid_idx, len(self.programs))
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        within = [wanted & (addresses >= w.begin) & (addresses < w.end) for w in self.watched]
        # One instruction means one tensor, the one in which its first lanes lie. Where it runs past that tensor's end
        # another may begin, which is no excuse.
        first = [int(here.argmax()) if here.any() else here.size for here in within]
        inside, meant = min(zip(first, within, self.watched, strict=True), key=lambda found: found[0])[1:]
        self._book(meant, program, (addresses[inside].astype(np.int64) - meant.begin) // meant.size, reads, writes)
        self.traffic.outside += int((wanted & ~inside).sum())
        return type(mask)(inside, mask.dtype)

    def _book(self, w: _Watched, program: int, elements: np.ndarray, reads: bool, writes: bool) -> None:
        count = len(elements) * w.size
        if reads:
            self.traffic.loaded += count
            self.traffic.unwritten += int((w.writer[elements] == _NOBODY).sum()) if w.fresh else 0
        if writes:
            self.traffic.stored += count
        if not (reads and writes):  # an atomic operation is how programs may share a place
            w.raced[elements[self._another(w.writer[elements], program)]] = True
        if writes and not reads:
            w.raced[elements[self._another(w.reader[elements], program)]] = True
        if reads:
            w.reader[elements] = program
        if writes:
            w.writer[elements] = program

    def _another(self, who: np.ndarray, program: int) -> np.ndarray:
        return (who >= self.launch) & (who != program)
