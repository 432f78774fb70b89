"""Ten steps on (data × tensor × pipeline × context) ranks of one mesh against one process."""

import pytest
import torch
from torch import nn

from minilib.model.config import ModelConfig
from minilib.parallel.context_parallel import ContextParallel
from minilib.parallel.context_parallel.layout import positions_in
from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.global_norm import clip_global_norm
from minilib.parallel.pipeline import PipelineParallel, cut_batch
from minilib.parallel.pipeline.schedules import interleaved, one_forward_one_backward, zero_bubble
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.ranks.launch import run
from minilib.ranks.mesh import DeviceMesh
from minilib.ranks.mesh_shape import MeshShape
from tests.parallel.context_parallel.test_training import TOKENS, adamw, batches, decoder, on_one_process

CONFIG = ModelConfig(23, 12, 16, 4, 4, 2, 4, 64, qk_norm=True, tie_embeddings=False)


def on_mesh(sizes: dict, method: str, schedule, sequence_parallel: bool) -> tuple[list[float], dict]:
    mesh = DeviceMesh(MeshShape.of(**sizes), timeout=30.0)
    model = decoder(CONFIG, seed=mesh.rank)
    tp = TensorParallel(model, mesh.comm("tp"), sequence_parallel=sequence_parallel)
    cp = ContextParallel(mesh.comm("cp"), method)
    cp.apply(model, TOKENS)  # before the pipeline's stages take the model's operations
    pipeline = PipelineParallel(model, mesh.comm("pp"), schedule)
    data = DataParallel(nn.ModuleList(pipeline.stages.values()), mesh.comm("dp", "cp"))
    mine = dict(pipeline.named_parameters())
    optimizer, losses = adamw(mine.values()), []
    cut = [p for name, p in mine.items() if tp.cuts[name].groups[0].copies == 1]
    copied = [p for name, p in mine.items() if tp.cuts[name].groups[0].copies > 1]
    rows = slice(mesh.coordinates["dp"], None, sizes["dp"])
    for tokens, targets in batches():
        optimizer.zero_grad()
        batch = (tokens[rows], positions_in(None, len(tokens[rows]), TOKENS), targets[rows])
        with data.no_sync():  # every microbatch adds up; `finish` averages the sum
            loss = pipeline.step(cut_batch(*map(cp.split, batch), schedule.num_microbatches))
        data.finish()
        tp.finish()
        clip_global_norm(0.5, [(cut, mesh.comm("pp", "tp")), (copied, mesh.comm("pp"))])
        optimizer.step()
        total = torch.tensor([loss or 0.0], dtype=torch.float64)  # the last stage's rank has it
        mesh.comm("dp", "pp", "cp").all_reduce(total)
        losses.append(total.item() / sizes["dp"] / sizes["cp"])
    return losses, {name: tp.whole(name, p) for name, p in mine.items()}


@pytest.mark.parametrize(
    ("sizes", "method", "schedule", "sequence_parallel"),
    [
        ({"pp": 2, "dp": 1, "cp": 2, "tp": 2}, "ring", one_forward_one_backward(2, 2), False),
        ({"dp": 2, "pp": 2, "cp": 1, "tp": 2}, "ring", interleaved(2, 2, 2), False),
        ({"tp": 1, "dp": 2, "pp": 2, "cp": 2}, "ulysses", zero_bubble(2, 2), False),
        ({"cp": 2, "tp": 2, "dp": 2, "pp": 1}, "ring", one_forward_one_backward(1, 2), True),
    ],
)
def test_ten_steps_on_eight_ranks_equal_those_of_one_process(sizes, method, schedule, sequence_parallel):
    losses, parameters = on_one_process(CONFIG, None)
    results = run(on_mesh, 8, sizes, method, schedule, sequence_parallel, timeout=300)
    assert {name for _, theirs in results for name in theirs} == set(parameters)
    for found, theirs in results:
        assert found == pytest.approx(losses, abs=1e-10)
        assert max((theirs[name] - parameters[name]).abs().max().item() for name in theirs) < 1e-10
