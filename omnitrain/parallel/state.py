"""The state of a spread model: which part of what a single process would hold lies here, and how to have it whole.

Names and shapes are those of the model that is not spread, so that a checkpoint says nothing of the mesh that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from omnitrain.parallel.mesh import Mesh


class Whole:
    """Names, shapes and places of the parameters of `model`.

    `given_out`: how many experts there are in all, by module (see `spread`).
    """

    def __init__(self, model: nn.Module, mesh: Mesh, given_out: Mapping[str, int]) -> None:
        self.mesh = mesh
        self.parameters = dict(model.named_parameters())
        self.experts = {
            name: given_out[module] for name in self.parameters if (module := name.rpartition(".")[0]) in given_out
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Of parameter `name` in a model that is not spread."""
        shape = tuple(self.parameters[name].shape)
        return (self.experts[name], *shape[1:]) if name in self.experts else shape

    def gather(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor on the host, of which every process has `part`, cut as parameter `name` is (its value,
        its gradient or a moment of it). A collective."""
        whole = part.full_tensor() if isinstance(part, DTensor) else part
        if name in self.experts:
            group = self.mesh.experts["expert"].get_group()
            parts = [torch.empty_like(whole) for _ in range(group.size())]
            dist.all_gather(parts, whole.contiguous(), group=group)
            whole = torch.cat(parts)
        return whole.detach().cpu()

    def place(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where in the whole of parameter `name` this process's part of it begins, and the part's shape."""
        part = self.parameters[name]
        shape, offset = tuple(part.shape), (0,) * part.ndim
        if isinstance(part, DTensor):
            shape, offset = compute_local_shape_and_global_offset(part.shape, part.device_mesh, part.placements)
        if name in self.experts:
            here = self.mesh.experts["expert"].get_local_rank()
            offset = (here * self.experts[name] // self.mesh.sizes.expert + offset[0], *offset[1:])
        return tuple(offset), tuple(shape)

    def squared_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """fp64 []: sum of the squares of gradients that are cut as parameters are; of what is here (see `add_up`)."""
        parts = [local(tensor) for tensor in tensors]
        parts = [part for part in parts if part.numel()]
        if not parts:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(torch._foreach_norm(parts)).double().square().sum()

    def add_up(self, sums: Tensor) -> Tensor:
        """`sums` over the processes of a copy, each of which has other parts of the parameters. A collective."""
        sums = sums.clone()
        dist.all_reduce(sums, group=self.mesh.parameters["copy"].get_group())
        return sums


def local(tensor: Tensor) -> Tensor:
    """What this process has of `tensor`; changes of it in place are changes of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that belong to the state of `model`, which every process has whole."""
    names = dict(model.named_parameters()).keys()
    return ((name, value) for name, value in model.state_dict(keep_vars=True).items() if name not in names)
