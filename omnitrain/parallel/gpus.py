"""Kinds of GPU: what their makers state, and the shares of it that a plan counts on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """As stated by the manufacturer.

    Attributes:
        peak: operations per second in bf16, dense, sums in fp32.
        memory: bytes.  bandwidth: of its memory, bytes per second.
        inside_node, between_nodes: bytes per second that one GPU sends (and receives at the same time): NVLink, and one
            network card for each GPU.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    inside_node: float
    between_nodes: float

    def seconds(self, operations: float, moved: float) -> float:
        """At best, of a kernel that does `operations` and moves `moved` bytes: a roofline (Williams et al. 2009)."""
        return max(operations / (self.peak * REACHED.peak), moved / (self.bandwidth * REACHED.bandwidth))

    def message_seconds(self, collective: str, size: int, processes: int, in_node: int) -> float:
        """Of a message of `size` bytes among `processes`, `in_node` of them in each node.

        Rings (all but all-to-all) enter a node once, through the cards of all who take part; of an all-to-all each
        process sends its own part through its own card.
        """
        if collective == "all-to-all":
            inside, outside = (in_node - 1) / processes, (processes - in_node) / processes
            return size * (inside / self.inside_node + outside / self.between_nodes) / REACHED.network
        crossing = min(self.inside_node, in_node * self.between_nodes)
        rate = self.inside_node if in_node == processes else crossing
        passes = 2 if collective == "all-reduce" else 1
        return passes * size * (processes - 1) / processes / rate / REACHED.network


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Shares of what is stated that are counted on. Assumptions, not measurements: usual values of large products, of
    element-wise kernels, of large messages, and of the memory that the allocator and CUDA leave."""

    peak: float = 0.6
    bandwidth: float = 0.8
    network: float = 0.7
    memory: float = 0.92


REACHED = Reached()

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="H100", peak=989e12, memory=80e9, bandwidth=3.35e12, inside_node=450e9, between_nodes=50e9),
        Gpu(name="H200", peak=989e12, memory=141e9, bandwidth=4.8e12, inside_node=450e9, between_nodes=50e9),
        Gpu(name="A100", peak=312e12, memory=80e9, bandwidth=2.039e12, inside_node=300e9, between_nodes=25e9),
        Gpu(name="B200", peak=2250e12, memory=180e9, bandwidth=8e12, inside_node=900e9, between_nodes=50e9),
    )
}
"""The SXM boards with 80 GB (H100, A100), 141 GB and 180 GB. Networks are those of the makers' own nodes: 400 Gbit/s
for each GPU, 200 with A100."""


def gpu(name: str) -> Gpu:
    """ValueError, with the names, if there is no such kind."""
    if name.upper() not in GPUS:
        raise ValueError(f"no GPU {name!r}; use one of {', '.join(GPUS)}")
    return GPUS[name.upper()]
