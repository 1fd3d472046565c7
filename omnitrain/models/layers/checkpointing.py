"""Activation checkpointing, the one way for every part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(part: Callable[..., Any], *inputs: Any, checkpointed: bool) -> Any:
    """part(*inputs). If `checkpointed`, only the inputs are kept for the backward pass, which computes `part` again
    (Chen et al. 2016, arXiv 1604.06174): memory of one layer instead of all, for a third more time."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(part, *inputs, use_reentrant=False)
    return part(*inputs)
