"""Wherever a score is a ratio of sums, its interval redraws both: items of very different lengths, and a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from omnitrain.evaluation import heldout
from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.evaluation.judges import error_rates
from omnitrain.evaluation.media_swap import Drawn, Swap, swap_gain
from omnitrain.evaluation.scores import BITS_PER_BYTE, NATS_PER_TOKEN, Measure, scores_of
from omnitrain.evaluation.teacher_forced import SampleLoss
from omnitrain.reports.comparison import compare_runs
from omnitrain.study.verdicts import Row, compare
from omnitrain.tasks.benchmark import Metric
from omnitrain.tasks.results import measured

from .conftest import Samples, text_sample

Found = tuple[float, float, float]  # value, low, high
RNG = np.random.default_rng(0)
TOKENS = np.round(np.exp(RNG.uniform(math.log(5), math.log(2000), 60)))
NATS = 3.0 * TOKENS + RNG.normal(0, 0.7, 60) * np.sqrt(TOKENS)


def in_general(nats: np.ndarray) -> Found:
    found = bootstrap_interval(nats, weights=TOKENS)
    return found.mean, found.low, found.high


def held_out(nats: np.ndarray) -> Found:
    rows = []
    for i, (own, tokens) in enumerate(zip(nats, TOKENS, strict=True)):
        sample, loss = text_sample(i), SampleLoss(nats=float(own), tokens=int(tokens), target_bytes=3 * int(tokens))
        rows.append(heldout._Row(Drawn(sample, Samples([sample])), loss=loss))
    found = heldout._loss_scores(rows, seed=0)
    return found["loss"], found["loss_low"], found["loss_high"]


def swapped(nats: np.ndarray) -> Found:
    gains = [
        Swap(id=str(i), partners=(), concept=str(i), own=2.0, swapped=2.0 + own / tokens, tokens=int(tokens))
        for i, (own, tokens) in enumerate(zip(nats, TOKENS, strict=True))
    ]
    found = swap_gain(gains)
    assert found is not None
    return found.mean, found.low, found.high


def of_a_task(nats: np.ndarray) -> Found:
    told = [((own, tokens), str(i)) for i, (own, tokens) in enumerate(zip(nats, TOKENS, strict=True))]
    found = measured(Metric(name="loss", higher_is_better=False), told)
    assert found is not None
    return found["value"], found["low"], found["high"]


def runs(nats: np.ndarray, measure: Measure, seeds: int = 1) -> pa.Table:
    """Two arms, the second worse by `nats` of the measure's unit."""
    scale = math.log(2) if measure is BITS_PER_BYTE else 1.0
    return pa.Table.from_pylist([
        {
            "match": "data", "arm": arm, "seed": seed, "id": str(i), "source": "", "split": "heldout_cell",
            "modality": "image", "task": "caption", "concept": "", "languages": ["en"],
            "loss": 2.0 + (scale * own / tokens if arm == "omni_early" else 0.0), "tokens": int(tokens),
            "bytes": int(tokens), "exact_match": None, "chrf": None, "swapped_loss": None, "reference": "a",
            "prediction": None, "sentence": "new",
        }
        for arm in ("vision", "omni_early") for seed in range(seeds)
        for i, (own, tokens) in enumerate(zip(nats, TOKENS, strict=True))
    ])  # fmt: skip


def compared(measure: Measure) -> Callable[[np.ndarray], Found]:
    def between_runs(nats: np.ndarray) -> Found:
        lines = compare_runs(scores_of(runs(nats, measure)), ["vision", "omni_early"])
        [line] = [line for line in lines if line.measure is measure and line.part == "all"]
        found = line.differences[1]
        assert found is not None
        return found.mean, found.low, found.high

    return between_runs


def of_a_study(nats: np.ndarray) -> Found:
    row = Row(name="vision", measure=NATS_PER_TOKEN, baseline="vision", select={"modality": ("image",)})
    comparison = compare(scores_of(runs(nats, NATS_PER_TOKEN, seeds=3)), row, "data")
    assert comparison is not None
    found = comparison.differences["omni_early"].estimate
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high


PLACES = [
    in_general, held_out, swapped, of_a_task, compared(NATS_PER_TOKEN), compared(BITS_PER_BYTE), of_a_study,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_items_of_very_different_lengths(place: Callable[[np.ndarray], Found]) -> None:
    """Against data sets redrawn one by one. (Redrawing the nats alone would give [2.00, 4.05].)"""
    rng = np.random.default_rng(1)
    drawn = (rng.integers(0, len(NATS), len(NATS)) for _ in range(4000))
    low, high = np.quantile([NATS[of].sum() / TOKENS[of].sum() for of in drawn], [0.025, 0.975])
    assert place(NATS)[0] == pytest.approx(NATS.sum() / TOKENS.sum())
    assert place(NATS)[1:] == pytest.approx((low, high), abs=0.006)
    assert high - low < 0.06


@pytest.mark.parametrize("place", PLACES)
def test_a_constant_has_no_width(place: Callable[[np.ndarray], Found]) -> None:
    assert place(0.3 * TOKENS) == pytest.approx((0.3, 0.3, 0.3), abs=1e-9)


def test_word_errors() -> None:
    """Utterances of ten to two hundred words, of which 30 % are wrong."""
    texts = [" ".join(["yes"] * 10 * k) for k in range(1, 21)]
    heard = [" ".join(["no"] * 3 * k + ["yes"] * 7 * k) for k in range(1, 21)]
    words, _ = error_rates(heard, texts)
    assert (words.mean, words.low, words.high) == pytest.approx((0.3, 0.3, 0.3))


def test_one_concept_is_redrawn_as_a_whole() -> None:
    rows = []
    for i, (nats, tokens) in enumerate([(3.0, 1), (4.0, 2), (20.0, 4)]):
        sample, loss = replace(text_sample(i), concept="one"), SampleLoss(nats=nats, tokens=tokens, target_bytes=tokens)
        rows.append(heldout._Row(Drawn(sample, Samples([sample])), loss=loss, unigram_nats=5.0 * tokens))
    found = heldout._loss_scores(rows, seed=0)
    assert [found[name] for name in ("loss", "loss_low", "loss_high")] == pytest.approx([27 / 7] * 3)
    assert found["unigram_loss"] == pytest.approx(5.0)


def test_one_weight_for_each_value() -> None:
    with pytest.raises(ValueError, match="one weight per value"):
        bootstrap_interval([1.0, 2.0], weights=[1.0])
