"""Prompts computed elsewhere: the tokens are one engine's, and as many bytes and messages move as the pages take."""

import pytest

from minilib.serving.disaggregation.page_format import pages_to_move
from minilib.serving.request import SamplingParams
from tests.serving.disaggregation.workers import CONFIG, LAYER_PAGE_BYTES, PAGE, one_engine, pair, prompt
from tests.serving.served import likeliest

LENGTHS = (1, 2, PAGE - 1, PAGE, PAGE + 1, PAGE + 2, 3 * PAGE - 1, 3 * PAGE, 3 * PAGE + 1, 3 * PAGE + 2, 20)


@pytest.mark.parametrize("transport", ["shared", "tcp"])
@pytest.mark.parametrize("chunk", [3, PAGE, 7, 100])
def test_tokens_are_those_of_one_engine_and_bytes_those_of_the_pages(transport, chunk):
    requests = {f"greedy {length}": (prompt(length), likeliest(6)) for length in LENGTHS}
    seeded = SamplingParams(5, temperature=1.3, seed=3, n=3, ignore_eos=True)
    requests |= {f"seeded {length}": (prompt(length, 1), seeded) for length in LENGTHS}
    with pair(transport, prefill={"max_batch_tokens": chunk}) as workers:
        for name, (tokens, params) in requests.items():
            workers.decode.add_request(name, tokens, params)
        assert workers.finish().tokens == one_engine(requests)
        pages = 2 * sum(pages_to_move(length, PAGE) for length in LENGTHS)
        assert workers.near.content_bytes_sent == workers.far.content_bytes_received
        assert workers.near.content_bytes_sent == CONFIG.num_layers * pages * LAYER_PAGE_BYTES
        assert workers.near.num_sent["done"] == 2 * (len(LENGTHS) - 1), "a prompt of one token moves nothing"


@pytest.mark.parametrize(("chunk", "chunks"), [(3, 3), (PAGE, 3), (5, 3), (6, 2), (100, 1)])
def test_one_message_a_layer_and_chunk_that_fills_a_page(chunk, chunks):
    """11 tokens are computed: chunks of 3 end at 3, 6, 9, 11, and fill pages 1, 2, 3 at 6, 9 and 11."""
    with pair(prefill={"max_batch_tokens": chunk}) as workers:
        workers.decode.add_request("a", prompt(12), likeliest(2))
        workers.finish()
        assert workers.near.num_sent["pages"] == CONFIG.num_layers * chunks


def test_pages_leave_before_the_next_layer_is_computed():
    """When layer l + 1 begins to compute, the pages of layer l have been posted."""
    with pair() as workers:
        posted: list[int] = []
        engine = workers.prefill
        attention = engine._attention

        def watched(work):
            attend = attention(work)

            def look(layer, *qkv):
                posted.append(workers.near.num_sent.get("pages", 0))
                return attend(layer, *qkv)

            return look

        engine._attention = watched
        workers.decode.add_request("a", prompt(9), likeliest(1))
        engine.turn()
        assert posted == list(range(CONFIG.num_layers))


@pytest.mark.parametrize("design", ["hash", "radix"])
@pytest.mark.parametrize("length", [2 * PAGE, 2 * PAGE + 1, 2 * PAGE + 2, 19])
@pytest.mark.parametrize("side", ["prefill", "decode", "both"])
def test_only_missing_pages_move_and_only_missing_tokens_are_computed(design, side, length):
    kept = {"prefix_cache": design}
    options = {} if side == "both" else {side: kept}
    both = kept if side == "both" else {}
    first, second = prompt(length), prompt(length)[: 2 * PAGE] + prompt(5, 9)
    requests = {"first": (first, likeliest(4)), "second": (second, likeliest(4)), "third": (second, likeliest(4))}
    with pair(**options, **both) as workers:
        moved = []
        for name, (tokens, params) in requests.items():
            before = workers.near.content_bytes_sent
            workers.decode.add_request(name, tokens, params)
            workers.finish()
            moved.append((workers.near.content_bytes_sent - before) // (CONFIG.num_layers * LAYER_PAGE_BYTES))
        assert workers.results.tokens == one_engine(requests)
        pages = pages_to_move(length, PAGE), pages_to_move(len(second), PAGE)
        here = side != "prefill"
        # the first one's last token was computed at the decode worker, and its page is full there if 2 pages are
        hits = min(length // PAGE, 2) if here else 0
        assert moved == [pages[0], pages[1] - hits, pages[1] - 3 if here else pages[1]]
        if side != "decode":
            assert workers.prefill.prefix.tokens_matched >= (0 if here else 2 * PAGE)


def test_a_prompt_that_is_kept_here_asks_nobody():
    with pair(prefix_cache="hash") as workers:
        for name in ("a", "b"):
            workers.decode.add_request(name, prompt(9), likeliest(3))
            workers.finish()
        assert workers.far.num_sent["compute"] == 1
        assert workers.results.tokens["a", 0] == workers.results.tokens["b", 0]


def test_short_prompts_are_computed_here_if_they_are_to_be():
    with pair(decode={"least_tokens": 8}) as workers:
        requests = {str(length): (prompt(length), likeliest(3)) for length in (7, 8, 9, 20)}
        for name, request in requests.items():
            workers.decode.add_request(name, *request)
        assert workers.finish().tokens == one_engine(requests)
        assert workers.far.num_sent["compute"] == 2


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "srpt", "fair_share"])
def test_a_full_decode_worker_pulls_later_and_preempts_as_ever(preemption, policy):
    """14 pages for 12 requests: prompts are computed before there is room, and sequences give way."""
    requests = {str(k): (prompt(5 + k, 2), SamplingParams(12, seed=k, n=1 + k % 2, ignore_eos=True)) for k in range(12)}
    decode = {"num_pages": 14, "num_swap_pages": 20, "preemption": preemption, "policy": policy, "max_sequences": 5}
    with pair(decode=decode) as workers:
        for name, request in requests.items():
            workers.decode.add_request(name, *request)
        assert workers.finish().tokens == one_engine(requests)
        assert workers.near.num_sent["done"] == 12


def test_a_full_prefill_worker_computes_later():
    requests = {str(k): (prompt(14 + k % 3, k), likeliest(3)) for k in range(8)}
    with pair(prefill={"num_pages": 6}) as workers:
        for name, request in requests.items():
            workers.decode.add_request(name, *request)
        assert workers.finish().tokens == one_engine(requests)


def test_a_long_prompt_makes_no_step_longer_where_others_decode():
    """The decode worker computes one token of each sequence in every step; one engine computes the prompt, too."""
    with pair() as workers:
        longest, schedule = [], workers.decode.scheduler.schedule

        def watched():
            work = schedule()
            longest.append(max((count for _, count in work), default=0))
            return work

        workers.decode.scheduler.schedule = watched
        workers.decode.add_request("chat", prompt(2), likeliest(30))
        for _ in range(5):
            workers.turn()
        workers.decode.add_request("long", prompt(50), likeliest(3))
        workers.finish()
        assert max(longest) == 1 and len(longest) >= 30
