"""A gradient that one rank computes wrongly reaches all ranks alike: replicas agree, and only recomputing tells."""

import pytest
import torch

from minilib.operations.integrity import IntegrityVerdict, RecomputeCheck, ReplicaCheck, flip_bit
from tests.operations.checkpoint.runs import ROW, comm_of_ranks, on_ranks, trainer_of


def trains_with_a_wrong_gradient(wrong_rank: int | None) -> dict:
    comm = comm_of_ranks()
    trainer = trainer_of("data", comm)
    parameters = dict(trainer.model.named_parameters())
    recompute = RecomputeCheck(parameters.items(), comm)
    inputs, positions, targets = ROW[None, :8], torch.arange(8)[None], ROW[None, 1:9]

    def loss() -> torch.Tensor:
        return trainer.model.loss(inputs, positions, targets)

    trainer.run(2)
    before = recompute.compare(loss, 2)
    name = "layers.1.qkv.weight" if "layers.1.qkv.weight" in parameters else sorted(parameters)[-1]

    def corrupt(gradient: torch.Tensor) -> torch.Tensor:
        flip_bit(wrong := gradient.clone(), 30)  # an exponent's bit of the first element
        return wrong

    if comm.rank == wrong_rank:
        parameters[name].register_hook(corrupt)
    gradients = {key: p.grad for key, p in parameters.items()}
    after = recompute.compare(loss, 2)
    untouched = all(gradients[key] is p.grad for key, p in parameters.items())
    trainer.run()
    replicas = ReplicaCheck({"run": trainer}, comm).compare(trainer.step)
    return {"before": before, "after": after, "replicas": replicas, "losses": trainer.losses, "name": name,
            "untouched": untouched}  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_agree_upon_a_wrong_gradient_and_recomputing_names_it(world_size):
    healthy = on_ranks(trains_with_a_wrong_gradient, world_size, None)
    wrong = on_ranks(trains_with_a_wrong_gradient, world_size, 1)
    for each in healthy:
        assert each["before"] == each["after"] == IntegrityVerdict(2) and each["replicas"].agreed
    for each in wrong:
        assert each["losses"][:2] == healthy[0]["losses"][:2] and each["losses"] != healthy[0]["losses"]
        assert each["replicas"].agreed, "the average has reached all of them alike"
        assert each["before"].agreed and each["untouched"]
        suspects = (1,) if world_size == 3 else (0, 1)
        assert each["after"] == IntegrityVerdict(2, suspects, world_size == 3, (each["name"],))


def test_one_rank_alone_has_nobody_to_compare_with():
    class Alone:
        world_size = 1

    with pytest.raises(ValueError, match="on two ranks or more"):
        RecomputeCheck([], Alone())
