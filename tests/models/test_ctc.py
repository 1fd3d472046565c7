"""CTC of one text after the other, beside torch's on padded batches."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

from omnitrain.models.layers.ctc import ByteHead, best_path, ctc_losses


def test_ctc_is_torchs_on_padded_batches() -> None:
    torch.manual_seed(0)
    borders, targets = [0, 9, 9 + 7, 9 + 7 + 12], [[3, 3, 5], [1, 2], [4, 4, 4, 4]]
    log_probs = torch.randn(28, 11).log_softmax(-1)
    ours = ctc_losses([log_probs[a:b] for a, b in pairwise(borders)], targets)
    alone = [
        ctc_losses([log_probs[a:b]], [target])[0] for (a, b), target in zip(pairwise(borders), targets, strict=True)
    ]
    padded = torch.zeros(12, 3, 11)
    for i, (a, b) in enumerate(pairwise(borders)):
        padded[: b - a, i] = log_probs[a:b]
    lengths = torch.tensor([9, 7, 12]), torch.tensor([3, 2, 4])
    flat = torch.tensor([token for target in targets for token in target])
    expected = F.ctc_loss(padded, flat, *lengths, blank=10, reduction="none")
    torch.testing.assert_close(torch.stack(ours), expected)
    torch.testing.assert_close(torch.stack(alone), expected)


def test_a_transcript_that_cannot_be_written_is_left_out() -> None:
    log_probs = torch.randn(4, 5).log_softmax(-1)
    # The same token three times needs two blanks between.
    targets = [[1, 1, 1], [], [1, 2, 1], [3, 3], [3, 3]]
    found = ctc_losses([log_probs, log_probs[:2], log_probs, log_probs[:2], log_probs[:3]], targets)
    assert [loss is None for loss in found] == [True, True, False, True, False]
    assert ctc_losses([log_probs], [[]]) == [None]
    assert ctc_losses([], []) == []


def test_a_head_writes_the_bytes_of_a_feature_one_after_the_other() -> None:
    head = ByteHead(8, slots=3)
    features = torch.randn(5, 8)
    found = head(features)
    assert found.shape == (15, 257)
    for i, feature in enumerate(features):
        expected = (head.weight @ feature + head.bias).view(3, 257).log_softmax(-1)
        torch.testing.assert_close(found[3 * i : 3 * i + 3], expected)
    torch.testing.assert_close(head(features[None])[0], found)


def test_the_best_path_drops_repeats_and_blanks() -> None:
    path = [4, 1, 1, 4, 1, 2, 2, 3, 4, 4, 3]  # the blank is 4
    assert best_path(torch.eye(5)[path].log()) == [1, 1, 2, 3, 3]
    assert best_path(torch.eye(5)[[4, 4]].log()) == []
