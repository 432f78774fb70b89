"""What training adds to a mixture of experts: keeping the load of experts even, by a penalty or by a controller.

    "loss"   a penalty on routers whose popular experts also have high scores (Shazeer et al. 2017; Switch, 2021)
    "bias"   no penalty: each expert's bias goes up a step while it has less than its share, and down while it has more;
             the controller is `mechanisms.balancing.Feedback`, which balances HTTP backends too (DeepSeek-V3, 2024)
    "both"   the bias, and a weak penalty beside it, as DeepSeek-V3 was trained
    "none"   whatever the router learns

On ranks loads are those of the whole batch, and over several backwards before a step those of all parts so far. How
strongly they are balanced depends on neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilib.mechanisms.balancing import Feedback
from minilib.model.moe import Router, Routing
from minilib.ranks.collectives import Communicator

METHODS = ("none", "loss", "bias", "both")


@dataclass(frozen=True)
class BalanceConfig:
    """How to balance.

    Args:
        method: one of METHODS.
        coefficient: of the load-balancing loss, with method "loss" or "both".
        rate: how far a bias moves in a step, with method "bias" or "both"; scores are between 0 and 1. The trainer
            lowers it together with the learning rate, so that biases come to rest when weights do.
        z_loss: coefficient of the router's z-loss, with any method.

    Raises:
        ValueError: for another method or a negative number.
    """

    method: str = "none"
    coefficient: float = 0.01
    rate: float = 0.001
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}; got {self.method!r}")
        for name in ("coefficient", "rate", "z_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")


class Balancer:
    """Watches every router of a model while it trains.

        loss = model.loss(...) + balancer.penalty()
        loss.backward()
        optimizer.step()
        balancer.step()

    Args:
        model: with any number of routers, also none.
        config: how to balance.
        comm: between ranks that share each batch; all methods are then collectives. None on one process.

    Attributes:
        loads: (routers, num_experts) int64, pairs that each expert has been wanted for since the last `step`, on all
            ranks.
        history: `loads` of every step so far; it begins anew when a run is resumed.

    Cost: an all-reduce of 8 bytes an expert and layer for each forward, on ranks.
    """

    def __init__(self, model: nn.Module, config: BalanceConfig, comm: Communicator | None = None) -> None:
        self.config, self.comm = config, comm
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.loads = self._nothing()
        self.history: list[list[list[int]]] = []
        self._seen: list[Routing] = []
        self._hooks = [router.register_forward_hook(self._see) for router in self.routers]

    def penalty(self, weight: float = 1.0) -> Tensor | float:
        """What to add to the loss of the forward just made, for the tokens of that forward.

        Args:
            weight: what this rank's, or this part's, loss is multiplied by: 0 if its tokens do not count.

        Raises:
            RuntimeError: if there was no forward since, or more than one.
        """
        if not self.routers:
            return 0.0
        seen, self._seen = self._seen, []
        if len(seen) != len(self.routers):
            raise RuntimeError(
                f"penalty() is asked for once after each forward with gradients; {len(self.routers)} routers have been "
                f"seen {len(seen)} times since"
            )
        loads = torch.stack([routing.wanted for routing in seen]) * (weight != 0)
        if self.comm is not None:
            self.comm.all_reduce(loads)
        self.loads += loads.cpu()
        total = 0.0
        for routing, load in zip(seen, self.loads, strict=True):
            if self.config.method in ("loss", "both"):
                shares = load.to(routing.scores) / load.sum().clamp_min(1)
                total = total + self.config.coefficient * load_balancing_loss(routing.scores, shares)
            if self.config.z_loss:
                total = total + self.config.z_loss * router_z_loss(routing.logits)
        return total * weight / len(self.routers)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """After the optimizer's step: move the biases, and write down the loads.

        Args:
            scale: of the rate, for a schedule.
        """
        if not self.routers:
            return
        self.history.append(self.loads.tolist())
        if self.config.method in ("bias", "both"):
            for router, load in zip(self.routers, self.history[-1], strict=True):
                feedback = Feedback(router.bias.tolist(), self.config.rate * scale)
                feedback.observe(load)
                router.bias.copy_(torch.tensor(feedback.bias))
        self.loads = self._nothing()

    def close(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, router: Router, inputs: Sequence[Tensor], routing: Routing) -> None:
        if torch.is_grad_enabled():  # a look at the validation loss is no training
            self._seen.append(routing)

    def _nothing(self) -> Tensor:
        experts = self.routers[0].config.num_experts if self.routers else 0
        return torch.zeros(len(self.routers), experts, dtype=torch.int64)


def load_balancing_loss(scores: Tensor, shares: Tensor) -> Tensor:
    """num_experts · Σ share · mean score: 1 for even loads, num_experts if one expert has everything and is sure of it.

    Shares count, so no gradient comes through them; given shares, the loss is a mean over tokens, and adds up over
    ranks and parts of a batch as the model's own loss does.

    Args:
        scores: (tokens, num_experts), positive; normalised here, as sigmoid scores have to be.
        shares: (num_experts,), each expert's part of all pairs of the batch.

    Source: Fedus, Zoph and Shazeer 2021, equations 4 to 6; DeepSeek-V3, equations 17 to 20; Qiu et al. 2025, "Demons in
    the Detail", for shares of the whole batch.
    """
    mean = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).sum(0) / max(1, len(scores))
    return len(shares) * (shares * mean).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean square of each token's log-sum-exp: keeps logits small, where float rounding is.

    Args:
        logits: (tokens, num_experts).

    Source: Zoph et al. 2022, "ST-MoE", equation 5.
    """
    return logits.logsumexp(-1).square().sum() / max(1, len(logits))
