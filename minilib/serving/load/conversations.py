"""Conversations: a load whose next prompt is all that was said before, and comes when the last answer has been read.

    turn 1    [ system prompt │ question 1 ] ─→ answer 1      pause
    turn 2    [ system prompt │ question 1 │ answer 1 │ question 2 ] ─→ answer 2      pause

Tenants have system prompts of their own. A conversation is a closed loop, and conversations begin by an open one; so a
slow server sees its turns later, and no fewer users.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

import numpy as np

from minilib.serving.load.arrivals import poisson_times


@dataclass(frozen=True)
class ChatTurn:
    """One question.

    Args:
        question: its tokens.
        answer_length: tokens of the answer, exactly.
        pause: seconds between the last token of the answer before and this question; 0 for the first.
    """

    question: tuple[int, ...]
    answer_length: int
    pause: float


@dataclass(frozen=True)
class ChatSession:
    """One conversation.

    Args:
        due: when its first question arrives, in seconds.
        tenant: whose system prompt it begins with.
        system: the tokens of that.
        turns: its questions.
    """

    due: float
    tenant: int
    system: tuple[int, ...]
    turns: tuple[ChatTurn, ...]


def chat_sessions(
    count: int,
    rate: float,
    *,
    num_turns: int = 6,
    tenants: int = 8,
    system_length: int = 1024,
    question_length: float = 400,
    answer_length: float = 24,
    pause: float = 5.0,
    vocab_size: int = 1000,
    seed: int = 0,
) -> list[ChatSession]:
    """Conversations that begin independently of each other; tenant i has a share in proportion to 1 / (i + 1).

    Args:
        count: conversations.
        rate: conversations that begin a second, on average.
        num_turns: questions of each.
        tenants: different system prompts.
        system_length: tokens of each of them; 0 for none.
        question_length, answer_length: mean tokens, uniform between a half and one and a half times as many.
        pause: mean seconds between an answer and the next question, exponentially distributed.
        vocab_size: tokens are drawn from so many.
        seed: same seed, same load.

    Raises:
        ValueError: if an argument is out of range.
    """
    if min(num_turns, tenants, question_length, answer_length) < 1 or system_length < 0 or pause < 0:
        raise ValueError("one turn, tenant and token or more are needed, a system_length and a pause of 0 or more")
    draws = np.random.default_rng(seed)
    systems = [_tokens(draws, system_length, vocab_size) for _ in range(tenants)]
    weights = 1 / np.arange(1, tenants + 1)
    sessions = []
    for due in poisson_times(count, rate, seed):
        tenant = int(draws.choice(tenants, p=weights / weights.sum()))
        turns = [
            ChatTurn(
                _tokens(draws, _around(draws, question_length), vocab_size),
                _around(draws, answer_length),
                float(draws.exponential(pause)) if number else 0.0,
            )
            for number in range(num_turns)
        ]
        sessions.append(ChatSession(due, tenant, systems[tenant], tuple(turns)))
    return sessions


def working_set(sessions: Row[ChatSession], begin: float, end: float, latency: float = 0.0) -> int:
    """Tokens that are worth keeping at the middle of a time: those of the conversations that go on, shared ones once.

    Args:
        sessions: the load.
        begin, end: the time, in seconds.
        latency: seconds that an answer is expected to take.
    """
    moment, tokens, systems = (begin + end) / 2, 0, {}
    for session in sessions:
        at = session.due
        for number, turn in enumerate(session.turns):
            at += turn.pause + latency * (number > 0)
            if at > moment:
                tokens += sum(len(said.question) + said.answer_length for said in session.turns[:number])
                if number:
                    systems[session.tenant] = len(session.system)
                break
    return tokens + sum(systems.values())


def _around(draws: np.random.Generator, mean: float) -> int:
    return max(1, int(draws.integers(int(mean / 2), int(mean * 1.5) + 1)))


def _tokens(draws: np.random.Generator, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(draws.integers(vocab_size, size=length).tolist())
