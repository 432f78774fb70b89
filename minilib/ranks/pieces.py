"""The pieces of a transfer: where its chunks lie in a tensor, and one message for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from minilib.mechanisms.replication import Transfer
from minilib.ranks.transport.base import Combine, Message, Transport

Pieces = Callable[[Transfer], Sequence[Tensor]]  # where a transfer's chunks lie, (values,) each


def chunks_of(flat: Tensor, num_chunks: int) -> Pieces:
    """A transfer's chunks of a flat tensor: one piece where they are neighbours, else one each."""
    parts = flat.tensor_split(num_chunks)
    edges = [0, *accumulate(map(len, parts))]

    def pieces(t: Transfer) -> Sequence[Tensor]:
        if t.count == 1 or t.stride == 1:
            return [flat[edges[t.chunk] : edges[t.chunk + t.count]]]
        return [parts[chunk] for chunk in t.chunks]

    return pieces


def content_of(pieces: Sequence[Tensor], keep: bool) -> Tensor:
    """The content of a message that carries these pieces; with `keep` a copy, which no change of them reaches."""
    if len(pieces) > 1:
        return torch.cat(pieces)
    return pieces[0].clone() if keep else pieces[0]


def buffer_for(pieces: Sequence[Tensor]) -> Tensor:
    """The buffer of a message for these pieces: the only piece itself, else one with room for all."""
    return pieces[0] if len(pieces) == 1 else pieces[0].new_empty(sum(map(len, pieces)))


def exchange_pieces(
    transport: Transport,
    send: Message | None,
    receive: Message | None,
    pieces: Sequence[Tensor],
    combine: Combine | None,
) -> None:
    """As `Transport.exchange`, but what is received goes on from the buffer into its pieces, if they are several."""
    if receive is None or len(pieces) == 1:
        transport.exchange(send, receive, combine)
        return
    transport.exchange(send, receive, None)
    for piece, received in zip(pieces, receive.content.split([len(piece) for piece in pieces]), strict=True):
        combine(piece, received) if combine else piece.copy_(received)
