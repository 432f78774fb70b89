"""How old a kept page is: as its last use, which is the end of the sequence that read it in each of its steps."""

import pytest

from minilib.mechanisms.caching import Fifo, Lfu, Lru
from minilib.serving.cache.prefix import DESIGNS
from minilib.serving.request import SamplingParams
from tests.serving.served import engine, likeliest, prompt
from tests.serving.test_engine_prefix import ask


def run(served, count):
    for _ in range(count):
        served.step()
        served.check_invariants()


@pytest.mark.parametrize("policy, kept", [(Lru, True), (Lfu, True), (Fifo, False)])
@pytest.mark.parametrize("design", DESIGNS)
def test_what_a_long_answer_has_used_is_no_older_than_its_end(design, policy, kept):
    """A long answer begins, a short request comes and goes, the long one ends: then room is needed for two pages."""
    served = engine(10, 4, prefix_cache=design, eviction=policy())
    served.add_request("long", prompt(5), SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    run(served, 3)
    short = [9, 8, 7, 6, 5, 4, 3, 2, 1]
    served.add_request("short", short, SamplingParams(max_tokens=1, temperature=0))
    sequence = served.requests["long"][0]
    while served.has_unfinished:
        run(served, 1)
    held = served.prefix.index.match(list(zip(*[iter(sequence.token_ids)] * 4, strict=False))).values
    assert len(held) == 5 and len(served.prefix.index) == 7
    ask(served, [11] * 19, likeliest(1))  # five pages; three were empty
    left = served.prefix.index.match(list(zip(*[iter(sequence.token_ids)] * 4, strict=False))).values
    assert len(left) == (5 if kept else 3)


@pytest.mark.parametrize("design", DESIGNS)
def test_who_waits_is_looked_up_where_the_last_look_ended(design, monkeypatch):
    """The first in the queue has 8 kept pages and no room: each step looks at the page behind them, and at no other."""
    served = engine(16, 4, prefix_cache=design)
    ask(served, prompt(33), likeliest(1))
    served.add_request("runs", prompt(1), SamplingParams(max_tokens=27, temperature=0, ignore_eos=True))
    run(served, 22)
    served.add_request("waits", [*prompt(33), *range(20)], likeliest(1))
    index, looked = served.prefix.index, []
    find = index.find
    monkeypatch.setattr(index, "find", lambda position, tokens: looked.append(tokens) or find(position, tokens))
    served.step()
    first, steps = len(looked), 0
    while served.scheduler.waiting and steps < 3:
        looked.clear()
        served.step()
        steps += 1
        assert len(looked) <= (2 if design == "hash" else first + 1)
    assert first >= 8 and steps == 3
