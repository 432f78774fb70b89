"""Workers in processes of their own: the same tokens, the bytes and messages of the closed form; one that is killed."""

import multiprocessing
import os
import signal

import pytest

from minilib.serving.disaggregation.decode import DecodeEngine
from minilib.serving.disaggregation.meeting import ChannelListener, connect_to_worker
from minilib.serving.disaggregation.on_ranks import serve_on_ranks
from minilib.serving.disaggregation.page_format import pages_to_move
from minilib.serving.disaggregation.prefill import PrefillEngine
from minilib.serving.load.arrivals import Arrival
from tests.serving.disaggregation.workers import CONFIG, LAYER_PAGE_BYTES, PAGE, model, one_engine, prompt
from tests.serving.served import likeliest

LENGTHS = (1, 5, 9, 12, 21, 40)
OPTIONS = {"num_pages": 64, "page_size": PAGE}


@pytest.mark.parametrize(("transport", "workers"), [("shared", 1), ("tcp", 2), ("shared", 0)])
def test_tokens_bytes_and_messages_over_processes(transport, workers):
    load = [Arrival(0.0, prompt(length), likeliest(8)) for length in LENGTHS]
    report = serve_on_ranks(model, load, workers, transport, **OPTIONS)
    expected = one_engine({str(k): (each.prompt_token_ids, each.params) for k, each in enumerate(load)})
    assert {(str(k), 0): tuple(tokens) for k, tokens in enumerate(report.tokens)} == expected
    assert all(each.completed for each in report.times)
    pages = sum(pages_to_move(length, PAGE) for length in LENGTHS) if workers else 0
    assert report.content_bytes == CONFIG.num_layers * pages * LAYER_PAGE_BYTES
    assert report.messages >= (CONFIG.num_layers * (len(LENGTHS) - 1) if workers else 0)
    if not workers:
        assert report.messages == 0


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="≥ 0"):
        serve_on_ranks(model, [], -1)
    with pytest.raises(ValueError, match="transport"):
        serve_on_ranks(model, [], 1, "smoke signals")


def prefill_process(address):
    worker = PrefillEngine(model(), **OPTIONS)
    worker.attach(connect_to_worker(address, 30))
    worker.serve()


def decode_process(address):
    worker = DecodeEngine(model(), [connect_to_worker(address, 30)], **OPTIONS)
    worker.add_request("a", prompt(40), likeliest(20))
    worker.step()
    while True:
        signal.pause()


def test_a_prefill_process_that_is_killed():
    context = multiprocessing.get_context("forkserver")
    with ChannelListener("shared") as listener:
        process = context.Process(target=prefill_process, args=(listener.address,), daemon=True)
        process.start()
        channel = listener.accept(60, "the prefill process")
    try:
        worker = DecodeEngine(model(), [channel], timeout=60, on_failure="recompute", **OPTIONS)
        os.kill(process.pid, signal.SIGSTOP)  # it has the request, and answers nothing
        worker.add_request("a", prompt(40), likeliest(20))
        worker.step()
        assert worker.deliveries
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        tokens = []
        while worker.has_unfinished:
            tokens += [output.token_id for output in worker.step()]
        assert tuple(tokens) == one_engine({"a": (prompt(40), likeliest(20))})["a", 0]
        assert "the prefill process is gone" in worker.failures[0]
        worker.check_invariants()
    finally:
        process.kill()
        process.join(30)
        channel.close()


def test_a_decode_process_that_is_killed():
    context = multiprocessing.get_context("forkserver")
    with ChannelListener("tcp") as listener:
        process = context.Process(target=decode_process, args=(listener.address,), daemon=True)
        process.start()
        channel = listener.accept(60, "the decode process")
    try:
        worker = PrefillEngine(model(), **OPTIONS)
        worker.attach(channel)
        worker.serve(until=lambda: any(each.lease for each in worker.handovers.values()))
        assert worker.cache.pool.num_used == pages_to_move(40, PAGE)
        process.kill()
        worker.serve()  # ends as everybody has gone
        assert not worker.channels and worker.cache.pool.num_used == 0
        worker.check_invariants()
    finally:
        process.kill()
        process.join(30)
        channel.close()
