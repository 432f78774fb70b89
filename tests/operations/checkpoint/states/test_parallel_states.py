"""Pipelines, meshes and bf16: what is cut in one way is loaded in another, and equals the state of one process."""

import copy

import pytest
import torch
import torch.distributed as dist

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.checkpoint import (
    Checkpointer,
    ZeroState,
    pipeline_state,
    replica_state,
    tensor_parallel_state,
)
from minilib.operations.checkpoint.format.folder import CheckpointFolder, read_committed
from minilib.parallel.data.data_parallel import DataParallel
from minilib.parallel.pipeline.pipeline_parallel import PipelineParallel
from minilib.parallel.pipeline.schedules import one_forward_one_backward
from minilib.parallel.pipeline.stage import cut_batch
from minilib.parallel.tensor_parallel import TensorParallel
from minilib.parallel.zero import Zero
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.mesh import DeviceMesh, MeshShape
from minilib.ranks.transport.shared import SharedMemoryTransport
from tests.operations.checkpoint.runs import on_ranks

TIED = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 1, "head_dim": 6, "max_position": 64}  # fmt: skip
STEPS = 2


def model_of(seed: int = 0, tied: bool = True) -> Decoder:
    model = Decoder(ModelConfig(**TIED, tie_embeddings=tied, qkv_bias=True))
    model.initialize(seed)
    return model


def batch_of(step: int):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(31, (4, 9), generator=generator)
    return tokens[:, :-1], torch.arange(8).expand(4, 8), tokens[:, 1:]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def train_alone(model, optimizer, steps=range(STEPS)) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(*batch_of(step)).backward()
        optimizer.step()


def of_one_model(seed=0, tied=True) -> dict:
    """Names → values that one process has after the same steps, by torch's own state dicts."""
    model = model_of(seed, tied)
    optimizer = adamw(model.parameters())
    train_alone(model, optimizer)
    return named_values(model, optimizer)


def named_values(model, optimizer) -> dict:
    found = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        found |= {f"optimizer.state.{names[p]}.{key}": value for key, value in state.items()}
    return found


def pipelined(folder: str, tied: bool, load: bool = False):
    comm = Communicator(SharedMemoryTransport())
    pipeline = PipelineParallel(model_of(tied=tied), comm, one_forward_one_backward(comm.world_size, 2))
    optimizer = adamw(pipeline.parameters())
    with Checkpointer(folder, Communicator(SharedMemoryTransport()), block_bytes=256) as checkpointer:
        if load:
            checkpointer.load({"run": pipeline_state(pipeline, optimizer)})
            pipeline.check_invariants()
            found = pipeline.full_state_dict()
            return found, {n: optimizer.state[p]["exp_avg"] for n, p in pipeline.named_parameters()}
        for step in range(STEPS):
            pipeline.zero_grad()
            pipeline.step(cut_batch(*batch_of(step), 2))
            optimizer.step()
        checkpointer.save({"run": pipeline_state(pipeline, optimizer)}, STEPS)
    return None


def tensor_parallel(folder: str, load: bool = False, data: int = 1):
    """On a mesh of `data` × tensor ranks."""
    mesh = DeviceMesh(MeshShape.of(dist.get_world_size(), dp=data, tp=None))
    tp = TensorParallel(model_of(1 if load else 0), mesh.comm("tp"))
    dp = DataParallel(tp.model, mesh.comm("dp")) if data > 1 else None
    optimizer = adamw(tp.model.parameters())
    with Checkpointer(folder, mesh.comm("dp", "tp")) as checkpointer:
        if load:
            loaded = checkpointer.load({"run": tensor_parallel_state(tp, optimizer)})
            found = tp.full_state_dict()
            names = [name for name, _ in tp.model.named_parameters()]
            moments = {n: tp.whole(n, optimizer.state[tp.model.get_parameter(n)]["exp_avg"]) for n in names}
            return found, moments, loaded.tally
        for step in range(STEPS):
            optimizer.zero_grad()
            tp.model.loss(*batch_of(step)).backward()
            if dp is not None:
                dp.finish()
            tp.finish()
            optimizer.step()
        checkpointer.save({"run": tensor_parallel_state(tp, optimizer)}, STEPS)
        return None


def alone(folder: str, tied: bool):
    model = model_of(9, tied)
    optimizer = adamw(model.parameters())
    with Checkpointer(folder) as checkpointer:
        checkpointer.load({"run": replica_state(model, optimizer)})
    return named_values(model, optimizer)


def stored_bytes(folder: str) -> int:
    committed = read_committed(CheckpointFolder(folder))
    boxes = [(stored, box) for stored in committed.table.values() for box in stored.boxes]
    return sum(box.box.numel * stored.dtype.itemsize for stored, box in boxes)


def values_bytes(values: dict) -> int:
    return sum(value.nbytes for value in values.values())


def check_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("world_size, tied", [(2, True), (3, False)])
def test_a_pipeline_is_saved_as_one_model_and_loaded_by_other_stages(tmp_path, world_size, tied):
    run(pipelined, world_size, str(tmp_path), tied, timeout=200)
    found = alone(tmp_path, tied)
    check_close(found, of_one_model(tied=tied))
    assert stored_bytes(tmp_path) == values_bytes(found), "a tied table is stored once"
    for ranks in (2, 3):
        for weights, moments in run(pipelined, ranks, str(tmp_path), tied, True, timeout=200):
            for name, value in weights.items():
                if f"model.{name}" in found:
                    assert torch.equal(value, found[f"model.{name}"])
            assert all(torch.equal(x, found[f"optimizer.state.{name}.exp_avg"]) for name, x in moments.items())


@pytest.mark.parametrize("before, data", [(2, 1), (4, 1), (4, 2)])
def test_columns_and_rows_are_loaded_by_other_numbers_of_ranks(tmp_path, before, data):
    """One head of keys and values is on all ranks of a tensor axis, and written once; so is all on a data axis."""
    run(tensor_parallel, before, str(tmp_path), False, data, timeout=200)
    found = alone(tmp_path, True)
    check_close(found, of_one_model())
    assert stored_bytes(tmp_path) == values_bytes(found)
    for ranks in (1, 2, 4):
        tallies = []
        for weights, moments, tally in run(tensor_parallel, ranks, str(tmp_path), True, timeout=200):
            assert all(torch.equal(value, found["model." + name.replace("unembed", "embed")])
                       for name, value in weights.items())  # fmt: skip
            assert all(torch.equal(value, found[f"optimizer.state.{name}.exp_avg"]) for name, value in moments.items())
            tallies.append(tally)
        whole = values_bytes(found)
        assert max(tally.needed for tally in tallies) < (1.0, 0.75, 0.6)[ranks // 2] * whole + 1, "a rank's part alone"


def bf16(folder: str, stage: int, load: bool):
    comm = Communicator(SharedMemoryTransport())
    zero = Zero(model_of(1 if load else 0), comm, stage, adamw_of_slices, precision="bf16")
    with Checkpointer(folder, Communicator(SharedMemoryTransport()), block_bytes=300) as checkpointer:
        if load:
            checkpointer.load({"run": ZeroState(zero)})
            zero.check_invariants()
        for step in range(STEPS, 2 * STEPS) if load else range(STEPS):
            zero.zero_grad()
            zero.model.loss(*batch_of(step)).backward()
            zero.step()
        if not load:
            checkpointer.save({"run": ZeroState(zero)}, STEPS)
            for step in range(STEPS, 2 * STEPS):
                zero.zero_grad()
                zero.model.loss(*batch_of(step)).backward()
                zero.step()
    return copy.deepcopy(zero.full_state_dict())


def adamw_of_slices(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("stage, other", [(0, 3), (1, 1), (2, 0), (3, 2)])
def test_masters_of_bf16_are_saved_and_go_on_bit_by_bit_in_any_stage(tmp_path, stage, other):
    before = run(bf16, 2, str(tmp_path), stage, False, timeout=200)
    after = run(bf16, 2, str(tmp_path), other, True, timeout=200)
    for one, two in zip(before, after, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert {value.dtype for value in one.values()} == {torch.float32}


def test_runs_on_one_process_need_no_group(tmp_path):
    assert on_ranks(lambda: 3, 0) == [3]
