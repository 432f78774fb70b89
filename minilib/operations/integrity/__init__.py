"""Silent corruption: replicas that compare checksums, gradients computed twice, and which checkpoint is still good."""

from minilib.operations.integrity.checked_steps import CheckedSteps, CheckpointNotAsNoted, NoGoodCheckpoint
from minilib.operations.integrity.checksums import combined_checksum, content_checksum
from minilib.operations.integrity.flips import flip_bit
from minilib.operations.integrity.recompute import RecomputeCheck
from minilib.operations.integrity.replicas import ReplicaCheck
from minilib.operations.integrity.verdict import IntegrityVerdict

__all__ = [
    "CheckedSteps",
    "CheckpointNotAsNoted",
    "IntegrityVerdict",
    "NoGoodCheckpoint",
    "RecomputeCheck",
    "ReplicaCheck",
    "combined_checksum",
    "content_checksum",
    "flip_bit",
]
