"""Activation checkpointing, the one way for every part."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT: dict[str, tuple[str, ...]] = {
    "attention": (
        "torch_attn._varlen_attn.default",
        "omnitrain.attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
    ),
    "experts": ("aten._grouped_mm.default", "omnitrain.grouped_mm.default"),
}
"""What may be kept though the rest is computed again -> the operations whose outputs it is."""


class SelfCheckpointing:
    """The forward pass of a module that computes itself again.

    kept: what of it is kept all the same; None: all of it, nothing is computed again.
    """

    kept: tuple[str, ...] | None = None


def run(part: Callable[..., Any], *inputs: Any, checkpointed: bool, kept: Collection[str] = ()) -> Any:
    """part(*inputs). If `checkpointed`, only the inputs are kept for the backward pass, which computes `part` again
    (Chen et al. 2016, arXiv 1604.06174): memory of one layer instead of all, for a third more time.

    `kept`: what of it (see `KEPT`) is kept too, and not computed again.
    """
    forward = vars(part).get("forward") if isinstance(part, nn.Module) else None
    if isinstance(forward, SelfCheckpointing):
        forward.kept = tuple(kept) if checkpointed else None
        return part(*inputs)
    if checkpointed and torch.is_grad_enabled():
        return again(part, *inputs, kept=kept)
    return part(*inputs)


def again(part: Callable[..., Any], *inputs: Any, kept: Collection[str] = ()) -> Any:
    """part(*inputs), computed again in the backward pass but for what is `kept`."""
    if not kept:
        return checkpoint(part, *inputs, use_reentrant=False)
    return checkpoint(part, *inputs, use_reentrant=False, context_fn=partial(_contexts, tuple(kept)))


def _contexts(kept: tuple[str, ...]) -> Any:
    names = {name for what in kept for name in KEPT[what]}

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if str(operation) in names else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
