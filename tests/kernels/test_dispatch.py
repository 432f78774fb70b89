"""How a kernel is launched."""

from types import SimpleNamespace

import pytest
import torch

from minilib.kernels.workbench.dispatch import launch, target_of


class Kernel:
    """Keeps what it is launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self.run

    def run(self, *arguments, **options):
        self.options = options


def test_a_grid_has_one_dimension_or_more():
    kernel = Kernel()
    launch(kernel, 5, torch.zeros(1))
    assert kernel.grid == (5,)
    launch(kernel, (5, 2), torch.zeros(1))
    assert kernel.grid == (5, 2)


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_80")],
)
def test_a_gpu_is_named_by_its_generation(capability, target, monkeypatch):
    """Blackwell for data centres multiplies by tcgen05, not by Hopper's wgmma, and has a name of its own."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert target_of(SimpleNamespace(is_cuda=True, device="cuda:0")) == target
    assert target_of(torch.zeros(1)) == "sm_80"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert target_of(torch.zeros(1)) == "gfx942"


def test_a_limit_on_registers_is_dropped_where_the_compiler_has_none(monkeypatch):
    kernel = Kernel()
    launch(kernel, 1, torch.zeros(1), num_warps=4, maxnreg=128)
    assert kernel.options == {"num_warps": 4, "maxnreg": 128}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launch(kernel, 1, torch.zeros(1), num_warps=4, maxnreg=128)
    assert kernel.options == {"num_warps": 4}
