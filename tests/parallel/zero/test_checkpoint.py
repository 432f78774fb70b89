"""A checkpoint of a model that ZeRO has cut: from its whole weights, and from no rank's part."""

from pathlib import Path

import torch

from minilib.model import weights
from minilib.model.decoder import Decoder
from minilib.model.stored.files import CheckpointError
from minilib.parallel.zero import Zero
from minilib.ranks import launch
from tests.parallel.zero.models import ADAMW, communicator, decoder


def saved(folder):
    """What saving the cut model says, and whether its whole weights, saved and loaded, are those that it began with."""
    comm, model = communicator("shared"), decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero = Zero(model, comm, 3, ADAMW)
    own = Path(folder) / str(comm.rank)
    try:
        said = str(weights.save(model, own / "cut", torch.float32))
    except CheckpointError as error:
        said = str(error)
    whole = Decoder(model.config)
    whole.load_state_dict(zero.full_state_dict())
    weights.save(whole, own / "whole", torch.float32)
    loaded = weights.load(own / "whole").state_dict()
    return said, (own / "cut").exists(), all(torch.equal(loaded[name], before[name]) for name in before)


def test_under_stage_three_only_the_whole_weights_are_saved(tmp_path):
    for said, written, same in launch.run(saved, 2, str(tmp_path)):
        assert "has shape (0,)" in said and "full_state_dict" in said
        assert not written and same
