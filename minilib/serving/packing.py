"""Weights packed for a CPU: the order in which oneDNN's matrix product reads them, made once instead of at every call.

torch's own `nn.Linear` hands fp32 weights to the BLAS as they are. For the few rows of a decoding step that is slow:
measured with torch 2.13 on two AMD EPYC cores, 25 million parameters and 8 rows take 15 ms that way and 4 ms packed.
`torch.compile` packs with the same two operations, but needs a C++ compiler on the reader's machine.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from minilib.model.decoder import Decoder

_ROWS = 32  # the batch that oneDNN chooses the order for; it was the best order for 1 to 256 rows


class PackedLinear(nn.Module):
    """A linear layer without bias over packed weights; for inference only.

    Args:
        linear: the layer to pack, fp32 on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def packed(model: Decoder) -> Decoder:
    """The same model with packed matrices where that can be had (fp32 on a CPU with oneDNN), else the model itself.

    The model that was given stays as it is; embeddings and norms are shared with it, the matrices are not.

    Cost: the matrices once more in memory, unless the caller drops the model.
    """
    weight = model.embed.weight
    here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not here or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return twin
