"""The loss of given answers, sample by sample: -log p(answer | prompt, media), packed and streamed.

Encoded samples are read one after another and dropped once their pack has been through the model, so that a thousand
large pictures never lie in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.data.packing import Budget, FirstFit, Item, Packing
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.omni import OmniModel

Writer = OmniModel | AuT
"""A model that writes text about what it reads: packed batches in, hidden states out."""

DEFAULT_BUDGET = Budget(tokens=4096, mel_frames=12_000, patches=16_384)


@dataclass(frozen=True, kw_only=True)
class SampleLoss:
    """Total loss of a sample's targets in nats, their number, and the UTF-8 bytes they stand for."""

    nats: float
    tokens: int
    target_bytes: int

    @property
    def per_token(self) -> float:
        """Nats per target token."""
        return self.nats / max(1, self.tokens)


@contextmanager
def evaluating(model: Writer) -> Generator[torch.device]:
    """The model in evaluation mode, without gradients; yields its device and restores the mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def packs(samples: Iterable[EncodedSample], budget: Budget) -> Iterator[list[tuple[int, EncodedSample]]]:
    """`samples` in order, as packs of (index, sample) within `budget`. A document longer than a pack is cut, its pieces
    keep its index; anything else that is too long has a pack of its own."""
    budget = replace(budget, frames=None)
    packer = FirstFit(budget, window=1)

    def pack(items: list[Item] | None) -> Iterator[list[tuple[int, EncodedSample]]]:
        if items:
            yield [(item.position, item.sample) for item in items]

    for index, whole in enumerate(samples):
        # Each piece says how many bytes the whole stands for.
        packing = Packing(budget=budget, n_bytes=lambda _, total=whole.target_bytes: total)
        items = [Item(0, index, a, b, part) for a, b, part in packing.parts(whole)]
        for item in items:
            yield from pack(packer.add(item))
        if not items:
            yield from pack(packer.close_fullest())
            yield [(index, whole)]
    yield from pack(packer.close_fullest())


def sample_losses(
    model: Writer,
    samples: Iterable[EncodedSample],
    *,
    budget: Budget = DEFAULT_BUDGET,
    on_batch: Callable[[int, Any], None] | None = None,
) -> list[SampleLoss]:
    """Teacher-forced losses of `samples`, in their order, in packs of `budget`. Run under `torch.autocast` to score in
    16 bits. `on_batch` is called after each pack with the number of its samples and the model's output."""
    found: dict[int, SampleLoss] = {}
    with evaluating(model) as device:
        for pack in packs(samples, budget):
            batch = PackedBatch.pack([sample for _, sample in pack])
            on_device = batch.to(device)
            output = model(**on_device.model_inputs())
            losses = chunked_cross_entropy(output.hidden, model.output_embedding, batch.labels).nll
            borders = batch.cu_seqlens.tolist()
            running = torch.cat([losses.new_zeros(1, dtype=torch.float64), losses.double().cumsum(0)]).tolist()
            for (index, sample), a, b in zip(pack, borders[:-1], borders[1:], strict=True):
                before = found.get(index, SampleLoss(nats=0.0, tokens=0, target_bytes=sample.target_bytes))
                found[index] = replace(
                    before,
                    nats=before.nats + running[b] - running[a],
                    tokens=before.tokens + int((sample.labels != IGNORE).sum()),
                )
            if on_batch is not None:
                on_batch(len({index for index, _ in pack}), output)
    return [found[index] for index in sorted(found)]
