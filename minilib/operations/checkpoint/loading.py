"""Load a checkpoint into a state that is there, on any ranks and in any cut; or say by name why it does not fit."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from minilib.operations.checkpoint.format.folder import Committed
from minilib.operations.checkpoint.format.reading import PartReader, RangeSource, ReadTally
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch, check_fits
from minilib.operations.checkpoint.states.model_state import Saveable
from minilib.operations.checkpoint.together import fail_together, told_by_all, tried
from minilib.ranks.collectives import Communicator


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Args:
        step: of the run.
        tally: bytes that this rank read for it.
    """

    step: int
    tally: ReadTally


def load_state(
    states: Mapping[str, Saveable],
    committed: Committed,
    source: RangeSource,
    comm: Communicator | None,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Fill the tensors of all states, and give them their values. A collective.

    Args:
        states: by the names that they were saved under.
        committed: what the manifest says.
        source: of the parts.
        comm: between all ranks; None on one process.
        ignore: patterns of names of tensors and of states that are left as they are, such as "optimizer.*".

    Raises:
        StateMismatch: if the checkpoint lacks a tensor or a state that is asked for, has one that nobody asks for, or
            has one of another shape or dtype. Nothing is loaded then.
        PartDamaged: if a part is damaged; the state is then loaded in part, and of no use.
        OtherRankFailed: if this happens on another rank.
        ValueError: as a state's `prepare`.
    """
    prepared, error = tried(lambda: fragments_to_fill(states, committed, ignore))
    fail_together(error, comm)
    fragments, known = prepared
    held = told_by_all(json.dumps(sorted({fragment.name for fragment in fragments} | known)), comm)
    _, error = tried(lambda: _refuse_leftovers(committed, {name for text in held for name in json.loads(text)}))
    fail_together(error, comm)
    reader = PartReader(source, committed.checksums, committed.sizes, committed.block_bytes)
    _, error = tried(lambda: reader.read(fragments, committed.table))
    fail_together(error, comm)
    for name, state in states.items():
        state.accept(committed.values[name])
    return Loaded(committed.step, reader.tally)


def fragments_to_fill(
    states: Mapping[str, Saveable], committed: Committed, ignore: Sequence[str]
) -> tuple[list[Fragment], set[str]]:
    """Prepare states for a checkpoint: their fragments, and the names of tensors that are knowingly not loaded.

    Raises:
        StateMismatch, ValueError: see `load_state`.
    """
    lacking = [name for name in states if name not in committed.values]
    left = [name for name in committed.values if name not in states and not _matches(name, ignore)]
    if lacking or left:
        which = f"has no {lacking[0]!r}" if lacking else f"has {left[0]!r}, which nobody asks for"
        raise StateMismatch(f"the checkpoint of step {committed.step} {which}: it holds {sorted(committed.values)}, "
                            f"and {sorted(states)} are to be loaded; ignore= names what to leave out")  # fmt: skip
    ignored = {name for name in committed.table if _matches(name, ignore)}
    stored = {name: tensor for name, tensor in committed.table.items() if name not in ignored}
    for name, state in states.items():
        ignored |= state.prepare(stored, committed.values[name])
    fragments = [each for state in states.values() for each in state.fragments()]
    fragments = [each for each in fragments if not _matches(each.name, ignore)]
    check_fits(fragments, committed.table)
    return fragments, ignored


def _refuse_leftovers(committed: Committed, known: Collection[str]) -> None:
    left = sorted(committed.table.keys() - known)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise StateMismatch(f"the checkpoint of step {committed.step} holds {left[0]}{more}, for which no rank has a "
                            "place: it is of another model, or name in ignore= what is to be left out")  # fmt: skip


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
