"""Checkpoints: saved from any ranks and cuts, loaded on any others, written behind the steps; see checkpointer.py."""

from minilib.operations.checkpoint.background import AlreadySaved, SaveFailed, SaveInProgress
from minilib.operations.checkpoint.checkpointer import Checkpointer
from minilib.operations.checkpoint.format.folder import NoCheckpoint
from minilib.operations.checkpoint.format.table import Fragment, StateMismatch
from minilib.operations.checkpoint.loading import Loaded
from minilib.operations.checkpoint.states.cuts import (
    TrainerState,
    expert_parallel_state,
    pipeline_state,
    replica_state,
    strategy_state,
    tensor_parallel_state,
)
from minilib.operations.checkpoint.states.model_state import ModelState, Saveable
from minilib.operations.checkpoint.states.rng import RngState
from minilib.operations.checkpoint.states.zero_state import ZeroState
from minilib.operations.checkpoint.together import OtherRankFailed

__all__ = [
    "AlreadySaved",
    "Checkpointer",
    "Fragment",
    "Loaded",
    "ModelState",
    "NoCheckpoint",
    "OtherRankFailed",
    "RngState",
    "SaveFailed",
    "SaveInProgress",
    "Saveable",
    "StateMismatch",
    "TrainerState",
    "ZeroState",
    "expert_parallel_state",
    "pipeline_state",
    "replica_state",
    "strategy_state",
    "tensor_parallel_state",
]
