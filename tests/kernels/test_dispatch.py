"""How a kernel is launched."""

import torch

from minilib.kernels.workbench.dispatch import launch


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


def test_a_limit_on_registers_is_dropped_where_the_compiler_has_none(monkeypatch):
    kernel = Kernel()
    launch(kernel, 1, torch.zeros(1), num_warps=4, maxnreg=128)
    assert kernel.options == {"num_warps": 4, "maxnreg": 128}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launch(kernel, 1, torch.zeros(1), num_warps=4, maxnreg=128)
    assert kernel.options == {"num_warps": 4}
