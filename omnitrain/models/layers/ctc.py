"""Connectionist temporal classification (Graves et al. 2006): texts that are written one symbol or blank a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def shortest_path(target: Sequence[int]) -> int:
    """Steps that `target` needs at least: one for each symbol, and a blank between equal ones."""
    return len(target) + sum(a == b for a, b in pairwise(target))


def ctc_loss(log_probs: Tensor, target: Sequence[int]) -> Tensor | None:
    """-log of the sum over all ways to write `target`, in nats; None for an empty one, or one that needs more steps.

    Args:
        log_probs: [T, V + 1], of each step; the blank is the last symbol.
    """
    steps, symbols = log_probs.shape
    if not target or shortest_path(target) > steps:
        return None
    ids = torch.tensor([list(target)], device=log_probs.device)
    lengths = torch.tensor([steps]), torch.tensor([len(target)])
    return F.ctc_loss(log_probs.unsqueeze(1), ids, *lengths, blank=symbols - 1, reduction="sum")
