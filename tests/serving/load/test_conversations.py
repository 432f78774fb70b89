"""Conversations are drawn as asked for, and the same for the same seed."""

from collections import Counter

import numpy as np
import pytest

from minilib.serving.load.conversations import ChatSession, ChatTurn, chat_sessions, working_set


def test_sessions_are_as_asked_for():
    sessions = chat_sessions(400, 2.0, num_turns=3, tenants=2, system_length=10, question_length=20, pause=4.0, seed=1)
    assert sessions == chat_sessions(
        400, 2.0, num_turns=3, tenants=2, system_length=10, question_length=20, pause=4.0, seed=1
    )
    assert sessions != chat_sessions(
        400, 2.0, num_turns=3, tenants=2, system_length=10, question_length=20, pause=4.0, seed=2
    )
    assert len({session.system for session in sessions}) == 2 and {len(s.turns) for s in sessions} == {3}
    assert 1.7 < 400 / sessions[-1].due < 2.3
    turns = [turn for session in sessions for turn in session.turns]
    lengths = [len(turn.question) for turn in turns]
    assert min(lengths) == 10 and max(lengths) == 30 and 19 < np.mean(lengths) < 21
    assert all(session.turns[0].pause == 0 for session in sessions)
    assert 3.5 < np.mean([turn.pause for session in sessions for turn in session.turns[1:]]) < 4.5
    assert 2 * 0.8 < Counter(s.tenant for s in sessions)[0] / Counter(s.tenant for s in sessions)[1] < 2 * 1.25


def test_the_working_set_counts_what_is_said_and_needed_again():
    turns = (ChatTurn((1,) * 10, 5, 0.0), ChatTurn((2,) * 10, 5, 10.0), ChatTurn((3,) * 10, 5, 10.0))
    one = ChatSession(0.0, 0, (0,) * 100, turns)
    assert [working_set([one], 0, 2 * moment) for moment in (5, 15, 25)] == [115, 130, 0]
    assert working_set([one, one], 0, 10) == 130, "a system prompt counts once"
    assert working_set([one], 0, 22, latency=3.0) == 115


@pytest.mark.parametrize("wrong", [{"num_turns": 0}, {"tenants": 0}, {"pause": -1}, {"system_length": -1}, {"rate": 0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        chat_sessions(**{"count": 1, "rate": 1.0} | wrong)
