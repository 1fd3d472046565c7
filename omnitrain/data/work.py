"""What samples cost to train on, and how much of it a pack may hold, so that no process waits long for another.

The idea is that of WLB-LLM (arXiv 2503.17924): packs are made alike in work when they are packed. Here each part of the
model counts by itself too, since processes that share its weights go through it layer by layer together: a pack without
pictures does not make up for one full of them. (To hold heavy packs back until those of other processes come too, as
WLB-LLM does, gained nothing that could be measured here, and was left out.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.data.settings import Budget

PARTS = ("all", "thinker", "aut", "visual", "talker")
"""Of the model, in the order of `Work.of`: the whole of it, and each part. An AuT's decoder counts as a Thinker."""
SLACK = (1.0, 1.1, 1.1, 1.1, 1.1)
"""A pack may hold so many times the mean work of each. Exactly the mean of every part is hard to pack: on the embedded
pack with a window of 16, ranks of DDP waited 6.5 % of the time instead of 4.0 %, of FSDP2 7.2 % instead of 6.3 %."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations (forward and backward pass) of a model on what a sample brings (`training.flops` counts them).

    Documents of a pack do not attend to one another, so those of a pack are the sum of its samples'.

    Attributes:
        token: a position of a pack, of any kind.
        pair: two positions of one document, of which the later attends to the earlier; n (n + 1) / 2 in a document.
        target: a position that predicts a token.
        mel_frame: 10 ms of a recording.
        patch: one of a picture or video.
        patch_pair: two patches of one picture or frame, in each direction and each with itself.
        frame: 80 ms of a spoken answer.
    """

    token: float
    pair: float = 0.0
    target: float = 0.0
    mel_frame: float = 0.0
    patch: float = 0.0
    patch_pair: float = 0.0
    frame: float = 0.0

    def of(self, sample: EncodedSample) -> tuple[float, ...]:
        """Operations on `sample` of each of `PARTS`."""
        n, mel_frames, patches, frames = sample.sizes
        targets = int(np.count_nonzero(sample.labels != IGNORE))
        patch_pairs = float((sample.grid_thw[:, 0] * sample.grid_thw[:, 1:].prod(axis=1).astype(float) ** 2).sum())
        parts = (
            self.token * n + self.pair * (n * (n + 1) // 2) + self.target * targets,
            self.mel_frame * mel_frames,
            self.patch * patches + self.patch_pair * patch_pairs,
            self.frame * frames,
        )
        return (sum(parts), *parts)


@dataclass
class Seen:
    """Of one source: samples that were packed, and the sums of their sizes (those of a `Budget`) and of their work."""

    samples: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * 4)
    work: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How much work a pack may hold: as much as one that just fills its budget and is like the mixture as a whole.

    Attributes:
        most: times that much.
    """

    work: Work
    most: float

    def bounds(self, seen: Sequence[Seen], weights: Sequence[float], budget: Budget) -> tuple[float, ...]:
        """Of each of `PARTS`, for sources of these `weights` of which these samples were `seen`."""
        shares = [weight / of.samples if of.samples else 0.0 for of, weight in zip(seen, weights, strict=True)]

        def mean(rows: Sequence[Sequence[float]]) -> list[float]:
            return [sum(s * each for s, each in zip(shares, of_all, strict=True)) for of_all in zip(*rows, strict=True)]

        sizes, work = mean([of.sizes for of in seen]), mean([of.work for of in seen])
        filling = budget.filling(sizes)  # of a pack of one sample, of the mean sizes of all
        means = (each / filling if filling else float("inf") for each in work)
        return tuple(self.most * slack * mean for slack, mean in zip(SLACK, means, strict=True))
