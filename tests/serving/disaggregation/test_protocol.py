"""Packets of another program, or of another version of this one: refused by name, and what was held is free."""

import asyncio
import json

import pytest
import torch

from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.disaggregation.channel import MAGIC, PREFIX, ChannelClosed, Packet
from minilib.serving.disaggregation.decode import DecodeEngine
from minilib.serving.disaggregation.page_format import PagesRefused
from minilib.serving.disaggregation.prefill import PrefillEngine
from tests.serving.disaggregation.workers import PAGE, channels, model, pair, prompt
from tests.serving.served import likeliest

TO_PREFILL = [
    ("compute", {}),
    ("compute", {"number": 7}),
    ("compute", {"number": 7, "salt": None}),
    ("compute", {"number": "7", "salt": ""}),
    ("compute", {"number": 7, "salt": "", "content": 7}),
    ("pull", {}),
    ("pull", {"numbers": 0}),
    ("pull", {"numbers": [0]}),
    ("pull", {"numbers": [0], "first": -1}),
    ("renew", {"numbers": [[]]}),
    ("release", {"numbers": None}),
    ("hello", {}),
    ("hello", {"format": None}),
    ("unheard of", {"numbers": [0]}),
]
TO_DECODE = [
    ("pages", {}),
    ("pages", {"number": 0}),
    ("pages", {"number": 0, "layer": 3, "first": 0, "stop": 1}),
    ("pages", {"number": 0, "layer": -1, "first": 0, "stop": 1}),
    ("pages", {"number": 0, "layer": 0, "first": None, "stop": 1}),
    ("pages", {"number": [0]}),
    ("done", {}),
    ("failed", {"number": 0}),
    ("hello", {}),
]


@pytest.mark.parametrize(("kind", "fields"), TO_PREFILL)
def test_what_a_prefill_worker_cannot_read(kind, fields, caplog):
    with pair() as workers:
        workers.decode.add_request("a", prompt(14), likeliest(3))
        workers.prefill.turn()
        content = torch.zeros(fields.pop("content", 8), dtype=torch.uint8)
        workers.far.post(Packet(kind, {"epoch": workers.prefill.epoch} | fields, content))
        workers.prefill.turn()
        workers.prefill.check_invariants()
        assert not workers.prefill.channels and workers.prefill.cache.pool.num_used == 0
        assert "prompts are given up" in caplog.text


@pytest.mark.parametrize(("kind", "fields"), TO_DECODE)
def test_what_a_decode_worker_cannot_read(kind, fields):
    with pair() as workers:
        workers.decode.add_request("a", prompt(14), likeliest(3))
        workers.near.post(Packet(kind, fields))
        (output,) = workers.decode.step()
        workers.decode.check_invariants()
        assert output.finish_reason == "error" and "its prompt did not arrive" in output.error
        assert not workers.decode.peers and workers.decode.cache.pool.num_used == 0


@pytest.mark.parametrize("missing", ["epoch", "patience", "format"])
def test_a_hello_without_all_that_belongs_to_it(missing):
    with channels() as (near, far):
        prefill = PrefillEngine(model(), 8, PAGE)
        hello = {"epoch": 1, "patience": 1.0, "format": prefill.format.to_dict()}
        near.post(Packet("hello", {name: value for name, value in hello.items() if name != missing}))
        with pytest.raises((ChannelClosed, PagesRefused), match=missing):
            DecodeEngine(model(), [far], 8, PAGE)


@pytest.mark.parametrize("head", [{"kind": []}, {"kind": {}}, [], {}, "deep"])
def test_heads_that_are_none(head):
    text = b"[" * 30_000 if head == "deep" else json.dumps(head).encode()
    with channels("tcp") as (near, far):
        near.socket.sendall(PREFIX.pack(MAGIC, len(text), 0) + text)
        with pytest.raises(ChannelClosed, match="no head of a packet"):
            while True:
                assert far.receive() == []


def test_a_request_whose_prompt_is_on_its_way_counts_as_waiting():
    async def arriving():
        with channels() as (near, far):
            PrefillEngine(model(), 8, PAGE).attach(near)  # says hello, and computes nothing
            async with AsyncEngine(DecodeEngine(model(), [far], 8, PAGE, patience=0.0)) as engine:
                stream = await engine.submit(prompt(14), likeliest(3))
                while engine.status().steps < 3:
                    await asyncio.sleep(0.001)
                assert len(engine.engine.scheduler.arriving) == 1
                assert (engine.status().num_waiting, engine.status().num_running) == (1, 0)
                stream.close()

    asyncio.run(asyncio.wait_for(arriving(), 30))
