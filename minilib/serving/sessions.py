"""Conversations with a model whose KV caches stay between turns: session state, with tokens in the place of turns.

    the client sends every token of the conversation, always       an API without state
    the server holds a KV cache for most of them                   p + n − 1 − c tokens are computed, c of them cached
    or has lost it: evicted, restarted, asked somewhere else       p + n − 1: it costs time, the reply is the same

What is kept is a memo of the server's own work, so it may be forgotten at any time. Whether it belongs to a prompt is
decided by its tokens, never by the session's name alone: a history that was edited is computed anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from minilib.mechanisms.caching import Cache, EvictionPolicy
from minilib.model.decoder import Decoder
from minilib.serving.cache.contiguous import ContiguousCache
from minilib.serving.cache.sequences import NotAnExtension
from minilib.serving.generation import Generation, generate


class ModelSessions:
    """Generates replies, and keeps the KV caches of as many sessions as its memory holds.

    Args:
        model: the decoder; state belongs to these very weights.
        memory: bytes for the KV caches between turns; 0 keeps none.
        eviction: chooses which session is forgotten when memory runs out; serves this object alone.

    Attributes:
        sessions: the KV caches held now, each of the bytes of all its slots.
        num_lost: turns whose state was held and did not begin the prompt.

    Raises:
        ValueError: if memory is below 0.
    """

    def __init__(self, model: Decoder, memory: int, eviction: EvictionPolicy) -> None:
        self.model, self.num_lost = model, 0
        self.sessions = Cache(memory, eviction)

    def reply(self, session: Hashable, prompt: Sequence[int], max_tokens: int) -> Generation:
        """Continue a conversation by `max_tokens` tokens, each the likeliest.

        Args:
            session: its name.
            prompt: all tokens of the conversation so far, replies included.
            max_tokens: new tokens.

        Raises:
            InvalidRequest, SequenceTooLong, FloatingPointError: as `generate`; the session's state stays good.
        """
        state = self.sessions.get(session)
        if state is not None:
            try:
                state.check_extension([list(prompt)])
            except NotAnExtension:
                state, self.num_lost = None, self.num_lost + 1
        if state is None:
            state = ContiguousCache.for_model(self.model)
        generation = generate(self.model, [prompt], max_tokens, state)
        self.sessions.offer(session, state, state.nbytes)
        return generation

    def restart(self) -> None:
        """Lose all state, as a process does that ends."""
        for session in list(self.sessions):
            self.sessions.remove(session)
