"""Scores of questions about long recordings by where in the recording the answer is (needle test)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.metrics import chrf, exact_match

BINS = 5
MEASURES = {"right": "right answers", "chrf": "chrF", "loss": "nats per token"}


@dataclass
class Curve:
    """A measure of the recordings of one length: for each filled bin its middle (share of the recording) and its mean
    with an interval over recordings. `chance`: what no listening gives."""

    places: list[float] = field(default_factory=list)
    scores: list[Interval] = field(default_factory=list)
    chance: float | None = None


def by_position(predictions: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Length (and split) -> measure -> curve, of the rows of ``eval/predictions.parquet`` whose samples say where their
    needle is (`meta`: ``needle_share``, ``seconds``).

    Chance of answers is that of always giving the most frequent reference of the row's task; that of the loss is the
    unigram model's.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    rows = [{**row, **json.loads(row.get("meta") or "{}")} for row in predictions]
    rows = [row for row in rows if "needle_share" in row]
    for row in rows:
        groups[row["split"], _rounded(float(row["seconds"]))].append(row)
    usual = _most_frequent(rows)
    return {_name(*key): _curves(of, usual) for key, of in sorted(groups.items(), key=lambda item: item[0][::-1])}


def _rounded(seconds: float) -> float:
    return 5 * round(seconds / 5) if seconds < 50 else 60 * round(seconds / 60)


def _name(split: str, seconds: float) -> str:
    length = f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
    return length if split == "train" else f"{length}, {split.replace('heldout_', 'held-out ')}"


def _most_frequent(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row["task"]][row["reference"]] += 1
    return {task: max(sorted(counts), key=counts.__getitem__) for task, counts in answers.items()}


def _curves(rows: list[dict[str, Any]], usual: Mapping[str, str]) -> dict[str, Curve]:
    answered = [row for row in rows if row["prediction"] is not None]
    constant = [usual[row["task"]] for row in answered], [row["reference"] for row in answered]
    known = [row["unigram_loss"] for row in rows]
    chance = {
        "right": exact_match(*constant) if answered else None,
        "chrf": float(np.mean([chrf([a], [b]) for a, b in zip(*constant, strict=True)])) if answered else None,
        "loss": float(np.average(known, weights=[row["tokens"] for row in rows])) if None not in known else None,
    }
    columns = {"right": "exact_match", "chrf": "chrf", "loss": "loss"}
    return {m: _curve(rows if m == "loss" else answered, columns[m], chance[m]) for m in MEASURES}


def _curve(rows: list[dict[str, Any]], column: str, chance: float | None) -> Curve:
    curve = Curve(chance=chance)
    for index in range(BINS):
        inside = [r for r in rows if min(int(float(r["needle_share"]) * BINS), BINS - 1) == index]
        if inside:
            weights = [float(r["tokens"]) if column == "loss" else 1.0 for r in inside]
            values = [float(r[column]) * w for r, w in zip(inside, weights, strict=True)]
            groups = [r["concept"] or r["id"] for r in inside]
            curve.places.append((index + 0.5) / BINS)
            curve.scores.append(bootstrap_interval(values, weights=weights, groups=groups))
    return curve
