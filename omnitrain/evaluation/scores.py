"""Scores of several runs on the same held-out samples as arrays, and the measures that are made of them.

eval/predictions.parquet of each run  --scores_of-->  Scores [runs, samples]  --parts(measure)-->  sums and weights
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnitrain.evaluation.heldout import ERROR_RATE_TASKS
from omnitrain.evaluation.metrics import normalise

SCORE_COLUMNS = (
    "id", "source", "split", "modality", "task", "concept", "languages", "loss", "tokens", "bytes", "exact_match",
    "chrf", "swapped_loss", "reference", "prediction",
)  # fmt: skip
"""What is compared of ``eval/predictions.parquet`` (`heldout.PREDICTIONS_SCHEMA`)."""
RUN_COLUMNS = ("match", "arm", "seed")
"""Which run a row is of; outside a study its name is the arm."""

RunKey = tuple[str, str, int]
"""match, arm, seed"""


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a Parquet file.

    Raises:
        ValueError: it cannot be read, or lacks one; the message names the file.
    """
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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The items of a study as arrays over R runs and I items; NaN where a run has no score for an item.

    Attributes:
        runs: match, arm, seed of each row.
        split, modality, task, concept, language: str [I]. `language` is the one that is written.
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
        match measure.name:
            case "bits_per_byte":
                return self.loss * self.tokens / math.log(2), self.bytes
            case "nats_per_token":
                return self.loss * self.tokens, self.tokens
            case "exact_match":
                return self.exact_match, ones
            case "chrf":
                return self.chrf, ones
            case "wer":
                return self.word_errors, self.words
            case "swap_gain":
                return self.swapped_loss - self.loss, ones
        raise ValueError(f"there is no measure {measure.name}")

    def where(self, **conditions: Collection[str]) -> np.ndarray:
        """bool [I]: items whose attributes have one of the given values, e.g. ``where(modality=["text"])``."""
        chosen = np.ones(len(self.tokens), dtype=bool)
        for name, values in conditions.items():
            chosen &= np.isin(getattr(self, name), list(values))
        return chosen


def scores_of(items: pa.Table) -> Scores:
    """Lay the rows of ``items.parquet`` out by run and item.

    Raises:
        ValueError: an item stands twice in a run, or has another length in another run.
    """
    rows = items.to_pydict()
    n = len(rows["id"])
    run_places: dict[RunKey, int] = {}
    item_places: dict[tuple[str, str], int] = {}
    r, i, first = np.zeros(n, dtype=int), np.zeros(n, dtype=int), []
    for place, key in enumerate(zip(*(rows[name] for name in RUN_COLUMNS), strict=True)):
        r[place] = run_places.setdefault(key, len(run_places))
        item = (rows["source"][place] or "", rows["id"][place])
        if item not in item_places:
            item_places[item] = len(item_places)
            first.append(place)
        i[place] = item_places[item]
    shape = len(run_places), len(item_places)
    names = list(item_places)
    if n:
        _, counts = np.unique(r * shape[1] + i, return_counts=True)
        if counts.max() > 1:
            raise ValueError("an item stands twice in one run's items; every (source, id) may be there once")

    def strings(name: str) -> np.ndarray:
        return np.array([rows[name][place] or "" for place in first], dtype=str)

    def numbers(name: str) -> np.ndarray:
        values = np.array([np.nan if v is None else float(v) for v in rows[name]])
        table = np.full(shape, np.nan)
        table[r, i] = values
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
    spoken = [place for place in range(n) if rows["task"][place] in ERROR_RATE_TASKS]
    for place in spoken:
        said, heard = normalise(rows["reference"][place] or ""), rows["prediction"][place]
        if said:
            words[i[place]] = len(said.split())
            if heard is not None:
                errors[r[place], i[place]] = _word_errors(normalise(heard), said)
    concept = strings("concept")
    languages = [rows["languages"][place] for place in first]
    return Scores(
        runs=tuple(run_places),
        split=strings("split"),
        modality=strings("modality"),
        task=strings("task"),
        # An item without a concept is a group of its own.
        concept=np.array([c or "/".join(names[k]) for k, c in enumerate(concept)], dtype=str),
        language=np.array([(given or ["unknown"])[-1] for given in languages], dtype=str),
        tokens=lengths("tokens"),
        bytes=lengths("bytes"),
        words=words,
        loss=numbers("loss"),
        swapped_loss=numbers("swapped_loss"),
        exact_match=numbers("exact_match"),
        chrf=numbers("chrf"),
        word_errors=errors,
    )


@cache
def _word_errors(heard: str, said: str) -> int:
    measured = jiwer.process_words(said, heard)
    return measured.substitutions + measured.deletions + measured.insertions
