"""Connectionist temporal classification (Graves et al. 2006): texts that are written one symbol or blank a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shortest_path(target: Sequence[int]) -> int:
    """Steps that `target` needs at least: one for each symbol, and a blank between equal ones."""
    return len(target) + sum(a == b for a, b in pairwise(target))


def ctc_losses(log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]]) -> list[Tensor | None]:
    """-log of the sum over all ways to write each of `targets`, in nats; None for an empty one, or one that needs more
    steps.

    Args:
        log_probs: of each target [T, V + 1], of each step; the blank is the last symbol.
    """
    possible = [
        i
        for i, (steps, target) in enumerate(zip(log_probs, targets, strict=True))
        if target and shortest_path(target) <= len(steps)
    ]
    losses: list[Tensor | None] = [None] * len(log_probs)
    if not possible:
        return losses
    longest = max(len(log_probs[i]) for i in possible)
    # Not `pad_sequence`, whose backward pass copies the whole for each of its parts.
    padded = torch.stack([F.pad(log_probs[i], (0, 0, 0, longest - len(log_probs[i]))) for i in possible], dim=1)
    symbols = torch.tensor([symbol for i in possible for symbol in targets[i]], device=padded.device)
    steps, lengths = (torch.tensor([len(of[i]) for i in possible]) for of in (log_probs, targets))
    found = F.ctc_loss(padded, symbols, steps, lengths, blank=padded.shape[-1] - 1, reduction="none")
    for i, loss in zip(possible, found.unbind(), strict=True):
        losses[i] = loss
    return losses


def best_path(log_probs: Tensor) -> list[int]:
    """The symbols on the path of the likeliest symbol at each step: [T, V + 1] -> symbols, without blanks."""
    path = log_probs.argmax(dim=-1).unique_consecutive().tolist()
    return [symbol for symbol in path if symbol != log_probs.shape[-1] - 1]


class ByteHead(nn.Linear):
    """Writes texts as UTF-8 bytes, `slots` bytes or blanks (symbol 256) for each feature.

    Bytes are few, so each is seen often, and the same for all languages. Features that are 80 ms apart need several:
    speech has some 15 letters a second, and outside of Latin script each is two or three bytes.
    """

    SYMBOLS = 257

    def __init__(self, width: int, slots: int) -> None:
        super().__init__(width, slots * self.SYMBOLS)
        self.slots = slots

    def forward(self, input: Tensor) -> Tensor:
        """log p of each symbol at each slot: features [..., T, width] -> fp32 [..., T * slots, 257]"""
        return super().forward(input).unflatten(-1, (self.slots, -1)).flatten(-3, -2).float().log_softmax(-1)
