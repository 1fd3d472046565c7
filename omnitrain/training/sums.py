"""Counters behind the logged numbers: exact under any number of ranks, and part of the checkpoint.

Everything is a sum; a quotient is taken only when a row is written. So a mean over ranks, batches or steps is the mean
over tokens, and a resumed run writes the row that an uninterrupted one would have written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from rich.table import Table
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.evaluation.metrics import bits_per_byte
from omnitrain.training.losses import SampleSums


class LossSums:
    """Un-normalised loss by (modality, task): nats, target tokens, target bytes, samples."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], list[float]] = {}

    def add(self, groups: Iterable[tuple[tuple[str, str], Sequence[float]]]) -> None:
        """Count sums by group (`BatchLosses.groups`)."""
        for key, values in groups:
            so_far = self.groups.get(key, (0.0, 0.0, 0.0, 0.0))
            self.groups[key] = [a + b for a, b in zip(so_far, values, strict=True)]

    def merge(self, other: LossSums) -> None:
        """Add the sums of `other`."""
        self.add(other.groups.items())

    AUXILIARY = ("ctc",)
    """Terms of their own: they stand for themselves, not in the sum of all."""

    def total(self, *, modality: str | None = None, task: str | None = None) -> list[float]:
        """[nats, target tokens, target bytes, samples] of all groups, or of those of one modality or task."""
        whole = modality is None and task is None
        picked = [
            sums
            for key, sums in self.groups.items()
            if (key[0] not in self.AUXILIARY if whole else modality in (None, key[0]) and task in (None, key[1]))
        ]
        return [math.fsum(column) for column in zip([0.0] * 4, *picked, strict=True)]

    def metrics(self, prefix: str) -> dict[str, float]:
        """`PREFIX/loss`, `PREFIX/loss/MODALITY`, `PREFIX/loss_by_task/TASK` (nats per target token) and
        `PREFIX/bits_per_byte/MODALITY`."""
        out: dict[str, float] = {}
        for name, selection in [
            ("loss", {}),
            *((f"loss/{m}", {"modality": m}) for m in sorted({key[0] for key in self.groups})),
            *(
                (f"loss_by_task/{t}", {"task": t})
                for t in sorted({t for m, t in self.groups if m not in self.AUXILIARY})
            ),
        ]:
            nll, tokens, target_bytes, _ = self.total(**selection)
            if tokens:
                out[f"{prefix}/{name}"] = nll / tokens
            if target_bytes and not name.startswith("loss_by_task"):
                out[f"{prefix}/{name.replace('loss', 'bits_per_byte', 1)}"] = bits_per_byte(nll, target_bytes)
        return out

    def state_dict(self) -> dict[tuple[str, str], list[float]]:
        return {key: list(values) for key, values in self.groups.items()}

    def load_state_dict(self, state: dict[tuple[str, str], list[float]]) -> None:
        self.groups = {key: list(values) for key, values in state.items()}


def add_pairs(totals: dict[str, tuple[float, float]], pairs: Mapping[str, tuple[float, float]]) -> None:
    """Add (sum, count) by name."""
    for name, (value, count) in pairs.items():
        a, b = totals.get(name, (0.0, 0.0))
        totals[name] = (a + value, b + count)


def merged_pairs(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """What all `parts` add up to."""
    totals: dict[str, tuple[float, float]] = {}
    for part in parts:
        add_pairs(totals, part)
    return totals


def means(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Quotients of what all `parts` add up to; of nothing there is none."""
    return {name: value / count for name, (value, count) in merged_pairs(parts).items() if count}


def sample_groups(batch: PackedBatch, sums: SampleSums) -> list[tuple[tuple[str, str], tuple[float, ...]]]:
    """Every sample of `batch` under its modality and task, for `LossSums.add`."""
    rows = zip(batch.modalities, batch.tasks, *(x.tolist() for x in vars(sums).values()), strict=True)
    return [((modality, task), (nll, tokens, n_bytes, 1.0)) for modality, task, nll, tokens, n_bytes in rows]


def expert_load(counts: Tensor, prefix: str = "experts") -> dict[str, float]:
    """How evenly the experts were used: `experts/entropy` (mean over layers of the normalised entropy, 1 is even),
    `experts/entropy_min` (the worst layer) and `experts/max_over_mean` (the busiest expert of any layer; 1 is even).

    Args:
        counts: [L, E]
    """
    counts = counts.double()
    if counts.numel() == 0 or not bool((counts.sum(1) > 0).all()):
        return {}
    share = counts / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1) / math.log(counts.shape[1]) if counts.shape[1] > 1 else share.sum(1)
    return {
        f"{prefix}/entropy": float(entropy.mean()),
        f"{prefix}/entropy_min": float(entropy.min()),
        f"{prefix}/max_over_mean": float((share * counts.shape[1]).max()),
    }


def loss_table(title: str, sums: LossSums) -> Table:
    """Loss and bits per byte of each modality."""
    table = Table(title=title)
    for column in ("modality", "samples", "target tokens", "loss (nats/token)", "bits per byte"):
        table.add_column(column, justify="left" if column == "modality" else "right")
    for modality in sorted({modality for modality, _ in sums.groups}):
        nll, tokens, target_bytes, samples = sums.total(modality=modality)
        table.add_row(
            modality,
            f"{samples:,.0f}",
            f"{tokens:,.0f}",
            f"{nll / tokens:.3f}" if tokens else "-",
            f"{bits_per_byte(nll, target_bytes):.3f}" if target_bytes else "-",
        )
    return table
