"""CTC of one text after the other, beside torch's on padded batches."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

from omnitrain.models.layers.ctc import ctc_loss


def test_ctc_is_torchs_on_padded_batches() -> None:
    torch.manual_seed(0)
    borders, targets = [0, 9, 9 + 7, 9 + 7 + 12], [[3, 3, 5], [1, 2], [4, 4, 4, 4]]
    log_probs = torch.randn(28, 11).log_softmax(-1)
    ours = [ctc_loss(log_probs[a:b], target) for (a, b), target in zip(pairwise(borders), targets, strict=True)]
    padded = torch.zeros(12, 3, 11)
    for i, (a, b) in enumerate(pairwise(borders)):
        padded[: b - a, i] = log_probs[a:b]
    lengths = torch.tensor([9, 7, 12]), torch.tensor([3, 2, 4])
    flat = torch.tensor([token for target in targets for token in target])
    expected = F.ctc_loss(padded, flat, *lengths, blank=10, reduction="none")
    torch.testing.assert_close(torch.stack([loss for loss in ours if loss is not None]), expected)


def test_a_transcript_that_cannot_be_written_is_left_out() -> None:
    log_probs = torch.randn(4, 5).log_softmax(-1)
    assert ctc_loss(log_probs, [1, 1, 1]) is None  # the same token three times needs two blanks between
    assert ctc_loss(log_probs[:2], []) is None
    assert ctc_loss(log_probs, [1, 2, 1]) is not None
    assert ctc_loss(log_probs[:2], [3, 3]) is None
    assert ctc_loss(log_probs[:3], [3, 3]) is not None
