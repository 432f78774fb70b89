"""Tensor parallelism: every rank has a part of every layer, and all ranks compute every token together.

    tp = TensorParallel(model, comm)                  cuts a Decoder, in place; all ranks begin as rank 0 does
    model.loss(tokens, positions, targets).backward() the same loss on every rank, from the same tokens
    tp.finish()                                       gradients of what all ranks have are complete
    tp.clip_grad_norm(1.0)
    optimizer.step()

Two kinds of parameters are on several ranks. Where every rank computes all of a gradient, nothing is to do. Where each
computes a part, `finish` adds the parts: norms of queries and keys, of which each rank has some heads; with sequence
parallelism all norms, of which each rank has some tokens; and heads of keys and values that are on several ranks.

In production: Megatron-LM, torch.distributed.tensor.parallel, which torchtitan applies in such a function.
Sources: Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022 (sequence parallelism).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from minilib.model.decoder import Decoder
from minilib.parallel.data.data_parallel import NoBackward
from minilib.parallel.tensor_parallel.layout import CannotBeCut, config_of_rank, cuts
from minilib.parallel.tensor_parallel.linear import ColumnParallelLinear, Enter, RowParallelLinear
from minilib.parallel.tensor_parallel.sequence_parallel import SequenceParallel
from minilib.parallel.tensor_parallel.stream import Replicated, Stream
from minilib.parallel.tensor_parallel.vocabulary import (
    VocabularyParallelEmbedding,
    VocabularyParallelLinear,
    own_logits,
    vocabulary_parallel_cross_entropy,
)
from minilib.parallel.zero.saving import OtherModel
from minilib.ranks.agreement import RanksDiffer, gather_texts, same_shapes
from minilib.ranks.collectives import Communicator

OF_HEADS = ("q_norm", "k_norm")  # replicas of which each rank's heads give a part of the gradient


class TensorParallel:
    """Cuts a decoder among ranks, in place. A collective, as are all methods.

    Args:
        model: whose parameters become this rank's parts of rank 0's.
        comm: between the ranks; all pass the same tokens.
        sequence_parallel: give each rank a part of the tokens between layers, not a replica of all.
        chunks: of tokens, in which products of a layer are computed and summed, one while the one before is under way.
        regather: with sequence_parallel, keep less for backward and gather it again; see sequence_parallel.py.

    Attributes:
        stream: counts its collectives; those of the loss and of `finish` come on top.
        cuts: how each parameter is cut, by name.

    Raises:
        CannotBeCut: for a mixture of experts, a packed model, or one that has been cut already.
        DoesNotDivide: if a rank cannot have as many heads, or columns of the feed-forward layer, as every other.
        RanksDiffer: if ranks have other models.
        ValueError: if chunks is no whole number or below 1, or for regather alone.

    Cost: see `ledger`; parameters, gradients and optimizer state fall to about 1/n.
    """

    def __init__(
        self,
        model: Decoder,
        comm: Communicator,
        *,
        sequence_parallel: bool = False,
        chunks: int = 1,
        regather: bool = False,
    ) -> None:
        if not isinstance(chunks, int) or chunks < 1:
            raise ValueError(f"chunks must be a whole number, at least 1, got {chunks!r}")
        if regather and not sequence_parallel:
            raise ValueError("regather is for sequence_parallel: without it every rank has all tokens anyway")
        _check(model, comm)
        self.model, self.comm = model, comm
        self.stream = SequenceParallel(comm, chunks, regather) if sequence_parallel else Replicated(comm, chunks)
        shapes = {name: x.shape for name, x in model.state_dict().items()}
        self.cuts = cuts(model.config, shapes, comm.world_size)
        for parameter in model.parameters():
            comm.broadcast(parameter)
        parallelize(model, self.stream, self._part)
        self._due = False
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def due(self) -> bool:
        """Whether gradients have come that `finish` has not added up yet."""
        return self._due

    def finish(self) -> None:
        """Call after the last backward of a step: add up the gradients of which each rank has a part.

        Raises:
            NoBackward: if there was none since the latest `finish`, which has added them up already.

        Cost: one all-reduce of them; none if there are none.
        """
        if not self._due:
            raise NoBackward("finish() adds up what backward() left on ranks: call loss.backward() first")
        self._due = False
        places = list(self._partial())
        if not places:
            return
        sizes = [math.prod(whole) for _, whole, _ in places]
        flat = places[0][0].new_zeros(sum(sizes))
        rooms = flat.split(sizes)
        own = [room.view(whole)[part.start : part.stop] for room, (_, whole, part) in zip(rooms, places, strict=True)]
        for mine, (gradient, _, _) in zip(own, places, strict=True):
            mine.copy_(gradient)
        self.comm.all_reduce(flat)
        for mine, (gradient, _, _) in zip(own, places, strict=True):
            gradient.copy_(mine)

    def grad_norm(self) -> Tensor:
        """Norm of the gradients of the whole model, (), each value counted once however many ranks have it."""
        if self._due:
            self.finish()
        squares = torch.zeros(1, dtype=torch.float64, device=self.comm.device)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                cut = self.cuts[name]
                for group, part in zip(cut.groups, cut.split(parameter.grad), strict=True):
                    squares += torch.linalg.vector_norm(part).double().square() / group.copies
        self.comm.all_reduce(squares)
        return squares.sqrt()[0]

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale gradients down to a global norm; return the norm before."""
        norm = self.grad_norm()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm.item()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter, or what has its shape, from all ranks' parts: on every rank, a copy."""
        everything = part.new_empty(self.comm.world_size, *part.shape)
        everything[self.comm.rank] = part.detach()
        self.comm.all_gather(everything)
        return self.cuts[name].whole(list(everything))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a parameter, or of what has its shape: a copy."""
        return self.cuts[name].take(whole, self.comm.rank)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model's parameters, on every rank, as `Decoder.state_dict` has them."""
        wholes: dict[Tensor, Tensor] = {}  # tied parameters once
        held = self.model.state_dict(keep_vars=True)
        for name, parameter in held.items():
            if parameter not in wholes:
                wholes[parameter] = self.whole(name, parameter)
        return {name: wholes[parameter] for name, parameter in held.items()}

    @torch.no_grad()
    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole model's parameters, which may be mapped from a file. No collective.

        Raises:
            OtherModel: if a parameter is missing, left over or of another shape; nothing is taken then.
        """
        held = self.model.state_dict(keep_vars=True)
        for name in {**held, **state}:
            expected = self._whole_shape(name, held[name]) if name in held else "no such parameter"
            found = tuple(state[name].shape) if name in state else "none"
            if found != expected:
                raise OtherModel(f"{name}: the model has {expected}, the state has {found}; load a model of its shape")
        for name, parameter in held.items():
            parameter.copy_(self.part(name, state[name]))

    def _whole_shape(self, name: str, part: Tensor) -> tuple[int, ...]:
        shape, cut = list(part.shape), self.cuts[name]
        shape[cut.dim] = sum(group.size for group in cut.groups)
        return tuple(shape)

    def _part(self, name: str) -> nn.Parameter:
        parameter = self.model.get_parameter(name)
        return nn.Parameter(self.part(name, parameter.detach()), requires_grad=parameter.requires_grad)

    def _arrived(self, parameter: nn.Parameter) -> None:
        self._due = True

    def _partial(self) -> Iterator[tuple[Tensor, tuple[int, ...], range]]:
        """Gradients of which this rank has a part of the sum, the shape of what all ranks have, and whose is whose."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or not self._sums_up(name):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            cut = self.cuts[name]
            for group, gradient in zip(cut.groups, cut.split(parameter.grad), strict=True):
                if group.copies > 1:
                    yield gradient, (group.size, *gradient.shape[1:]), group.ranges[self.comm.rank]

    def _sums_up(self, name: str) -> bool:
        """Whether ranks that have the same of a parameter compute parts of its gradient."""
        kind = name.split(".")[-2]
        return kind == "qkv" or kind in OF_HEADS or isinstance(self.stream, SequenceParallel)


def parallelize(model: Decoder, stream: Stream, part: Callable[[str], nn.Parameter]) -> None:
    """Put layers of which this rank has a part in place of a decoder's own.

    Args:
        model: cut in place.
        stream: how the residual stream lies on ranks.
        part: gives this rank's part of a parameter, by name.
    """
    config, comm = model.config, stream.comm
    mine = config_of_rank(config, comm.world_size)
    embed = part("embed.weight")
    unembed = embed if config.tie_embeddings else part("unembed.weight")
    for number, layer in enumerate(model.layers):
        here = f"layers.{number}"
        bias = part(f"{here}.qkv.bias") if config.qkv_bias else None
        layer.heads = (mine.num_heads, mine.num_kv_heads, mine.num_kv_heads)
        layer.qkv = ColumnParallelLinear(part(f"{here}.qkv.weight"), bias, stream)
        layer.project = RowParallelLinear(part(f"{here}.project.weight"), stream)
        layer.gate_up = ColumnParallelLinear(part(f"{here}.gate_up.weight"), None, stream)
        layer.down = RowParallelLinear(part(f"{here}.down.weight"), stream)
    if isinstance(stream, SequenceParallel):  # whoever reads logits names tokens among all
        layer.register_forward_hook(lambda module, inputs, x: Enter.apply(x, stream))
    model.embed = VocabularyParallelEmbedding(embed, config.vocab_size, stream)
    model.unembed = VocabularyParallelLinear(unembed, config.vocab_size, stream)

    def loss(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = own_logits(features, weight, stream)
        return vocabulary_parallel_cross_entropy(logits, targets, config.vocab_size, comm)

    model.ops = copy.copy(model.ops)
    model.ops.loss = loss
    model.initialize = partial(_initialize, "random numbers of one seed would be the same in every rank's part")


def _initialize(why: str, seed: int = 0) -> None:
    raise CannotBeCut(f"a model is initialized before it is cut: {why}; build it anew, or use load_full_state_dict")


def _check(model: Decoder, comm: Communicator) -> None:
    """Refuse, on all ranks alike, before anything is cut."""
    texts = gather_texts(repr(model.config), comm)
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise RanksDiffer(f"rank 0 has {texts[0]}, rank {rank} has {text}: all ranks must build the same model")
    same_shapes(model, comm)
    if model.ops.compiled:
        raise CannotBeCut("this model is packed for serving on one CPU; load it with pack=False")
    if isinstance(model.embed, VocabularyParallelEmbedding):
        raise CannotBeCut("this model has been cut already; build it anew")
