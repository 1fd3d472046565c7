"""Layers in fused kernels (`torch.compile`), applied from outside and in place: no name in the state changes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from omnitrain.models.layers.attention import varlen_attention
from omnitrain.models.layers.checkpointing import SelfCheckpointing, again

BACKEND = "inductor"


class CompiledForward(SelfCheckpointing):
    """The `forward` of one layer, compiled when it is first called where something is learnt. Elsewhere (evaluation,
    generation with its caches) the layer runs as it is written.

    Hooks around the layer (FSDP2 gathers its weights in one) stay outside of what is compiled; activation checkpointing
    is inside, where the compiler sees both passes. Where hooks are inside the layer (experts that are given out), or
    its attention is another, what is compiled ends there and begins again.
    """

    def __init__(self, layer: nn.Module, compiled: dict[bool, Callable[..., Any]]) -> None:
        self.layer, self.compiled = layer, compiled
        self.whole: bool | None = None

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return type(self.layer).forward(self.layer, *inputs)
        if self.whole is None:
            self.whole = _is_whole(self.layer)
        return self.compiled[self.whole](self.layer, self.kept, *inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "kept": self.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy of the layer
        vars(self).update(state, compiled=_compiled(), whole=None)


def compile_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let the layers of these `kinds` that stand in lists in `model` be compiled, each list on its own."""
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        compiled = _compiled()
        for layer in stack:
            if isinstance(layer, kinds):
                vars(layer)["forward"] = CompiledForward(layer, compiled)


def _compiled() -> dict[bool, Callable[..., Any]]:
    """In one graph, or in pieces. Layers of the same shapes share what is compiled, for packs of any length."""
    return {
        whole: torch.compile(_copy(_forward), fullgraph=whole, dynamic=True, backend=BACKEND) for whole in (True, False)
    }


def _forward(layer: nn.Module, kept: tuple[str, ...] | None, *inputs: Any) -> Any:
    forward = type(layer).forward
    return forward(layer, *inputs) if kept is None else again(lambda *given: forward(layer, *given), *inputs, kept=kept)


def _copy(function: Any) -> Any:
    """What is compiled of a function is kept, and counted, with its code."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _is_whole(layer: nn.Module) -> bool:
    for module in layer.modules():
        inside = module is not layer and (module._forward_pre_hooks or module._forward_hooks)
        if inside or getattr(module, "attend", varlen_attention) is not varlen_attention:
            return False
    return True
