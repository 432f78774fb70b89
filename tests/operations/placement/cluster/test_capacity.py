"""Who has which GPU, and what is free where: against counting anew after every change."""

import random

import pytest

from minilib.mechanisms.scheduling.placing import FreeIndex
from minilib.operations.placement.cluster.capacity import MOST_INDEXES, OUT, FreeGpus, NotFree
from minilib.operations.placement.cluster.drawing import gpu_cells
from minilib.operations.placement.cluster.index import Fit
from minilib.operations.placement.cluster.topology import GpuCluster, Host

NVL72 = GpuCluster.regular(2, 18, 4, nvlink_domain=72, gpu="gb200")


def test_what_a_group_can_give_depends_on_the_fit():
    free = FreeGpus(GpuCluster.regular(2, 2, 8, racks_per_unit=1))
    free.take("x", [0])  # 7, 8 | 8, 8
    assert free.index(Fit()).total == 31
    assert free.index(Fit(4, 4)).total == 28
    assert free.index(Fit(4, 4)).capacity["host"] == [4, 8, 8, 8]
    assert free.index(Fit(2, 8)).capacity["host"][0] == 0  # six in workers of two, and no group of eight
    assert free.index(Fit(8, 8)).smallest("rack", 16) == 1


def test_a_group_of_eight_lies_within_a_domain_and_not_within_a_tray():
    free = FreeGpus(NVL72)
    index = free.index(Fit(4, 8))
    assert index.levels == ["host", "domain"]
    free.take("x", [0])
    assert index.capacity["domain"] == [64, 72]  # 17 whole trays are 8 groups of two
    assert index.total == 136


def test_levels_that_say_nothing_new_are_left_out():
    assert FreeGpus(GpuCluster.regular(1, 1)).index(Fit()).levels == ["host"]
    assert FreeGpus(GpuCluster.regular(4, 4, racks_per_unit=4)).index(Fit()).levels == ["host", "rack"]
    assert FreeGpus(GpuCluster.regular(4, 1, racks_per_unit=2)).index(Fit()).levels == ["host", "unit"]


def test_selectors_leave_out_hosts():
    hosts = tuple(Host(f"h{n}", 2, f"h{n}", "r", "u", {"zone": "ab"[n % 2]}) for n in range(4))
    free = FreeGpus(GpuCluster("x", "h100-sxm", hosts))
    index = free.index(Fit(selector=(("zone", "b"),)))
    assert index.total == 4 and list(index.least_first("host")) == [1, 3]
    assert free.index(Fit(selector=(("zone", "c"),))).total == 0


def test_no_gpu_is_given_twice():
    free = FreeGpus(NVL72)
    free.take("a", [3, 1])
    for owner, gpus, said in (
        ("b", [0, 1], "GPU 1 is that of 'a'"),
        ("a", [5], "give them back"),
        ("b", [5, 5], "twice"),
    ):
        with pytest.raises(NotFree, match=said):
            free.take(owner, gpus)
    free.check_invariants()
    assert free.owned("a") == (3, 1) and free.owned("b") == () and free.is_free(0)
    with pytest.raises(NotFree, match="no GPUs to give back"):
        free.give_back("b")
    with pytest.raises(IndexError, match="none of the 144"):
        free.take("b", [144])
    free.check_invariants()


def test_a_drained_gpu_is_kept_by_its_owner_and_not_free_afterwards():
    free = FreeGpus(NVL72)
    free.take("a", [0, 1])
    free.take_out([1, 2], "drained")
    assert free.owner(1) == "a" and not free.is_free(2) and free.free == 141
    assert free.give_back("a") == (0, 1)
    assert [free.is_free(gpu) for gpu in (0, 1, 2)] == [True, False, False]
    with pytest.raises(NotFree, match="GPU 1 is drained"):
        free.take("b", [1])
    free.restore([1, 2, 3])
    assert free.free == 144
    free.check_invariants()
    with pytest.raises(ValueError, match="failed, drained, reserved"):
        free.take_out([0], "tired")
    with pytest.raises(IndexError):
        free.take_out([144], "failed")
    free.check_invariants()


def test_counts_are_those_of_counting_anew():
    """3,000 changes, with more fits than are kept."""
    choices = random.Random(3)
    hosts = [Host(f"h{n}", choices.choice((2, 4, 8)), f"d{n // 3}", f"r{n // 6}", f"u{n // 12}",
                  {"zone": choices.choice("ab")}) for n in range(36)]  # fmt: skip
    free = FreeGpus(GpuCluster("x", "h100-sxm", tuple(hosts)))
    fits = [Fit(w, w * g, s) for w in (1, 2, 3, 4) for g in (1, 2, 3) for s in ((), (("zone", "a"),))]
    assert len(fits) > MOST_INDEXES
    owners = []
    for step in range(3_000):
        free.index(choices.choice(fits))
        gpus = choices.sample(range(free.cluster.gpus), choices.choice((1, 2, 8, 60)))
        action = choices.choice(("take", "take", "back", "out", "restore"))
        if action == "take" and (gpus := [gpu for gpu in gpus if free.is_free(gpu)]):
            free.take(step, gpus)
            owners.append(step)
        elif action == "back" and owners:
            free.give_back(owners.pop(choices.randrange(len(owners))))
        elif action == "out":
            free.take_out(gpus[:3], choices.choice(OUT))
        elif action == "restore":
            free.restore(gpus)
        if step % 10 == 0:
            free.check_invariants()
    free.check_invariants()


def test_a_change_of_one_host_moves_few_groups(monkeypatch):
    """Of 10,000 hosts: one, and the rack and unit above it."""
    free = FreeGpus(GpuCluster.regular(2_500, 4))
    index, moved = free.index(Fit(8, 8)), []
    add = FreeIndex.add
    monkeypatch.setattr(FreeIndex, "add", lambda self, *group: (moved.append(group), add(self, *group)))
    free.take("x", range(8))
    assert moved == [(0, 0), (0, 24), (0, 8 * 32 - 8)] and index.levels == ["host", "rack", "unit"]


def test_the_largest_groups_are_dealt_whole_and_the_rest_where_it_fits_best():
    free = FreeGpus(GpuCluster.regular(1, 6, 8))
    free.take("x", [*range(8, 12), *range(16, 18), *range(24, 25)])  # 8 4 6 7 8 8
    index = free.index(Fit())
    assert list(index.deal("host", 8)) == [(0, 8)]
    assert list(index.deal("host", 20)) == [(0, 8), (4, 8), (1, 4)]
    assert list(index.deal("host", 24)) == [(0, 8), (4, 8), (5, 8)]
    assert list(index.deal("host", 41)) == [(0, 8), (4, 8), (5, 8), (3, 7), (2, 6), (1, 4)]
    assert index.smallest("host", 5) == 2 and index.smallest("host", 9) is None


def test_a_scratch_changes_on_its_own():
    free = FreeGpus(NVL72)
    fit = Fit(4, 8)
    free.take("a", range(8))
    twin = free.scratch(fit)
    twin.give_back("a")
    twin.take("b", range(72))
    assert (free.index(fit).total, twin.index(fit).total) == (136, 72) and free.owned("a") and not free.owned("b")
    free.check_invariants()
    twin.check_invariants()


def test_a_drawing_has_a_cell_for_each_gpu():
    free = FreeGpus(NVL72)
    free.take("job", [5, 76])
    free.take_out([143], "failed")
    cells = gpu_cells(free)
    assert [cell.gpu for cell in cells] == list(range(144))
    assert len({cell[1:4] for cell in cells}) == 144
    assert cells[76] == (76, 1, 1, 0, "job", None) and cells[143] == (143, 1, 17, 3, None, "failed")
