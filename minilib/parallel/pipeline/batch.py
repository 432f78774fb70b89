"""A step's batch, before anything of it is sent: can the pipeline run it, and is it the same on every rank?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from minilib.parallel.pipeline.schedule import PipelineSchedule
from minilib.parallel.pipeline.stage import Microbatch
from minilib.ranks.agreement import checksum


def check_batch(microbatches: Sequence[Microbatch], num_tokens: int | None, schedule: PipelineSchedule) -> None:
    """Refuse what `PipelineParallel.step` cannot run.

    Raises:
        RuntimeError: if gradients are off.
        TypeError: for what is no Microbatch.
        ValueError: for another number of microbatches than the schedule's, targets of another shape than their tokens,
            a num_tokens that is no whole number ≥ 1, or if no token counts and num_tokens is left out.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("gradients are off, and a step needs them: call step outside torch.no_grad() and "
                           "torch.inference_mode()")  # fmt: skip
    if len(microbatches) != schedule.num_microbatches:
        raise ValueError(f"{schedule.name} is made for {schedule.num_microbatches} microbatches, "
                         f"got {len(microbatches)}")  # fmt: skip
    for number, microbatch in enumerate(microbatches):
        if not isinstance(microbatch, Microbatch):
            raise TypeError(f"microbatch {number} has to be a Microbatch, as cut_batch makes them; "
                            f"got a {type(microbatch).__name__}")  # fmt: skip
        tokens, targets = tuple(microbatch.token_ids.shape), tuple(microbatch.targets.shape)
        if tokens != targets:
            raise ValueError(f"microbatch {number} has token_ids of shape {tokens} and targets of shape {targets}; "
                             "every token needs one target")  # fmt: skip
    if num_tokens is None:
        if not any(microbatch.num_tokens for microbatch in microbatches):
            raise ValueError("no token of this batch counts: all targets are ignored")
    elif not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
        raise ValueError(f"num_tokens is a whole number ≥ 1, got {num_tokens!r}")


def batch_checksum(microbatches: Sequence[Microbatch], num_tokens: int | None) -> str:
    """8 digits that tell a step's microbatches and num_tokens from others.

    Cost: one pass over token ids, positions and targets at about 1 GB/s.
    """
    parts = [(tuple(part.shape), str(part.dtype), checksum(part)) for each in microbatches for part in each]
    return f"{zlib.crc32(repr((parts, num_tokens)).encode()):08x}"
