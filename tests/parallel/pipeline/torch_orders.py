"""What torch.distributed.pipelining's own schedule classes do, in what order, without ranks."""

import re

from torch import nn
from torch.distributed.pipelining import schedules as theirs

CLASSES = {
    "gpipe": theirs.ScheduleGPipe,
    "1f1b": theirs.Schedule1F1B,
    "breadth-first": theirs.ScheduleLoopedBFS,
    "interleaved": theirs.ScheduleInterleaved1F1B,
    "zero-bubble": theirs.ScheduleInterleavedZeroBubble,
    "zbv": theirs.ScheduleZBVZeroBubble,
    "dual-pipe-v": theirs.ScheduleDualPipeV,
}
VALIDATE, ADD_COMMUNICATION = theirs._validate_schedule, theirs._add_send_recv
SIMULATE = theirs._simulate_comms_compute


class FakeStage:
    """A stage that only notes what it is asked to do, in a list that all of them share."""

    def __init__(self, stage, rank, num_ranks, num_stages, done):
        self.stage_index, self.group_rank, self.group_size, self.num_stages = stage, rank, num_ranks, num_stages
        self.is_first, self.is_last, self.has_backward, self.submod = (
            stage == 0,
            stage == num_stages - 1,
            True,
            nn.Module(),
        )
        self.stage_index_to_group_rank = {number: number % num_ranks for number in range(num_stages)}
        self.device, self._done = "cpu", done

    def forward_one_chunk(self, microbatch, *args, **kwargs):
        self._done.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch, *args, **kwargs):
        self._done.append(f"{self.stage_index}B{microbatch}")

    def _no_messages(self, microbatch):
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _no_messages

    def perform_reduce_grad(self, scale):
        pass


def order(name, num_ranks, num_microbatches, stages_per_rank=1):
    """For each rank, the actions that torch's schedule takes, as text."""
    num_stages = num_ranks * stages_per_rank
    if name in ("gpipe", "1f1b"):
        return [executed(CLASSES[name], rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    v_shape = name in ("zbv", "dual-pipe-v")
    mine = (0, num_stages - 1) if v_shape else range(0, num_stages, num_ranks)
    stages = [FakeStage(stage, 0, num_ranks, num_stages, []) for stage in mine]
    schedule = CLASSES[name](stages, num_microbatches, loss_fn=lambda *_: None)
    return [flat(schedule.pipeline_order[rank]) for rank in range(num_ranks)]


def flat(actions):
    """Without waits, and with the two halves of overlapped actions one after the other."""
    return [found for action in actions if action is not None for found in re.findall(r"\d+[FBIW]\d+", str(action))]


def executed(schedule_class, rank, num_ranks, num_microbatches):
    """What runs; for the last rank `_get_pipeline_order` of Schedule1F1B prints something else."""
    done = []
    stage = FakeStage(rank, rank, num_ranks, num_ranks, done)
    schedule = schedule_class(stage, num_microbatches)
    schedule._initialize_stage = lambda *args: None
    schedule._step_microbatches([()] * num_microbatches, [{}] * num_microbatches)
    return done


def as_theirs(schedule):
    """Our schedule in their words: rank → their actions."""
    read = theirs._Action.from_str
    return {rank: [read(str(action)) for action in actions] for rank, actions in enumerate(schedule.actions)}
