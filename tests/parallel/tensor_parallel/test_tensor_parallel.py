"""Training on 1, 2 and 4 ranks against one process with the whole decoder, in float64."""

import pytest
import torch

from minilib.parallel.data.data_parallel import NoBackward
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.torch_communicator import TorchCommunicator
from minilib.ranks.transport.group import GroupTransport
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.parallel.tensor_parallel.models import CLIP, SHAPES, STREAMS, adamw, alone, decoder, tokens_of

STEPS = 10


def goes(tp: TensorParallel, steps: int) -> dict:
    model, optimizer = tp.model, adamw(tp.model)
    losses, norms, gradients, own = [], [], {}, {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(*tokens_of(step))
        loss.backward()
        tp.finish()
        if not step:
            own = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            gradients = {name: tp.whole(name, gradient) for name, gradient in own.items()}
        norms.append(tp.clip_grad_norm(CLIP))
        optimizer.step()
        losses.append(loss.item())
    norm_grads = {name: gradient for name, gradient in own.items() if "norm" in name}
    padding = model.unembed.weight[max(0, model.config.vocab_size - tp.comm.rank * len(model.unembed.weight)) :]
    return {
        "state": tp.full_state_dict(),
        "gradients": gradients,
        "norms": norms,
        "losses": losses,
        "norm gradients": norm_grads,
        "padding": padding.detach(),
        "size": sum(p.numel() for p in model.parameters()),
    }


def trains(comm_of) -> dict:
    comm = comm_of()
    return {
        (shape, number): goes(TensorParallel(decoder(comm.rank, **changes), comm, **options), STEPS)
        for shape, changes in SHAPES.items()
        for number, options in enumerate(STREAMS if shape == "grouped KV heads, tied" else STREAMS[:2])
    }


COMMUNICATORS = {
    1: TorchCommunicator,
    2: lambda: Communicator(GroupTransport()),
    4: lambda: Communicator(SharedMemoryTransport()),
}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradients_norms_and_parameters_are_those_of_one_process(n):
    ranks = run(trains, n, COMMUNICATORS[n])
    for shape, number in ranks[0]:
        expected, found = alone(shape, STEPS), [rank[shape, number] for rank in ranks]
        close = {"rtol": 0, "atol": 1e-10, "msg": lambda text, what=(shape, number): f"{what}: {text}"}
        for each in found:
            torch.testing.assert_close(each["gradients"], expected["gradients"], **close)
            torch.testing.assert_close(each["state"], expected["state"], **close)
            assert each["losses"] == pytest.approx(expected["losses"], abs=1e-10)
            assert each["norms"] == pytest.approx(expected["norms"], abs=1e-10) and max(each["norms"]) > CLIP
            # Not nearly: what every rank has must not drift apart.
            for name, gradient in each["norm gradients"].items():
                assert torch.equal(gradient, found[0]["norm gradients"][name]), (shape, number, name)
            assert each["losses"] == found[0]["losses"] and each["norms"] == found[0]["norms"]
            assert not each["padding"].any(), "a token that does not exist has been trained"
        if n > 1:
            whole = sum(p.numel() for p in decoder(0, **SHAPES[shape]).parameters())
            assert max(each["size"] for each in found) < 0.8 * whole
    assert sum(len(rank[shape, 0]["padding"]) for rank in ranks) == -37 % n


def interleaves() -> list[dict]:
    """Two forwards of other numbers of tokens, and then their backwards, the later one first."""
    comm, found = Communicator(SharedMemoryTransport()), []
    for options in STREAMS:
        tp = TensorParallel(decoder(comm.rank), comm, **options)
        losses = [tp.model.loss(*tokens_of(0, sequences)) for sequences in (3, 2)]
        for loss in reversed(losses):
            loss.backward()
        tp.finish()
        found.append({name: tp.whole(name, parameter.grad) for name, parameter in tp.model.named_parameters()})
    return found


def test_forwards_may_follow_each_other_before_their_backwards():
    whole = decoder(0)
    for sequences in (3, 2):
        whole.loss(*tokens_of(0, sequences)).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for found in run(interleaves, 2):
        for gradients in found:
            torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-10)


def without_some() -> dict[str, tuple[torch.Tensor, ...]]:
    """Batches of which some tokens, all tokens, or even the rows are missing."""
    tokens, positions, targets = tokens_of(0)
    ignored = targets.clone()
    ignored[0, :3] = ignored[2, 4:] = -100
    return {
        "some ignored": (tokens, positions, ignored),
        "all ignored": (tokens, positions, torch.full_like(targets, -100)),
        "no sequences": (tokens[:0], positions[:0], targets[:0]),
        "no tokens": (tokens[:, :0], positions[:, :0], targets[:, :0]),
    }


def trains_without_some() -> list[dict]:
    comm, found = Communicator(SharedMemoryTransport()), []
    for options in STREAMS:
        results = {}
        for kind, batch in without_some().items():
            tp = TensorParallel(decoder(comm.rank), comm, **options)
            loss = tp.model.loss(*batch)
            loss.backward()
            tp.finish()
            gradients = {name: tp.whole(name, parameter.grad) for name, parameter in tp.model.named_parameters()}
            results[kind] = (loss.detach(), gradients)
        found.append(results)
    return found


def test_ignored_targets_and_empty_batches_give_what_they_give_one_process():
    expected = {}
    for kind, batch in without_some().items():
        whole = decoder(0)
        loss = whole.loss(*batch)
        loss.backward()
        expected[kind] = (loss.detach(), {name: parameter.grad for name, parameter in whole.named_parameters()})
    assert expected["some ignored"][0].isfinite() and expected["no tokens"][0].isnan()
    for found in run(trains_without_some, 2):
        for results in found:
            torch.testing.assert_close(results, expected, rtol=0, atol=1e-10, equal_nan=True)


def accumulates() -> tuple[dict, dict, float]:
    """Two backwards before one `finish`; and the norm of a decoder with frozen and unused parameters."""
    comm = Communicator(SharedMemoryTransport())
    tp = TensorParallel(decoder(comm.rank), comm, sequence_parallel=True)
    for part in range(2):
        tp.model.loss(*tokens_of(part)).backward()
    tp.finish()
    with pytest.raises(NoBackward, match="call loss.backward"):
        tp.finish()
    summed = {name: tp.whole(name, parameter.grad) for name, parameter in tp.model.named_parameters()}
    model = decoder(comm.rank, qk_norm=True)
    model.layers[0].requires_grad_(False)
    model.embed.requires_grad_(False)
    tp = TensorParallel(model, comm)
    tp.model.loss(*tokens_of(0)).backward()
    norm = tp.clip_grad_norm(1e9)  # which finishes what nobody has
    return summed, {name for name, p in model.named_parameters() if p.grad is not None}, norm


def test_backwards_add_up_and_frozen_parameters_stay_out():
    whole = decoder(0)
    for part in range(2):
        whole.loss(*tokens_of(part)).backward()
    frozen = decoder(0, qk_norm=True)
    frozen.layers[0].requires_grad_(False)
    frozen.embed.requires_grad_(False)
    frozen.loss(*tokens_of(0)).backward()
    trained = {name: p.grad for name, p in frozen.named_parameters() if p.grad is not None}
    for summed, names, norm in run(accumulates, 2):
        expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
        torch.testing.assert_close(summed, expected, rtol=0, atol=1e-10)
        assert names == set(trained)
        assert norm == pytest.approx(torch.nn.utils.get_total_norm(trained.values()).item(), abs=1e-10)


def forwards(options: dict) -> list[torch.Tensor]:
    """Logits of all tokens, with their gradients, and of some, as serving asks for them."""
    comm = Communicator(SharedMemoryTransport())
    model = decoder(comm.rank, qkv_bias=True)
    tp = TensorParallel(model, comm, **options)
    tokens, positions, _ = tokens_of(0)
    logits = model(tokens, positions, model.ops.causal_attention)
    (logits * torch.linspace(0, 1, logits.numel(), dtype=torch.float64).view(logits.shape)).sum().backward()
    tp.finish()
    with torch.no_grad():
        some = model(tokens, positions, model.ops.causal_attention, logits_indices=torch.tensor([20, 3]))
        one = model(tokens[:1, :1], positions[:1, :1], model.ops.causal_attention)
    found = {name: tp.whole(name, parameter.grad) for name, parameter in model.named_parameters()}
    return [logits.detach(), some, one, found]


@pytest.mark.parametrize("options", STREAMS[:2], ids=["replicated", "sequence parallel"])
def test_logits_are_those_of_the_whole_decoder_on_every_rank(options):
    model = decoder(0, qkv_bias=True)
    tokens, positions, _ = tokens_of(0)
    logits = model(tokens, positions, model.ops.causal_attention)
    (logits * torch.linspace(0, 1, logits.numel(), dtype=torch.float64).view(logits.shape)).sum().backward()
    one = model(tokens[:1, :1], positions[:1, :1], model.ops.causal_attention).detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = [logits.detach(), logits.detach().flatten(0, 1)[[20, 3]], one, gradients]
    for found in run(forwards, 4, options):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def mixed_precision() -> tuple[float, float]:
    comm, losses = Communicator(SharedMemoryTransport()), []
    for options in STREAMS[:2]:
        model = decoder(comm.rank, qkv_bias=True).float()
        tp = TensorParallel(model, comm, **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(*tokens_of(0))
        loss.backward()
        tp.finish()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        losses.append((loss.item(), tp.grad_norm().item()))
    return losses


def test_under_autocast_products_are_bfloat16_and_gradients_float32():
    whole = decoder(0, qkv_bias=True).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = whole.loss(*tokens_of(0))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()]).item()
    exact = decoder(0, qkv_bias=True).loss(*tokens_of(0)).item()
    assert loss.item() != pytest.approx(exact, rel=1e-6), "nothing was rounded"
    for found in run(mixed_precision, 2)[0]:
        assert found == pytest.approx((loss.item(), norm), rel=2e-2)
