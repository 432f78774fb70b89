"""Ten training steps of the untouched decoder on (data × context) ranks against one process."""

from functools import partial

import pytest
import torch
from torch import nn

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.parallel.context_parallel import ContextParallel
from minilib.parallel.context_parallel.layout import positions_in
from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.zero import Zero
from minilib.ranks.launch import run
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.mesh_shape import MeshShape

STEPS, ROWS, TOKENS = 10, 4, 16
DENSE = ModelConfig(23, 12, 16, 2, 4, 2, 4, 64, qk_norm=True, tie_embeddings=True)
EXPERTS = ModelConfig(23, 12, 16, 2, 4, 1, 4, 64, tie_embeddings=False, moe=MoEConfig(4, 2, 8))
PACKED = [[0, 3, 4, 16], [0, 16], [0, 9, 16], [0, 1, 2, 11, 16]]
adamw = partial(torch.optim.AdamW, lr=1e-2)


def batches():
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        rows = torch.randint(23, (ROWS, TOKENS + 1), generator=generator)
        yield rows[:, :-1], rows[:, 1:]


def decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    model = Decoder(config).double()
    model.initialize(seed)
    return model


def apart(documents):
    """Attention with the mask of documents written out, in torch's own attention."""

    def attention(layer, q, k, v):
        length = q.shape[1]
        masks = []
        for starts in documents:
            blocks = [torch.ones(end - begin, end - begin) for begin, end in zip(starts, starts[1:], strict=False)]
            masks.append(torch.block_diag(*blocks).tril().bool())
        assert masks[0].shape == (length, length)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.stack(masks).unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return mixed.transpose(1, 2)

    return attention


def on_one_process(config: ModelConfig, documents) -> tuple[list[float], dict]:
    model, losses = decoder(config), []
    optimizer = adamw(model.parameters())
    positions = positions_in(documents, ROWS, TOKENS)
    for tokens, targets in batches():
        optimizer.zero_grad()
        loss = model.loss(tokens, positions, targets, apart(documents) if documents else None)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def on_ranks(config: ModelConfig, documents, method: str, stage: int | None, sizes: dict) -> tuple[list[float], dict]:
    mesh = DeviceMesh(MeshShape.of(**sizes), timeout=20.0)
    both, cp, dp = mesh.comm("dp", "cp"), ContextParallel(mesh.comm("cp"), method), mesh.coordinates["dp"]
    model, losses = decoder(config, seed=mesh.rank), []
    trained = Trained(model, both) if stage is None else Zero(model, both, stage, adamw, precision="fp64")
    mine = slice(dp, None, sizes["dp"])
    for tokens, targets in batches():
        trained.zero_grad()
        loss = cp.loss(model, tokens[mine], targets[mine], documents[mine] if documents else None)
        loss.backward()
        trained.clip_grad_norm(0.5)
        trained.step()
        both.all_reduce(mean := loss.detach().clone(), "avg")
        losses.append(mean.item())
    if stage is not None:
        trained.close()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


class Trained:
    """A replica with its optimizer, in the words of Zero."""

    def __init__(self, model, comm):
        self.model, self.dp = model, DataParallel(model, comm)
        self.optimizer = adamw(model.parameters())
        self.zero_grad, self.step = self.optimizer.zero_grad, self.optimizer.step

    def clip_grad_norm(self, norm):
        self.dp.finish()
        nn.utils.clip_grad_norm_(self.model.parameters(), norm)


@pytest.mark.parametrize(
    ("config", "documents", "method", "stage", "sizes"),
    [
        (DENSE, None, "ring", None, {"dp": 2, "cp": 2}),
        (DENSE, PACKED, "ring", None, {"cp": 2, "dp": 2}),
        (EXPERTS, PACKED, "ulysses", None, {"dp": 1, "cp": 4}),
        (DENSE, PACKED, "ulysses", 3, {"dp": 2, "cp": 2}),
        (EXPERTS, None, "ring", 3, {"dp": 1, "cp": 2}),
    ],
    ids=["ring", "ring-packed", "ulysses-experts-packed", "ulysses-zero3-packed", "ring-experts-zero3"],
)
def test_ten_steps_equal_those_of_one_process(config, documents, method, stage, sizes):
    """The first loss among them: with documents that saw each other it was 1.83 times as large elsewhere."""
    losses, parameters = on_one_process(config, documents)
    world_size = sizes["dp"] * sizes["cp"]
    for found, theirs in run(on_ranks, world_size, config, documents, method, stage, sizes, timeout=120):
        assert found == pytest.approx(losses, abs=1e-10)
        assert max((theirs[name] - x).abs().max().item() for name, x in parameters.items()) < 1e-10


def applied(method: str) -> list[bool]:
    """A model that is called without attention computes the same loss and gradients, and the other one is untouched."""
    mesh = DeviceMesh(MeshShape.of(cp=2), timeout=20.0)
    cp, model, other = ContextParallel(mesh.comm("cp"), method), decoder(DENSE), decoder(DENSE)
    tokens, targets = next(batches())
    cp.apply(model, TOKENS)
    losses = [
        model.loss(*(cp.split(x) for x in (tokens, positions_in(None, ROWS, TOKENS), targets))),
        cp.loss(other, tokens, targets),
    ]
    for loss in losses:
        loss.backward()
    gradients = zip(model.parameters(), other.parameters(), strict=True)
    alone = other.loss(tokens, positions_in(None, ROWS, TOKENS), targets)
    mesh.comm("cp").all_reduce(mean := losses[0].detach().clone(), "avg")
    return [
        torch.equal(*losses),
        all(torch.equal(one.grad, another.grad) for one, another in gradients),
        torch.allclose(alone, mean),
    ]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_model_to_which_it_is_applied(method):
    assert run(applied, 2, method, timeout=60) == [[True] * 3] * 2
