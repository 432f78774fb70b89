"""A request that makes the model raise ends alone; a failure that does not repeat ends nobody; all come to an end."""

import random

import pytest

from minilib.serving.asynchronous.fault_isolation import FaultIsolation
from minilib.serving.request import SamplingParams
from tests.serving import faults
from tests.serving.faults import Broken
from tests.serving.served import Results, alone, assert_idle, engine, greedy, likeliest, prompt

COUNT = 6


def breaking(served, breaks):
    """Let the model raise in each step for whose work, (sequence, count) each, `breaks` is true."""
    forward = served._forward

    def broken(work, interrupts):
        if breaks(work):
            raise Broken("no such row")
        return forward(work, interrupts)

    served._forward = broken
    return served


def finish(served, limit=2000):
    """Isolated steps until nothing is unfinished."""
    isolation, results, errors = FaultIsolation(served), Results(), {}
    for _ in range(limit):
        if not served.has_unfinished:
            break
        outputs = isolation.step()
        results.take(outputs)
        errors |= {output.request_id: output.error for output in outputs if output.error}
        served.check_invariants()
        isolation.check_invariants()
        assert served.scheduler.max_sequences == 256
    assert not served.has_unfinished, f"still unfinished after {limit} steps: {list(served.requests)}"
    assert_idle(served)
    assert not isolation.suspects
    return results, errors


def ran(name):
    return lambda work: any(sequence.request_id == name for sequence, _ in work)


def has_generated(name, count):
    return lambda work: any(s.request_id == name and s.num_output_tokens >= count for s, _ in work)


@pytest.mark.parametrize("others", [0, 1, 5])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("made", [0, 1, 3])
@pytest.mark.parametrize("budget", [2048, 7], ids=["whole prompts", "chunks"])
def test_who_makes_the_model_raise_ends_alone(others, place, made, budget):
    served = breaking(engine(max_batch_tokens=budget), has_generated("bad", made))
    names = [f"good {number}" for number in range(others)]
    for name in ["bad", *names] if place == "first" else [*names, "bad"]:
        served.add_request(name, prompt(11 + len(name), seed=len(name)), likeliest(COUNT))
    results, errors = finish(served)
    assert errors == {"bad": "its step raised Broken: no such row"}
    assert len(results.tokens.get(("bad", 0), ())) == made and results.reasons["bad", 0] == "error"
    for name in names:
        assert results.tokens[name, 0] == greedy(prompt(11 + len(name), seed=len(name)), COUNT)


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_failure_that_does_not_repeat_ends_nobody(failing):
    steps = []
    served = breaking(engine(), lambda work: steps.append(work) or len(steps) == failing)
    for name in range(1, 4):
        served.add_request(str(name), prompt(10 + name), likeliest(COUNT))
    results, errors = finish(served)
    assert not errors and len(steps) > failing
    for name in range(1, 4):
        assert results.tokens[str(name), 0] == greedy(prompt(10 + name), COUNT)


def test_a_model_that_always_raises_ends_all():
    served = breaking(engine(), lambda work: True)
    for name in range(5):
        served.add_request(str(name), prompt(10), likeliest(COUNT, n=1 + name % 3))
    results, errors = finish(served, limit=20)
    assert len(errors) == 5 and set(results.reasons.values()) == {"error"} and len(results.reasons) == 1 + 2 + 3 + 1 + 2


def test_every_sample_of_a_request_ends_and_keeps_its_text():
    params = SamplingParams(max_tokens=COUNT, temperature=1.5, seed=3, n=3)
    served = breaking(engine(), has_generated("bad", 2))
    served.add_request("wide", prompt(9), SamplingParams(max_tokens=COUNT, seed=1, n=4))
    served.add_request("bad", prompt(17), params)
    results, errors = finish(served)
    assert list(errors) == ["bad"]
    for sample, tokens in enumerate(alone(prompt(17), params)):
        assert results.tokens["bad", sample] == tokens[:2]
    for sample, tokens in enumerate(alone(prompt(9), SamplingParams(max_tokens=COUNT, seed=1, n=4))):
        assert results.tokens["wide", sample] == tokens


def test_text_that_was_held_back_comes_with_the_error():
    text = faults.Tokenizer().decode
    first = faults.faulty_engine(40, 4)
    first.add_request("a", (9, 10), likeliest(1))
    token = first.step()[0].token_id
    served = faults.faulty_engine(40, 4, tokenizer=faults.Tokenizer())
    served.add_request("a", (9, 10), likeliest(9, stop=text([token]) + "never"))
    assert [output.text for output in served.step()] == [""], "it may become the stop string"
    (ended,) = served.fail("a", "no more")
    assert (ended.text, ended.finish_reason, ended.error, ended.token_id) == (text([token]), "error", "no more", None)
    assert_idle(served)
    assert served.fail("a", "no more") == []


def test_suspects_that_are_aborted_hold_nobody_up():
    served = breaking(engine(), ran("bad"))
    for name in ("good", "bad", "late"):
        served.add_request(name, prompt(12), likeliest(COUNT))
    isolation = FaultIsolation(served)
    assert isolation.step() == [] and isolation.suspects == {"good", "bad", "late"}
    served.abort("bad")
    served.abort("good")
    results, errors = finish(served)
    assert not errors and results.tokens["late", 0] == greedy(prompt(12), COUNT)


def test_a_failure_with_no_request_in_it_is_the_engines_own():
    served = engine()
    served.add_request("a", prompt(12), likeliest(COUNT))

    def broken():
        raise Broken

    served.scheduler.schedule = broken
    with pytest.raises(Broken):
        FaultIsolation(served).step()


@pytest.mark.parametrize("seed", range(6))
def test_random_failures_of_a_crowded_engine_end_only_who_repeats_them(seed):
    """A third of the requests always raise, and one step in ten does whoever runs."""
    choices = random.Random(seed)
    served = faults.faulty_engine(14, 2, 12, max_batch_tokens=9, preemption=choices.choice(["recompute", "swap"]))
    bad = {str(number) for number in range(12) if choices.random() < 0.33}
    breaking(served, lambda work: choices.random() < 0.1 or any(s.request_id in bad for s, _ in work))
    kinds = {
        str(n): (
            tuple(choices.randrange(8, 37) for _ in range(choices.randint(1, 9))),
            likeliest(choices.randint(1, 9)),
        )
        for n in range(12)
    }
    for name, kind in kinds.items():
        served.add_request(name, *kind)
    results, errors = finish(served)
    assert bad <= set(errors)
    for name, kind in kinds.items():
        whole = faults.faulty_engine(40, 4)
        whole.add_request("alone", *kind)
        expected = finish(whole)[0].tokens.get(("alone", 0), ())
        received = results.tokens.get((name, 0), ())
        assert received == (expected if name not in errors else expected[: len(received)])
