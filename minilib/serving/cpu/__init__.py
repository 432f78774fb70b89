"""Serving on a CPU in compiled code, which is loaded where it is asked for and not before: it takes 100 MiB."""

from __future__ import annotations

import torch

from minilib.model.decoder import Decoder


def pack_as_asked(model: Decoder, pack: bool | torch.dtype, over: bool = False) -> None:
    """Pack a model as an engine's argument says: not, in fp32 for True, or with products in a dtype; see `pack`."""
    if pack:
        from minilib.serving.cpu.packing import pack as pack_model

        pack_model(model, torch.float32 if pack is True else pack, over)
