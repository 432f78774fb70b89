"""A recorded step makes the tokens that the same step makes call by call, and is not used where it would not."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.serving.cpu import packing, steps
from minilib.serving.cpu.ops import CompiledOps
from minilib.serving.cpu.tape import Kernel, Tape, recording
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams
from tests.serving.cpu.test_packing import needs_onednn, needs_pairs

DENSE = {
    "layer norms only": {},
    "normalised heads": {"qk_norm": True},
    "biases": {"qkv_bias": True},
    "no whole panels": {"hidden_size": 44, "intermediate_size": 71, "tie_embeddings": False},
}
PACKS = [True, pytest.param(torch.bfloat16, marks=needs_pairs)]


def decoder(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, **options}
    model = Decoder(
        ModelConfig(61, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_position=96, **sizes)
    ).eval()
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


@needs_pairs
@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE)
def test_replayed_steps_in_bf16_make_the_tokens_of_steps_made_call_by_call(options, replays, monkeypatch):
    monkeypatch.setattr(packing, "bf16_by_own_block", lambda: True)
    engine = Engine(decoder(**options), pack=torch.bfloat16)
    engine.steps.possible = False
    expected = serve(engine)
    assert replays == []
    assert serve(Engine(decoder(**options), pack=torch.bfloat16)) == expected
    assert len(replays) >= 20


@pytest.mark.parametrize("pack", PACKS)
def test_a_step_is_the_kernels_of_its_layers_and_no_more(pack, monkeypatch):
    monkeypatch.setattr(packing, "bf16_by_own_block", lambda: True)
    engine = Engine(decoder(), pack=pack)
    serve(engine)
    assert engine.steps.recorded
    for step in engine.steps.recorded.values():
        calls = [Kernel(call[0]) for call, _ in step.tape._calls]
        assert {kernel: calls.count(kernel) for kernel in Kernel} == {
            Kernel.PRODUCT: 4 * 2 + 1, Kernel.RMS_NORM: 2 * 2 + 1, Kernel.ROTATE: 2, Kernel.SWIGLU: 2, Kernel.ADD: 2,
            Kernel.STORE: 2, Kernel.ATTEND: 2, Kernel.ROUND: 0 if pack is True else 4 * 2,
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


class Watch(TorchDispatchMode):
    """Operations of torch that compute: all but empty tensors and other views of a tensor that is there."""

    def __init__(self):
        super().__init__()
        self.computed = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = not function._schema.is_mutable and storages(result) <= storages(args) - {None}
        if function.overloadpacket is not torch.ops.aten.empty and not views:
            self.computed.append(str(function))
        return result


def storages(values):
    return {leaf.untyped_storage().data_ptr() if torch.is_tensor(leaf) else None for leaf in tree_leaves(values)}


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("pack", PACKS)
def test_nothing_but_what_is_on_the_tape_computes_while_a_step_is_recorded(options, pack, monkeypatch):
    monkeypatch.setattr(packing, "bf16_by_own_block", lambda: True)
    watches = []

    @contextmanager
    def watched():
        with recording() as tape, Watch() as watch:
            yield tape
        watches.append(watch)

    monkeypatch.setattr(steps, "recording", watched)
    serve(Engine(decoder(**options), pack=pack))
    assert len(watches) > 5 and not any(watch.computed for watch in watches)


def test_a_watch_sees_what_would_be_missing():
    x = torch.randn(3, 8)
    with torch.inference_mode(), Watch() as watch:
        for harmless in (x[:, :4], x.view(8, 3).flatten(), torch.empty(4)):
            assert watch.computed == [] and harmless is not None
        for harm in (lambda: x * 2, lambda: x.add_(1), lambda: x[:, ::2].contiguous(), lambda: float(x[0, 0])):
            harm()
            assert len(watch.computed) == 1
            watch.computed.clear()


def test_nothing_is_written_down_after_a_recording():
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    with recording() as tape:
        CompiledOps().add(x, y)
    CompiledOps().add(x, y)
    assert len(tape) == 1


@needs_onednn
def test_products_of_onednn_are_made_call_by_call(replays, monkeypatch):
    monkeypatch.setattr(packing, "bf16_by_own_block", lambda: False)
    engine = Engine(decoder(), pack=torch.bfloat16)
    assert len(serve(engine)) == 7 and replays == [] and not engine.steps.possible


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
