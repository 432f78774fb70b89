"""A recorded step makes the tokens that the same step makes call by call, and is not used where it would not."""

import pytest
import torch
from torch import nn

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.serving.cpu import steps
from minilib.serving.cpu.ops import CompiledOps
from minilib.serving.cpu.tape import Kernel, Tape, recording
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams

DENSE = {"layer norms only": {}, "normalised heads": {"qk_norm": True}, "biases": {"qkv_bias": True}}


def decoder(**options):
    model = Decoder(ModelConfig(61, 32, 48, 2, 4, 2, 8, max_position=96, **options)).eval()
    same = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=same)
    return model


def serve(engine, requests=5, max_tokens=30):
    """Requests that come one after the other: batches of every size, prompts among them."""
    made = {}
    for number in range(requests):
        prompt = [(7 * number + 3 * k) % 61 for k in range(1 + 6 * number)]
        params = SamplingParams(max_tokens=max_tokens - 3 * number, temperature=0, n=1 + number % 2, ignore_eos=True)
        engine.add_request(str(number), prompt, params)
        for _ in range(4):
            collect(engine, made)
    while engine.has_unfinished:
        collect(engine, made)
    return made


def collect(engine, made):
    for output in engine.step():
        made.setdefault((output.request_id, output.sample), []).append(output.token_id)


@pytest.fixture
def replays(monkeypatch):
    """How often a tape is played."""
    seen = []
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape: (seen.append(len(tape)), replay(tape))[1])
    return seen


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("page_size", [1, 16])
def test_replayed_steps_make_the_tokens_of_plain_torch(options, page_size, replays):
    expected = serve(Engine(decoder(**options), page_size=page_size))
    assert replays == []
    assert serve(Engine(decoder(**options), page_size=page_size, pack=True)) == expected
    assert len(replays) >= 20
    assert serve(Engine(decoder(**options), page_size=page_size, pack=True, num_pages=112 // page_size)) == expected


def test_a_step_is_the_kernels_of_its_layers_and_no_more():
    engine = Engine(decoder(), pack=True)
    serve(engine)
    for step in engine.steps.recorded.values():
        calls = [Kernel(call[0]) for call, _ in step.tape._calls]
        assert {kernel: calls.count(kernel) for kernel in Kernel} == {
            Kernel.PRODUCT: 4 * 2 + 1, Kernel.RMS_NORM: 2 * 2 + 1, Kernel.ROTATE: 2, Kernel.SWIGLU: 2, Kernel.ADD: 2,
            Kernel.STORE: 2, Kernel.ATTEND: 2,
        }  # fmt: skip


def test_few_tapes_are_kept_and_none_for_large_batches(monkeypatch):
    monkeypatch.setattr(steps, "MOST_SEQUENCES", 5)
    engine = Engine(decoder(), pack=True)
    expected = serve(Engine(decoder(), pack=True))
    assert serve(engine) == expected
    assert 1 < len(engine.steps.recorded) <= steps.MOST_TAPES
    assert max(engine.steps.recorded) <= 5


def test_experts_are_not_on_a_tape_so_steps_are_made_call_by_call(replays):
    experts = MoEConfig(4, 2, 16)
    expected = serve(Engine(decoder(moe=experts)))
    engine = Engine(decoder(moe=experts), pack=True)
    assert serve(engine) == expected
    assert replays == [] and not engine.steps.possible


def test_what_computes_beside_the_kernels_makes_a_tape_void():
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    with torch.inference_mode():
        for void, beside in (
            (False, lambda z: z[:, :4]),
            (True, lambda z: z * 2),
            (True, lambda z: z[:, ::2].contiguous()),
        ):
            with recording() as tape:
                beside(CompiledOps().add(x, y))
            assert tape.complete is not void and len(tape) == 1
        z = CompiledOps().add(x, y)
    assert len(tape) == 1, "nothing is written down after the recording"
    assert torch.equal(z, x + y)


def test_an_interrupted_recording_leaves_no_tape():
    engine = Engine(decoder(), pack=True)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    engine.step()
    through = engine.model.layers[1].forward
    engine.model.layers[1].forward = None
    with pytest.raises(TypeError):
        engine.step()
    assert engine.steps.recorded == {}
    engine.model.layers[1].forward = through
    made = []
    while engine.has_unfinished:
        made += [output.token_id for output in engine.step()]
    assert len(made) == 8
