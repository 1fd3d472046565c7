"""What a step on a mesh takes, put together from a ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from omnitrain.parallel.gpus import REACHED, Gpu
from omnitrain.parallel.ledger import ALL_TO_ALL, Message
from omnitrain.parallel.mesh import MeshSizes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one process and one optimizer step.

    Attributes:
        tokens: positions that a process (or those that share packs together) reads in a step.
        memory: bytes at the peak, by what they are for (`ledger.KINDS`).
        messages, bytes: how many of each kind, and their bytes.
        operations: as they run, what is computed again included.  model_operations: those that the equations ask for.
        compute: seconds of all operations, each at the bound of its peak or memory.
    """

    sizes: MeshSizes
    gpu: Gpu
    tokens: int
    memory: Mapping[str, int]
    messages: Counter[Message]
    bytes: Counter[Message]
    operations: float
    model_operations: float
    compute: float

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu.memory * REACHED.memory

    @property
    def gathering(self) -> float:
        """Seconds of messages that travel while something is computed: of weights and gradients."""
        return sum(self._seconds(m) for m in self.bytes if m.collective != ALL_TO_ALL)

    @property
    def exchanging(self) -> float:
        """Seconds of messages that computation waits for: of tokens and heads."""
        return sum(self._seconds(m) for m in self.bytes if m.collective == ALL_TO_ALL)

    @property
    def seconds(self) -> float:
        return max(self.compute, self.gathering) + self.exchanging

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU."""
        return self.tokens / self.sizes.context / self.seconds

    @property
    def rate(self) -> float:
        """Operations per second of each GPU that the equations ask for."""
        return self.model_operations / self.sizes.context / self.seconds

    def of(self, collective: str) -> tuple[int, int]:
        """Messages of this kind, and their bytes; those of a process to itself do not count."""
        mine = [m for m in self.messages if m.collective == collective and m.processes > 1]
        return sum(self.messages[m] for m in mine), sum(self.bytes[m] for m in mine)

    def _seconds(self, message: Message) -> float:
        size = self.bytes[message]
        return self.gpu.message_seconds(message.collective, size, message.processes, message.in_node)


def fastest_first(estimates: list[Estimate]) -> list[Estimate]:
    """Those that fit before those that do not; among them by tokens per second of each GPU."""
    return sorted(estimates, key=lambda e: (not e.fits, -e.tokens_per_second))
