"""What a layout runs on: GPUs in NVLink domains, joined by a network, at rates that were measured elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.numbers import quoted
from minilib.numbers.machine import Machine, NotOnThisMachine

# Figures of quoted.toml for each data sheet. BEST is the fastest matrix product that a search over shapes found, which
# no training reaches; TRAINING what products of a model's shapes reach, where somebody has measured that.
BEST = {
    "a100-80g-sxm": {"bf16": "matmul_a100_bf16"},
    "h100-sxm": {"bf16": "matmul_h100_bf16", "fp8": "matmul_h100_fp8"},
    "gb200": {"bf16": "matmul_gb200_bf16", "fp8": "matmul_gb200_fp8"},
}
TRAINING = BEST | {"h100-sxm": {"bf16": "training_matmul_h100_bf16", "fp8": "training_matmul_h100_fp8"}}
ATTENTION = {"a100-80g-sxm": "attention_2_a100", "h100-sxm": "attention_3_h100", "gb200": "attention_4_b200"}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, and what they reach.

    Args:
        gpu: its data sheet.
        gpus: how many.
        domain: GPUs that NVLink joins: 8 of a DGX H100, 72 of an NVL72.
        matmul: FLOP/s of large matrix products, by dtype; bf16 is among them.
        attention: FLOP/s of attention.
        memory: bytes/s of large operations that only read and write.
        nvlink: bytes/s of a collective within a domain, each way.
        network: bytes/s of one GPU's port to other domains, each way.
        nvlink_step, network_step: seconds of a ring's step without bytes, within a domain and between them.
        reserve: bytes of a GPU that are not the model's: context, buffers of collectives, fragments.

    Raises:
        ValueError: if a domain is no whole number of GPUs, a rate no number > 0, or a time no finite number ≥ 0.
    """

    gpu: Machine
    gpus: int
    domain: int
    matmul: dict[str, float]
    attention: float
    memory: float
    nvlink: float
    network: float
    nvlink_step: float = 0.0
    network_step: float = 0.0
    reserve: float = 4e9

    def __post_init__(self) -> None:
        for name in ("gpus", "domain"):
            check_whole(name, getattr(self, name), 1)
        rates = {f"matmul in {dtype}": rate for dtype, rate in self.matmul.items()}
        rates |= {name: getattr(self, name) for name in ("attention", "memory", "nvlink", "network")}
        for name, rate in rates.items():
            check_quantity(name, rate, above_zero=True, finite=False)
        for name in ("nvlink_step", "network_step", "reserve"):
            check_quantity(name, getattr(self, name))
        if "bf16" not in self.matmul:
            raise ValueError(f"matmul needs a rate of bf16, which the output is in; got {', '.join(self.matmul)}")
        if self.reserve >= self.gpu.memory_bytes:
            raise ValueError(f"reserve leaves nothing of {self.gpu.memory_bytes:,} bytes, got {self.reserve!r}")

    @classmethod
    def of(
        cls,
        gpu: str,
        gpus: int,
        domain: int = 8,
        port: float = 50e9,
        attention: str | None = None,
        best_shapes: bool = False,
    ) -> Cluster:
        """A cluster of GPUs with a data sheet, whose efficiencies quoted.toml has, with their sources.

        Args:
            gpu: name of the data sheet.
            gpus: how many.
            domain: GPUs that NVLink joins.
            port: bytes/s of one GPU's port to the network, each way, as sold.
            attention: a figure of quoted.toml for the attention kernel of the day; the latest for this GPU if left out.
            best_shapes: take matrix products at the rate of their best shape, as an upper bound.

        Raises:
            ValueError: if nothing is quoted for this GPU.
        """
        check_quantity("port", port, above_zero=True, finite=False)
        if gpu not in list(BEST):
            raise ValueError(f"no efficiencies are quoted for {gpu!r}, only for {', '.join(BEST)}; build a Cluster "
                             "from rates of your own")  # fmt: skip
        machine = Machine.datasheet(gpu)
        return cls(
            machine,
            gpus,
            domain,
            matmul={
                dtype: quoted.value("gpu", name) for dtype, name in (BEST if best_shapes else TRAINING)[gpu].items()
            },
            attention=quoted.value("gpu", attention or ATTENTION[gpu]) * machine.peak("bf16"),
            memory=quoted.value("gpu", "memory_efficiency") * machine.memory_bandwidth,
            nvlink=quoted.value("gpu", "nvlink_efficiency") * machine.link("nvlink").bandwidth,
            network=quoted.value("gpu", "network_efficiency") * port,
            nvlink_step=quoted.value("gpu", "nccl_step_nvlink"),
            network_step=quoted.value("gpu", "nccl_step_network"),
        )

    def product_rate(self, dtype: str) -> float:
        """FLOP/s of large matrix products.

        Raises:
            NotOnThisMachine: for a dtype without a rate.
        """
        if dtype not in self.matmul:
            raise NotOnThisMachine(f"no rate of products in {dtype!r}; it has: {', '.join(self.matmul)}")
        return self.matmul[dtype]

    @property
    def room(self) -> float:
        """Bytes of a GPU for the model."""
        return self.gpu.memory_bytes - self.reserve

    def bandwidth(self, group: GroupPlace) -> float:
        """Bytes/s of a ring through a group.

        A ring enters and leaves each domain once for every member that has a port there: k members of one domain share
        k ports, up to what NVLink passes on.
        """
        return self.nvlink if group.domains == 1 else min(self.nvlink, group.fewest * self.network)

    def latency(self, group: GroupPlace) -> float:
        """Seconds of a ring's step without bytes."""
        return self.nvlink_step if group.domains == 1 else self.network_step


class GroupPlace(NamedTuple):
    """How a group of ranks lies in NVLink domains.

    Args:
        size: ranks.
        domains: that they stand in.
        fewest: ranks in the domain that has fewest of them.
    """

    size: int
    domains: int
    fewest: int

    @classmethod
    def of(cls, domains: Sequence[int]) -> GroupPlace:
        """From the domain of each rank.

        Raises:
            ValueError: if there is no rank.
        """
        if not domains:
            raise ValueError("a group has 1 rank or more, got none")
        counts = Counter(domains)
        return cls(len(domains), len(counts), min(counts.values()))
