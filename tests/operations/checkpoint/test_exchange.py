"""Exported checkpoints are read by those whose layout it is: as safetensors, and by torch.distributed.checkpoint."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from minilib.model import weights
from minilib.operations.checkpoint import Checkpointer, StateMismatch, replica_state
from minilib.operations.checkpoint.exchange import (
    NotImported,
    export_dcp,
    export_hugging_face,
    import_dcp,
    load_weights,
)
from tests.operations.checkpoint.runs import SHAPE, on_ranks, trainer_of, trains_and_saves
from tests.operations.checkpoint.small_models import model_and_optimizer


@pytest.mark.parametrize("parallel", ["zero3", "tensor"])
def test_what_ranks_saved_is_exported_as_one_model(tmp_path, parallel):
    on_ranks(trains_and_saves, 2, str(tmp_path), parallel)
    path = export_hugging_face(tmp_path / parallel, tmp_path / "hf", SHAPE, dtype=torch.float32)
    stored, loaded = load_file(path), weights.load(tmp_path / "hf")
    alone = trainer_of("data", None)
    assert load_weights(alone.model, tmp_path / parallel) == 3
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, alone.model.state_dict()[name]), name
    assert torch.equal(stored["model.embed_tokens.weight"], alone.model.embed.weight)
    other = trainer_of("data", None, mixture=True)
    with pytest.raises(StateMismatch):
        load_weights(other.model, tmp_path / parallel)


def test_torch_reads_what_is_exported_and_what_torch_saves_is_imported(tmp_path):
    model, optimizer = model_and_optimizer(steps=3)
    with Checkpointer(tmp_path / "ours") as checkpointer:
        checkpointer.save({"run": replica_state(model, optimizer)}, 3)
    assert export_dcp(tmp_path / "ours", tmp_path / "dcp") == 3
    other, other_optimizer = model_and_optimizer(9, steps=1)
    state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, other_optimizer)}
    tensors = {"model": state["model"], "optimizer": {"state": state["optimizer"]["state"]}}
    dcp.load(tensors, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, value in model.state_dict().items():
        assert torch.equal(tensors["model"][name], value)
    for (name, _), moments in zip(model.named_parameters(), optimizer.state.values(), strict=True):
        for key, value in moments.items():
            assert torch.equal(tensors["optimizer"]["state"][name][key], value), (name, key)
    import_dcp(tmp_path / "dcp", tmp_path / "again", 3)
    fresh, fresh_optimizer = model_and_optimizer(5, steps=0)
    with Checkpointer(tmp_path / "again") as checkpointer:
        checkpointer.load({"run": replica_state(fresh, fresh_optimizer)})
    torch.testing.assert_close(fresh_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_torch_alone_is_imported(tmp_path):
    model, optimizer = model_and_optimizer(steps=2)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(NotImported, match="pickled objects"):
        import_dcp(tmp_path / "dcp", tmp_path / "ours", 2)
    values = {"run": replica_state(model, optimizer).values()}
    pickled = [name for name in dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
               if name.startswith("optimizer.param_groups")]  # fmt: skip
    import_dcp(tmp_path / "dcp", tmp_path / "ours", 2, values, pickled)
    fresh, fresh_optimizer = model_and_optimizer(5, steps=0)
    with Checkpointer(tmp_path / "ours") as checkpointer:
        checkpointer.load({"run": replica_state(fresh, fresh_optimizer)})
    assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))
    torch.testing.assert_close(fresh_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
