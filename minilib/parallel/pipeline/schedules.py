"""The schedules there are. Each function returns who does what, for p ranks and m microbatches.

    gpipe            all forwards, then all backwards
    1f1b             as few forwards ahead as keep the ranks busy, then a forward and a backward by turns
    breadth-first    gpipe with several stages a rank, stage by stage
    interleaved      1f1b with several stages a rank, a few microbatches of one stage, then of the next
    zero-bubble      1f1b with split backwards: weight gradients fill bubbles (ZB-H1; with several stages a rank, too)
    zbv              split backwards, and stages down the ranks and back up again, in the form of a V
    dual-pipe-v      the same V; a forward and a backward of different microbatches side by side

Sources: Huang et al. 2019 (GPipe); Narayanan et al. 2019 and 2021 (1F1B, interleaved); Lamy-Poirier 2022
(breadth-first); Qi et al. 2023 (zero bubble) and 2024 (V); DeepSeek-AI 2024 (DualPipe), and its cut in half, DualPipeV.
Orders are those of torch.distributed.pipelining, where it has them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from minilib.parallel.pipeline.schedule import Action, PipelineSchedule


class ImpossibleSchedule(ValueError):
    """There is no such schedule for so many ranks, stages and microbatches."""


def gpipe(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """All forwards, then all backwards. Activations of all m microbatches are held; bubble (p-1)/(m+p-1)."""
    microbatches = range(num_microbatches)
    rows = [[Action(rank, kind, microbatch) for kind in "FB" for microbatch in microbatches]
            for rank in range(num_ranks)]  # fmt: skip
    return _schedule("gpipe", num_microbatches, range(num_ranks), rows)


def one_forward_one_backward(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Activations of at most p - rank microbatches are held; bubble as of gpipe."""
    rows = []
    for rank in range(num_ranks):
        ahead = min(num_microbatches, num_ranks - 1 - rank)
        rows.append(_by_turns(num_microbatches, ahead, lambda kind, number, rank=rank: Action(rank, kind, number)))
    return _schedule("1f1b", num_microbatches, range(num_ranks), rows)


def breadth_first(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> PipelineSchedule:
    """All microbatches through a rank's first stage, then all through its next; backwards likewise, last ones first."""
    rank_of, microbatches = _loop(num_ranks, stages_per_rank), range(num_microbatches)
    rows = []
    for rank in range(num_ranks):
        stages = range(rank, len(rank_of), num_ranks)
        row = [Action(stage, "F", microbatch) for stage in stages for microbatch in microbatches]
        row += [Action(stage, "B", microbatch) for stage in reversed(stages) for microbatch in reversed(microbatches)]
        rows.append(row)
    return _schedule("breadth-first", num_microbatches, rank_of, rows)


def interleaved(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> PipelineSchedule:
    """1F1B over stages that are dealt to ranks by turns: 1/stages_per_rank of the bubble, as many times the messages.

    Raises:
        ImpossibleSchedule: if microbatches do not divide into rounds, each of num_ranks or a few more.
    """
    _refuse_none("interleaved", num_ranks, num_ranks * stages_per_rank, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        order = _Interleaving(num_ranks, num_microbatches, stages_per_rank, rank)
        ahead = order.each_round * (stages_per_rank - 1) + 2 * (num_ranks - 1 - rank)
        total = num_microbatches * stages_per_rank
        rows.append(_by_turns(total, min(total, ahead), order.action))
    return _schedule("interleaved", num_microbatches, _loop(num_ranks, stages_per_rank), rows)


def zero_bubble(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> PipelineSchedule:
    """Weight gradients wait, on rank r for r more backwards, and fill the end; memory as of 1F1B.

    The bubble is (p-1)(F+I-W) with one stage a rank, where W takes no longer than F.

    Raises:
        ImpossibleSchedule: as `interleaved`, with one stage a rank, too: rounds do not matter there, but torch's class
            refuses such numbers, so there is no order of torch's to compare with.
    """
    _refuse_none("zero-bubble", num_ranks, num_ranks * stages_per_rank, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        order = _Interleaving(num_ranks, num_microbatches, stages_per_rank, rank)
        total = num_microbatches * stages_per_rank
        ahead = min(total, order.each_round * (stages_per_rank - 1) + num_ranks - 1 - rank)
        row: list[Action] = []
        backwards: list[Action] = []
        for action in _by_turns(total, ahead, order.action):
            if action.kind == "F":
                row.append(action)
                continue
            backwards.append(action)
            row.append(action._replace(kind="I"))
            if len(backwards) > rank:
                row.append(backwards[len(backwards) - 1 - rank]._replace(kind="W"))
        row += [action._replace(kind="W") for action in backwards[max(0, total - rank) :]]
        rows.append(row)
    return _schedule("zero-bubble", num_microbatches, _loop(num_ranks, stages_per_rank), rows)


def zbv(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Two stages a rank in a V: no bubble between a rank's first and last action if F = I = W; memory as of 1F1B."""
    rows = []
    for rank in range(num_ranks):
        do = _Counted(down := rank, up := 2 * num_ranks - 1 - rank)
        length = max(num_microbatches, 2 * num_ranks - 1)  # shorter ones are what is left of one that fills the ranks
        do("F" * (2 * (num_ranks - rank) - 1), down)
        for _ in range(rank):
            do("F", up)
            do("F", down)
        for _ in range(num_ranks - rank):
            do("FIW", up)
        while do.count(up, "F") < length:
            do("FIW" if do.count(down, "F") < length else "IW", down)
            do("FIW", up)
        for _ in range(rank):
            do("I", down)
            do("I", up)
        for _ in range(num_ranks - rank):
            do("IW", down)
        do("W" * (length - do.count(up, "W")), up)
        do("W" * (length - do.count(down, "W")), down)
        rows.append([action for action in do.actions if action.microbatch < num_microbatches])
    return _schedule("zbv", num_microbatches, _v(num_ranks), rows)


def dual_pipe_v(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """A V whose forwards and backwards run side by side, so that one computes while the other communicates.

    Here they run one after the other. Backwards are split only where that fills a bubble, at both ends.

    Raises:
        ImpossibleSchedule: for fewer microbatches than stages.
    """
    if num_microbatches < 2 * num_ranks:
        raise ImpossibleSchedule(
            f"dual-pipe-v needs as many microbatches as stages, which are {2 * num_ranks}, got {num_microbatches}; "
            "cut the batch into more, or use zbv"
        )
    rows = []
    for rank in range(num_ranks):
        do, after = _Counted(down := rank, up := 2 * num_ranks - 1 - rank), num_ranks - 1 - rank
        do("F" * (2 * after), down)
        for _ in range(rank + 1):
            do("F", down)
            do("F", up)
        for _ in range(after):
            do("I", up)
            do.late_weights()
            do("F", up)
        for _ in range(num_microbatches - 2 * num_ranks + rank + 1):
            for one, other in ((down, up), (up, down)):
                do("F", one)
                do("B", other)
        for _ in range(after):
            do("B", up)
            do("F", up)
            do("B", down)
        for number in range(2 * (rank + 1)):
            do("B" if number <= rank else "I", down if number % 2 else up)
        for _ in range(after):
            do.late_weights()
            do("I", down)
        for _ in range(rank + 1):
            do.late_weights()
        rows.append(do.actions)
    return _schedule("dual-pipe-v", num_microbatches, _v(num_ranks), rows)


SCHEDULES: dict[str, Callable[..., PipelineSchedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "breadth-first": breadth_first,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
    "zbv": zbv,
    "dual-pipe-v": dual_pipe_v,
}


class _Interleaving:
    """Which stage and microbatch a rank's n-th forward and n-th backward are of, when several stages take turns."""

    def __init__(self, num_ranks: int, num_microbatches: int, stages_per_rank: int, rank: int) -> None:
        rounds = max(1, num_microbatches // num_ranks)
        if num_microbatches % rounds:
            raise ImpossibleSchedule(
                f"{num_microbatches} microbatches do not divide into {rounds} rounds over {num_ranks} ranks; "
                f"make them a multiple of {rounds}, or of {num_ranks}"
            )
        self.each_round = num_microbatches // rounds
        self._ranks, self._stages, self._rank = num_ranks, stages_per_rank, rank

    def action(self, kind: str, number: int) -> Action:
        """The n-th forward or backward of the rank."""
        turn, place = divmod(number, self.each_round)
        whole_round, local = divmod(turn, self._stages)
        if kind == "B":
            local = self._stages - 1 - local
        return Action(local * self._ranks + self._rank, kind, whole_round * self.each_round + place)


class _Counted:
    """A rank's actions on two stages, each stage's microbatches in order."""

    def __init__(self, *stages: int) -> None:
        self.actions: list[Action] = []
        self._counts: Counter = Counter()
        self._late: deque[Action] = deque()  # weight gradients that wait

    def __call__(self, kinds: str, stage: int) -> None:
        """Take the next action of each kind on a stage. I's weights wait in a queue, for `late_weights` or for a W."""
        for kind in kinds:
            name = "I" if kind == "B" else kind
            action = Action(stage, kind, self._counts[stage, name])
            self._counts[stage, name] += 1
            self.actions.append(action)
            if kind == "I":
                self._late.append(action._replace(kind="W"))

    def late_weights(self) -> None:
        """Take the weight gradients that have waited longest, if any do."""
        if self._late:
            self.actions.append(self._late.popleft())

    def count(self, stage: int, kind: str) -> int:
        """How many actions of a kind a stage has had."""
        return self._counts[stage, kind]


def _by_turns(total: int, ahead: int, action: Callable[[str, int], Action]) -> list[Action]:
    """So many forwards ahead, then a forward and a backward by turns, then the backwards that are left."""
    row = [action("F", number) for number in range(ahead)]
    for number in range(total - ahead):
        row += [action("F", ahead + number), action("B", number)]
    return row + [action("B", number) for number in range(total - ahead, total)]


def _loop(num_ranks: int, stages_per_rank: int) -> list[int]:
    return list(range(num_ranks)) * stages_per_rank


def _v(num_ranks: int) -> list[int]:
    return [*range(num_ranks), *reversed(range(num_ranks))]


def _schedule(
    name: str, num_microbatches: int, rank_of: Sequence[int], rows: Sequence[Sequence[Action]]
) -> PipelineSchedule:
    _refuse_none(name, len(rows), len(rank_of), num_microbatches)
    return PipelineSchedule(name, num_microbatches, tuple(rank_of), tuple(map(tuple, rows)))


def _refuse_none(name: str, num_ranks: int, num_stages: int, num_microbatches: int) -> None:
    if num_ranks < 1 or num_stages < 1 or num_microbatches < 1:
        raise ImpossibleSchedule(
            f"{name} needs 1 rank or more, 1 stage a rank or more and 1 microbatch or more; "
            f"got {num_ranks} ranks, {num_stages} stages and {num_microbatches} microbatches"
        )
