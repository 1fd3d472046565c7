"""Prompts and new answers to them, as packs: what on-policy training makes of the pack that the loader gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.vocabulary import TEXT


def last_answers(batch: PackedBatch) -> list[list[int]]:
    """The tokens of the last answer in each sample. Raises ValueError: a sample has none."""
    return [batch.labels[first:end].tolist() for first, end in _last_runs(batch)]


def last_prompts(batch: PackedBatch) -> PackedBatch:
    """Each sample up to its last answer, with all media. Raises ValueError: a sample has none."""
    starts = batch.cu_seqlens[:-1].tolist()
    ends = [first + 1 for first, _ in _last_runs(batch)]  # the position that predicts the answer's first token
    kept = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    on_device = kept.to(batch.input_ids.device)
    lengths = [b - a for a, b in zip(starts, ends, strict=True)]
    return replace(
        batch,
        input_ids=batch.input_ids[on_device],
        labels=torch.full((len(kept),), IGNORE),
        token_types=batch.token_types[kept],
        position_ids=batch.position_ids[:, on_device],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        spoken=None,
        read=None if batch.read is None else last_prompts(batch.read),
    )


def _last_runs(batch: PackedBatch) -> list[tuple[int, int]]:
    """First and end of the last positions of each sample that predict something, one after the other."""
    runs = []
    for name, (start, end) in zip(batch.sample_ids, pairwise(batch.cu_seqlens.tolist()), strict=True):
        targets = (batch.labels[start:end] != IGNORE).nonzero().squeeze(1)
        if not len(targets):
            raise ValueError(f"sample {name!r} has no answer, whose place a new one could take")
        last = int(targets[-1])
        before = (batch.labels[start : start + last] == IGNORE).nonzero().squeeze(1)
        first = int(before[-1]) + 1 if len(before) else 0
        runs.append((start + first, start + last + 1))
    return runs


def repeated(batch: PackedBatch, n: int) -> PackedBatch:
    """`batch` n times end to end, media too: sample b of copy i is number i * B + b."""
    tensors = {
        name: torch.cat([value] * n, dim=1 if name == "position_ids" else 0)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and name != "cu_seqlens"
    }
    per_sample = ("sample_ids", "sources", "tasks", "modalities", "languages", "metas")
    lengths = batch.cu_seqlens.diff().tolist() * n
    return replace(
        batch,
        **tensors,
        **{name: getattr(batch, name) * n for name in per_sample},
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        read=None if batch.read is None else repeated(batch.read, n),
    )


def with_answers(prompts: PackedBatch, answers: Sequence[Sequence[int]]) -> PackedBatch:
    """Prompts (`last_prompts`) with an answer, of at least one token, behind each, which is what is to be learnt. How
    many bytes it stands for is not counted."""
    parts, positions, labels, types = [], [], [], []
    device = prompts.input_ids.device
    borders = list(pairwise(prompts.cu_seqlens.tolist()))
    for (start, end), answer in zip(borders, answers, strict=True):
        tokens = torch.tensor(answer, dtype=torch.int64)
        before = prompts.position_ids[:, start:end]
        after = before.max() + 1 + torch.arange(len(answer), device=device)
        parts += [prompts.input_ids[start:end], tokens.to(device)]
        positions += [before, after.expand(3, -1)]
        ignored = torch.full((end - start - 1,), IGNORE)
        labels += [ignored, tokens, torch.tensor([IGNORE])]
        types += [prompts.token_types[start:end], torch.full((len(answer),), TEXT, dtype=torch.uint8)]
    lengths = [end - start + len(answer) for (start, end), answer in zip(borders, answers, strict=True)]
    return replace(
        prompts,
        input_ids=torch.cat(parts),
        labels=torch.cat(labels),
        token_types=torch.cat(types),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        target_bytes=torch.zeros(len(answers), dtype=torch.int64),
        read=None if prompts.read is None else with_answers(prompts.read, answers),
    )
