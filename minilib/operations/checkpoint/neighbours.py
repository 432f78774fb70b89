"""Each rank's part in the memory of its own host and of a neighbour's: a lost host is made up for without the disk.

    host 0    part of rank 0, copy of rank 1's        host 1 is lost:   its part of the newest checkpoint
    host 1    part of rank 1, copy of rank 2's                          comes from host 0,
    host 2    part of rank 2, copy of rank 0's                          all other ranks have their own

A rank keeps parts as files in a folder of its host's memory (/dev/shm), which outlast a process that is killed, and not
the host. Nothing is synced. A checkpoint counts once every rank has told that it keeps what it has to keep; the
one before is removed only then, so there are two for a time.

Source: Wang et al., "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints", SOSP 2023.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from minilib.mechanisms.journaling import numbered, numbers_of
from minilib.mechanisms.sharding.placement import spread
from minilib.operations.checkpoint.cuts import prepared_to_save, saveables
from minilib.operations.checkpoint.folder import MANIFEST, CheckpointFolder, Committed, NoCheckpoint, part_name
from minilib.operations.checkpoint.loading import Loaded, fragments_to_fill, load_state
from minilib.operations.checkpoint.plan import Planner
from minilib.operations.checkpoint.reading import parts_needed
from minilib.operations.checkpoint.together import fail_together, told_by_all, tried
from minilib.operations.checkpoint.writing import BLOCK, CRC_BYTES, cut_blocks, snapshot
from minilib.ranks.collectives import Communicator


class NeighbourMemory:
    """Checkpoints in the memory of hosts, beside those on a disk. Methods are collectives, but for `forget`.

    Args:
        folder: of this rank alone, in memory of its host; made if there is none.
        comm: between all ranks, none of whose collectives runs meanwhile.
        places: host of each rank; copies are spread over hosts. Each rank is a host of its own if left out.
        copies: of each part, its own included.

    Attributes:
        keepers: for each rank, who keeps its part, itself the first.
        received: bytes that the latest `load` received from other ranks.

    Raises:
        ValueError: if there are fewer ranks than copies.
    """

    def __init__(
        self, folder: Path | str, comm: Communicator, places: Sequence[int] | None = None, copies: int = 2
    ) -> None:
        self._folder, self._comm, self._planner, self.received = Path(folder), comm, Planner(comm), 0
        places = list(range(comm.world_size)) if places is None else list(places)
        self.keepers = [_spread_from(copies, places, rank) for rank in range(comm.world_size)]
        self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of parts that this rank keeps, its own and others'."""
        return sum(path.stat().st_size for path in self._folder.glob("part-*"))

    def save(self, state: Mapping[str, object], step: int) -> None:
        """Keep the state of a run in memory: each rank its share here, and a copy of it with its neighbours.

        Args:
            state: as `Checkpointer.save` takes it.
            step: of the run.

        Raises:
            StateMismatch: if ranks do not hold one whole state.
            OSError, OtherRankFailed: if some rank has no room; what was kept before is then still there.

        Cost: (copies − 1) times a rank's share sent and received, and a copy of it; memory for two steps for a time.
        """
        prepared, error = tried(lambda: prepared_to_save(state))
        fail_together(error, self._comm)
        fragments, held, values = prepared
        plan = self._planner.plan(held)
        contents = plan.parts[self._comm.rank]
        part = torch.zeros(contents.size, dtype=torch.uint8)
        snapshot(contents, contents.views(fragments), part)
        blocks = cut_blocks(memoryview(part.numpy()), BLOCK)
        sums = b"".join(crc32(block).to_bytes(CRC_BYTES, "little") for block in blocks)
        told = [json.loads(text) for text in told_by_all(json.dumps([sums.hex(), values]), self._comm)]
        names = [part_name(step, rank) for rank in range(len(told))]
        checksums = {name: bytes.fromhex(text) for name, (text, _) in zip(names, told, strict=True)}
        sizes = {name: each.size for name, each in zip(names, plan.parts, strict=True)}
        self._keep(Committed(step, plan.table(step), told[0][1], checksums, sizes, BLOCK, len(names)), part)

    def load(self, state: Mapping[str, object]) -> Loaded:
        """Load the newest step of which every part is in some rank's memory; no disk is read.

        Args:
            state: as it was saved, on as many ranks.

        Raises:
            NoCheckpoint: if there is none, since too many hosts were lost, or another number of ranks kept it: load
                from the disk.
            PartDamaged, StateMismatch, OtherRankFailed: see `load_state`.

        Cost: a part that is lost here comes from a neighbour. So does, for a time, a part that holds anything else that
            this rank needs: with replicas all parts, with ZeRO those with AdamW's step, which one rank wrote for all.
        """
        committed = self._recover()
        states = saveables(state)
        found, error = tried(lambda: fragments_to_fill(states, committed, ()))
        fail_together(error, self._comm)
        kept = self._held()
        received = self._bring_all(committed, parts_needed(found[0], committed.table))
        try:
            loaded = load_state(states, committed, CheckpointFolder(self._folder), self._comm)
        finally:
            for name in set(self._held()) - set(kept):
                (self._folder / name).unlink()
        self.received += received
        return loaded

    def _keep(self, committed: Committed, part: Tensor) -> None:
        """Keep this rank's part here and with its neighbours, and what is a neighbour's to be kept here."""
        names = [part_name(committed.step, rank) for rank in range(self._comm.world_size)]
        _, error = tried(lambda: self._write(names[self._comm.rank], memoryview(part.numpy())))
        for hop in range(1, len(self.keepers[0])):
            for rank, data in self._exchange(committed, part, hop, names).items():
                if error is None:
                    _, error = tried(lambda rank=rank, data=data: self._write(names[rank], data))
        if error is None:
            _, error = tried(lambda: self._write(numbered(MANIFEST, committed.step), committed.packed()))
        fail_together(error, self._comm)
        self._remove_others(committed.step)

    def _recover(self) -> Committed:
        """Give each rank what it has to keep of the newest step of which all parts are in memory somewhere."""
        held = self._held_by_all()
        step = max((step for step in _steps(held) if _is_whole(step, held)), default=None)
        if step is None:
            raise NoCheckpoint("the ranks' memory holds no step of which every part is somewhere: load from the disk")
        name = numbered(MANIFEST, step)
        holder = next(rank for rank, names in enumerate(held) if name in names)
        text = (self._folder / name).read_bytes().hex() if self._comm.rank == holder else ""
        manifest = bytes.fromhex(told_by_all(text, self._comm)[holder])
        committed = Committed.unpacked(manifest, name)
        if committed.world_size != self._comm.world_size:
            raise NoCheckpoint(f"{committed.world_size} ranks kept step {step} in memory, and here are "
                               f"{self._comm.world_size}: load from the disk, as any number of ranks can")  # fmt: skip
        mine = [part_name(step, rank) for rank, keepers in enumerate(self.keepers) if self._comm.rank in keepers]
        self.received = self._bring_all(committed, mine)
        self._write(name, manifest)
        return committed

    def _bring_all(self, committed: Committed, parts: Iterable[str]) -> int:
        """Bring parts into this rank's memory, each rank those that it asks for; bytes received here."""
        asked = [json.loads(text) for text in told_by_all(json.dumps(sorted(parts)), self._comm)]
        held, received = self._held_by_all(), 0
        for part in sorted({part for names in asked for part in names}):
            wanting = [rank for rank, names in enumerate(asked) if part in names and part not in held[rank]]
            received += self._bring(committed, part, wanting, held)
        return received

    def forget(self) -> None:
        """Lose everything, as with a host. No collective."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def _bring(self, committed: Committed, part: str, wanting: Sequence[int], held: Sequence[Sequence[str]]) -> int:
        """Send a part from a rank that has it to those that want it; bytes received here."""
        if not wanting:
            return 0
        holder = next(rank for rank, names in enumerate(held) if part in names)
        data = _tensor((self._folder / part).read_bytes()) if self._comm.rank == holder else _tensor(b"")
        inputs = [data if rank in wanting else data[:0] for rank in range(self._comm.world_size)]
        size = committed.sizes[part] if self._comm.rank in wanting else 0
        outputs = [torch.empty(size if rank == holder else 0, dtype=torch.uint8) for rank in range(len(inputs))]
        self._comm.all_to_all(outputs, inputs)
        if size:
            self._write(part, memoryview(outputs[holder].numpy()))
        return size

    def _exchange(self, committed: Committed, part: Tensor, hop: int, names: Sequence[str]) -> dict[int, memoryview]:
        """Send this rank's part to its keeper of this number; what came from others, by rank."""
        to = [keepers[hop] for keepers in self.keepers]
        inputs = [part if rank == to[self._comm.rank] else part[:0] for rank in range(len(to))]
        sizes = [committed.sizes[names[rank]] if to[rank] == self._comm.rank else 0 for rank in range(len(to))]
        outputs = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self._comm.all_to_all(outputs, inputs)
        kept = [rank for rank in range(len(to)) if to[rank] == self._comm.rank]
        return {rank: memoryview(outputs[rank].numpy()) for rank in kept}

    def _held_by_all(self) -> list[list[str]]:
        return [json.loads(text) for text in told_by_all(json.dumps(self._held()), self._comm)]

    def _held(self) -> list[str]:
        return sorted(path.name for path in self._folder.iterdir() if not path.name.endswith(".partial"))

    def _write(self, name: str, data: memoryview | bytes) -> None:
        """Whole or not at all: a process may be killed, and a file of half a part would count."""
        partial = self._folder / f"{name}.partial"
        partial.write_bytes(data)
        partial.replace(self._folder / name)

    def _remove_others(self, step: int) -> None:
        for path in self._folder.iterdir():
            if not path.name.startswith((numbered("part", step), numbered(MANIFEST, step))):
                path.unlink()


def _spread_from(copies: int, places: Sequence[int], first: int) -> list[int]:
    """Who keeps a rank's part: that rank, and neighbours in other places, the next ones behind it first."""
    order = [(first + number) % len(places) for number in range(len(places))]
    return [order[number] for number in spread(copies, [places[rank] for rank in order])]


def _steps(held: Sequence[Sequence[str]]) -> set[int]:
    return {step for names in held for step in numbers_of(MANIFEST, names)}


def _is_whole(step: int, held: Sequence[Sequence[str]]) -> bool:
    """Whether each rank's part of a step is somewhere."""
    every = {name for names in held for name in names}
    return all(part_name(step, rank) in every for rank in range(len(held)))


def _tensor(data: memoryview | bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
