"""Tensors that lie in files: a mapping that reads them one by one, or a part of one, when somebody asks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from omnitrain.models.deferred import put


class Stored(Mapping[str, Tensor]):
    """`shapes`: of the whole tensors, by name, which costs no reading."""

    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of `shape` that begins at `offset`; nothing else is read."""

    def __getitem__(self, name: str) -> Tensor:
        return self.region(name, (0,) * len(self.shapes[name]), self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Below(Stored):
    def __init__(self, stored: Stored, prefix: str) -> None:
        self._stored, self._prefix = stored, prefix
        names = {name: shape for name, shape in stored.shapes.items() if name.startswith(prefix)}
        self.shapes = {name.removeprefix(prefix): shape for name, shape in names.items()}

    def region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._stored.region(self._prefix + name, offset, shape)


def below(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Those whose names begin with `prefix`, by the rest of their names."""
    if isinstance(tensors, Stored):
        return _Below(tensors, prefix)
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def shapes(tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape; nothing that is stored is read."""
    return tensors.shapes if isinstance(tensors, Stored) else {n: tuple(x.shape) for n, x in tensors.items()}


def region(tensors: Mapping[str, Tensor], name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The part of ``tensors[name]`` of `shape` that begins at `offset`; of what is stored, nothing else is read."""
    if isinstance(tensors, Stored):
        return tensors.region(name, offset, shape)
    return tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
    """Let `module` have all of these `weights`, or those of these names: one after the other, or, where it lies on
    `meta`, later (`models.deferred`)."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name in weights if names is None else names:
        put(own[name], partial(region, weights, name))
