"""Each rank's part in the memory of its own host and of a neighbour's: a lost host is made up for without the disk.

    host 0    part of rank 0, copy of rank 1's        host 1 is lost:   its part of the newest checkpoint
    host 1    part of rank 1, copy of rank 2's                          comes from host 0,
    host 2    part of rank 2, copy of rank 0's                          all other ranks have their own

A rank keeps parts as files in a folder of its host's memory (host_memory.py). A save copies this rank's share while the
run stands still; it is sent behind the steps. A checkpoint counts once every rank has told that it keeps what it has to
keep; the one before is removed only then, so there are two for a time.

Source: Wang et al., "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints", SOSP 2023.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch

from minilib.mechanisms.journaling import numbered, numbers_of
from minilib.mechanisms.sharding.placement import spread
from minilib.operations.checkpoint.background import AlreadySaved, BackgroundSaves
from minilib.operations.checkpoint.format.folder import MANIFEST, CheckpointFolder, Committed, NoCheckpoint, part_name
from minilib.operations.checkpoint.format.reading import parts_needed
from minilib.operations.checkpoint.format.writing import BLOCK, block_checksum, cut_blocks
from minilib.operations.checkpoint.host_memory import HostMemory
from minilib.operations.checkpoint.loading import Loaded, fragments_to_fill, load_state
from minilib.operations.checkpoint.plan import SavePlan
from minilib.operations.checkpoint.states.cuts import saveables
from minilib.operations.checkpoint.together import fail_together, told_by_all, tried
from minilib.ranks.collectives import Communicator
from minilib.ranks.transport.base import CollectiveFailed

PIECE = 16 * 2**20  # bytes that are sent at a time


class _Route(NamedTuple):
    """A part goes from the memory of a rank to that of another one."""

    part: str
    source: int
    target: int


class NeighbourMemory:
    """Checkpoints in the memory of hosts, beside those on a disk. Methods are collectives, but for `forget`.

    Args:
        folder: of this rank alone, in memory of its host; made if there is none.
        comm: between all ranks, for these checkpoints alone: a save behind the steps uses it.
        places: host of each rank; copies are spread over hosts. Each rank is a host of its own if left out.
        copies: of each part, its own included.
        busy: see `Checkpointer`.

    Attributes:
        keepers: for each rank, who keeps its part, itself the first.
        sent: bytes of parts that the latest `save` has sent to other ranks.
        received: bytes that the latest `load` received from other ranks.

    Raises:
        ValueError: if there are fewer ranks than copies.
    """

    def __init__(
        self,
        folder: Path | str,
        comm: Communicator,
        places: Sequence[int] | None = None,
        copies: int = 2,
        busy: str = "wait",
    ) -> None:
        self._comm, self.sent, self.received = comm, 0, 0
        places = list(range(comm.world_size)) if places is None else list(places)
        self.keepers = [_spread_from(copies, places, rank) for rank in range(comm.world_size)]
        self._saves, self._memory = BackgroundSaves(comm, busy), HostMemory(Path(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of parts that this rank keeps, its own and others'."""
        return self._memory.nbytes

    @property
    def staged_bytes(self) -> int:
        """Memory of the host that this rank holds beside those for a copy, at most its own part."""
        return self._saves.staged_bytes

    def save(self, state: Mapping[str, object], step: int, wait: bool = False) -> None:
        """Keep the state of a run in memory: each rank its share here, and a copy of it with its neighbours.

        Args:
            state, step: as `Checkpointer.save` takes them.
            wait: return once all ranks keep it; otherwise once it is copied.

        Raises:
            SaveFailed: if the save before failed, or with wait this one, such as for lack of room on some rank; what
                was kept before is then still there.
            AlreadySaved: if this step is kept.
            SaveInProgress, StateMismatch, OtherRankFailed: see `Checkpointer.save`.

        Cost: without wait the run stands still for a copy of this rank's share and two small collectives. (copies − 1)
            times the share is sent and received, in pieces; memory of that copy, and for two steps for a time.
        """
        plan, fragments, values = self._saves.begin(state, step, lambda: self._refuse_saved(step))
        part = memoryview(self._saves.staged(plan, fragments).numpy())
        self._saves.run(step, lambda: self._keep(step, plan, values, part), wait)

    def wait(self) -> None:
        """Return when no save goes on.

        Raises:
            SaveFailed: if the one that went on failed.
        """
        self._saves.settle()

    def close(self) -> None:
        """Wait, and end; what is kept stays.

        Raises:
            SaveFailed: as `wait`.
        """
        self._saves.close()

    def load(self, state: Mapping[str, object]) -> Loaded:
        """Load the newest step of which every part is in some rank's memory; no disk is read.

        Args:
            state: as it was saved, on as many ranks.

        Raises:
            NoCheckpoint: if there is none, since too many hosts were lost, or another number of ranks kept it: load
                from the disk.
            PartDamaged, StateMismatch, OtherRankFailed: see `load_state`.
            SaveFailed: as `wait`.

        Cost: a part that is lost here comes from a neighbour. So does, for a time, a part that holds anything else that
            this rank needs: with replicas all parts, with ZeRO those with AdamW's step, which one rank wrote for all.
        """
        self._saves.settle()
        committed = self._recover()
        states = saveables(state)
        found, error = tried(lambda: fragments_to_fill(states, committed, ()))
        fail_together(error, self._comm)
        kept = self._memory.names()
        received = self._bring(committed, parts_needed(found[0], committed.table))
        try:
            loaded = load_state(states, committed, CheckpointFolder(self._memory.folder), self._comm)
        finally:
            self._memory.remove(set(self._memory.names()) - set(kept))
        self.received += received
        return loaded

    def forget(self) -> None:
        """Lose everything, as with a host. No collective."""
        self._memory.clear()

    @property
    def _rank(self) -> int:
        return self._comm.rank

    def _refuse_saved(self, step: int) -> None:
        if numbered(MANIFEST, step) in self._memory.names():
            raise AlreadySaved(f"step {step} is kept in memory; load it, or forget() it first if the run went back")

    def _keep(self, step: int, plan: SavePlan, values: Mapping, part: memoryview) -> None:
        """Keep this rank's part here and with its neighbours, and what is a neighbour's to be kept here."""
        committed = self._committed(step, plan, values, part)
        names = list(committed.sizes)
        try:
            _, error = tried(lambda: self._memory.write(names[self._rank], part))
            fail_together(error, self._comm)
            hops = range(1, len(self.keepers[0]))
            for hop in hops:
                routes = [_Route(name, rank, self.keepers[rank][hop]) for rank, name in enumerate(names)]
                self._send(routes, committed.sizes)
            _, error = tried(lambda: self._memory.write(numbered(MANIFEST, step), committed.packed()))
            fail_together(error, self._comm)
        except CollectiveFailed:
            raise  # others may have gone on with this step, or with the one before: both stay
        except Exception:
            self._memory.discard(step)  # as every rank does
            raise
        self.sent = len(hops) * len(part)
        self._memory.keep_only(step)

    def _committed(self, step: int, plan: SavePlan, values: Mapping, part: memoryview) -> Committed:
        """What the manifest of this save says."""
        sums = b"".join(block_checksum(block) for block in cut_blocks(part, BLOCK))
        said = json.dumps([sums.hex(), values if self._rank == 0 else {}])
        told = [json.loads(text) for text in told_by_all(said, self._comm)]
        names = [part_name(step, rank) for rank in range(len(told))]
        checksums = {name: bytes.fromhex(text) for name, (text, _) in zip(names, told, strict=True)}
        sizes = {name: each.size for name, each in zip(names, plan.parts, strict=True)}
        return Committed(step, plan.table(step), told[0][1], checksums, sizes, BLOCK, len(names))

    def _recover(self) -> Committed:
        """Give each rank what it has to keep of the newest step of which all parts are in memory somewhere."""
        held = self._held_by_all()
        step = max((step for step in _steps(held) if _is_whole(step, held)), default=None)
        if step is None:
            raise NoCheckpoint("the ranks' memory holds no step of which every part is somewhere: load from the disk")
        name = numbered(MANIFEST, step)
        holder = next(rank for rank, names in enumerate(held) if name in names)
        text = self._memory.read(name).hex() if self._rank == holder else ""
        manifest = bytes.fromhex(told_by_all(text, self._comm)[holder])
        committed = Committed.unpacked(manifest, name)
        if committed.world_size != self._comm.world_size:
            raise NoCheckpoint(f"{committed.world_size} ranks kept step {step} in memory, and here are "
                               f"{self._comm.world_size}: load from the disk, as any number of ranks can")  # fmt: skip
        mine = [part_name(step, rank) for rank, keepers in enumerate(self.keepers) if self._rank in keepers]
        self.received = self._bring(committed, mine)
        _, error = tried(lambda: self._memory.write(name, manifest))
        fail_together(error, self._comm)
        self._memory.keep_only(step)
        return committed

    def _bring(self, committed: Committed, parts: Iterable[str]) -> int:
        """Bring parts into this rank's memory, each rank those that it asks for; bytes received here."""
        asked = [json.loads(text) for text in told_by_all(json.dumps(sorted(parts)), self._comm)]
        held, received = self._held_by_all(), 0
        for part in sorted({part for names in asked for part in names}):
            holder = next(rank for rank, names in enumerate(held) if part in names)
            wanting = [rank for rank, names in enumerate(asked) if part in names and part not in held[rank]]
            received += self._send([_Route(part, holder, rank) for rank in wanting], committed.sizes)
        return received

    def _send(self, routes: Sequence[_Route], sizes: Mapping[str, int]) -> int:
        """Send parts from memory to memory, a piece at a time; bytes received here. A collective.

        Args:
            routes: at most one from a rank to another one.
            sizes: of the parts.

        Raises:
            OSError, OtherRankFailed: if a rank has no room.
        """
        ranks, error, received = range(self._comm.world_size), None, 0
        incoming = [route for route in routes if route.target == self._rank]
        for route in incoming:
            self._memory.begin(route.part)
        for at in range(0, max((sizes[route.part] for route in routes), default=0), PIECE):
            inputs, outputs = ([torch.empty(0, dtype=torch.uint8) for _ in ranks] for _ in range(2))
            for part, source, target in routes:
                count = max(0, min(PIECE, sizes[part] - at))
                if source == self._rank and count:
                    inputs[target] = torch.frombuffer(bytearray(self._memory.read(part, at, count)), dtype=torch.uint8)
                if target == self._rank:
                    outputs[source] = torch.empty(count, dtype=torch.uint8)
            self._comm.all_to_all(outputs, inputs)
            for part, source, _ in incoming:
                if error is None:
                    _, error = tried(partial(self._memory.extend, part, memoryview(outputs[source].numpy())))
                received += len(outputs[source])
        fail_together(error, self._comm)
        for route in incoming:
            self._memory.finish(route.part)
        return received

    def _held_by_all(self) -> list[list[str]]:
        return [json.loads(text) for text in told_by_all(json.dumps(self._memory.names()), self._comm)]


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
