"""Weights that are not there yet: large parameters of a model lie on `meta`, and know where their numbers come from.

Processes that share a model build it so. Each then asks for its own part of one parameter after the other, and so never
holds more than its parts and one tensor (`parallel.sharding.spread`). Whoever writes weights does it by `put`, be the
model there or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Source = Callable[[Sequence[int], Sequence[int]], Tensor]
"""(offset, shape) -> that part of a parameter's numbers."""


class LargeOnMeta(TorchFunctionMode):
    """What is built in this context has its matrices on `meta`; vectors and buffers, which modules fill with numbers
    of their own, are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            size = args[0] if args and not isinstance(args[0], int) else args
            if len(size) > 1:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


@torch.no_grad()
def put(parameter: Tensor, source: Source) -> None:
    """Let `parameter` have the numbers of `source`: now, or, on `meta`, once somebody asks for them."""
    if parameter.is_meta:
        vars(parameter)["source"] = source
    else:
        parameter.copy_(source((0,) * parameter.ndim, parameter.shape))


def part_of_whole(whole: Callable[[], Tensor]) -> Source:
    """The source of what can only be made as a whole."""
    return lambda offset, shape: whole()[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def sources(model: nn.Module) -> dict[str, Source]:
    """The sources of the parameters of `model`, by name, all of which lie on `meta` afterwards; none if all of it is
    there. Raises ValueError for a parameter that nobody has `put` anything into."""
    if not any(p.is_meta for p in model.parameters()):
        return {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.is_meta:
                later = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
                put(later, part_of_whole(p.detach))
                setattr(module, name, later)
    found = {name: vars(p).get("source") for name, p in model.named_parameters()}
    if empty := [name for name, source in found.items() if source is None]:
        raise ValueError(f"{empty[0]} and {len(empty) - 1} more parameters have got no numbers from anywhere")
    return {name: source for name, source in found.items() if source is not None}
