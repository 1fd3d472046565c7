"""A training step of one process in a world that is not there.

The real model is spread by the real code over a process group that sends nothing, and its numbers are fake tensors,
which have shapes and no values. Three things that depend on values are given some:

- Tensors made of whole numbers alone (borders of documents, kinds of positions, labels, lengths of media) are real, as
  long as nothing fake goes into them.
- Routers choose experts in turn, so that each gets as many tokens as the next, and all processes send each other as
  many rows.
- A number read from a fake tensor is 1 (true): targets weigh alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten, _c10d = torch.ops.aten, torch.ops.c10d


@contextlib.contextmanager
def pretended_world(size: int) -> Generator[None]:
    """This process is the first of `size`, of which the others do not exist. RuntimeError if it has others already."""
    if dist.is_initialized():
        raise RuntimeError("this process has a process group already, and cannot pretend another")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def fake_numbers(*, as_on_gpu: bool) -> Generator[None]:
    """What is built and computed here has shapes and no values.

    `as_on_gpu`: the model takes the ways that it takes on CUDA under bf16 autocast: its tensors say that they are
    there. (They are not: autograd would ask for a device. What is to run under autocast needs that of ``cpu``.)
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Pretence())
        if as_on_gpu:
            stack.enter_context(patch.object(FakeTensor, "is_cuda", True, create=True))
            stack.enter_context(_autocast_of_cuda())
        yield


@contextlib.contextmanager
def _autocast_of_cuda() -> Generator[None]:
    """For those who ask; `torch.autocast("cuda")` says no where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class _Pretence(TorchDispatchMode):
    """Stands above a FakeTensorMode; see above."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        real = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if real and (tensors or _makes_whole_numbers(func, kwargs)):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
                if func is _c10d.alltoall_base_.default:
                    _as_if_all_were_alike(*args[:3])
                return result
        if func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_):
            args = (args[0], _places(args[1]), *args[2:])
        if func is _aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is _aten._fused_adamw_.default:  # in place on a GPU, where a fake one makes copies
            return None
        if func is _aten.topk.default:
            return _in_turn(*func(*args, **kwargs), args[0].shape[-1])
        return func(*args, **kwargs)


def _makes_whole_numbers(func: Any, kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:  # arange of whole numbers
        return func.overloadpacket is _aten.arange
    return not dtype.is_floating_point


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the numbers of the places where they are true, of which it is known how many there are."""
    found: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        with unset_fake_temporarily():
            found += index.nonzero().unbind(1) if index is not None and masks else [index]
    return found


def _in_turn(values: Tensor, _: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The choices of `topk` [N, k] among `n`, one after the other."""
    with unset_fake_temporarily():
        return values, (torch.arange(values.numel()) % n).view(values.shape)


def _as_if_all_were_alike(received: Tensor, sent: Tensor, group: Any) -> None:
    """The first process gets from each other what it sends to itself."""
    processes = ProcessGroup.unbox(group).size()
    received.copy_(sent.view(processes, -1)[0].repeat(processes).view(received.shape))
