"""What the processes of one run tell one another: every call here is a collective, made by all ranks alike."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor` summed over all ranks; unchanged (and no communication) in a single process."""
    if distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order; `[value]` in a single process. Values are small and picklable."""
    if not distributed():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
