"""Batches from the host to the device, while it computes.

A batch goes through pinned memory, on a stream of its own, as soon as it is read: while the one before it is trained
on. What decides shapes or is checked (borders of documents, kinds of positions, labels, sizes of media, codes) stays on
the host: read from a GPU, it would be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from omnitrain.data.batch import PackedBatch, SpokenAnswers
from omnitrain.data.waveforms import WaveBatch
from omnitrain.models.layers.transfer import sent


@singledispatch
def for_training(batch: Any, device: torch.device) -> Any:
    """`batch` with the numbers that are computed with on `device`, which is not waited for."""
    raise TypeError(f"{type(batch).__name__} is no batch of this library; give `for_training` a way for it")


@for_training.register
def _(batch: PackedBatch, device: torch.device) -> PackedBatch:
    spoken = None if batch.spoken is None else for_training(batch.spoken, device)
    read = None if batch.read is None else for_training(batch.read, device)
    moved = _moved(batch, ("input_ids", "position_ids", "mel", "patches"), device)
    return replace(batch, **moved, spoken=spoken, read=read)


@for_training.register
def _(batch: SpokenAnswers, device: torch.device) -> SpokenAnswers:
    return replace(batch, **_moved(batch, ("position_ids", "heard"), device))


@for_training.register
def _(batch: WaveBatch, device: torch.device) -> WaveBatch:
    return replace(batch, **_moved(batch, ("wav",), device))


def _moved(batch: Any, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    return {name: sent(value, device) for name in names if (value := getattr(batch, name)) is not None}


@dataclass(frozen=True)
class Ahead:
    """A batch that is on its way to a GPU."""

    batch: Any
    there: torch.cuda.Event


class SendAhead:
    """Call it with a batch as soon as that is read; `arrived` makes the computation, not the host, wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch: Any) -> Ahead:
        with torch.cuda.stream(self.stream):
            moved = for_training(batch, self.device)
            return Ahead(moved, self.stream.record_event())


def arrived(ahead: Ahead) -> Any:
    """The batch, for the current stream."""
    stream = torch.cuda.current_stream()
    stream.wait_event(ahead.there)
    for tensor in _on_gpu(ahead.batch):
        tensor.record_stream(stream)  # its memory is not to be used again before this stream is done with it
    return ahead.batch


def _on_gpu(batch: Any) -> Iterator[Tensor]:
    for value in vars(batch).values():
        if isinstance(value, SpokenAnswers | PackedBatch):
            yield from _on_gpu(value)
        elif isinstance(value, Tensor) and value.is_cuda:
            yield value
