"""Numbers that no run has: 0, negative, fractions, NaN, names that are unknown. An error by name, never a price."""

import dataclasses
import math

import pytest

from minilib.numbers.machine import NotOnThisMachine
from minilib.ranks.mesh_shape import NoSuchAxis
from minilib.training.planner.cluster import Cluster, GroupPlace
from minilib.training.planner.layer_time import place_of_group
from minilib.training.planner.layout import LayoutDoesNotFit, ParallelLayout, layouts
from minilib.training.planner.memory import layer_bytes, layers_in_flight, price_memory
from minilib.training.planner.planner import NothingFits, plan_training, price_layout
from minilib.training.planner.published import published_runs
from minilib.training.planner.shape import TrainedShape
from minilib.training.planner.step_time import price_step

SHAPE = TrainedShape(8, 1024, 8, 8, 128, 4096, 1024)
EXPERTS = dataclasses.replace(SHAPE, experts=4, top_k=2, expert_ffn=512)
H100, A100 = Cluster.of("h100-sxm", 8), Cluster.of("a100-80g-sxm", 8)
LAYOUT = ParallelLayout(8)
NONE = [0, -8, 8.0, math.nan, math.inf, True, None, "8"]


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("name", ["batch", "sequence"])
def test_batches_and_sequences_that_are_none(name, value):
    given = {"batch": 8, "sequence": 64} | {name: value}
    for call in (
        lambda: price_layout(SHAPE, LAYOUT, H100, **given),
        lambda: price_step(SHAPE, LAYOUT, H100, **given),
        lambda: price_memory(SHAPE, LAYOUT, **given),
        lambda: plan_training(SHAPE, H100, **given),
        lambda: list(layouts(SHAPE, 8, domain=8, **given)),
        lambda: LAYOUT.check(SHAPE, 8, **given),
    ):
        with pytest.raises(ValueError, match=f"{name} is a whole number ≥ 1, got"):
            call()


@pytest.mark.parametrize("value", NONE)
def test_other_numbers_that_are_none(value):
    for name, call in {
        "gpus": lambda: list(layouts(SHAPE, value, 8, 64, 8)),
        "domain": lambda: list(layouts(SHAPE, 8, 8, 64, value)),
        "max_microbatch": lambda: plan_training(SHAPE, H100, 8, 64, max_microbatch=value),
        "sequence": lambda: SHAPE.flops_per_token(value),
        "batch": lambda: LAYOUT.microbatches(value),
        "tp": lambda: layer_bytes(SHAPE, value, 64, "full"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is a whole number ≥ 1, got"):
            call()
    for call in (
        lambda: place_of_group(LAYOUT, value, "dp"),
        lambda: dataclasses.replace(H100, domain=value),
        lambda: Cluster.of("h100-sxm", 8, value),
    ):
        with pytest.raises(ValueError, match="domain is a whole number ≥ 1, got"):
            call()
    with pytest.raises(ValueError, match="gpus is a whole number ≥ 1, got"):
        Cluster.of("h100-sxm", value)
    for size in ("dp", "pp", "cp", "tp", "ep", "etp", "interleave", "microbatch"):
        with pytest.raises(LayoutDoesNotFit, match="whole numbers ≥ 1"):
            ParallelLayout(**{"dp": 1, size: value})


@pytest.mark.parametrize("batch", [7, 12])
def test_a_batch_that_does_not_divide_is_refused_wherever_it_is_divided(batch):
    for call in (LAYOUT.microbatches, lambda batch: layers_in_flight(SHAPE, LAYOUT, batch)):
        with pytest.raises(LayoutDoesNotFit, match=f"{batch} sequences are no multiple of dp · microbatch = 8"):
            call(batch)


@pytest.mark.parametrize("dtype", ["fp8", "int3", "", None])
def test_dtypes_without_a_rate(dtype):
    for call in (price_layout, price_step):
        with pytest.raises(NotOnThisMachine, match=f"no rate of products in {dtype!r}; it has: bf16"):
            call(SHAPE, LAYOUT, A100, 8, 64, dtype)
    with pytest.raises(NotOnThisMachine, match="no rate of products"):
        plan_training(SHAPE, A100, 8, 64, dtype)


@pytest.mark.parametrize("name", ["attention", "memory", "nvlink", "network"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, True, None, "1"])
def test_rates_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} is a number > 0, got"):
        dataclasses.replace(H100, **{name: value})
    with pytest.raises(ValueError, match="matmul in bf16 is a number > 0, got"):
        dataclasses.replace(H100, matmul={"bf16": value})


@pytest.mark.parametrize("name", ["nvlink_step", "network_step", "reserve"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, None])
def test_seconds_and_bytes_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} is a finite number ≥ 0, got"):
        dataclasses.replace(H100, **{name: value})


def test_clusters_that_cannot_be():
    with pytest.raises(ValueError, match="matmul needs a rate of bf16"):
        dataclasses.replace(H100, matmul={"fp8": 1e15})
    with pytest.raises(ValueError, match="reserve leaves nothing of"):
        dataclasses.replace(H100, reserve=H100.gpu.memory_bytes)
    with pytest.raises(ValueError, match="port is a number > 0, got nan"):
        Cluster.of("h100-sxm", 8, port=math.nan)
    for name in (None, [], "h200"):
        with pytest.raises(ValueError, match="no efficiencies are quoted for"):
            Cluster.of(name, 8)
    with pytest.raises(ValueError, match="a group has 1 rank or more"):
        GroupPlace.of([])
    with pytest.raises(NoSuchAxis, match="no axis 'sp'"):
        place_of_group(LAYOUT, 8, "sp")


@pytest.mark.parametrize(
    "name", ["layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "q_rank", "experts", "dense_layers"]
)
@pytest.mark.parametrize("value", [-1, 1.5, math.nan, True, None])
def test_sizes_of_a_model_that_are_none(name, value):
    with pytest.raises(ValueError, match=rf"{name} is a whole number ≥ [01], got"):
        dataclasses.replace(SHAPE, **{name: value})


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        (SHAPE, {"layers": 0}, "layers is a whole number ≥ 1, got 0"),
        (SHAPE, {"kv_heads": 3}, "8 heads of queries cannot share 3 of keys"),
        (SHAPE, {"top_k": 1}, "top_k, expert_ffn, shared_ffn and dense_layers are 0 without experts"),
        (EXPERTS, {"top_k": 0}, "1 ≤ top_k ≤ 4 and expert_ffn ≥ 1"),
        (EXPERTS, {"top_k": 5}, "1 ≤ top_k ≤ 4 and expert_ffn ≥ 1"),
        (EXPERTS, {"expert_ffn": 0}, "1 ≤ top_k ≤ 4 and expert_ffn ≥ 1"),
        (EXPERTS, {"dense_layers": 9}, "9 dense layers of 8"),
        (SHAPE, {"kv_rank": 64, "rope_dim": 129}, "rope_dim ≤ head_dim"),
        (SHAPE, {"rope_dim": 64}, "q_rank and rope_dim are 0 without a kv_rank"),
    ],
)
def test_models_that_cannot_be(shape, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(shape, **change)


def test_unknown_words_are_not_taken_for_others():
    with pytest.raises(ValueError, match="recompute is one of none, selective, full; got 'half'"):
        layer_bytes(SHAPE, 1, 64, "half")


@pytest.mark.parametrize(("change", "message"), [({"tflops": 0}, "tflops"), ({"counts": "half"}, "counts is one of")])
def test_published_runs_that_cannot_be(change, message):
    run = published_runs()["mpt-70b"]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(run, **change)
    with pytest.raises(NothingFits, match="no layout of .* is what the source says"):
        dataclasses.replace(run, layout={"dp": 3}).predict()


@pytest.mark.parametrize("count", [-1, 2.5, None, True])
def test_counts_of_rows_that_are_none(count):
    plans = plan_training(SHAPE, H100, 8, 64)
    with pytest.raises(ValueError, match="count is a whole number ≥ 0, got"):
        plans.table(count)
    assert not plans.table(0).rows
