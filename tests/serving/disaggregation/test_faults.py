"""What goes wrong between two workers: each fault ends by name, both sides free what they held, others go on."""

import pytest
import torch

from minilib.serving.disaggregation.channel import Packet
from minilib.serving.disaggregation.decode import DecodeEngine
from minilib.serving.request import InvalidRequest
from tests.serving.disaggregation.workers import CONFIG, PAGE, FakeClock, channels, model, one_engine, pair, prompt
from tests.serving.served import likeliest

LONG = 14


def errors(workers):
    """Step the decode worker until a request ends by an error; its text."""
    for _ in range(50):
        for output in workers.decode.step():
            if output.error:
                workers.decode.check_invariants()
                return output.error
    raise AssertionError("no request ended by an error")


def computed(workers, name="a", pages_here=0):
    """Have a prompt computed while the decode worker has no room to pull it; the leases at the prefill worker."""
    hog = workers.decode.cache.new_table()
    hog.append(workers.decode.cache.num_slots - pages_here * PAGE)
    workers.decode.add_request(name, prompt(LONG), likeliest(3))
    for _ in range(3):
        workers.prefill.turn()
    assert [each.lease is not None for each in workers.prefill.handovers.values()] == [True]
    return hog


def test_a_lease_that_nobody_renews_expires_and_a_late_read_fails_by_name():
    clock = FakeClock()
    with pair(prefill={"clock": clock, "lease": 30.0}) as workers:
        hog = computed(workers)
        leased = set(next(iter(workers.prefill.handovers.values())).lease.frames)
        clock.now = 29.9
        workers.prefill.turn()
        assert workers.prefill.cache.pool.num_used == len(leased) == 4
        clock.now = 30.0
        workers.prefill.turn()
        assert workers.prefill.cache.pool.num_used == 0 and workers.prefill.expired == 1
        # another prompt gets the very pages that the lease held
        with channels() as (near, far):
            workers.prefill.attach(near)
            other = DecodeEngine(model(), [far], num_pages=32, page_size=PAGE)
            other.add_request("other", prompt(LONG, 5), likeliest(3))
            workers.prefill.turn()
            frames = set(next(iter(workers.prefill.handovers.values())).lease.frames)
            assert frames == leased
            moved = workers.near.content_bytes_sent
            hog.release()
            workers.decode.step()  # has room now, and pulls
            workers.prefill.turn()
            assert "LeaseExpired" in errors(workers)
            assert workers.near.content_bytes_sent == moved == 0, "pages of somebody else were read"
            other.close()
            workers.prefill.turn()
        workers.assert_empty()


def test_a_decode_worker_that_waits_for_room_renews_its_leases():
    clocks = FakeClock(), FakeClock()
    with pair(prefill={"clock": clocks[0], "lease": 30.0}, decode={"clock": clocks[1]}) as workers:
        hog = computed(workers)
        for second in range(0, 200, 9):
            clocks[0].now = clocks[1].now = second
            workers.decode.step()
            workers.prefill.turn()
        assert workers.prefill.expired == 0 and len(workers.prefill.handovers) == 1
        hog.release()
        assert workers.finish().tokens == one_engine({"a": (prompt(LONG), likeliest(3))})


def test_a_request_refused_before_it_is_admitted_leaves_nothing_at_the_prefill_worker():
    """Refused by its shape, nothing is asked for; ended while it waits for room, its lease is released."""
    with pair() as workers:
        with pytest.raises(InvalidRequest):
            workers.decode.add_request("too long", prompt(CONFIG.max_position), likeliest(9))
        assert "compute" not in workers.far.num_sent
        hog = computed(workers)
        [output] = workers.decode.fail("a", "refused by admission control")
        assert output.finish_reason == "error"
        workers.prefill.turn()
        assert not workers.prefill.handovers and workers.prefill.cache.pool.num_used == 0
        hog.release()
        workers.assert_empty()


def test_a_prompt_that_the_prefill_worker_cannot_take_ends_by_name():
    with pair(prefill={"num_pages": 2}) as workers:
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        workers.decode.add_request("b", prompt(5), likeliest(3))
        workers.prefill.turn()
        assert "did not arrive" in errors(workers)
        assert set(workers.finish().tokens) == {("b", 0)}


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("room", [True, False])
def test_cancelled_in_every_state_frees_both_sides(turns, room):
    """Before it is computed, between chunks, on its way, without room, running: and its twin is not touched."""
    with pair(prefill={"max_batch_tokens": 4}) as workers:
        hog = workers.decode.cache.new_table()
        hog.append(0 if room else workers.decode.cache.num_slots)
        workers.decode.add_request("cancelled", prompt(LONG), likeliest(9))
        for _ in range(turns):
            workers.prefill.turn()
            if room:
                workers.decode.step()
        assert workers.decode.abort("cancelled")
        workers.decode.check_invariants() if room else None
        hog.release()
        assert workers.decode.cache.pool.num_used == 0, "frames of a cancelled request are free at once"
        workers.decode.add_request("twin", prompt(LONG, 3), likeliest(4))  # gets the same frames
        workers.results.tokens.clear()
        assert workers.finish().tokens == one_engine({"twin": (prompt(LONG, 3), likeliest(4))})


def test_pages_that_come_late_are_thrown_away():
    with pair() as workers:
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        workers.prefill.turn()
        workers.decode.abort("a")
        workers.decode.cache.k.fill_(7.0)
        workers.prefill.turn()
        workers.decode.step()
        assert workers.decode.num_late == CONFIG.num_layers
        assert bool((workers.decode.cache.k == 7.0).all()), "a late page was written into a frame"
        workers.assert_empty()


@pytest.mark.parametrize("transport", ["shared", "tcp"])
@pytest.mark.parametrize("on_failure", ["fail", "recompute"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_prefill_worker_that_dies(transport, on_failure, turns):
    with pair(transport, prefill={"max_batch_tokens": 4}, decode={"on_failure": on_failure}) as workers:
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        for _ in range(turns):
            workers.turn()
        workers.near.close()
        if on_failure == "fail":
            assert "the prefill worker is gone" in errors(workers)
            assert workers.decode.cache.pool.num_used == 0
            workers.decode.add_request("b", prompt(LONG), likeliest(3))
            assert "no prefill worker is left" in errors(workers)
        else:
            workers.decode.add_request("b", prompt(LONG), likeliest(3))
            while workers.decode.has_unfinished:
                workers.results.take(workers.decode.step())
            expected = one_engine({name: (prompt(LONG), likeliest(3)) for name in "ab"})
            assert workers.results.tokens == expected and workers.decode.failures


@pytest.mark.parametrize("turns", range(6))
def test_a_decode_worker_that_dies(turns):
    """Its pages are freed, and another decode worker is served as ever."""
    with pair(prefill={"max_batch_tokens": 4}) as workers, channels() as (near, far):
        workers.prefill.attach(near)
        other = DecodeEngine(model(), [far], 32, PAGE)
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        other.add_request("b", prompt(LONG), likeliest(3))
        for _ in range(turns):
            workers.prefill.turn()
            workers.decode.step()
        workers.far.close()
        tokens = []
        while other.has_unfinished:
            workers.prefill.turn()
            workers.prefill.check_invariants()
            tokens += [output.token_id for output in other.step()]
        assert tuple(tokens) == one_engine({"b": (prompt(LONG), likeliest(3))})["b", 0]
        workers.prefill.turn()
        assert list(workers.prefill.channels) == [near] and workers.prefill.cache.pool.num_used == 0


@pytest.mark.parametrize("on_failure", ["fail", "recompute"])
def test_a_prefill_worker_that_is_silent_counts_as_dead(on_failure):
    clock = FakeClock()
    with pair(decode={"clock": clock, "timeout": 10.0, "on_failure": on_failure}) as workers:
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        workers.decode.step()
        clock.now = 10.0
        assert not workers.decode.step() and workers.decode.deliveries
        clock.now = 10.1
        outputs = workers.decode.step()
        assert "has said nothing for 10 s" in workers.decode.failures[0] and not workers.decode.peers
        assert [output.finish_reason for output in outputs] == (["error"] if on_failure == "fail" else [None])


def test_a_prefill_worker_that_is_busy_with_others_says_that_it_lives():
    clocks = FakeClock(), FakeClock()
    options = {"prefill": {"clock": clocks[0], "max_batch_tokens": 1}, "decode": {"clock": clocks[1], "timeout": 10.0}}
    with pair(**options) as workers:
        for name in "ab":
            workers.decode.add_request(name, prompt(LONG), likeliest(1))
        while workers.decode.has_unfinished:
            clocks[0].now = clocks[1].now = clocks[0].now + 4.0
            workers.turn()
        assert not workers.decode.failures and workers.near.num_sent["alive"] > 5


def test_an_epoch_of_another_life_is_refused():
    with pair() as workers:
        workers.decode.peers[0].epoch += 1
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        workers.prefill.turn()
        assert not workers.prefill.channels and not workers.prefill.requests
        assert "is gone" in errors(workers)


@pytest.mark.parametrize("place", [{"layer": 1, "first": 2, "stop": 4}, {"layer": 1, "first": 0, "stop": 5}])
def test_pages_that_nobody_asked_for_end_the_transfer(place):
    """A page is left out, or there is one too many."""
    with pair() as workers:
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        workers.near.post(Packet("pages", {"number": 0} | place, torch.zeros(64, dtype=torch.uint8)))
        assert "nobody has asked for" in errors(workers)
        assert workers.decode.cache.pool.num_used == 0


@pytest.mark.parametrize(("room", "why"), [(True, "no pages of layer 0"), (False, "nobody has asked for")])
def test_done_without_all_pages_is_a_failure(room, why):
    with pair() as workers:
        hog = workers.decode.cache.new_table()
        hog.append(0 if room else workers.decode.cache.num_slots)
        workers.decode.add_request("a", prompt(LONG), likeliest(3))
        workers.near.post(Packet("done", {"number": 0}))
        [output] = workers.decode.step()
        assert why in output.error
        hog.release()
        assert workers.decode.cache.pool.num_used == 0


def test_a_prompt_that_makes_the_model_raise_ends_alone():
    with pair() as workers:
        forward = workers.prefill._forward

        def raises(work, interrupts):
            if any(sequence.num_prompt_tokens == LONG - 1 for sequence, _ in work):
                raise RuntimeError("bad prompt")
            return forward(work, interrupts)

        workers.prefill._forward = raises
        workers.decode.add_request("bad", prompt(LONG), likeliest(3))
        workers.decode.add_request("good", prompt(9), likeliest(3))
        finished = workers.finish()
        assert finished.reasons == {("bad", 0): "error", ("good", 0): "length"}
        assert "bad prompt" in workers.decode.failures[0]
