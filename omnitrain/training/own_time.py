"""How long a process itself computes, beside how long it waits for the others.

Messages make all processes of a run equally slow, so a clock around a step says nothing of who is the slowest. This one
runs through the forward passes and stands still at the messages in them: where weights are gathered, and where tokens
travel to the experts of others. It adds no message and no synchronisation of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from omnitrain.models.layers.moe import SwiGLUExperts


class OwnTime:
    """A stopwatch of the forward passes of one process; on a GPU, of its stream of kernels."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []  # by turns where it began, in which part of the model, and stopped
        self._now: Callable[[], Any] | None = None  # None: no pass is under way
        self._hooks: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """From now on stand still where the layers of `model`, which is spread, wait for messages: ahead of what hooks
        that are there do before and after a layer, until behind that. And tell its parts (``aut``, ``thinker``, ...)
        apart, through each of which the processes go together."""
        self.forget()
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule | SwiGLUExperts):
                mark = torch.compiler.disable(partial(self._mark, name.split(".")[0]))
                for prepend in (True, False):
                    self._hooks.append(module.register_forward_pre_hook(mark, prepend=prepend))
                    self._hooks.append(module.register_forward_hook(mark, prepend=prepend))

    def forget(self) -> None:
        """Take the hooks of `watch` away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def running(self, device: torch.device) -> Generator[None]:
        """Of one forward pass, on `device`."""
        self._marks, self._now = [], _event if device.type == "cuda" else time.perf_counter
        self._mark("")
        try:
            yield
        finally:
            self._mark("")
            self._now = None

    def seconds(self) -> dict[str, float]:
        """Of the last pass, by part; nothing before the first. A GPU must be through with it."""
        found: dict[str, float] = {}
        for (part, start), (_, end) in zip(self._marks[::2], self._marks[1::2], strict=True):
            found[part] = found.get(part, 0.0) + _between(start, end)
        return found

    def _mark(self, part: str, *_: Any) -> None:
        if self._now is not None:  # as it is where a layer is computed again, in a backward pass
            self._marks.append((part, self._now()))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def waiting(ranks: Sequence[Sequence[Mapping[str, float]]], *, by_part: bool) -> list[float]:
    """For each of R ranks the share of the time that it waits for the slowest, if all begin each pass together.

    Args:
        ranks: R x n, what each computes in each of the n passes, by part of the model; in any unit.
        by_part: they begin each part together too, as those do that share its weights layer by layer.
    """
    total, own = 0.0, [0.0] * len(ranks)
    for passes in zip(*ranks, strict=True):
        parts = sorted({part for each in passes for part in each})
        rows = [[each.get(part, 0.0) for part in parts] if by_part else [sum(each.values())] for each in passes]
        total += sum(map(max, zip(*rows, strict=True)))
        own = [so_far + sum(row) for so_far, row in zip(own, rows, strict=True)]
    return [1 - seconds / total if total else 0.0 for seconds in own]
