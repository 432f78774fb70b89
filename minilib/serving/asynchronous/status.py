"""What an engine tells about itself: what it is, and what it does now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

State = Literal["starting", "ready", "restarting", "draining", "stopped"]


@dataclass(frozen=True)
class ModelDescription:
    """What a client has to know of the model and its engine.

    Args:
        max_length: most tokens of a sequence, prompt and generated together.
        vocab_size: tokens that the model knows.
        page_size: tokens in a page of the KV cache.
        num_pages: pages of the KV cache.
        fingerprint: of the model's shape and weights as it computes with them, in hexadecimal digits; equal in any two
            processes that serve the same model in the same form.
    """

    max_length: int
    vocab_size: int
    page_size: int
    num_pages: int
    fingerprint: str


@dataclass(frozen=True)
class EngineStatus:
    """The newest that is known of an engine; what is counted is counted since its start, and never falls.

    Args:
        state: whether it takes requests ("ready"), and if not, why.
        num_running: sequences that run.
        num_waiting: requests that have been submitted and have never run.
        num_pages: pages of the KV cache; 0 before the model is loaded.
        num_free_pages: those that no running sequence holds.
        prompt_tokens: tokens of the prompts that have been computed or taken from kept pages.
        cached_tokens: those that were taken from kept pages.
        generated_tokens: tokens that were handed out.
        preemptions: how often a sequence had to give way.
        steps: steps of the engine.
        restarts: how often its process was started again.
    """

    state: State
    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    restarts: int = 0


class Counts(NamedTuple):
    """What an engine does now, and what it has done; the names are those of `EngineStatus`."""

    num_running: int = 0
    num_free_pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0

    def after(self, earlier: Counts) -> Counts:
        """What counts since the start where an earlier engine, which has ended, has done this already."""
        return Counts(*self[:2], *(mine + before for mine, before in zip(self[2:], earlier[2:], strict=True)))
