"""The kernels' benchmark, tried out on the CPU at tiny sizes: every op, its peers, and what becomes of failures."""

import json
import math
import platform
from types import SimpleNamespace

import pytest
import torch

from minilib.kernels.workbench.dispatch import interpreted
from minilib.numbers.machine import Machine
from minilib.numbers.price import Cost
from minilib.numbers.records import Record
from tools.bench import kernels
from tools.kernel_jobs import Job, Sizes, jobs, shares

TINY = Sizes(
    device="cpu", attention=((1, 16),), heads=((2, 2), (4, 2)), head_dim=16, product=16, rows=8, columns=32,
    tokens=8, vocab=50, hidden=16, experts=(2, 3), budget=1e-4,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    found = list(kernels.kernels(Machine.datasheet("h200"), TINY, compiler=lambda op: op))
    return {row["name"]: row for row in found}


def test_every_op_is_measured_beside_its_peers(rows):
    ops = {name.split()[0] for name in rows}
    assert ops == {"attention", "matmul", "rms_norm", "softmax", "swiglu", "cross_entropy", "rotary",
                   "linear_cross_entropy", "grouped_matmul"}  # fmt: skip
    assert len(rows) == 2 * 2 + 4 + 2 * 2 * 2 + 2 * 5 + 1
    for name, row in rows.items():
        assert row["measured"] > 0 and row["predicted"] > 0 and row["flops"] > 0 and row["bytes"] > 0, name
        assert row["quartiles"][0] <= row["measured"] <= row["quartiles"][1], name
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["measured"])
        assert row["peers"] and all(x is None or x > 0 for x in row["peers"].values()), name
        assert set(row["ratios"]) | set(row["errors"]) == set(row["peers"]), name
    assert json.loads(json.dumps(list(rows.values())))


def test_a_row_is_a_line_of_words(rows):
    for name, row in rows.items():
        line = kernels.line(row)
        assert line.startswith(name) and all(peer in line for peer in row["peers"])


def test_a_peer_that_is_not_there_is_an_error_and_no_number(rows):
    for name, row in rows.items():
        wrong = {"cudnn"} if name.startswith("attention") else set()
        assert set(row["errors"]) == wrong, row["errors"]
        assert all(row["peers"][peer] is None for peer in wrong)


def test_the_logits_of_linear_cross_entropy_are_counted(rows):
    row = next(row for name, row in rows.items() if name.startswith("linear_cross_entropy"))
    assert row["logits_bytes"] == {"ours": 2 * 1 * 50, "torch": 2 * 8 * 50}
    assert row["peak_bytes"] == {"ours": None, "torch": None}  # torch counts no bytes of a CPU


def test_the_ways_of_one_job_compute_the_same():
    torch.manual_seed(0)
    for job in jobs(TINY, compiler=lambda op: op):
        if "backward" in job.name and not job.name.startswith("linear"):
            continue  # each way has random gradients of its own
        ours = job.ours()()
        for peer, make in job.peers.items():
            if peer in ("cudnn", "dense"):  # what is not there, and another product of the same size
                continue
            for x, y in zip(_tensors(ours), _tensors(make()()), strict=True):
                assert torch.allclose(x.float(), y.float(), atol=0.05, rtol=0.05), (job.name, peer)


def test_experts_share_all_rows():
    assert shares(16, 4, even=True) == [4] * 4 and sum(shares(17, 4, even=True)) == 17
    assert shares(25, 4, even=False) == [12, 6, 4, 3]


def test_an_op_that_fails_leaves_its_error_and_the_others_go_on(monkeypatch):
    def fails():
        raise RuntimeError("no such kernel\n  File somewhere")

    cost = Cost(flops=1, bytes=1)
    made = [Job("broken", cost, fails), Job("whole", cost, lambda: lambda: None, {"peer": fails})]
    monkeypatch.setattr(kernels, "jobs", lambda sizes, compiler: made)
    broken, whole = kernels.kernels(Machine.datasheet("h200"), TINY, compiler=lambda op: op)
    assert broken["errors"] == {"ours": "RuntimeError: no such kernel"} and "measured" not in broken
    assert kernels.line(broken) == "broken: RuntimeError: no such kernel"
    assert whole["errors"] == {"peer": "RuntimeError: no such kernel"} and whole["measured"] > 0


def test_the_sizes_of_a_gpu_exceed_its_cache():
    sizes = Sizes()
    assert all(batch * tokens == 16384 for batch, tokens in sizes.attention)
    assert 2 * sizes.rows * sizes.columns > 2 * 50 * 2**20 and 2 * sizes.tokens * sizes.vocab > 50 * 2**20
    for cost in (job.cost for job in jobs(TINY, compiler=lambda op: op)):
        assert math.isfinite(cost.intensity)


@pytest.mark.skipif(platform.system() != "Linux" or interpreted(), reason="compiles on Linux, uninterpreted")
def test_a_build_that_does_not_compile_leaves_its_error(monkeypatch):
    from minilib.kernels.rowwise import softmax

    good, bad = softmax.builds("sm_90")[:2]
    bad.types["stride_grad"] = "no type"
    monkeypatch.setattr(kernels.compiled, "all_builds", lambda target, every: {"softmax": [good, bad]})
    whole, broken = kernels.every_build(("sm_90",))
    assert whole["module"] == "softmax" and whole["name"] == good.name and whole["spilled"] == 0
    assert broken["name"] == bad.name and broken["target"] == "sm_90" and broken["error"]


def test_some_rows_of_a_record_are_renewed_and_it_says_by_whom(monkeypatch):
    builds = {"softmax": [SimpleNamespace(name="a"), SimpleNamespace(name="b")], "rotary": [SimpleNamespace(name="a")]}
    monkeypatch.setattr(kernels.compiled, "TARGETS", {"sm_80": (), "sm_90": ()})
    monkeypatch.setattr(kernels.compiled, "all_builds", lambda target, every: builds)
    where = dict.fromkeys(("machine", "date", "commit", "command"), "first") | {"versions": {"torch": "1"}}
    keys = [(t, m, n) for t in ("sm_80", "sm_90") for m, n in (("softmax", "a"), ("softmax", "gone"), ("rotary", "a"))]
    old = [{"target": t, "module": m, "name": n, "registers": 1} for t, m, n in keys]
    new = [{"target": t, "module": "softmax", "name": "b", "registers": 2} for t in ("sm_80", "sm_90")]
    new.append({"target": "sm_90", "module": "softmax", "name": "a", "registers": 2})
    record, later = Record("compiled", {"builds": old}, where), {**where, "machine": "second", "commit": "later"}
    found = kernels.renewed(record, new, later)
    assert [(row["target"], row["module"], row["name"], row["registers"]) for row in found.data["builds"]] == [
        ("sm_80", "softmax", "a", 1), ("sm_80", "softmax", "b", 2), ("sm_80", "rotary", "a", 1),
        ("sm_90", "softmax", "a", 2), ("sm_90", "softmax", "b", 2), ("sm_90", "rotary", "a", 1),
    ]  # fmt: skip
    assert found.provenance["machine"] == "first" and "extended" not in record.provenance
    (extended,) = found.provenance["extended"]
    assert extended["machine"] == "second" and extended["commit"] == "later"
    assert extended["modules"] == ["softmax"] and extended["targets"] == ["sm_80", "sm_90"]
    with pytest.raises(ValueError, match="2 builds have no row, such as .*softmax.*b"):
        kernels.renewed(record, [], later)


def _tensors(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)
