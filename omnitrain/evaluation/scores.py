"""Scores of several runs on the same held-out samples as arrays, and the measures that are made of them.

eval/predictions.parquet of each run  --scores_of-->  Scores [runs, samples]  --parts(measure)-->  sums and weights
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnitrain.evaluation.metrics import ERROR_RATE_TASKS, edits, normalise

SCORE_COLUMNS = (
    "id", "source", "split", "modality", "task", "concept", "languages", "loss", "tokens", "bytes", "exact_match",
    "chrf", "swapped_loss", "reference", "prediction",
)  # fmt: skip
"""What is compared of ``eval/predictions.parquet`` (`heldout.PREDICTIONS_SCHEMA`)."""
RUN_COLUMNS = ("match", "arm", "seed")
"""Which run a row is of; outside a study its name is the arm, and `sentence` (what arms have read) is empty."""

RunKey = tuple[str, str, int]
"""match, arm, seed"""

_edits = cache(edits)  # runs that answer alike are measured once


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a Parquet file. Raises ValueError, naming the file, if it cannot be read or lacks one."""
    try:
        there = pq.read_schema(path).names
        if lacking := [name for name in columns if name not in there]:
            raise ValueError(f"{path}: columns {', '.join(lacking)} are missing")
        return pq.read_table(path, columns=list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score that is a ratio of sums over items: ``sum(numerator) / sum(weight)``."""

    name: str
    unit: str
    lower_is_better: bool
    form: str = ".3f"


BITS_PER_BYTE = Measure(name="bits_per_byte", unit="bits per byte", lower_is_better=True)
NATS_PER_TOKEN = Measure(name="nats_per_token", unit="nats per token", lower_is_better=True)
EXACT_MATCH = Measure(name="exact_match", unit="exact match", lower_is_better=False)
CHRF = Measure(name="chrf", unit="chrF", lower_is_better=False, form=".1f")
WER = Measure(name="wer", unit="word error rate", lower_is_better=True)
SWAP_GAIN = Measure(name="swap_gain", unit="media swap, nats", lower_is_better=False)
MEASURES = (NATS_PER_TOKEN, BITS_PER_BYTE, CHRF, EXACT_MATCH, WER, SWAP_GAIN)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The items of a study as arrays over R runs and I items; NaN where a run has no score for an item.

    Attributes:
        runs: match, arm, seed of each row.
        split, modality, task, concept, language: str [I]. `language` is the one that is written.
        sentence: "read" where an arm has read the reference in training, "new" where none has, "" if nobody says.
        tokens, bytes, words: of the reference, float [I]. `words` is 0 where no error rate is asked for.
        loss, swapped_loss: nats per target token, float [R, I].
        exact_match, chrf, word_errors: of generated answers, float [R, I].
    """

    runs: tuple[RunKey, ...]
    split: np.ndarray
    modality: np.ndarray
    task: np.ndarray
    concept: np.ndarray
    language: np.ndarray
    sentence: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    words: np.ndarray
    loss: np.ndarray
    swapped_loss: np.ndarray
    exact_match: np.ndarray
    chrf: np.ndarray
    word_errors: np.ndarray

    def parts(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """Numerator [R, I] (NaN: no score) and weight [I] of a measure."""
        ones = np.ones(len(self.tokens))
        return {
            "bits_per_byte": (self.loss * self.tokens / math.log(2), self.bytes),
            "nats_per_token": (self.loss * self.tokens, self.tokens),
            "exact_match": (self.exact_match, ones),
            "chrf": (self.chrf, ones),
            "wer": (self.word_errors, self.words),
            "swap_gain": ((self.swapped_loss - self.loss) * self.tokens, self.tokens),
        }[measure.name]

    def where(self, **conditions: Collection[str]) -> np.ndarray:
        """bool [I]: items whose attributes have one of the given values, e.g. ``where(modality=["text"])``."""
        chosen = np.ones(len(self.tokens), dtype=bool)
        for name, values in conditions.items():
            chosen &= np.isin(getattr(self, name), list(values))
        return chosen

    def values_of(self, name: str, conditions: Mapping[str, Collection[str]]) -> list[str]:
        """What the attribute `name` is for the items of `where`, sorted."""
        return sorted(set(getattr(self, name)[self.where(**conditions)].tolist()))


def scores_of(items: pa.Table) -> Scores:
    """Lay the rows of ``items.parquet`` out by run and item. Raises ValueError where an item stands twice in a run, or
    has another length in another run."""
    rows = items.to_pydict()
    n = len(rows["id"])
    run_places: dict[RunKey, int] = {}
    item_places: dict[tuple[str, str], int] = {}
    r, i, first = np.zeros(n, dtype=int), np.zeros(n, dtype=int), []
    for place, (source, id, *key) in enumerate(
        zip(*(rows[name] for name in ("source", "id", *RUN_COLUMNS)), strict=True)
    ):
        r[place] = run_places.setdefault(tuple(key), len(run_places))
        i[place] = item_places.setdefault((source or "", id), len(item_places))
        if i[place] == len(first):
            first.append(place)
    names, shape = list(item_places), (len(run_places), len(item_places))
    if len(set(zip(r.tolist(), i.tolist(), strict=True))) < n:
        raise ValueError("an item stands twice in one run's items; every (source, id) may be there once")

    def strings(name: str) -> np.ndarray:
        return np.array([rows[name][place] or "" for place in first], dtype=str)

    def numbers(name: str) -> np.ndarray:
        table = np.full(shape, np.nan)
        table[r, i] = [np.nan if v is None else float(v) for v in rows[name]]
        return table

    def lengths(name: str) -> np.ndarray:
        table = numbers(name)
        of_first = np.array([float(rows[name][place]) for place in first])
        if n and (np.abs(table - of_first) > 0).any():  # NaN, where a run lacks the item, is no difference
            odd = names[int(np.argmax((np.abs(table - of_first) > 0).any(axis=0)))]
            raise ValueError(
                f"item {odd[1]} of {odd[0]} has another number of {name} in another run; compare runs of the same data "
                "and tokenizer"
            )
        return of_first

    errors, words = np.full(shape, np.nan), np.zeros(shape[1])
    for place in (place for place in range(n) if rows["task"][place] in ERROR_RATE_TASKS):
        said, heard = normalise(rows["reference"][place] or ""), rows["prediction"][place]
        words[i[place]] = len(said.split())
        if said and heard is not None:
            errors[r[place], i[place]], _ = _edits(said, normalise(heard))
    return Scores(
        runs=tuple(run_places),
        # An item without a concept is a group of its own.
        concept=np.array([c or "/".join(name) for c, name in zip(strings("concept"), names, strict=True)], dtype=str),
        language=np.array([(rows["languages"][place] or ["unknown"])[-1] for place in first], dtype=str),
        words=words,
        word_errors=errors,
        **{name: strings(name) for name in ("split", "modality", "task", "sentence")},
        **{name: lengths(name) for name in ("tokens", "bytes")},
        **{name: numbers(name) for name in ("loss", "swapped_loss", "exact_match", "chrf")},
    )
