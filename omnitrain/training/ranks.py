"""What the processes of one run tell one another. Calls are collectives, made by all ranks alike, unless they say that
they are not."""

from __future__ import annotations

from typing import Any, TypeVar

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


def tell_ranks(message: str) -> None:
    """Leave `message` for the other ranks, at any time. Not a collective: they find it with `told`."""
    if distributed():
        _store().set(message, "1")


def told(message: str) -> bool:
    """Whether a rank has left `message`. Not a collective."""
    return distributed() and _store().check([message])


def second_store() -> dist.Store:
    """What all ranks read and write, by a connection of its own: for a thread beside the one that trains, which may be
    waiting on the first. Not a collective."""
    default: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore("omnitrain", default.clone())


def groups_of_ranks() -> dict[str, Any]:
    """Process groups that this rank is in, by names that all of their ranks know them by. Not a collective."""
    world = dist.distributed_c10d._world
    return {world.pg_names[group]: group for group in list(world.pg_map)}


def collectives_begun() -> dict[str, int]:
    """How many this rank has begun in each of its groups. Not a collective."""
    return {name: group._get_sequence_number_for_group() for name, group in groups_of_ranks().items()}


def _store() -> dist.Store:
    return dist.PrefixStore("omnitrain", dist.distributed_c10d._get_default_store())
